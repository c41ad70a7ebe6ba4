"""Triton kernels for a CUDA device: each does in one launch what torch needs several for.

Triton comes with torch's builds for CUDA. Nothing here is imported without it; ``layers/device.py`` registers these
functions and has the same in plain operations of torch.
"""

# ruff: noqa: N803
# mypy: disable-error-code="import-not-found,import-untyped,untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_RANK = 32, 128, 16
BLOCK = 1024


@triton.jit
def _add_rounded_kernel(  # type: ignore[no-untyped-def]
    weight, factor, rows, out, height, width, rank, scale,
    weight_row, weight_column, factor_row, factor_column, rows_row, rows_column,
    DROPPED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < height)[:, None] & (column < width)[None, :]

    change = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, rank, RANK):
        part = start + tl.arange(0, RANK)
        left_inside = (row < height)[:, None] & (part < rank)[None, :]
        right_inside = (part < rank)[:, None] & (column < width)[None, :]
        left = tl.load(factor + row[:, None] * factor_row + part[None, :] * factor_column, mask=left_inside, other=0.0)
        right = tl.load(rows + column[None, :] * rows_row + part[:, None] * rows_column, mask=right_inside, other=0.0)
        change += tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="ieee")

    place = row.to(tl.int64)[:, None] * width + column[None, :]
    stored = row.to(tl.int64)[:, None] * weight_row + column.to(tl.int64)[None, :] * weight_column
    total = tl.load(weight + stored, mask=inside, other=0.0).to(tl.float32) + scale * change

    # The same pattern as ``device.rounded``.
    mixed = ((place & 0xFFFF).to(tl.int32) * 0x9E3B) & 0xFFFF
    mixed = ((mixed ^ (mixed >> 7)) * 0x85EB) & 0xFFFF
    noise = (mixed ^ (mixed >> 8)) >> (16 - DROPPED)
    bits = ((total.to(tl.int32, bitcast=True) + noise) >> DROPPED) << DROPPED
    tl.store(out + place, bits.to(tl.float32, bitcast=True).to(out.dtype.element_ty), mask=inside)


def add_rounded(weight: Tensor, factor: Tensor, rows: Tensor, scale: float) -> Tensor:
    """``weight + scale * factor @ rows.T``, rounded without bias; see ``device.add_update``."""
    height, width = weight.shape
    out = torch.empty(height, width, dtype=weight.dtype, device=weight.device)
    grid = (triton.cdiv(height, BLOCK_ROWS), triton.cdiv(width, BLOCK_COLUMNS))

    if weight.dtype == torch.bfloat16:
        dropped = 16
    else:
        dropped = 13

    _add_rounded_kernel[grid](
        weight, factor, rows, out, height, width, factor.shape[1], scale,
        *weight.stride(), *factor.stride(), *rows.stride(),
        DROPPED=dropped, ROWS=BLOCK_ROWS, COLUMNS=BLOCK_COLUMNS, RANK=BLOCK_RANK,
    )  # fmt: skip

    return out


@triton.jit
def _places(entry, k2, k3, r1, r2, r3):  # type: ignore[no-untyped-def]
    """The six indices of an entry of the Kronecker product, (k1 k2 k3, r1 r2 r3)."""
    columns = r1 * r2 * r3
    row, column = entry // columns, entry % columns
    return row // (k2 * k3), row // k3 % k2, row % k3, column // (r2 * r3), column // r3 % r2, column % r3


@triton.jit
def _kronecker_kernel(  # type: ignore[no-untyped-def]
    first, second, third, out, numel, k2, k3, r1, r2, r3, HAS_THIRD: tl.constexpr, BLOCK: tl.constexpr
):
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < numel
    i1, i2, i3, j1, j2, j3 = _places(entry, k2, k3, r1, r2, r3)
    value = tl.load(first + i1 * r1 + j1, mask=inside)
    value *= tl.load(second + i2 * r2 + j2, mask=inside)

    if HAS_THIRD:
        value *= tl.load(third + i3 * r3 + j3, mask=inside)

    tl.store(out + entry, value, mask=inside)


@triton.jit
def _kronecker_gradients_kernel(  # type: ignore[no-untyped-def]
    grad, first, second, third, out, numel, k1, k2, k3, r1, r2, r3, HAS_THIRD: tl.constexpr, BLOCK: tl.constexpr
):
    # One program per entry of the three matrices: it sums what that entry has a part in.
    wanted = tl.program_id(0)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, numel, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        inside = entry < numel
        i1, i2, i3, j1, j2, j3 = _places(entry, k2, k3, r1, r2, r3)
        value = tl.load(grad + entry, mask=inside, other=0.0).to(tl.float32)
        a = tl.load(first + i1 * r1 + j1, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(second + i2 * r2 + j2, mask=inside, other=0.0).to(tl.float32)
        value_c = value

        if HAS_THIRD:
            c = tl.load(third + i3 * r3 + j3, mask=inside, other=0.0).to(tl.float32)
            value_c = value * c

        of_first = wanted == i1 * r1 + j1
        of_second = wanted == k1 * r1 + i2 * r2 + j2
        total += tl.where(of_first, value_c * b, 0.0) + tl.where(of_second, value_c * a, 0.0)

        if HAS_THIRD:
            of_third = wanted == k1 * r1 + k2 * r2 + i3 * r3 + j3
            total += tl.where(of_third, value * a * b, 0.0)

    tl.store(out + wanted, tl.sum(total))


def kronecker(first: Tensor, second: Tensor, third: Tensor | None = None) -> Tensor:
    """The Kronecker product of two or three contiguous matrices."""
    (k1, r1), (k2, r2), (k3, r3) = first.shape, second.shape, (1, 1) if third is None else third.shape
    out = first.new_empty(k1 * k2 * k3, r1 * r2 * r3)
    grid = (triton.cdiv(out.numel(), BLOCK),)
    _kronecker_kernel[grid](
        first, second, third, out, out.numel(), k2, k3, r1, r2, r3, HAS_THIRD=third is not None, BLOCK=BLOCK
    )

    return out


def kronecker_gradients(grad: Tensor, first: Tensor, second: Tensor, third: Tensor | None = None) -> Tensor:
    """The gradients of those matrices, flat and one after the other."""
    (k1, r1), (k2, r2), (k3, r3) = first.shape, second.shape, (1, 1) if third is None else third.shape
    out = first.new_empty(k1 * r1 + k2 * r2 + (0 if third is None else k3 * r3))
    _kronecker_gradients_kernel[(out.numel(),)](
        grad.contiguous(), first, second, third, out, grad.numel(), k1, k2, k3, r1, r2, r3,
        HAS_THIRD=third is not None, BLOCK=BLOCK,
    )  # fmt: skip

    return out
