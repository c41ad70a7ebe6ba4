"""The fused function of convolutions that are a product on the channels: ``fused_conv`` decides which those are."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flora.layers.conv.channels import add_projected, mix, on_cpu, outer, project, rows
from flora.layers.gate import again, summed, sums_weights, without_autocast

aten = torch.ops.aten
CACHED = 2**19  # numbers turned around at a time on a CPU: its caches hold them
Geometry = tuple[Any, ...]  # stride, padding, dilation, transposed, output padding, groups


def pointwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, out: Tensor | None, geometry: Geometry
) -> Tensor:
    """The layer with ``weight + out @ down``; shapes as of ``_Pointwise``."""
    y: Tensor = _Pointwise.apply(x, weight, bias, down, out, geometry)  # type: ignore[no-untyped-call]
    return y


class _Pointwise(torch.autograd.Function):
    """A kernel of size 1, or a transposed one whose patches lie apart: products on the channels.

    Shapes: weight (O, I, 1 ..) or transposed (I, O, *K), down (J, I), out (O, J) or transposed (O * K, J), or None.
    Of the transposed, the output's gradient is seen with the pixels of a patch as channels.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, out: Tensor | None, geometry: Geometry
    ) -> Tensor:
        ctx.geometry, ctx.whole, hidden = geometry, sums_weights(x, weight), None
        low_down, low_out = down.to(x.dtype), None if out is None else out.to(x.dtype)
        if not ctx.whole and low_out is not None:
            hidden = project(low_down.T, _seen(x, geometry))
        made = (None, None, None) if on_cpu(x) else (low_down, low_out, hidden)
        ctx.save_for_backward(x, weight, bias, down, out, *made)
        if ctx.whole:
            matrix = summed(_matrix(weight, geometry), out, down)
            if geometry[3] and _faster_by_product(x, down, out):
                return _spread_product(matrix, x, weight.shape[2:], bias)
            used = (matrix.T if geometry[3] else matrix).reshape(weight.shape)
            return aten.convolution(x, used, bias, *geometry)  # type: ignore[no-any-return]
        y: Tensor = aten.convolution(x, weight, bias, *geometry)
        if low_out is None or hidden is None:
            add_projected(y, low_down, _seen(x, geometry))
        else:
            add_projected(y, low_out, hidden)
        return y

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, bias, down, out, low_down, low_out, hidden = ctx.saved_tensors
        geometry = ctx.geometry
        if torch.is_grad_enabled():
            return again(ctx, _plain_pointwise, (x, weight, bias, down, out), (geometry,), grad)
        grad_bias = grad.sum([dim for dim in range(grad.ndim) if dim != 1]) if ctx.needs_input_grad[2] else None
        whole, matrix = ctx.whole, None
        if ctx.needs_input_grad[0]:
            matrix = _matrix(weight, geometry)
            matrix = summed(matrix, out, down) if whole else matrix
        if low_down is None:
            low_down, low_out = down.to(x.dtype), None if out is None else out.to(x.dtype)
        rest = (matrix, whole, low_down, low_out, hidden, down.dtype, geometry)
        size = _slice_size(grad) if geometry[3] else len(x)
        if size >= len(x):
            grad_x, grad_down, grad_out = _pointwise_gradients(x, grad, *rest)
        else:
            grad_x, grad_down = None if matrix is None else torch.empty_like(x), torch.zeros_like(down)
            grad_out = None if out is None else torch.zeros_like(out)
            for part in (slice(start, start + size) for start in range(0, len(x), size)):
                own_x, own_down, own_out = _pointwise_gradients(x[part], grad[part], *rest)
                grad_down += own_down
                if grad_x is not None:
                    grad_x[part] = own_x
                if grad_out is not None:
                    grad_out += own_out
        return grad_x, None, grad_bias, grad_down, grad_out, None


