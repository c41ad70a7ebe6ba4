"""The fused function of convolutions, straight and transposed, of one group; ``fused`` says what it is about."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flora import kernels
from flora.channels import add_projected, outer, project
from flora.fused import again, sums_weights
from flora.fused_pointwise import Geometry, pointwise
from flora.tucker import Tucker, mode_product

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
    return _conv(x, weight, bias, kernels.spatial_core(form, scale), inner, out, geometry)


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
    return _conv(x, weight, bias, kernels.spatial_core(form, scale), inner, out, geometry)


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    core: Tensor,
    inner: Tensor | None,
    out: Tensor | None,
    geometry: Geometry,
) -> Tensor:
    stride, padding, dilation, transposed, extra = geometry[:5]
    apart = transposed and tuple(stride) == weight.shape[2:] and {*dilation} == {1} and not any((*padding, *extra))
    if apart and sums_weights(x, weight):
        up = (core if out is None else mode_product(core, out, 1)).flatten(1).T  # (O * K, Ji)
        down, wide = (up, None) if inner is None else (inner.T, up)
        return pointwise(x, weight, bias, down, wide, geometry)
    if core[0, 0].numel() == 1 and not transposed and not any(padding):
        down = core.flatten(1) if inner is None else core.flatten(1) @ inner.T
        return pointwise(x, weight, bias, down, out, geometry)
    y: Tensor = _Conv.apply(x, weight, bias, core, inner, out, geometry)  # type: ignore[no-untyped-call]
    return y


class _Conv(torch.autograd.Function):
    """Shapes: x (B, I, *S), core (Jo, Ji, *K) or transposed (Ji, Jo, *K), inner (I, Ji), out (O, Jo) -> (B, O, *S')."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        core: Tensor,
        inner: Tensor | None,
        out: Tensor | None,
        geometry: Geometry,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, core, inner, out)
        ctx.geometry = geometry
        if sums_weights(x, weight):
            return aten.convolution(  # type: ignore[no-any-return]
                x, _stand_in(weight, core, inner, out, geometry), bias, *geometry
            )
        y: Tensor = aten.convolution(x, weight, bias, *geometry)
        hidden = _hidden(x if inner is None else project(inner, x), core, geometry)
        if out is None:
            y += hidden
        else:
            add_projected(y, out, hidden)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, bias, core, inner, out = ctx.saved_tensors
        geometry = ctx.geometry
        if torch.is_grad_enabled():
            return again(ctx, _plain_conv, (x, weight, bias, core, inner, out), (geometry,), grad)
        small = x if inner is None else project(inner, x)
        wants_x, whole = ctx.needs_input_grad[0], sums_weights(x, weight)
        grad_out, back = None, grad
        if out is not None:
            grad_out = outer(grad, _hidden(small, core, geometry)).to(out.dtype)
            back = project(out, grad)
        mask = [inner is not None or (wants_x and not whole), True, False]
        grad_small, grad_core, _ = aten.convolution_backward(back, small, core.to(x.dtype), None, *geometry, mask)
        grad_inner = None if inner is None else outer(x, grad_small).to(inner.dtype)
        grad_x = None
        if wants_x:
            used = _stand_in(weight, core, inner, out, geometry) if whole else weight
            grad_x = aten.convolution_backward(grad, x, used, None, *geometry, [True, False, False])[0]
            if inner is None and not whole:
                grad_x += grad_small
            elif inner is not None and not whole:
                add_projected(grad_x, inner, grad_small)
        grad_bias = grad.sum([dim for dim in range(grad.ndim) if dim != 1]) if ctx.needs_input_grad[2] else None
        return grad_x, None, grad_bias, grad_core.to(core.dtype), grad_inner, grad_out, None


def _stand_in(weight: Tensor, core: Tensor, inner: Tensor | None, out: Tensor | None, geometry: Geometry) -> Tensor:
    """W + dW by one product into a copy of W."""
    first, second = (inner, out) if geometry[3] else (out, inner)
    part = core if second is None else mode_product(core, second, 1)
    if first is None:
        return weight + part
    return torch.addmm(weight.flatten(1), first, part.flatten(1)).view(weight.shape)


def _hidden(small: Tensor, core: Tensor, geometry: Geometry) -> Tensor:
    return aten.convolution(small, core.to(small.dtype), None, *geometry)  # type: ignore[no-any-return]


def _plain_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    core: Tensor,
    inner: Tensor | None,
    out: Tensor | None,
    geometry: Geometry,
) -> Tensor:
    small = x if inner is None else torch.einsum("bi...,ij->bj...", x, inner.to(x.dtype))
    hidden = _hidden(small, core, geometry)
    change = hidden if out is None else torch.einsum("bj...,oj->bo...", hidden, out.to(x.dtype))
    return aten.convolution(x, weight, bias, *geometry) + change  # type: ignore[no-any-return]
