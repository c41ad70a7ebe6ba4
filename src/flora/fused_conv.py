"""The fused function of convolutions, straight and transposed, of one group; ``fused`` says what it is about."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flora import kernels
from flora.fused import again, in_plain_eager
from flora.planning import SUM_PAYS_FROM
from flora.tucker import Tucker, mode_product

aten = torch.ops.aten
LARGE_KERNEL = 25  # entries of a depthwise kernel, and
LARGE_MAP = 100  # pixels of its input, from which its gradient is faster on channels-last copies
Geometry = tuple[Any, ...]  # stride, padding, dilation, transposed, output padding, groups


def conv(base: Any, weight: Tensor, bias: Tensor | None, form: Tucker, scale: float, x: Tensor) -> Tensor:
    """The layer with ``weight + scale * form``, for Conv1d to Conv3d with one group. x: (batch, in, *spatial)."""
    out, inner = form.factors[:2]
    padding = base.padding
    if base.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if base.padding_mode == "zeros" else base.padding_mode
        x, padding = F.pad(x, base._reversed_padding_repeated_twice, mode=mode), (0,) * len(base.kernel_size)
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
    stride, padding, _, transposed = geometry[:4]
    if core[0, 0].numel() == 1 and not transposed and not any(padding):
        wide: Tensor = _Pointwise.apply(  # type: ignore[no-untyped-call]
            x,
            weight,
            bias,
            core.flatten(1) if inner is None else core.flatten(1) @ inner.T,
            out,
            tuple(stride),
            geometry,
        )
        return wide
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
        if _sums_weights(x, weight, geometry):
            return aten.convolution(  # type: ignore[no-any-return]
                x, _stand_in(weight, core, inner, out, geometry), bias, *geometry
            )
        y: Tensor = aten.convolution(x, weight, bias, *geometry)
        hidden = _hidden(x if inner is None else _project(inner, x), core, geometry)
        if out is None:
            y += hidden
        else:
            _add_projected(y, out, hidden)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, bias, core, inner, out = ctx.saved_tensors
        geometry = ctx.geometry
        if torch.is_grad_enabled():
            return again(ctx, _plain_conv, (x, weight, bias, core, inner, out), (geometry,), grad)
        small = x if inner is None else _project(inner, x)
        wants_x = ctx.needs_input_grad[0]
        grad_out = None
        back = grad
        if out is not None:
            grad_out = _outer(grad, _hidden(small, core, geometry)).to(out.dtype)
            back = _project(out, grad)
        mask = [inner is not None or (wants_x and not _sums_weights(x, weight, geometry)), True, False]
        grad_small, grad_core, _ = aten.convolution_backward(back, small, core.to(x.dtype), None, *geometry, mask)
        grad_inner = None if inner is None else _outer(x, grad_small).to(inner.dtype)
        grad_x = None
        if wants_x:
            whole = _sums_weights(x, weight, geometry)
            used = _stand_in(weight, core, inner, out, geometry) if whole else weight
            grad_x = aten.convolution_backward(grad, x, used, None, *geometry, [True, False, False])[0]
            if inner is None and not whole:
                grad_x += grad_small
            elif inner is not None and not whole:
                _add_projected(grad_x, inner, grad_small)
        grad_bias = grad.sum([dim for dim in range(grad.ndim) if dim != 1]) if ctx.needs_input_grad[2] else None
        return grad_x, None, grad_bias, grad_core.to(core.dtype), grad_inner, grad_out, None


def _sums_weights(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether to run the layer once with W + dW instead of adding into output and gradient.

    It pays where the activations far outnumber the weights. Not in half precision: the sum would round a small dW away.
    """
    inputs, outputs = weight.shape[:2] if geometry[3] else weight.shape[1::-1]
    activations = x.numel() // inputs * (inputs + outputs)
    return weight.dtype in (torch.float32, torch.float64) and activations > SUM_PAYS_FROM * weight.numel()


def _stand_in(weight: Tensor, core: Tensor, inner: Tensor | None, out: Tensor | None, geometry: Geometry) -> Tensor:
    """W + dW by one product into a copy of W."""
    first, second = (inner, out) if geometry[3] else (out, inner)
    part = core if second is None else mode_product(core, second, 1)
    if first is None:
        return weight + part
    return torch.addmm(weight.flatten(1), first, part.flatten(1)).view(weight.shape)


