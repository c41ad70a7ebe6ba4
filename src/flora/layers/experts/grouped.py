"""A grouped product over a stack of expert matrices and its change, in one autograd function.

A grouped product multiplies every row of x by the matrix of its expert. With an adapter the matrix of expert e is

    W'[e] = weight[e] + left @ middle[e] @ right.T        (m, n) = (m, n) + (m, p) (p, q) (q, n)

where all experts share ``left`` and ``right``, and each has a small ``middle`` of its own. So the change needs no stack
of large matrices: all rows go through ``left`` together, then every expert multiplies its own rows by its ``middle``,
and all rows go through ``right`` together, straight into the output of the frozen product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flora.layers import device
from flora.layers.gate import again, without_autocast

Run = Callable[..., Tensor]  # torch's grouped product


def grouped(
    weight: Tensor, left: Tensor | None, middle: Tensor, right: Tensor | None, x: Tensor, ends: Tensor, run: Run
) -> Tensor:
    """``run(x, weight + left @ middle @ right.T, offs=ends)``.

    Args:
        weight: shape (experts, m, n), frozen.
        left: shape (m, p), the factor of the inputs; None for the identity.
        middle: shape (experts, p, q).
        right: shape (n, q), the factor of the outputs; None for the identity.
        x: shape (rows, m), sorted by expert.
        ends: shape (experts,), where each expert's rows end; torch calls it ``offs``.
        run: the grouped product.

    Returns:
        Shape (rows, n).
    """
    y: Tensor = _Grouped.apply(x, weight, left, middle, right, ends, run)  # type: ignore[no-untyped-call]
    return y


def row_by_row(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Each row times the matrix of its expert: (rows, p), (experts, p, q) -> (rows, q).

    Rows past the last end, which nothing reads, get the last expert's.
    """
    own = matrices[_expert_of(rows, ends, matrices)]
    return torch.bmm(rows.unsqueeze(1), own).squeeze(1)


class _Grouped(torch.autograd.Function):
    """Arguments and shapes as of ``grouped``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        left: Tensor | None,
        middle: Tensor,
        right: Tensor | None,
        ends: Tensor,
        run: Run,
    ) -> Tensor:
        ctx.run = run
        y = run(x, weight, offs=ends)

        # shape: (rows, p), then (rows, q)
        narrow_in = x if left is None else device.project(x, left.to(x.dtype))
        narrow_out = _by_expert(narrow_in, middle.to(x.dtype), ends)

        # The change is added into the output of the frozen product, which no one else has seen yet.
        if right is None:
            y += narrow_out
        else:
            y.addmm_(narrow_out, right.to(x.dtype).t())

        # Where a factor is the identity, the narrow tensor is x or the output itself and need not be kept twice.
        kept = (None if left is None else narrow_in, None if right is None else narrow_out)
        ctx.save_for_backward(x, weight, left, middle, right, ends, *kept)

        return y

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, left, middle, right, ends, narrow_in, narrow_out = ctx.saved_tensors

        if torch.is_grad_enabled():
            return again(ctx, _plain_grouped, (x, weight, left, middle, right), (ends, ctx.run), grad)

        # The forward's chain  x -> left -> middle -> right -> y  is walked from its end, each step with the transposed
        # matrix; the gradient of a matrix is the product of what went into it and what came back out of it.
        grad = grad.contiguous()
        grad_narrow_out = grad if right is None else device.project(grad, right.to(x.dtype))
        grad_narrow_in = _by_expert(grad_narrow_out, middle.to(x.dtype).mT, ends)
        grad_middle = _outer_by_expert(x if narrow_in is None else narrow_in, grad_narrow_out, middle, ends)
        grad_left = grad_right = grad_x = None

        if left is not None:
            grad_left = device.outer(x, grad_narrow_in, left.dtype).to(left.dtype)
        if right is not None:
            grad_right = device.outer(grad, narrow_out, right.dtype).to(right.dtype)

        # The gradient of x has two sources, the frozen product and the change; the second is added into the first.
        if ctx.needs_input_grad[0]:
            grad_x = ctx.run(grad, weight.mT, offs=ends)

            if left is None:
                grad_x += grad_narrow_in
            else:
                grad_x.addmm_(grad_narrow_in, left.to(x.dtype).t())

        return grad_x, None, grad_left, grad_middle, grad_right, None, None


def _by_expert(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """What ``row_by_row`` returns, by one product for each expert where that is faster."""
    counts = _rows_per_expert(rows, ends)
    if counts is None:
        return row_by_row(rows, matrices, ends)
    return torch.cat([torch.mm(own, matrix) for own, matrix in zip(rows.split(counts), matrices, strict=True)])


def _outer_by_expert(left: Tensor, right: Tensor, like: Tensor, ends: Tensor) -> Tensor:
    """For each expert ``left.T @ right`` of its rows: (rows, p), (rows, q) -> (experts, p, q), in the dtype of like."""
    counts = _rows_per_expert(left, ends)

    # Without counts: the outer product of every single row, added up under the number of its expert.
    if counts is None:
        pairs = torch.bmm(left.unsqueeze(2), right.unsqueeze(1)).to(like.dtype)
        return torch.zeros_like(like).index_put_((_expert_of(left, ends, like),), pairs, accumulate=True)

    pieces = zip(left.to(like.dtype).split(counts), right.to(like.dtype).split(counts), strict=True)
    return torch.stack([torch.mm(own.t(), other) for own, other in pieces])


def _expert_of(rows: Tensor, ends: Tensor, matrices: Tensor) -> Tensor:
    """The expert of each row, the first whose end lies beyond it, (rows,)."""
    places = torch.arange(len(rows), device=ends.device, dtype=ends.dtype)
    return torch.searchsorted(ends, places, right=True).clamp(max=len(matrices) - 1)


def _rows_per_expert(rows: Tensor, ends: Tensor) -> list[int] | None:
    """How many rows each expert has; None where a product for each expert does not pay, or rows belong to none."""
    if not device.counts_rows(rows) or len(rows) < device.LEAST_ROWS * len(ends) or int(ends[-1]) != len(rows):
        return None
    return ends.diff(prepend=ends.new_zeros(1)).tolist()


def _plain_grouped(
    x: Tensor, weight: Tensor, left: Tensor | None, middle: Tensor, right: Tensor | None, ends: Tensor, run: Run
) -> Tensor:
    """The same in plain operations, for the gradient of a gradient."""
    narrow_in = x if left is None else x @ left.to(x.dtype)
    narrow_out = row_by_row(narrow_in, middle.to(x.dtype), ends)
    return run(x, weight, offs=ends) + (narrow_out if right is None else narrow_out @ right.to(x.dtype).T)
