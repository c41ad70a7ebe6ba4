"""What a Tucker update is: a small core with as many dimensions as the weight, one factor matrix per mode.

Words and orientation are the literature's (Kolda and Bader 2009): ``core`` is ``(J1, ..., JN)``, ``factors[n]`` is
``(In, Jn)``, the tensor is ``core x1 factors[0] ... xN factors[N-1]`` of shape ``(I1, ..., IN)``. A mode kept whole has
no factor (``None``), and its rank is its size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flora.errors import UserError, WrongTypeError


def mode_product(tensor: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """The mode-``mode`` product: contracts that dimension of ``tensor`` with the columns of ``matrix``.

    Args:
        tensor: shape ``(..., Jn, ...)`` with ``Jn`` at dimension ``mode``.
        matrix: shape ``(In, Jn)``.
        mode: which dimension.

    Returns:
        The tensor with ``In`` in place of ``Jn``.
    """
    # The dimensions before and after the mode are seen as one each, which is a view. Where there is none before, or
    # none after, the product is one of two matrices; otherwise one for each index before.
    before, size, after = math.prod(tensor.shape[:mode]), tensor.shape[mode], math.prod(tensor.shape[mode + 1 :])
    shape = (*tensor.shape[:mode], matrix.shape[0], *tensor.shape[mode + 1 :])

    if before == 1:
        product = matrix @ tensor.reshape(size, after)
    elif after == 1:
        product = tensor.reshape(before, size) @ matrix.T
    else:
        product = torch.bmm(matrix.expand(before, -1, -1), tensor.reshape(before, size, after))

    return product.view(shape)


def kronecker(parts: Sequence[Tensor | None], ranks: Sequence[int]) -> Tensor | None:
    """The Kronecker product of the factors of several modes, which is their factor when they are treated as one.

    Args:
        parts: matrices ``(In, Jn)``, None for the identity.
        ranks: ``Jn`` of each.

    Returns:
        ``(prod(In), prod(Jn))``; None, the identity, where every part is None.
    """
    like = next((part for part in parts if part is not None), None)
    if like is None:
        return None

    matrices = [
        torch.eye(rank, dtype=like.dtype, device=like.device) if part is None else part
        for part, rank in zip(parts, ranks, strict=True)
    ]
    # The outer product of two matrices, with rows beside rows and columns beside columns, is their Kronecker product.
    # torch.kron does the same in many more calls.
    product = matrices[0]
    for matrix in matrices[1:]:
        (rows, columns), (height, width) = product.shape, matrix.shape
        product = product.reshape(rows, 1, columns, 1) * matrix.reshape(1, height, 1, width)
        product = product.view(rows * height, columns * width)

    return product


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

    Examples:
        >>> form = Tucker(torch.ones(2, 3), (torch.ones(5, 2), None))
        >>> form.shape, form.ranks, form.num_params
        ((5, 3), (2, 3), 16)
        >>> form.to_dense().shape
        torch.Size([5, 3])
    """

    core: Tensor
    factors: tuple[Tensor | None, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.core, Tensor):
            raise WrongTypeError(
                f"the core must be a tensor, got a {type(self.core).__name__}; give torch.as_tensor(core)"
            )

        if len(self.factors) != self.core.ndim:
            raise UserError(
                f"a core of {self.core.ndim} dimensions {tuple(self.core.shape)} needs {self.core.ndim} factors, "
                f"got {len(self.factors)}; pass None for a mode that is kept whole"
            )

        for mode, (rank, factor) in enumerate(zip(self.core.shape, self.factors, strict=True)):
            if factor is not None and (factor.ndim != 2 or factor.shape[1] != rank):
                raise UserError(
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

    def scaled(self, scale: float) -> Tucker:
        """``scale`` times the tensor; itself where that is 1."""
        if scale == 1:
            return self
        return Tucker(scale * self.core, self.factors)

    def to_dense(self) -> Tensor:
        """The dense tensor ``(I1, ..., IN)``; the last mode first: the largest product is then one of two matrices."""
        dense = self.core
        for mode, factor in reversed(list(enumerate(self.factors))):
            if factor is not None:
                dense = mode_product(dense, factor, mode)
        return dense.contiguous()


def concatenate(forms: Sequence[Tucker], weights: Sequence[float]) -> Tucker:
    """The weighted sum of Tucker forms as one Tucker form, exact: factors side by side, cores along a block diagonal.

    A mode that is whole in any of them, or whose ranks would add up to its size or more, is kept whole.

    Args:
        forms: of one shape.
        weights: a number for each.

    Raises:
        ValueError: the shapes differ.
    """
    shape = forms[0].shape
    if any(form.shape != shape for form in forms):
        raise UserError(
            f"cannot add Tucker forms of the shapes {[form.shape for form in forms]}; they have to be equal"
        )

    # sum_k w_k G_k x1 A_k ... = G x1 [A_1 A_2 ...] ..., where G has the cores as blocks along its diagonal: block k
    # starts where the columns of form k start in each mode. In a mode that is kept whole there are no columns to be put
    # side by side, so every block spans it, after the form's own factor has been multiplied in; blocks then overlap and
    # add up.
    ranks = [sum(form.ranks[mode] for form in forms) for mode in range(len(shape))]
    whole = [
        ranks[mode] >= size or any(form.factors[mode] is None for form in forms) for mode, size in enumerate(shape)
    ]
    size = [shape[mode] if whole[mode] else ranks[mode] for mode in range(len(shape))]
    core = forms[0].core.new_zeros(size)
    start = [0] * len(shape)
    for form, weight in zip(forms, weights, strict=True):
        part = form.core
        for mode, factor in enumerate(form.factors):
            if whole[mode] and factor is not None:
                part = mode_product(part, factor, mode)

        block = tuple(slice(at, at + length) for at, length in zip(start, part.shape, strict=True))
        core[block] += weight * part
        start = [0 if whole[mode] else at + part.shape[mode] for mode, at in enumerate(start)]

    factors = [
        None if whole[mode] else torch.cat([_factor(form, mode) for form in forms], dim=1) for mode in range(len(shape))
    ]

    return Tucker(core, tuple(factors))


def _factor(form: Tucker, mode: int) -> Tensor:
    """The factor of a mode, the identity written out where there is none. shape: (In, Jn)."""
    factor = form.factors[mode]
    if factor is not None:
        return factor
    return torch.eye(form.ranks[mode], dtype=form.core.dtype, device=form.core.device)