class _Pointwise(torch.autograd.Function):
    """A kernel of size 1: matrix products on the channels. down (Jo, I), out (O, Jo) or None."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        out: Tensor | None,
        stride: tuple[int, ...],
        geometry: Geometry,
    ) -> Tensor:
        y: Tensor = aten.convolution(x, weight, bias, *geometry)
        seen = x[_steps(stride)]
        if out is None:
            _add_projected(y, down, seen)
        else:
            _add_projected(y, out, _project(down.T, seen))
        ctx.save_for_backward(x, weight, bias, down, out)
        ctx.stride, ctx.geometry = stride, geometry
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, bias, down, out = ctx.saved_tensors
        if torch.is_grad_enabled():
            return again(ctx, _plain_pointwise, (x, weight, bias, down, out), (ctx.stride, ctx.geometry), grad)
        steps = _steps(ctx.stride)
        seen, back, grad_out = x[steps], grad, None
        if out is not None:
            grad_out = _outer(grad, _project(down.T, seen)).to(out.dtype)
            back = _project(out, grad)
        grad_down = _outer(seen, back).T.to(down.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = aten.convolution_backward(grad, x, weight, None, *ctx.geometry, [True, False, False])[0]
            if all(step == 1 for step in ctx.stride):
                _add_projected(grad_x, down.T, back)
            else:
                grad_x[steps] += _project(down, back)
        grad_bias = grad.sum([dim for dim in range(grad.ndim) if dim != 1]) if ctx.needs_input_grad[2] else None
        return grad_x, None, grad_bias, grad_down, grad_out, None, None


def _steps(stride: tuple[int, ...]) -> tuple[slice, ...]:
    """The positions that a kernel of size 1 sees."""
    return (slice(None), slice(None), *(slice(None, None, step) for step in stride))


def _plain_pointwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    out: Tensor | None,
    stride: tuple[int, ...],
    geometry: Geometry,
) -> Tensor:
    hidden = torch.einsum("bi...,ji->bj...", x[_steps(stride)], down.to(x.dtype))
    change = hidden if out is None else torch.einsum("bj...,oj->bo...", hidden, out.to(x.dtype))
    return aten.convolution(x, weight, bias, *geometry) + change  # type: ignore[no-any-return]


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


def _rows(x: Tensor) -> Tensor | None:
    """A channels-last tensor (B, C, *S) as its rows (B * S, C), without a copy; None for other layouts."""
    last = x.movedim(1, -1)
    return last.reshape(-1, x.shape[1]) if last.is_contiguous() and not x.is_contiguous() else None


def _project(matrix: Tensor, x: Tensor) -> Tensor:
    """``matrix.T`` on the channels: matrix (C, J), x (B, C, *S) -> (B, J, *S) in the layout of x."""
    matrix = matrix.to(x.dtype)
    rows = _rows(x)
    if rows is not None:
        flat = rows @ matrix
        return flat.view(x.shape[0], *x.shape[2:], matrix.shape[1]).movedim(-1, 1)
    flat = x.reshape(x.shape[0], x.shape[1], -1)
    transposed = matrix.T.contiguous().expand(x.shape[0], -1, -1)
    return torch.bmm(transposed, flat).view(x.shape[0], matrix.shape[1], *x.shape[2:])


def _add_projected(y: Tensor, matrix: Tensor, hidden: Tensor) -> None:
    """Adds ``matrix`` on the channels of hidden (B, J, *S) into y (B, C, *S), in place; matrix (C, J)."""
    matrix = matrix.to(y.dtype)
    rows = _rows(y)
    if rows is not None:
        rows.addmm_(hidden.movedim(1, -1).reshape(-1, hidden.shape[1]), matrix.T)
        return
    if not y.is_contiguous():
        y += _project(matrix.T, hidden)
        return
    flat = hidden.reshape(*hidden.shape[:2], -1)
    y.view(*y.shape[:2], -1).baddbmm_(matrix.expand(y.shape[0], -1, -1), flat)


def _outer(wide: Tensor, narrow: Tensor) -> Tensor:
    """The sum over batch and positions of ``wide narrow^T``: (B, C, *S), (B, J, *S) -> (C, J)."""
    rows = _rows(wide)
    if rows is not None:
        return (narrow.movedim(1, -1).reshape(-1, narrow.shape[1]).T @ rows).T
    first, second = (part.reshape(*part.shape[:2], -1) for part in (narrow, wide))
    return torch.bmm(first, second.transpose(1, 2)).sum(0).T


def is_slow_depthwise(module: Any, weight: Tensor, x: Tensor) -> bool:
    """Whether torch computes the gradient of this depthwise kernel faster on channels-last copies.

    On a CPU that is so, by a factor of two to three, for large kernels (ConvNeXt's 7x7) on maps that are not tiny.
    """
    depthwise = x.ndim == weight.ndim == 4 and weight.shape[1] == 1 and module.groups == weight.shape[0] > 1
    large = depthwise and weight[0].numel() >= LARGE_KERNEL and x.shape[2] * x.shape[3] >= LARGE_MAP
    plain = large and x.device.type == "cpu" and weight.requires_grad and x.is_contiguous()
    return (
        plain and module.padding_mode == "zeros" and not isinstance(module.padding, str) and in_plain_eager(x, weight)
    )


def depthwise(module: Any, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """A depthwise convolution whose kernel is trained: the gradient of the kernel is taken on channels-last copies."""
    geometry = (module.stride, module.padding, module.dilation, False, (0, 0), module.groups)
    y: Tensor = _Depthwise.apply(x, weight, bias, geometry)  # type: ignore[no-untyped-call]
    return y


class _Depthwise(torch.autograd.Function):
    """Shapes: x (B, C, H, W), weight (C, 1, *K) -> (B, C, H', W')."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.geometry = geometry
        return aten.convolution(x, weight, bias, *geometry)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():
            return again(ctx, aten.convolution, (x, weight, bias), ctx.geometry, grad)
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = aten.convolution_backward(grad, x, weight, None, *ctx.geometry, [True, False, False])[0]
        last = [part.contiguous(memory_format=torch.channels_last) for part in (grad, x)]
        grad_weight = aten.convolution_backward(*last, weight, None, *ctx.geometry, [False, True, False])[1]
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 2, 3))
        return grad_x, grad_weight, grad_bias, None
