"""A convolution with a kernel of one pixel and its change in one autograd function: products on the channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flora.layers import device
from flora.layers.conv.channels import add_projected, mix, outer, project, rows
from flora.layers.gate import again, without_autocast

aten = torch.ops.aten


def pointwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    out: Tensor | None,
    stride: tuple[int, ...],
    sums: bool,
) -> Tensor:
    """The layer with ``weight + out @ down``, without padding.

    Args:
        x: shape (B, I, *S).
        weight: shape (O, I, 1, ...).
        bias: shape (O,).
        down: shape (J, I).
        out: shape (O, J), None for the identity.
        stride: of the layer.
        sums: whether to run once with the sum, or the change beside the layer.
    """
    y: Tensor = _Pointwise.apply(x, weight, bias, down, out, stride, sums)  # type: ignore[no-untyped-call]
    return y


# With a kernel of one pixel the layer multiplies the channels of each pixel by a matrix, and the change is
#
#     x (B, I, *S)  --down-->  (B, J, *S')  --out-->  (B, O, *S')
#
# A stride skips pixels: the change sees the same pixels as the layer, through a strided view of x.
class _Pointwise(torch.autograd.Function):
    """Arguments and shapes as of ``pointwise``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        out: Tensor | None,
        stride: tuple[int, ...],
        sums: bool,
    ) -> Tensor:
        ctx.stride, ctx.sums = stride, sums
        ctx.save_for_backward(x, weight, bias, down, out)

        if sums:
            return _convolve(x, _changed(weight, down, out).view(weight.shape), bias, stride)

        y = _convolve(x, weight, bias, stride)
        pixels = _strided(x, stride)

        if out is None:
            add_projected(y, down, pixels)
        else:
            add_projected(y, out, project(down.T, pixels))

        return y

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, bias, down, out = ctx.saved_tensors

        if torch.is_grad_enabled():
            return again(ctx, _plain_pointwise, (x, weight, bias, down, out), (ctx.stride,), grad)

        # A strided view is copied once where three products would each have to gather it.
        pixels = _strided(x, ctx.stride)

        if rows(x) is None:
            pixels = pixels.contiguous()

        grad_out, grad_hidden = None, grad

        if out is not None:
            grad_out = outer(grad, project(down.T, pixels), out.dtype)
            grad_hidden = project(out, grad)

        grad_down = outer(pixels, grad_hidden, down.dtype).T

        # Of the pixels that were met first, then spread over the whole input: the skipped pixels have no gradient.
        grad_x = None

        if ctx.needs_input_grad[0]:
            if ctx.sums:
                matrix = _changed(weight, down, out)
            else:
                matrix = weight.flatten(1)

            grad_x = mix(matrix.T, grad)

            if not ctx.sums:
                add_projected(grad_x, down.T, grad_hidden)

            grad_x = _spread(grad_x, x, ctx.stride)

        if not ctx.needs_input_grad[2]:
            grad_bias = None
        else:
            grad_bias = grad.sum([dim for dim in range(grad.ndim) if dim != 1])

        return grad_x, None, grad_bias, grad_down, grad_out, None, None


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...]) -> Tensor:
    none, ones = (0,) * len(stride), (1,) * len(stride)
    return aten.convolution(x, weight, bias, stride, none, ones, False, none, 1)  # type: ignore[no-any-return]


def _changed(weight: Tensor, down: Tensor, out: Tensor | None) -> Tensor:
    """``W + out @ down`` as a matrix (O, I)."""
    return device.add_update(weight.flatten(1), out, down.T, 1.0)


def _strided(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The positions that the stride does not skip, as a view."""
    if {*stride} == {1}:
        return x
    return x[(slice(None), slice(None), *(slice(None, None, step) for step in stride))]


def _spread(grad: Tensor, x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The gradient of the full input from that of the positions that the stride does not skip."""
    if grad.shape == x.shape:
        return grad
    whole = torch.zeros_like(x)
    _strided(whole, stride).copy_(grad)
    return whole


def _plain_pointwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, out: Tensor | None, stride: tuple[int, ...]
) -> Tensor:
    """The same in plain operations, with dW formed, for the gradient of a gradient."""
    update = (down if out is None else out @ down).to(weight.dtype)
    return _convolve(x, weight, bias, stride) + _convolve(x, update.reshape(weight.shape), None, stride)
