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
LARGE_KERNEL = 25  # entries of a depthwise kernel from which torch's own gradient of it is slow
NARROW = 16  # channels below which a product writes them faster with the pixels innermost, to be turned afterwards
Geometry = tuple[Any, ...]  # stride, padding, dilation, transposed, output padding, groups


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
    y: Tensor
    apart = transposed and tuple(stride) == weight.shape[2:] and {*dilation} == {1} and not any((*padding, *extra))
    if apart and _sums_weights(x, weight):
        up = (core if out is None else mode_product(core, out, 1)).flatten(1).T  # (O * K, Ji)
        small = (up, None) if inner is None else (inner.T, up)
        y = _Pointwise.apply(x, weight, bias, *small, geometry)  # type: ignore[no-untyped-call]
    elif core[0, 0].numel() == 1 and not transposed and not any(padding):
        down = core.flatten(1) if inner is None else core.flatten(1) @ inner.T
        y = _Pointwise.apply(x, weight, bias, down, out, geometry)  # type: ignore[no-untyped-call]
    else:
        y = _Conv.apply(x, weight, bias, core, inner, out, geometry)  # type: ignore[no-untyped-call]
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
        if _sums_weights(x, weight):
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
        wants_x, whole = ctx.needs_input_grad[0], _sums_weights(x, weight)
        grad_out, back = None, grad
        if out is not None:
            grad_out = _outer(grad, _hidden(small, core, geometry)).to(out.dtype)
            back = _project(out, grad)
        mask = [inner is not None or (wants_x and not whole), True, False]
        grad_small, grad_core, _ = aten.convolution_backward(back, small, core.to(x.dtype), None, *geometry, mask)
        grad_inner = None if inner is None else _outer(x, grad_small).to(inner.dtype)
        grad_x = None
        if wants_x:
            used = _stand_in(weight, core, inner, out, geometry) if whole else weight
            grad_x = aten.convolution_backward(grad, x, used, None, *geometry, [True, False, False])[0]
            if inner is None and not whole:
                grad_x += grad_small
            elif inner is not None and not whole:
                _add_projected(grad_x, inner, grad_small)
        grad_bias = grad.sum([dim for dim in range(grad.ndim) if dim != 1]) if ctx.needs_input_grad[2] else None
        return grad_x, None, grad_bias, grad_core.to(core.dtype), grad_inner, grad_out, None


def _sums_weights(x: Tensor, weight: Tensor) -> bool:
    """Whether to run the layer once with W + dW instead of adding into output and gradient.

    It pays where the activations outnumber the weights. Not in half precision: the sum would round a small dW away.
    """
    activations = x.numel() // x.shape[1] * sum(weight.shape[:2])
    return weight.dtype in (torch.float32, torch.float64) and activations > SUM_PAYS_FROM * weight.numel()


def _stand_in(weight: Tensor, core: Tensor, inner: Tensor | None, out: Tensor | None, geometry: Geometry) -> Tensor:
    """W + dW by one product into a copy of W."""
    first, second = (inner, out) if geometry[3] else (out, inner)
    part = core if second is None else mode_product(core, second, 1)
    if first is None:
        return weight + part
    return torch.addmm(weight.flatten(1), first, part.flatten(1)).view(weight.shape)


