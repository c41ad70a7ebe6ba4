"""The factored way through a layer: the change of its output, without ever forming the dense update.

Each function takes the layer, its input, the Tucker form of its weight (in the order of ``weight.shape``) and the scale,
and returns ``op(x, scale * form)`` where ``op`` is what the layer does with a weight. The small matrices are folded in
the dtype of the adapter and cast to the dtype of the input, so the input itself is never copied to another dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flora.tucker import Tucker, mode_product

CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}  # by number of kernel dims


def fold_matrix(form: Tucker, scale: float) -> tuple[Tensor | None, Tensor]:
    """A 2-D form as ``up @ down``: the core goes into the factor that leaves the smaller inner rank.

    Returns:
        ``up`` of shape (I1, J) or None for the identity, and ``down`` of shape (J, I2), J = min(J1, J2).
    """
    left, right = form.factors
    core = scale * form.core
    if right is None:
        return left, core
    if core.shape[0] <= core.shape[1]:
        return left, core @ right.T
    return (core if left is None else left @ core), right.T


def linear(base: nn.Module, x: Tensor, form: Tucker, scale: float) -> Tensor:
    """``x @ W.T`` for W of (out, in): two skinny products. x: (..., in) -> (..., out)."""
    up, down = fold_matrix(form, scale)
    hidden = F.linear(x, down.to(x.dtype))
    return hidden if up is None else F.linear(hidden, up.to(x.dtype))


def linear_transposed(base: nn.Module, x: Tensor, form: Tucker, scale: float) -> Tensor:
    """The same for a weight stored as (in, out), as in GPT-2's Conv1D."""
    first, second = form.factors
    return linear(base, x, Tucker(form.core.T, (second, first)), scale)


def conv(base: Any, x: Tensor, form: Tucker, scale: float) -> Tensor:
    """1x1 down to r_in channels, the small core with the layer's own stride and padding, 1x1 up to the output channels.

    x: (batch, in, *spatial) or unbatched; the form is (out, in / groups, *kernel). Every group shares the factors.
    """
    conv_nd = CONV[form.core.ndim - 2]
    pointwise = (1,) * (form.core.ndim - 2)
    groups = base.groups
    out, inner = form.factors[:2]
    core = scale * form.core
    for mode, factor in enumerate(form.factors[2:], start=2):
        if factor is not None:
            core = mode_product(core, factor, mode)
    if inner is not None:
        down = inner.T.reshape(inner.shape[1], inner.shape[0], *pointwise)
        x = conv_nd(x, _per_group(down, groups).to(x.dtype), groups=groups)
    x = base._conv_forward(x, (core if out is None else _per_group(core, groups)).to(x.dtype), None)
    if out is not None:
        x = conv_nd(x, out.reshape(*out.shape, *pointwise).to(x.dtype), groups=groups)
    return x


def _per_group(weight: Tensor, groups: int) -> Tensor:
    """The same small weight for every group, stacked along the output channels."""
    return weight if groups == 1 else weight.repeat(groups, *(1,) * (weight.ndim - 1))


def embedding(base: nn.Module, ids: Tensor, form: Tucker, scale: float) -> Tensor:
    """Only the rows that are looked up. ids: any shape -> (*ids.shape, dim)."""
    rows, columns = form.factors
    core = scale * form.core
    small = core if columns is None else core @ columns.T  # (J_vocab, dim)
    if rows is None:
        return F.embedding(ids, small)
    return torch.matmul(F.embedding(ids, rows), small)
