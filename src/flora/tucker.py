"""What a Tucker update is: a small core with as many dimensions as the weight, one factor matrix per mode.

Words and orientation are the literature's (Kolda and Bader 2009): ``core`` is ``(J1, ..., JN)``, ``factors[n]`` is
``(In, Jn)``, the tensor is ``core x1 factors[0] ... xN factors[N-1]`` of shape ``(I1, ..., IN)``. A mode kept whole has no
factor (``None``), and its rank is its size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def mode_product(tensor: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """The mode-``mode`` product: contracts that dimension of ``tensor`` with the columns of ``matrix``.

    Args:
        tensor: shape ``(..., Jn, ...)`` with ``Jn`` at dimension ``mode``.
        matrix: shape ``(In, Jn)``.

    Returns:
        The tensor with ``In`` in place of ``Jn``.
    """
    return torch.tensordot(tensor, matrix, dims=([mode], [1])).movedim(-1, mode)


def count_params(shape: Sequence[int], ranks: Sequence[int]) -> int:
    """Parameters of a Tucker form: ``prod(Jn) + sum(In * Jn)`` over the modes that have a factor (Jn < In)."""
    return math.prod(ranks) + sum(size * rank for size, rank in zip(shape, ranks, strict=True) if rank != size)


@dataclass(frozen=True, eq=False)
class Tucker:
    """A tensor in Tucker form (paper, section 3: ``dW = G x1 A1 ... xN AN``).

    Args:
        core: shape ``(J1, ..., JN)``.
        factors: ``N`` matrices ``(In, Jn)``; ``None`` where the mode is kept whole (then ``In = Jn``).

    Raises:
        ValueError: if the factors do not fit the core.

    Example:
        >>> form = Tucker(torch.ones(2, 3), (torch.ones(5, 2), None))
        >>> form.shape, form.ranks, form.num_params
        ((5, 3), (2, 3), 16)
        >>> form.to_dense().shape
        torch.Size([5, 3])
    """

    core: Tensor
    factors: tuple[Tensor | None, ...]

    def __post_init__(self) -> None:
        if len(self.factors) != self.core.ndim:
            raise ValueError(
                f"a core of {self.core.ndim} dimensions {tuple(self.core.shape)} needs {self.core.ndim} factors, "
                f"got {len(self.factors)}; pass None for a mode that is kept whole"
            )
        for mode, (rank, factor) in enumerate(zip(self.core.shape, self.factors, strict=True)):
            if factor is not None and (factor.ndim != 2 or factor.shape[1] != rank):
                raise ValueError(
                    f"factor {mode} has shape {tuple(factor.shape)}, expected (size, {rank}) to fit the core "
                    f"{tuple(self.core.shape)}"
                )

    @property
    def shape(self) -> tuple[int, ...]:
        """``(I1, ..., IN)``, the shape of the dense tensor."""
        return tuple(
            rank if factor is None else factor.shape[0]
            for rank, factor in zip(self.core.shape, self.factors, strict=True)
        )

    @property
    def ranks(self) -> tuple[int, ...]:
        """``(J1, ..., JN)``, the shape of the core."""
        return tuple(self.core.shape)

    @property
    def num_params(self) -> int:
        """Numbers stored in core and factors."""
        return self.core.numel() + sum(factor.numel() for factor in self.factors if factor is not None)

    def to_dense(self) -> Tensor:
        """The dense tensor ``(I1, ..., IN)``; modes are applied in the order that keeps the intermediates small."""
        dense = self.core
        growth = sorted((f.shape[0] / f.shape[1], mode) for mode, f in enumerate(self.factors) if f is not None)
        for _, mode in growth:
            factor = self.factors[mode]
            if factor is not None:
                dense = mode_product(dense, factor, mode)
        return dense.contiguous()