def _pointwise_gradients(
    x: Tensor,
    grad: Tensor,
    matrix: Tensor | None,
    whole: bool,
    down: Tensor,
    out: Tensor | None,
    hidden: Tensor | None,
    dtype: torch.dtype,
    geometry: Geometry,
) -> tuple[Any, Tensor, Any]:
    """Of x, down and out, for some of the samples; matrix is that of the weight, with the change in it if ``whole``."""
    seen, grad_out = _seen(x, geometry), None
    seen = seen.contiguous() if rows(x) is None else seen
    if geometry[3]:
        grad = _patches(grad, geometry[0])
    back = grad
    if out is not None:
        grad_out = outer(grad, project(down.T, seen) if hidden is None else hidden, dtype)
        back = project(out, grad)
    grad_down = outer(seen, back, dtype).T
    if matrix is None:
        return None, grad_down, grad_out
    grad_x = mix(matrix.T, grad)
    if not whole:
        add_projected(grad_x, down.T, back)
    if grad_x.shape != x.shape:
        part, grad_x = grad_x, torch.zeros_like(x)
        _seen(grad_x, geometry).copy_(part)
    return grad_x, grad_down, grad_out


def _seen(x: Tensor, geometry: Geometry) -> Tensor:
    """The positions that a kernel of size 1 sees, as a view."""
    stride, transposed = geometry[0], geometry[3]
    if transposed or {*stride} == {1}:
        return x
    places = (slice(None), slice(None), *(slice(None, None, step) for step in stride))
    return x[places]


def _matrix(weight: Tensor, geometry: Geometry) -> Tensor:
    """The weight as what a product on the channels takes: (O, I), or transposed (O * K, I)."""
    return weight.flatten(1).T if geometry[3] else weight.flatten(1)


def _patches(grad: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """The pixels of each patch as channels, in the layout of grad: (B, O, *(S * K)) -> (B, O * K, *S)."""
    dims, sizes = len(kernel), [size // step for size, step in zip(grad.shape[2:], kernel, strict=True)]
    split = grad.reshape(*grad.shape[:2], *(part for pair in zip(sizes, kernel, strict=True) for part in pair))
    places, inside = range(2, 2 + 2 * dims, 2), range(3, 3 + 2 * dims, 2)
    if rows(grad) is not None:
        return split.permute(0, *places, 1, *inside).reshape(len(grad), *sizes, -1).movedim(-1, 1)
    return split.permute(0, 1, *inside, *places).reshape(len(grad), -1, *sizes)


def _spread_product(matrix: Tensor, x: Tensor, kernel: tuple[int, ...], bias: Tensor | None) -> Tensor:
    """The transposed convolution of patches that lie apart: matrix (O * K, I), x (B, I, *S) -> (B, O, *(S * K))."""
    dims, places = len(kernel), x.shape[2:]
    order = (0, 1, *(mode for dim in range(dims) for mode in (2 + dims + dim, 2 + dim)))
    inside = tuple(size for pair in zip(places, kernel, strict=True) for size in pair)
    y = x.new_empty(len(x), len(matrix) // math.prod(kernel), *inside)
    each = None if bias is None else bias.repeat_interleave(math.prod(kernel))
    size = _slice_size(y)
    for seen, target in zip(x.split(size), y.split(size), strict=True):
        target.copy_(mix(matrix, seen, each).view(len(seen), -1, *kernel, *places).permute(order))
    return y.view(*y.shape[:2], *(place * step for place, step in zip(places, kernel, strict=True)))


def _slice_size(y: Tensor) -> int:
    """How many samples at a time, so that what is turned around stays in the cache of a CPU."""
    return len(y) if not on_cpu(y) else max(1, CACHED * len(y) // max(1, y.numel()))


def _faster_by_product(x: Tensor, down: Tensor, out: Tensor | None) -> bool:
    """Whether a transposed convolution whose patches lie apart is better run as a product and a copy.

    On a CPU torch turns planes into blocks and back for it. A change of zero keeps torch's way, so that a new adapter
    leaves the output as it was to the last bit.
    """
    return on_cpu(x) and x.is_contiguous() and bool(down.any()) and (out is None or bool(out.any()))


def _plain_pointwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, out: Tensor | None, geometry: Geometry
) -> Tensor:
    """The same in plain operations, with dW whole, for the gradient of a gradient."""
    update = (down if out is None else out @ down).to(weight.dtype)
    update = (update.T if geometry[3] else update).reshape(weight.shape)
    return aten.convolution(x, weight, bias, *geometry) + aten.convolution(x, update, None, *geometry)  # type: ignore[no-any-return]
