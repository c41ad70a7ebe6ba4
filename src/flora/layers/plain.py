"""The factored way through a layer: the change of its output, without ever forming the dense update.

Each function takes the layer, the Tucker form of its weight (in the order of ``weight.shape``), the scale and the
arguments of the layer's forward, and returns ``op(x, scale * form)`` where ``op`` is what the layer does with a weight.
The small matrices are folded in the dtype of the adapter and cast to the dtype of the input, so the input is never
copied to another dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flora.tucker.form import Tucker, kronecker

# The function for each number of kernel dimensions.
CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE: dict[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def fold_matrix(form: Tucker, scale: float) -> tuple[Tensor | None, Tensor]:
    """A 2-D form as ``up @ down``: the core goes into the factor that leaves the smaller inner rank.

    Returns:
        ``up`` of shape (I1, J) or None for the identity, and ``down`` of shape (J, I2), J = min(J1, J2).
    """
    # dW = left @ core @ right.T. The core goes to the side of its larger rank, so that what lies between ``up`` and
    # ``down`` is the smaller one.
    left, right = form.factors
    core = form.scaled(scale).core

    if right is None:
        return left, core
    if core.shape[0] <= core.shape[1]:
        return left, core @ right.T

    return (core if left is None else left @ core), right.T


def linear(base: nn.Module | None, form: Tucker, scale: float, input: Tensor) -> Tensor:
    """``x @ W.T`` for W of (out, in): two skinny products. input: (..., in) -> (..., out)."""
    up, down = fold_matrix(form, scale)
    hidden = F.linear(input, down.to(input.dtype))
    if up is None:
        return hidden
    return F.linear(hidden, up.to(input.dtype))


def linear_transposed(base: nn.Module, form: Tucker, scale: float, x: Tensor) -> Tensor:
    """The same for a weight stored as (in, out), as in GPT-2's Conv1D."""
    first, second = form.factors
    return linear(base, Tucker(form.core.T, (second, first)), scale, x)


def conv(base: Any, form: Tucker, scale: float, input: Tensor) -> Tensor:
    """1x1 down to r_in channels, the small core with the layer's own stride and padding, 1x1 up to the output channels.

    input: (batch, in, *spatial) or unbatched; the form is (out, in / groups, *kernel). Every group shares the factors.
    """
    conv_nd, groups = CONV[form.core.ndim - 2], base.groups
    out, inner = form.factors[:2]
    core = spatial_core(form, scale)
    x: Tensor = input

    if inner is not None:
        x = conv_nd(x, _per_group(_pointwise(inner.T, core), groups).to(x.dtype), groups=groups)

    x = base._conv_forward(x, (core if out is None else _per_group(core, groups)).to(x.dtype), None)

    if out is None:
        return x

    return conv_nd(x, _pointwise(out, core).to(x.dtype), groups=groups)


