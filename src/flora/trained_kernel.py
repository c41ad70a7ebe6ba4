"""Convolutions whose kernel is trained, or formed by an adapter, with a gradient of it that is fast on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flora.fused import again, in_plain_eager
from flora.fused_pointwise import Geometry

aten = torch.ops.aten
LARGE_KERNEL = 25  # entries of a depthwise kernel from which torch's own gradient of it is slow
FEW_CHANNELS = 64  # up to which torch's gradient of a kernel over volumes is slow with the channels outermost


def is_slow(module: Any, weight: Tensor, x: Tensor) -> bool:
    """Whether torch computes the gradient of this trained kernel slowly, and ``conv`` does better."""
    plain = weight.requires_grad and x.ndim == weight.ndim >= 4 and x.device.type == "cpu"
    if not plain or module.padding_mode != "zeros" or isinstance(module.padding, str) or not in_plain_eager(x, weight):
        return False
    return _is_large_depthwise(module, weight, x) or _is_narrow_volume(module, weight, x)


def _is_large_depthwise(module: Any, weight: Tensor, x: Tensor) -> bool:
    """As ConvNeXt's 7x7."""
    depthwise = module.groups == x.shape[1] > 1 and weight.shape[:2] == (x.shape[1], 1)
    return depthwise and weight[0].numel() >= LARGE_KERNEL and x.dtype in (torch.float32, torch.float64)


def _is_narrow_volume(module: Any, weight: Tensor, x: Tensor) -> bool:
    """As the first blocks of a 3-D U-Net. On processors with AVX-512 torch has another way, which is not slow."""
    straight = x.ndim == 5 and module.groups == 1 and {*module.stride, *module.dilation} == {1}
    slow = straight and weight[0, 0].numel() > 1 and 1 < x.shape[1] <= FEW_CHANNELS and x.dtype == torch.float32
    return slow and torch.backends.cpu.get_cpu_capability() == "AVX2"


def conv(module: Any, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """A convolution with this weight, whose gradient takes the faster way; for those that ``is_slow`` names."""
    geometry = (module.stride, module.padding, module.dilation, False, (0,) * (x.ndim - 2), module.groups)
    y: Tensor = _TrainedKernel.apply(x, weight, bias, geometry)  # type: ignore[no-untyped-call]
    return y


class _TrainedKernel(torch.autograd.Function):
    """Shapes: x (B, I, *S), weight (O, I / groups, *K) -> (B, O, *S')."""

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
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = aten.convolution_backward(grad, x, weight, None, *ctx.geometry, [True, False, False])[0]
        of_kernel = _depthwise_gradient if ctx.geometry[-1] > 1 else _volume_gradient
        grad_bias = grad.sum([dim for dim in range(grad.ndim) if dim != 1]) if ctx.needs_input_grad[2] else None
        return grad_x, of_kernel(x, grad, weight, ctx.geometry), grad_bias, None


def _depthwise_gradient(x: Tensor, grad: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """A depthwise convolution too: of each channel of each sample by its own output's gradient, stride and dilation
    exchanged. Torch's own way takes three to ten times as long.
    """
    stride, padding, dilation, *rest = geometry
    planes = x.shape[0] * x.shape[1]
    apart = aten.convolution(
        x.reshape(1, planes, *x.shape[2:]),
        grad.reshape(planes, 1, *grad.shape[2:]),
        None,
        *(dilation, padding, stride, *rest[:2], planes),
    )
    inside = (slice(None), slice(None), *(slice(size) for size in weight.shape[2:]))
    return apart[inside].view(*x.shape[:2], *weight.shape[2:]).sum(0).unsqueeze(1)  # type: ignore[no-any-return]


def _volume_gradient(x: Tensor, grad: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Torch's own, channels last: the way that it then takes is up to twice as fast, the copies of x and grad paid."""
    x = x.contiguous(memory_format=torch.channels_last_3d)
    return aten.convolution_backward(grad, x, weight, None, *geometry, [False, True, False])[1]  # type: ignore[no-any-return]
