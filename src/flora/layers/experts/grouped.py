"""The fused function of a grouped product over a stack of expert matrices; ``fused`` says what it is about."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flora.layers import device
from flora.layers.gate import again, without_autocast

Run = Callable[..., Tensor]  # torch's grouped product


def grouped(
    weight: Tensor, left: Tensor | None, middle: Tensor, right: Tensor | None, x: Tensor, offs: Tensor, run: Run
) -> Tensor:
    """``run(x, weight + left @ middle @ right.T, offs=offs)``; shapes as of ``_Grouped``.

    Args:
        weight: frozen.
        left: the factor of the inputs that all experts share, None for the identity.
        middle: a small matrix for each expert.
        right: the factor of the outputs, as left.
        x: rows sorted by expert.
        offs: (E,), where each expert's rows end.
        run: the grouped product.
    """
    y: Tensor = _Grouped.apply(x, weight, left, middle, right, offs, run)  # type: ignore[no-untyped-call]
    return y


def one_by_one(rows: Tensor, matrices: Tensor, offs: Tensor) -> Tensor:
    """Each row by the matrix of its expert: (S, p), (E, p, q) -> (S, q).

    Rows past the last end, which nothing reads, get the last expert's.
    """
    return torch.bmm(rows.unsqueeze(1), matrices[_expert_of(rows, offs, matrices)]).squeeze(1)


class _Grouped(torch.autograd.Function):
    """Shapes: x (S, m), weight (E, m, n), left (m, p) or None, middle (E, p, q), right (n, q) or None -> (S, n)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        left: Tensor | None,
        middle: Tensor,
        right: Tensor | None,
        offs: Tensor,
        run: Run,
    ) -> Tensor:
        ctx.run = run
        y = run(x, weight, offs=offs)

        small = device.project(x, left.to(x.dtype)) if left is not None else x

        hidden = _each(small, middle.to(x.dtype), offs)

        if right is None:
            y += hidden
        else:
            y.addmm_(hidden, right.to(x.dtype).t())

        kept = (None if left is None else small, None if right is None else hidden)
        ctx.save_for_backward(x, weight, left, middle, right, offs, *kept)

        return y

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, left, middle, right, offs, small, hidden = ctx.saved_tensors

        if torch.is_grad_enabled():
            return again(ctx, _plain_grouped, (x, weight, left, middle, right), (offs, ctx.run), grad)

        grad, run = grad.contiguous(), ctx.run

        back = grad if right is None else device.project(grad, right.to(x.dtype))

        grad_small = _each(back, middle.to(x.dtype).mT, offs)
        grad_middle = _sums(x if small is None else small, back, middle, offs)

        if left is None:
            grad_left = None
        else:
            grad_left = device.outer(x, grad_small, left.dtype).to(left.dtype)

        if right is None:
            grad_right = None
        else:
            grad_right = device.outer(grad, hidden, right.dtype).to(right.dtype)

        grad_x = None

        if ctx.needs_input_grad[0]:
            grad_x = run(grad, weight.mT, offs=offs)

            if left is None:
                grad_x += grad_small
            else:
                grad_x.addmm_(grad_small, left.to(x.dtype).t())

        return grad_x, None, grad_left, grad_middle, grad_right, None, None


def _each(rows: Tensor, matrices: Tensor, offs: Tensor) -> Tensor:
    """What ``one_by_one`` returns."""
    sizes = _sizes(rows, offs)
    if sizes is None:
        return one_by_one(rows, matrices, offs)
    return torch.cat([torch.mm(own, matrix) for own, matrix in zip(rows.split(sizes), matrices, strict=True)])


def _sums(left: Tensor, right: Tensor, like: Tensor, offs: Tensor) -> Tensor:
    """For each expert the product ``left.T @ right`` of its rows: (S, p), (S, q) -> (E, p, q) in the dtype of like."""
    sizes = _sizes(left, offs)
    if sizes is None:
        pairs = torch.bmm(left.unsqueeze(2), right.unsqueeze(1)).to(like.dtype)
        return torch.zeros_like(like).index_put_((_expert_of(left, offs, like),), pairs, accumulate=True)
    pieces = zip(left.to(like.dtype).split(sizes), right.to(like.dtype).split(sizes), strict=True)
    return torch.stack([torch.mm(own.t(), other) for own, other in pieces])


def _expert_of(rows: Tensor, offs: Tensor, matrices: Tensor) -> Tensor:
    places = torch.arange(len(rows), device=offs.device, dtype=offs.dtype)
    return torch.searchsorted(offs, places, right=True).clamp(max=len(matrices) - 1)


def _sizes(rows: Tensor, offs: Tensor) -> list[int] | None:
    """How many rows each expert has, on a CPU and where a product for each pays; None elsewhere."""
    if not device.counts_rows(rows) or len(rows) < device.LEAST_ROWS * len(offs) or int(offs[-1]) != len(rows):
        return None
    return offs.diff(prepend=offs.new_zeros(1)).tolist()


def _plain_grouped(
    x: Tensor, weight: Tensor, left: Tensor | None, middle: Tensor, right: Tensor | None, offs: Tensor, run: Run
) -> Tensor:
    small = x @ left.to(x.dtype) if left is not None else x
    hidden = one_by_one(small, middle.to(x.dtype), offs)
    return run(x, weight, offs=offs) + (hidden if right is None else hidden @ right.to(x.dtype).T)
