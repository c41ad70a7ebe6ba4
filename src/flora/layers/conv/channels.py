"""Products on the channels of activations (batch, channels, *spatial), in whichever memory layout those have."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flora.layers import device


def rows(x: Tensor) -> Tensor | None:
    """A channels-last tensor (B, C, *S) as its rows (B * S, C), without a copy; None for other layouts."""
    if x.is_contiguous():
        return None
    last = x.movedim(1, -1)
    if not last.is_contiguous():
        return None
    return last.reshape(-1, x.shape[1])


def project(matrix: Tensor, x: Tensor) -> Tensor:
    """``matrix.T`` on the channels, channels last: convolutions over few channels are then about twice as fast.

    Args:
        matrix: shape (C, J).
        x: shape (B, C, *S).
    """
    # Three ways to the same numbers, by the memory layout: channels last is one product of all pixels; otherwise a
    # product for each sample, with the pixels as rows, or with the pixels as columns and turned around afterwards.
    # shape: flat (B, pixels, J), or (B * pixels, J)
    matrix = matrix.to(x.dtype)
    lines = rows(x)
    if lines is not None:
        flat = lines @ matrix
    elif device.writes_planes(matrix.shape[1], x):
        planes = torch.bmm(matrix.T.contiguous().expand(x.shape[0], -1, -1), x.flatten(2))
        flat = planes.transpose(1, 2).contiguous()
    else:
        flat = torch.bmm(x.flatten(2).transpose(1, 2), matrix.expand(x.shape[0], -1, -1))

    return flat.view(x.shape[0], *x.shape[2:], matrix.shape[1]).movedim(-1, 1)


def add_projected(y: Tensor, matrix: Tensor, hidden: Tensor) -> None:
    """Adds ``matrix`` on the channels of hidden into y, in place.

    Args:
        y: shape (B, C, *S).
        matrix: shape (C, J).
        hidden: shape (B, J, *S).
    """
    # ``rows`` and ``view`` share the memory of y, so the product is added into y without another pass over it.
    matrix = matrix.to(y.dtype)
    lines = rows(y)
    if lines is not None:
        lines.addmm_(hidden.movedim(1, -1).reshape(-1, hidden.shape[1]), matrix.T)
    elif y.is_contiguous():
        y.view(*y.shape[:2], math.prod(y.shape[2:])).baddbmm_(matrix.expand(y.shape[0], -1, -1), hidden.flatten(2))
    else:
        y += project(matrix.T, hidden)


def outer(wide: Tensor, narrow: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over batch and positions of ``wide narrow^T``, (C, J) in ``dtype``.

    Args:
        wide: shape (B, C, *S).
        narrow: shape (B, J, *S).
        dtype: of the result.
    """
    lines = rows(wide)
    if lines is not None:
        narrow_lines = narrow.movedim(1, -1).reshape(-1, narrow.shape[1])
        return device.product(narrow_lines.t(), lines, dtype).to(dtype).t()
    return torch.bmm(narrow.flatten(2), wide.flatten(2).transpose(1, 2)).sum(0, dtype=dtype).t()


def mix(matrix: Tensor, x: Tensor) -> Tensor:
    """A product on the channels, (B, O, *S) in the layout of x.

    Args:
        matrix: shape (O, I).
        x: shape (B, I, *S).
    """
    lines = rows(x)
    if lines is not None:
        return (lines @ matrix.T).view(x.shape[0], *x.shape[2:], len(matrix)).movedim(-1, 1)
    planes = torch.bmm(matrix.expand(x.shape[0], -1, -1), x.flatten(2))
    return planes.view(x.shape[0], len(matrix), *x.shape[2:])
