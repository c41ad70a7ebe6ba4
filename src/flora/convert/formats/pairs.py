"""A Tucker form as the product of two narrow parts, up and down, as in LoRA: exact, no SVD, no higher rank.

Which modes stand on which side of the product is the only choice: for a convolution the output channels against all
the rest, for a matrix the two dimensions. The core goes to the side that leaves the smaller inner rank.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flora.tucker.form import Tucker, mode_product


def split(form: Tucker, scale: float) -> tuple[Tensor, Tensor]:
    """``scale * form`` as up (I1, R) and down (R, I2, ..., IN), with R = min(J1, J2 * ... * JN); in float64.

    The scale is on ``up``.
    """
    core, first = form.core.double(), form.factors[0]
    left, others = core.shape[0], math.prod(core.shape[1:])

    # The core goes to the side that leaves the smaller rank between the two; the other side is its factors alone.
    # shape: up (I1, R), down (R, J2, ..., JN)
    if left <= others:
        up = torch.eye(left, dtype=torch.float64) if first is None else first.double()
        down = core
    else:
        up = core.reshape(left, others)
        down = torch.eye(others, dtype=torch.float64).reshape(others, *core.shape[1:])

        if first is not None:
            up = first.double() @ up

    for mode, factor in enumerate(form.factors[1:], start=1):
        if factor is not None:
            down = mode_product(down, factor.double(), mode)

    return scale * up, down


def split_stack(form: Tucker, scale: float) -> tuple[Tensor, Tensor]:
    """A stack (E, O, I) as ups (E, O, R) and downs (E, R, I), R = min(J_out, J_in); in float64."""
    experts, out, inner = form.factors
    core = form.core.double()

    # (E, J_out, J_in)
    if experts is not None:
        core = mode_product(core, experts.double(), 0)

    count, left, right = core.shape

    up = torch.eye(left, dtype=torch.float64) if out is None else out.double()

    down = torch.eye(right, dtype=torch.float64) if inner is None else inner.double().T

    if right <= left:
        return scale * (up @ core), down.expand(count, *down.shape)

    return scale * up.expand(count, *up.shape), core @ down


def join_stack(up: Tensor, down: Tensor) -> Tucker:
    """The inverse of :func:`split_stack`: keeps the side that all experts share as a factor; else the dense stack."""
    if torch.equal(down, down[:1].expand_as(down)):
        return Tucker(up.contiguous(), (None, None, down[0].T.contiguous()))
    if torch.equal(up, up[:1].expand_as(up)):
        return Tucker(down.contiguous(), (None, up[0].contiguous(), None))
    return Tucker((up.double() @ down.double()).to(up.dtype), (None, None, None))


def swap(form: Tucker, first: int, second: int) -> Tucker:
    """The form with two modes exchanged."""
    factors = list(form.factors)
    factors[first], factors[second] = factors[second], factors[first]
    return Tucker(form.core.transpose(first, second), tuple(factors))


def trim(form: Tucker) -> Tucker:
    """The same tensor without the ranks that a zero padding added: zero columns of a factor, with their core slices."""
    core, factors = form.core, list(form.factors)
    for mode, factor in enumerate(form.factors):
        if factor is not None:
            used = (factor != 0).any(0) & (core.movedim(mode, 0).reshape(core.shape[mode], -1) != 0).any(1)
            if not used.any():
                used[0] = True

            if not used.all():
                keep = used.nonzero().squeeze(1)
                core, factors[mode] = core.index_select(mode, keep), factor.index_select(1, keep)

    return Tucker(core, tuple(factors))


def columns(part: Tensor) -> Tensor | None:
    """A matrix that may be stored as a convolution of size 1; None if its kernel is larger.

    shape: (size, R) or (size, R, 1, ...) -> (size, R)
    """
    if part.shape[2:].numel() != 1:
        return None
    return part.reshape(part.shape[:2])


def pad(tensor: Tensor, dim: int, size: int) -> Tensor:
    """Zeros appended along ``dim`` up to ``size``."""
    if tensor.shape[dim] == size:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = size - tensor.shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)