def conv_transpose(
    base: Any, form: Tucker, scale: float, input: Tensor, output_size: list[int] | None = None
) -> Tensor:
    """The same for a transposed convolution, whose form is (in, out / groups, *kernel)."""
    conv_nd, groups = CONV[form.core.ndim - 2], base.groups
    inner, out = form.factors[:2]
    core = spatial_core(form, scale)
    padding = output_padding(base, input, output_size)
    x = input

    # The inputs of a transposed convolution are the first dimension of its weight, over all groups. So each group has
    # its own rows of the inner factor, and the core is repeated.
    # shape: down (groups * Ji, in / groups)
    if inner is not None:
        size, rank = inner.shape
        down = inner.reshape(groups, size // groups, rank).transpose(1, 2).reshape(groups * rank, size // groups)
        x = conv_nd(x, _pointwise(down, core).to(x.dtype), groups=groups)
        core = _per_group(core, groups)

    run = CONV_TRANSPOSE[core.ndim - 2]
    x = run(x, core.to(x.dtype), None, base.stride, base.padding, padding, groups, base.dilation)

    if out is None:
        return x

    return conv_nd(x, _per_group(_pointwise(out, core), groups).to(x.dtype), groups=groups)


def output_padding(base: Any, input: Tensor, output_size: list[int] | None) -> list[int]:
    """The output padding of a transposed convolution for the output size that was asked for."""
    dims = len(base.kernel_size)
    return base._output_padding(  # type: ignore[no-any-return]
        input, output_size, base.stride, base.padding, base.kernel_size, dims, base.dilation
    )


def spatial_core(form: Tucker, scale: float) -> Tensor:
    """The scaled core with the kernel factors applied: (J1, J2, *kernel)."""
    kernel, core = kernel_factor(form), form.scaled(scale).core
    if kernel is None:
        return core
    return apply_kernel(core, kernel, form.shape[2:])


def kernel_factor(form: Tucker) -> Tensor | None:
    """The factors of the kernel modes as one: (prod(kernel), prod(ranks)), None where all are kept whole."""
    return kronecker(form.factors[2:], form.ranks[2:])


def apply_kernel(core: Tensor, kernel: Tensor, size: Sequence[int]) -> Tensor:
    """A core (J1, J2, *ranks) with the kernel's factor (prod(size), prod(ranks)): (J1, J2, *size)."""
    first, second = core.shape[:2]
    return (core.reshape(first * second, -1) @ kernel.T).view(first, second, *size)


def _pointwise(matrix: Tensor, core: Tensor) -> Tensor:
    """A matrix as the weight of a convolution with kernel size 1."""
    return matrix.reshape(*matrix.shape, *(1,) * (core.ndim - 2))


def _per_group(weight: Tensor, groups: int) -> Tensor:
    """The same small weight for every group, stacked along the first dimension."""
    if groups == 1:
        return weight
    return weight.repeat(groups, *(1,) * (weight.ndim - 1))


def embedding(base: Any, form: Tucker, scale: float, input: Tensor) -> Tensor:
    """Only the rows that are looked up; the padding row gets no gradient. input: ids -> (*ids.shape, dim)."""
    # Looking rows up in the factor of the vocabulary gives (*ids.shape, J) numbers; only these are multiplied by the
    # small matrix. So a token costs J * dim operations, however large the vocabulary is.
    rows, small = _rows(form, scale)
    if rows is None:
        return F.embedding(input, small, base.padding_idx)

    out = torch.matmul(F.embedding(input, rows), small)

    # torch's embedding gives the padding row no gradient. So positions with that id pass none on, neither to the factor
    # nor to the small matrix.
    if base.padding_idx is None or not torch.is_grad_enabled():
        return out

    return torch.where((input == base.padding_idx).unsqueeze(-1), out.detach(), out)


def embedding_bag(
    base: Any,
    form: Tucker,
    scale: float,
    input: Tensor,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
) -> Tensor:
    """The same for bags that are summed or averaged: the bag is taken in the small space. -> (bags, dim)."""
    rows, small = _rows(form, scale)
    bag = F.embedding_bag(
        input,
        small if rows is None else rows,
        offsets,
        mode=base.mode,
        per_sample_weights=None if per_sample_weights is None else per_sample_weights.to(small.dtype),
        include_last_offset=base.include_last_offset,
        padding_idx=base.padding_idx,
    )

    if rows is None:
        return bag

    return bag @ small


def _rows(form: Tucker, scale: float) -> tuple[Tensor | None, Tensor]:
    """The factor of the vocabulary (None: whole) and the small matrix (J_vocab, dim) that follows it."""
    rows, columns = form.factors
    core = form.scaled(scale).core
    return rows, core if columns is None else core @ columns.T


def bilinear(base: nn.Module, form: Tucker, scale: float, input1: Tensor, input2: Tensor) -> Tensor:
    """Both inputs into the small space, the core there, then up. (..., in1), (..., in2) -> (..., out)."""
    out, first, second = form.factors
    x = input1 if first is None else input1 @ first.to(input1.dtype)

    y = input2 if second is None else input2 @ second.to(input2.dtype)

    hidden = F.bilinear(x, y, form.scaled(scale).core.to(x.dtype))

    if out is None:
        return hidden

    return F.linear(hidden, out.to(hidden.dtype))
