"""The trainable change of one weight: ``TuckerDelta`` holds ``core`` and ``factor_0 .. factor_{N-1}``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flora.initialize import initialize
from flora.tucker import Tucker


class TuckerDelta(nn.Module):
    """A trainable Tucker form, ``delta = scale * core x1 factor_0 ... xN factor_{N-1}``.

    Called with a weight it returns ``weight + delta``, so it also works without PEFT, as a torch parametrization.

    Args:
        shape: ``(I1, ..., IN)`` of the weight.
        ranks: ``(J1, ..., JN)``; a rank equal to its size keeps that mode whole (no ``factor_n``).
        scale: the constant ``s`` of the paper.
        init: a key of ``flora.INITIALIZERS``.
        init_weights: False starts from a random, non-zero core.
        device, dtype: of the parameters.

    Example:
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
        init: str = "orthogonal",
        init_weights: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.core = nn.Parameter(torch.empty(*ranks, device=device, dtype=dtype))
        self._factor_names = tuple(
            None if rank == size else f"factor_{mode}"
            for mode, (size, rank) in enumerate(zip(shape, ranks, strict=True))
        )
        for name, size, rank in zip(self._factor_names, shape, ranks, strict=True):
            if name is not None:
                self.register_parameter(name, nn.Parameter(torch.empty(size, rank, device=device, dtype=dtype)))
        factors = [factor for factor in self.form.factors if factor is not None]
        initialize(self.core, factors, init, identity=init_weights)

    @property
    def form(self) -> Tucker:
        """The Tucker form without the scale; its tensors are the live parameters."""
        return Tucker(self.core, tuple(None if name is None else getattr(self, name) for name in self._factor_names))

    def dense(self) -> Tensor:
        """``scale * form.to_dense()``, shape ``(I1, ..., IN)``."""
        return self.scale * self.form.to_dense()

    def forward(self, weight: Tensor) -> Tensor:
        """``weight + delta``, in the dtype of ``weight``."""
        return weight + self.dense().to(weight.dtype)

    def extra_repr(self) -> str:
        form = self.form
        return f"shape={form.shape}, ranks={form.ranks}, scale={self.scale:g}, params={form.num_params:,}"
