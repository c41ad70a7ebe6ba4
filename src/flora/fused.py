"""The factored path beside a frozen layer, as one autograd function that keeps the input and little else.

Written as separate operations, an adapter beside a layer reads and writes the activations again for each product,
scaling and sum, and keeps every intermediate. Here the change is added in place into the layer's own output and into
the gradient of its input, the core is folded into the factor that leaves the smaller inner rank, and the small
intermediates are computed again in backward. Products are ordered so that the skinny side is contiguous, which the BLAS
libraries reward.

``can_fuse`` says when it may be used; otherwise, and for the gradient of a gradient, ``kernels`` does the same in plain
operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flora import kernels
from flora.tucker import Tucker

aten = torch.ops.aten


def can_fuse(x: Tensor, weight: Tensor) -> bool:
    """Whether the fused function does what separate operations would: eager mode, one dtype, a frozen weight."""
    return not (
        torch.compiler.is_compiling()
        or weight.requires_grad
        or x.dtype != weight.dtype
        or torch.is_autocast_enabled(x.device.type)
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def linear(weight: Tensor, bias: Tensor | None, form: Tucker, scale: float, x: Tensor) -> Tensor:
    """``F.linear(x, weight + scale * form, bias)``. x: (..., in), weight and form: (out, in)."""
    out, inner = form.factors
    rows = x.reshape(-1, x.shape[-1])
    y: Tensor = _Linear.apply(rows, weight, bias, form.core, inner, out, scale)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], y.shape[-1])


class _Linear(torch.autograd.Function):
    """Shapes: x (T, I), weight (O, I), core (Jo, Ji), inner (I, Ji) or None, out (O, Jo) or None -> (T, O)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        core: Tensor,
        inner: Tensor | None,
        out: Tensor | None,
        scale: float,
    ) -> Tensor:
        y = F.linear(x, weight, bias)
        up, down = _skinny(scale * core, inner, out, x.dtype)
        hidden = x @ down.T.contiguous()
        if up is None:
            y += hidden
        else:
            y.addmm_(hidden, up.T)
        ctx.save_for_backward(x, weight, bias, core, inner, out, None if up is None else hidden)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, bias, core, inner, out, hidden = ctx.saved_tensors
        scale = ctx.scale
        if torch.is_grad_enabled():
            return _again(ctx, _plain_linear, (x, weight, bias, core, inner, out), (scale,), grad)
        grad = grad.contiguous()
        up, down = _skinny(scale * core, inner, out, x.dtype)
        back = grad if up is None else grad @ up  # (T, J)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight
            grad_x.addmm_(back, down)
        grad_down = back.T @ x  # (J, I)
        grad_up = None if up is None else (hidden.T @ grad).T  # (O, J)
        grad_core, grad_inner, grad_out = _unfold(scale * core, inner, out, grad_down, grad_up)
        grad_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, None, grad_bias, scale * grad_core, grad_inner, grad_out, None


def _folds_down(core: Tensor, inner: Tensor | None) -> bool:
    return inner is None or core.shape[0] <= core.shape[1]


def _skinny(core: Tensor, inner: Tensor | None, out: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
    """The form as up (O, J) @ down (J, I); up is None for the identity."""
    if inner is None:
        up, down = out, core
    elif _folds_down(core, inner):
        up, down = out, core @ inner.T
    else:
        up, down = (core if out is None else out @ core), inner.T
    return None if up is None else up.to(dtype), down.to(dtype)


def _unfold(
    core: Tensor, inner: Tensor | None, out: Tensor | None, grad_down: Tensor, grad_up: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of core, inner and out from those of up and down, in the dtype of the adapter."""
    grad_down = grad_down.to(core.dtype)
    grad_up = None if grad_up is None else grad_up.to(core.dtype)
    if inner is None:
        return grad_down, None, grad_up
    if _folds_down(core, inner):
        return grad_down @ inner, grad_down.T @ core, grad_up
    if grad_up is None:
        raise AssertionError("up is a matrix when the core is folded into it")
    grad_core = grad_up if out is None else out.T @ grad_up
    return grad_core, grad_down.T, None if out is None else grad_up @ core.T


def _plain_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    core: Tensor,
    inner: Tensor | None,
    out: Tensor | None,
    scale: float,
) -> Tensor:
    return F.linear(x, weight, bias) + kernels.linear(None, Tucker(core, (out, inner)), scale, x)


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


Geometry = tuple[Any, ...]  # stride, padding, dilation, transposed, output padding, groups


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
        y: Tensor = aten.convolution(x, weight, bias, *geometry)
        hidden = _hidden(x if inner is None else _project(inner, x), core, geometry)
        if out is None:
            y += hidden
        else:
            _add_projected(y, out, hidden)
        ctx.save_for_backward(x, weight, bias, core, inner, out)
        ctx.geometry = geometry
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, bias, core, inner, out = ctx.saved_tensors
        geometry = ctx.geometry
        if torch.is_grad_enabled():
            return _again(ctx, _plain_conv, (x, weight, bias, core, inner, out), (geometry,), grad)
        small = x if inner is None else _project(inner, x)
        wants_x = ctx.needs_input_grad[0]
        grad_out = None
        back = grad
        if out is not None:
            grad_out = _outer(grad, _hidden(small, core, geometry)).to(out.dtype)
            back = _project(out, grad)
        mask = [wants_x or inner is not None, True, False]
        grad_small, grad_core, _ = aten.convolution_backward(back, small, core.to(x.dtype), None, *geometry, mask)
        grad_inner = None if inner is None else _outer(x, grad_small).to(inner.dtype)
        grad_x = None
        if wants_x:
            grad_x = aten.convolution_backward(grad, x, weight, None, *geometry, [True, False, False])[0]
            if inner is None:
                grad_x += grad_small
            else:
                _add_projected(grad_x, inner, grad_small)
        grad_bias = grad.sum([dim for dim in range(grad.ndim) if dim != 1]) if ctx.needs_input_grad[2] else None
        return grad_x, None, grad_bias, grad_core.to(core.dtype), grad_inner, grad_out, None


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
            return _again(ctx, _plain_pointwise, (x, weight, bias, down, out), (ctx.stride, ctx.geometry), grad)
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


def _again(ctx: Any, plain: Any, inputs: Sequence[Tensor | None], rest: Sequence[Any], grad: Tensor) -> Any:
    """The gradient with a graph of its own (double backward): the same step in plain operations."""
    wanted = {index: value for index, value in enumerate(inputs) if value is not None and ctx.needs_input_grad[index]}
    with torch.enable_grad():
        y = plain(*inputs, *rest)
        found = torch.autograd.grad(y, list(wanted.values()), grad, create_graph=True)
    grads = dict(zip(wanted, found, strict=True))
    return tuple(grads.get(index) for index in range(len(ctx.needs_input_grad)))
