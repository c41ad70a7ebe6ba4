"""Products on the channels of activations (batch, channels, *spatial), in whichever layout those have."""

from __future__ import annotations

import torch
from torch import Tensor

SUMS_IN_FLOAT32 = hasattr(torch.ops.aten.mm, "dtype")  # on CUDA, a product in half precision may return them so
NARROW = 16  # channels below which a product writes them faster with the pixels innermost, to be turned afterwards


def on_cpu(x: Tensor) -> bool:
    """Whether caches decide. On a GPU a launch costs more than small matrices and narrow tensors that are kept."""
    return x.device.type == "cpu"


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``left @ right``, in ``dtype`` where the device gives a product in half precision with its sums unrounded."""
    if left.is_cuda and SUMS_IN_FLOAT32 and dtype == torch.float32 != left.dtype:
        return torch.mm(left, right, out_dtype=dtype)  # type: ignore[no-any-return,unused-ignore]
    return torch.mm(left, right)


def rows(x: Tensor) -> Tensor | None:
    """A channels-last tensor (B, C, *S) as its rows (B * S, C), without a copy; None for other layouts."""
    if x.is_contiguous():
        return None
    last = x.movedim(1, -1)
    return last.reshape(-1, x.shape[1]) if last.is_contiguous() else None


def project(matrix: Tensor, x: Tensor) -> Tensor:
    """``matrix.T`` on the channels: matrix (C, J), x (B, C, *S) -> (B, J, *S), channels last.

    Narrow tensors are kept so because convolutions over few channels are then about twice as fast.
    """
    matrix = matrix.to(x.dtype)
    lines = rows(x)
    if lines is not None:
        flat = lines @ matrix
    elif matrix.shape[1] < NARROW and on_cpu(x):
        flat = torch.bmm(matrix.T.contiguous().expand(x.shape[0], -1, -1), x.flatten(2)).transpose(1, 2).contiguous()
    else:
        flat = torch.bmm(x.flatten(2).transpose(1, 2), matrix.expand(x.shape[0], -1, -1))
    return flat.view(x.shape[0], *x.shape[2:], matrix.shape[1]).movedim(-1, 1)


def add_projected(y: Tensor, matrix: Tensor, hidden: Tensor) -> None:
    """Adds ``matrix`` on the channels of hidden (B, J, *S) into y (B, C, *S), in place; matrix (C, J)."""
    matrix = matrix.to(y.dtype)
    lines = rows(y)
    if lines is not None:
        lines.addmm_(hidden.movedim(1, -1).reshape(-1, hidden.shape[1]), matrix.T)
    elif y.is_contiguous():
        y.view(*y.shape[:2], -1).baddbmm_(matrix.expand(y.shape[0], -1, -1), hidden.flatten(2))
    else:
        y += project(matrix.T, hidden)


def outer(wide: Tensor, narrow: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over batch and positions of ``wide narrow^T``: (B, C, *S), (B, J, *S) -> (C, J), in ``dtype``."""
    lines = rows(wide)
    if lines is not None:
        return product(narrow.movedim(1, -1).reshape(-1, narrow.shape[1]).t(), lines, dtype).to(dtype).t()
    return torch.bmm(narrow.flatten(2), wide.flatten(2).transpose(1, 2)).sum(0, dtype=dtype).t()


def mix(matrix: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """A product on the channels: matrix (O, I), x (B, I, *S), bias (O,) -> (B, O, *S) in the layout of x."""
    lines = rows(x)
    if lines is not None:
        flat = lines @ matrix.T if bias is None else torch.addmm(bias, lines, matrix.T)
        return flat.view(x.shape[0], *x.shape[2:], len(matrix)).movedim(-1, 1)
    pair = (matrix.expand(x.shape[0], -1, -1), x.flatten(2))
    y = torch.bmm(*pair) if bias is None else torch.baddbmm(bias.unsqueeze(1), *pair)
    return y.view(x.shape[0], len(matrix), *x.shape[2:])


def channels_last(x: Tensor) -> Tensor:
    """A copy of contiguous x (B, C, *S) with the channels innermost: sample by sample, which torch turns in blocks."""
    lines = x.new_empty(len(x), *x.shape[2:], x.shape[1])
    for target, sample in zip(lines.flatten(1, -2), x.flatten(2), strict=True):
        target.copy_(sample.T)
    return lines.movedim(-1, 1)


def copy_from_last(source: Tensor, target: Tensor) -> None:
    """Copies channels-last source into contiguous target, both (B, C, *S), in the same way."""
    for sample, plane in zip(source.movedim(1, -1).flatten(1, -2), target.flatten(2), strict=True):
        plane.copy_(sample.T)
