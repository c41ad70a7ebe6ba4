"""The trainable change of one weight: ``TuckerDelta`` holds ``core`` and ``factor_0 .. factor_{N-1}``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flora.errors import UserError, WrongTypeError
from flora.tucker.fold import Fold, parse_fold
from flora.tucker.form import Tucker
from flora.tucker.initialize import INITIALIZERS, initialize
from flora.tucker.ranks import Role, check_request, check_shape


class TuckerDelta(nn.Module):
    """A trainable Tucker form, ``delta = scale * core x1 factor_0 ... xN factor_{N-1}``.

    Called with a weight it returns ``weight + delta``, so it also works without PEFT, as a torch parametrization.

    Args:
        shape: of the weight as it is stored.
        ranks: ``(J1, ..., JN)``; a rank equal to its size keeps that mode whole (no ``factor_n``).
        scale: the constant ``s`` of the paper.
        fold: how the weight is seen as an N-d tensor, ``"(gates hidden) input, gates=4"``; ranks are then those of the
            folded dimensions.
        init: a key of ``flora.INITIALIZERS``.
        roles: the role of each (folded) dimension, for ``init``; by default the outputs first, then what is summed
            over.
        init_weights: False starts from a random, non-zero core.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: ranks, shape or fold do not fit each other.

    Examples:
        >>> layer = nn.Conv2d(6, 10, 3)
        >>> _ = nn.utils.parametrize.register_parametrization(layer, "weight", TuckerDelta((10, 6, 3, 3), (4, 4, 2, 2)))
        >>> layer(torch.zeros(1, 6, 5, 5)).shape
        torch.Size([1, 10, 3, 3])
    """

    core: nn.Parameter

    def __init__(
        self,
        shape: Sequence[int],
        ranks: Sequence[int],
        *,
        scale: float = 1.0,
        fold: str | Fold | None = None,
        init: str = "zero_first",
        roles: Sequence[Role] | None = None,
        init_weights: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        shape = check_shape(shape)
        check_request(ranks, "ranks")

        if isinstance(scale, bool) or not isinstance(scale, (int, float)):
            raise WrongTypeError(f"scale must be a number, got {scale!r} of type {type(scale).__name__}")
        if not math.isfinite(scale):
            raise UserError(f"scale must be a finite number, got {scale}")
        if init not in INITIALIZERS:
            raise UserError(f"init is {init!r}, expected one of {', '.join(INITIALIZERS)}")

        self.scale = scale
        self.fold: Fold | None

        self.fold = parse_fold(fold, shape) if isinstance(fold, str) else fold

        sizes = tuple(shape) if self.fold is None else self.fold.shape

        if isinstance(ranks, int):
            raise WrongTypeError(
                f"ranks is {ranks}, expected one rank per dimension of {sizes}; FloraConfig(r=...) takes one int"
            )
        if len(ranks) != len(sizes) or any(not 1 <= rank <= size for rank, size in zip(ranks, sizes, strict=True)):
            raise UserError(
                f"ranks {tuple(ranks)} do not fit the shape {sizes}; give one from 1 to the size per dimension"
            )

        # A mode whose rank is its size has no factor: a square one would add parameters and reach nothing new.
        self.core = nn.Parameter(torch.empty(*ranks, device=device, dtype=dtype))
        self._factor_names = tuple(
            None if rank == size else f"factor_{mode}"
            for mode, (size, rank) in enumerate(zip(sizes, ranks, strict=True))
        )

        for name, size, rank in zip(self._factor_names, sizes, ranks, strict=True):
            if name is not None:
                self.register_parameter(name, nn.Parameter(torch.empty(size, rank, device=device, dtype=dtype)))

        initialize(self.core, self.form.factors, init, roles, identity=init_weights)

    @property
    def form(self) -> Tucker:
        """The Tucker form without the scale, over the folded dimensions; its tensors are the live parameters."""
        return Tucker(*self.tensors())

    def tensors(self) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """The core and the factors, unscaled, over the folded dimensions, as they are."""
        stored = self._parameters
        # A wrapper of the whole model keeps them under other names.
        if "core" not in stored:
            return self.core, tuple([None if name is None else getattr(self, name) for name in self._factor_names])
        return stored["core"], tuple([None if name is None else stored[name] for name in self._factor_names])  # type: ignore[return-value]

    @property
    def stored_form(self) -> Tucker:
        """The same tensor as a Tucker form over the dimensions of the stored weight, without the scale."""
        if self.fold is None:
            return self.form
        return self.fold.stored_form(self.form)

    def stored_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shape of the stored weight and the ranks of ``stored_form``, without forming it."""
        core, factors = self.tensors()
        ranks = tuple(core.shape)

        if self.fold is None:
            pairs = zip(ranks, factors, strict=True)
            return tuple([rank if factor is None else factor.shape[0] for rank, factor in pairs]), ranks

        # The folded modes that make one stored dimension have the Kronecker product of their factors as its factor,
        # whose rank is the product of theirs; at or above the dimension's size ``stored_form`` keeps it whole.
        shape = self.fold.stored_shape
        sizes = [math.prod([ranks[axis] for axis in group]) for group in self.fold.groups]

        return shape, tuple([min(size, rank) for size, rank in zip(shape, sizes, strict=True)])

    def dense(self) -> Tensor:
        """``scale * form.to_dense()`` in the shape of the stored weight."""
        dense = self.form.scaled(self.scale).to_dense()
        if self.fold is None:
            return dense
        return dense.reshape(self.fold.stored_shape)

    def forward(self, weight: Tensor) -> Tensor:
        """``weight + delta``, in the dtype of ``weight``."""
        return weight + self.dense().to(weight.dtype)

    def extra_repr(self) -> str:
        """Shape, ranks, scale and parameters."""
        form = self.form
        return f"shape={form.shape}, ranks={form.ranks}, scale={self.scale:g}, params={form.num_params:,}"