class _Pointwise(torch.autograd.Function):
    """A kernel of size 1, or a transposed one whose patches lie apart: backward takes products on the channels.

    Shapes: weight (O, I, 1 ..) or transposed (I, O, *K), down (J, I), out (O, J) or transposed (O * K, J), or None.
    Of the transposed, the output's gradient is seen with the pixels of a patch as channels.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, out: Tensor | None, geometry: Geometry
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, down, out)
        ctx.geometry = geometry
        if _sums_weights(x, weight):
            matrix = _sum(_matrix(weight, geometry), down, out)
            used = (matrix.T if geometry[3] else matrix).reshape(weight.shape)
            return aten.convolution(x, used, bias, *geometry)  # type: ignore[no-any-return]
        y: Tensor = aten.convolution(x, weight, bias, *geometry)
        seen = x[_steps(geometry)]
        if out is None:
            _add_projected(y, down, seen)
        else:
            _add_projected(y, out, _project(down.T, seen))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, bias, down, out = ctx.saved_tensors
        geometry = ctx.geometry
        if torch.is_grad_enabled():
            return again(ctx, _plain_pointwise, (x, weight, bias, down, out), (geometry,), grad)
        grad_bias = grad.sum([dim for dim in range(grad.ndim) if dim != 1]) if ctx.needs_input_grad[2] else None
        steps, grad_out = _steps(geometry), None
        seen = x[steps].contiguous() if _rows(x) is None else x[steps]
        if geometry[3]:
            grad = _patches(grad, weight.shape[2:])
        back = grad
        if out is not None:
            grad_out = _outer(grad, _project(down.T, seen)).to(out.dtype)
            back = _project(out, grad)
        grad_down = _outer(seen, back).T.to(down.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            matrix, whole = _matrix(weight, geometry), _sums_weights(x, weight)
            grad_x = _mix((_sum(matrix, down, out) if whole else matrix).T, grad)
            if not whole:
                _add_projected(grad_x, down.T, back)
            if grad_x.shape != x.shape:
                part, grad_x = grad_x, torch.zeros_like(x)
                grad_x[steps] = part
        return grad_x, None, grad_bias, grad_down, grad_out, None


def _steps(geometry: Geometry) -> tuple[slice, ...]:
    """The positions that a kernel of size 1 sees."""
    return (slice(None), slice(None), *(slice(None, None, 1 if geometry[3] else step) for step in geometry[0]))


def _matrix(weight: Tensor, geometry: Geometry) -> Tensor:
    """The weight as what a product on the channels takes: (O, I), or transposed (O * K, I)."""
    return weight.flatten(1).T if geometry[3] else weight.flatten(1)


def _sum(matrix: Tensor, down: Tensor, out: Tensor | None) -> Tensor:
    """W + dW by one product into a copy of W."""
    return matrix + down if out is None else torch.addmm(matrix, out, down)


def _patches(grad: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """The pixels of each patch as channels, in the layout of grad: (B, O, *(S * K)) -> (B, O * K, *S)."""
    dims, sizes = len(kernel), [size // step for size, step in zip(grad.shape[2:], kernel, strict=True)]
    split = grad.reshape(*grad.shape[:2], *(part for pair in zip(sizes, kernel, strict=True) for part in pair))
    places, inside = range(2, 2 + 2 * dims, 2), range(3, 3 + 2 * dims, 2)
    if _rows(grad) is not None:
        return split.permute(0, *places, 1, *inside).reshape(len(grad), *sizes, -1).movedim(-1, 1)
    return split.permute(0, 1, *inside, *places).reshape(len(grad), -1, *sizes)


def _mix(matrix: Tensor, x: Tensor) -> Tensor:
    """A product on the channels: matrix (O, I), x (B, I, *S) -> (B, O, *S) in the layout of x."""
    rows = _rows(x)
    if rows is not None:
        return (rows @ matrix.T).view(x.shape[0], *x.shape[2:], len(matrix)).movedim(-1, 1)
    return torch.bmm(matrix.expand(x.shape[0], -1, -1), x.flatten(2)).view(x.shape[0], len(matrix), *x.shape[2:])


def _plain_pointwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, out: Tensor | None, geometry: Geometry
) -> Tensor:
    """The same in plain operations, with dW whole, for the gradient of a gradient."""
    update = (down if out is None else out @ down).to(weight.dtype)
    update = (update.T if geometry[3] else update).reshape(weight.shape)
    return aten.convolution(x, weight, bias, *geometry) + aten.convolution(x, update, None, *geometry)  # type: ignore[no-any-return]


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
    """``matrix.T`` on the channels: matrix (C, J), x (B, C, *S) -> (B, J, *S), channels last.

    Narrow tensors are kept so because convolutions over few channels are then about twice as fast.
    """
    matrix = matrix.to(x.dtype)
    rows = _rows(x)
    if rows is not None:
        flat = rows @ matrix
    elif matrix.shape[1] < NARROW:
        flat = torch.bmm(matrix.T.contiguous().expand(x.shape[0], -1, -1), x.flatten(2)).transpose(1, 2).contiguous()
    else:
        flat = torch.bmm(x.flatten(2).transpose(1, 2), matrix.expand(x.shape[0], -1, -1))
    return flat.view(x.shape[0], *x.shape[2:], matrix.shape[1]).movedim(-1, 1)


def _add_projected(y: Tensor, matrix: Tensor, hidden: Tensor) -> None:
    """Adds ``matrix`` on the channels of hidden (B, J, *S) into y (B, C, *S), in place; matrix (C, J)."""
    matrix = matrix.to(y.dtype)
    rows = _rows(y)
    if rows is not None:
        rows.addmm_(hidden.movedim(1, -1).reshape(-1, hidden.shape[1]), matrix.T)
    elif y.is_contiguous():
        y.view(*y.shape[:2], -1).baddbmm_(matrix.expand(y.shape[0], -1, -1), hidden.flatten(2))
    else:
        y += _project(matrix.T, hidden)


def _outer(wide: Tensor, narrow: Tensor) -> Tensor:
    """The sum over batch and positions of ``wide narrow^T``: (B, C, *S), (B, J, *S) -> (C, J)."""
    rows = _rows(wide)
    if rows is not None:
        return (narrow.movedim(1, -1).reshape(-1, narrow.shape[1]).T @ rows).T
    return torch.bmm(narrow.flatten(2), wide.flatten(2).transpose(1, 2)).sum(0).T


def is_slow_depthwise(module: Any, weight: Tensor, x: Tensor) -> bool:
    """Whether this is a trained depthwise kernel whose gradient torch computes slowly, as ConvNeXt's 7x7 on a CPU."""
    channels = x.shape[1] if x.ndim == weight.ndim >= 4 else 1
    depthwise = channels > 1 and weight.shape[:2] == (channels, 1) and module.groups == channels
    large = depthwise and weight[0].numel() >= LARGE_KERNEL and weight.requires_grad
    plain = large and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
    return (
        plain and module.padding_mode == "zeros" and not isinstance(module.padding, str) and in_plain_eager(x, weight)
    )


