"""Depthwise convolutions whose kernel is trained, or formed by an adapter, with a gradient that is fast on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flora.fused import again, in_plain_eager
from flora.fused_pointwise import Geometry

aten = torch.ops.aten
LARGE_KERNEL = 25  # entries of a depthwise kernel from which torch's own gradient of it is slow


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
