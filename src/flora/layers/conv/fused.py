"""The fused function of convolutions, straight and transposed, of one group; ``fused`` says what it is about."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flora.layers import plain as kernels
from flora.layers.conv.channels import add_projected, on_cpu, outer, project
from flora.layers.conv.pointwise import Geometry, pointwise
from flora.layers.gate import again, sums_weights, without_autocast
from flora.tucker.form import Tucker, mode_product

aten = torch.ops.aten


def conv(base: Any, weight: Tensor, bias: Tensor | None, form: Tucker, scale: float, x: Tensor) -> Tensor:
    """The layer with ``weight + scale * form``, for Conv1d to Conv3d with one group. x: (batch, in, *spatial)."""
    out, inner = form.factors[:2]
    padding = base.padding
    sides = base._reversed_padding_repeated_twice
    if base.padding_mode == "zeros" and isinstance(padding, str) and sides[::2] == sides[1::2]:
        padding = tuple(sides[::2][::-1])
    if base.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if base.padding_mode == "zeros" else base.padding_mode
        x, padding = F.pad(x, sides, mode=mode), (0,) * len(base.kernel_size)
    geometry = (base.stride, padding, base.dilation, False, (0,) * len(base.kernel_size), 1)
    return _conv(x, weight, bias, form, scale, inner, out, geometry)


def conv_transpose(
    base: Any,
    weight: Tensor,
    bias: Tensor | None,
    form: Tucker,
    scale: float,
    x: Tensor,
    output_size: list[int] | None = None,
) -> Tensor:
    """The same for ConvTranspose1d to ConvTranspose3d, whose weight and form are (in, out, *kernel)."""
    inner, out = form.factors[:2]
    extra = kernels.output_padding(base, x, output_size)
    geometry = (base.stride, base.padding, base.dilation, True, extra, 1)
    return _conv(x, weight, bias, form, scale, inner, out, geometry)


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    form: Tucker,
    scale: float,
    inner: Tensor | None,
    out: Tensor | None,
    geometry: Geometry,
) -> Tensor:
    stride, padding, dilation, transposed, extra = geometry[:5]
    size = weight.shape[2:]
    apart = transposed and tuple(stride) == size and {*dilation} == {1} and not any((*padding, *extra))
    if apart and sums_weights(x, weight):
        core = kernels.spatial_core(form, scale)
        up = (core if out is None else mode_product(core, out, 1)).flatten(1).T  # (O * K, Ji)
        down, wide = (up, None) if inner is None else (inner.T, up)
        return pointwise(x, weight, bias, down, wide, geometry)
    if size.numel() == 1 and not transposed and not any(padding):
        core = form.scaled(scale).core.flatten(1)
        return pointwise(x, weight, bias, core if inner is None else core @ inner.T, out, geometry)
    core, kernel = form.scaled(scale).core, kernels.kernel_factor(form)
    y: Tensor = _Conv.apply(x, weight, bias, core, kernel, inner, out, geometry)  # type: ignore[no-untyped-call]
    return y


class _Conv(torch.autograd.Function):
    """Beside the layer: down to few channels, a convolution of the layer's own geometry there, and up again.

    Shapes: x (B, I, *S), core (Jo, Ji, *R) or transposed (Ji, Jo, *R), kernel (prod(K), prod(R)) or None where R = K,
    inner (I, Ji), out (O, Jo) -> (B, O, *S').
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        core: Tensor,
        kernel: Tensor | None,
        inner: Tensor | None,
        out: Tensor | None,
        geometry: Geometry,
    ) -> Tensor:
        ctx.geometry, ctx.whole = geometry, sums_weights(x, weight)
        spatial = _spatial(core, kernel, weight)
        small = hidden = None
        low_inner, low_out = (None if factor is None else factor.to(x.dtype) for factor in (inner, out))
        if ctx.whole:
            y: Tensor = aten.convolution(x, _stand_in(weight, spatial, inner, out, geometry), bias, *geometry)
        else:
            y = aten.convolution(x, weight, bias, *geometry)
            small = None if low_inner is None else project(low_inner, x)
            hidden = aten.convolution(x if small is None else small, spatial, None, *geometry)
            if low_out is None:
                y += hidden
            else:
                add_projected(y, low_out, hidden)
        made = (None,) * 5 if on_cpu(x) else (spatial, small, None if out is None else hidden, low_inner, low_out)
        ctx.save_for_backward(x, weight, bias, core, kernel, inner, out, *made)
        return y

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, bias, core, kernel, inner, out, *made = ctx.saved_tensors
        spatial, small, hidden, low_inner, low_out = made
        geometry, whole, wants_x = ctx.geometry, ctx.whole, ctx.needs_input_grad[0]
        if torch.is_grad_enabled():
            return again(ctx, _plain_conv, (x, weight, bias, core, kernel, inner, out), (geometry,), grad)
        spatial = _spatial(core, kernel, weight) if spatial is None else spatial
        if small is None:
            small = x if inner is None else project(inner, x)
        grad_out, back = None, grad
        if out is not None:
            hidden = aten.convolution(small, spatial, None, *geometry) if hidden is None else hidden
            grad_out = outer(grad, hidden, out.dtype)
            back = project(out if low_out is None else low_out, grad)
        mask = [inner is not None or (wants_x and not whole), True, False]
        grad_small, grad_spatial, _ = aten.convolution_backward(back, small, spatial, None, *geometry, mask)
        grad_core, grad_kernel = _unfold_kernel(grad_spatial.to(core.dtype), core, kernel)
        grad_inner = None if inner is None else outer(x, grad_small, inner.dtype)
        grad_x = None
        if wants_x:
            used = _stand_in(weight, spatial, inner, out, geometry) if whole else weight
            grad_x = aten.convolution_backward(grad, x, used, None, *geometry, [True, False, False])[0]
            if inner is None and not whole:
                grad_x += grad_small
            elif inner is not None and not whole:
                add_projected(grad_x, inner if low_inner is None else low_inner, grad_small)
        grad_bias = grad.sum([dim for dim in range(grad.ndim) if dim != 1]) if ctx.needs_input_grad[2] else None
        return grad_x, None, grad_bias, grad_core, grad_kernel, grad_inner, grad_out, None