def depthwise(module: Any, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """A depthwise convolution whose kernel is trained.

    The gradient of the kernel is a depthwise convolution too: of each channel of each sample by its own output's
    gradient, with stride and dilation exchanged. On a CPU torch's own way takes about ten times as long.
    """
    geometry = (module.stride, module.padding, module.dilation, False, (0,) * (x.ndim - 2), module.groups)
    y: Tensor = _Depthwise.apply(x, weight, bias, geometry)  # type: ignore[no-untyped-call]
    return y


class _Depthwise(torch.autograd.Function):
    """Shapes: x (B, C, *S), weight (C, 1, *K) -> (B, C, *S')."""

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
        stride, padding, dilation, *rest = ctx.geometry
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = aten.convolution_backward(grad, x, weight, None, *ctx.geometry, [True, False, False])[0]
        planes = x.shape[0] * x.shape[1]
        apart = aten.convolution(
            x.reshape(1, planes, *x.shape[2:]),
            grad.reshape(planes, 1, *grad.shape[2:]),
            None,
            *(dilation, padding, stride, *rest[:2], planes),
        )
        inside = (slice(None), slice(None), *(slice(size) for size in weight.shape[2:]))
        grad_weight = apart[inside].view(*x.shape[:2], *weight.shape[2:]).sum(0).unsqueeze(1)
        grad_bias = grad.sum([dim for dim in range(grad.ndim) if dim != 1]) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None