def _spatial(core: Tensor, kernel: Tensor | None, weight: Tensor) -> Tensor:
    """The core over the whole kernel, in the dtype of the weight: (J1, J2, *K)."""
    return (core if kernel is None else kernels.apply_kernel(core, kernel, weight.shape[2:])).to(weight.dtype)


def _unfold_kernel(grad: Tensor, core: Tensor, kernel: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The gradients of core and kernel from that of the core over the whole kernel."""
    if kernel is None:
        return grad, None
    rows = grad.reshape(-1, len(kernel))
    return (rows @ kernel).view(core.shape), rows.T @ core.reshape(len(rows), -1)


def _stand_in(weight: Tensor, core: Tensor, inner: Tensor | None, out: Tensor | None, geometry: Geometry) -> Tensor:
    """W + dW by one product into a copy of W."""
    first, second = (inner, out) if geometry[3] else (out, inner)
    part = core if second is None else mode_product(core, second, 1)
    if first is None:
        return weight + part
    return torch.addmm(weight.flatten(1), first, part.flatten(1)).view(weight.shape)


def _plain_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    core: Tensor,
    kernel: Tensor | None,
    inner: Tensor | None,
    out: Tensor | None,
    geometry: Geometry,
) -> Tensor:
    small = x if inner is None else torch.einsum("bi...,ij->bj...", x, inner.to(x.dtype))
    hidden = aten.convolution(small, _spatial(core, kernel, weight), None, *geometry)
    change = hidden if out is None else torch.einsum("bj...,oj->bo...", hidden, out.to(x.dtype))
    return aten.convolution(x, weight, bias, *geometry) + change  # type: ignore[no-any-return]
