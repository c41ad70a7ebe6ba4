"""Convolutions whose kernel is trained, or formed by an adapter, where torch is slow on a CPU."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flora.layers.conv.channels import channels_last, copy_from_last
from flora.layers.conv.pointwise import Geometry
from flora.layers.gate import again, in_plain_eager

aten = torch.ops.aten
LARGE_KERNEL = 25  # entries of a depthwise kernel from which torch's own gradient of it is slow
CACHED = 2**18  # numbers that a CPU's cache holds
SLAB = 2**20  # numbers of a slab of a volume
LEAST_PLANES = 20480  # numbers in a single sample's planes below which torch takes a slow way
FEW_CHANNELS = 64  # up to which torch's gradient of a kernel over volumes is slow with the channels outermost


def is_slow(module: Any, weight: Tensor, x: Tensor) -> bool:
    """Whether torch computes the gradient of this trained kernel slowly, and ``conv`` does better."""
    plain = weight.requires_grad and x.ndim == weight.ndim >= 4 and x.device.type == "cpu" and x.numel() > 0
    if not plain or module.padding_mode != "zeros" or isinstance(module.padding, str) or not in_plain_eager(x, weight):
        return False
    return _is_large_depthwise(module, weight, x) or _is_narrow_volume(module, weight, x)


def _is_large_depthwise(module: Any, weight: Tensor, x: Tensor) -> bool:
    """As ConvNeXt's 7x7."""
    depthwise = module.groups == x.shape[1] > 1 and weight.shape[:2] == (x.shape[1], 1)
    return depthwise and weight[0].numel() >= LARGE_KERNEL and x.dtype in (torch.float32, torch.float64)


def _is_narrow_volume(module: Any, weight: Tensor, x: Tensor) -> bool:
    """As the first blocks of a 3-D U-Net. With AVX-512, or channels last, torch has another way, which is not slow."""
    straight = {*module.stride, *module.dilation} == {1} and weight[0, 0].numel() > 1 and x.is_contiguous()
    return straight and 1 < x.shape[1] <= FEW_CHANNELS and _is_volume_on_avx2(module, x)


def _is_volume_on_avx2(module: Any, x: Tensor) -> bool:
    plain = x.ndim == 5 and module.groups == 1 and x.dtype == torch.float32
    return plain and torch.backends.cpu.get_cpu_capability() == "AVX2"


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
    """A depthwise convolution too: of each channel of each sample by its own output's gradient.

    Stride and dilation are exchanged; a few samples at a time stay in the cache while they are turned around.
    """
    stride, padding, dilation, *rest = geometry
    inside = (slice(None), slice(None), *(slice(size) for size in weight.shape[2:]))
    total = weight.new_zeros(x.shape[1], *weight.shape[2:])
    size = max(1, CACHED // x[0].numel())
    for some, behind in zip(x.split(size), grad.split(size), strict=True):
        planes = some.shape[0] * some.shape[1]
        apart = aten.convolution(
            some.reshape(1, planes, *x.shape[2:]),
            behind.reshape(planes, 1, *grad.shape[2:]),
            None,
            *(dilation, padding, stride, *rest[:2], planes),
        )
        total += apart[inside].view(len(some), *total.shape).sum(0)
    return total.unsqueeze(1)


def _volume_gradient(x: Tensor, grad: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Torch's own, channels last, of two or three slabs along the depth at a time.

    A slab of x has the planes besides that its kernels reach, zeros where there are none. It is never one alone,
    because torch takes a slow way for a single small sample.
    """
    stride, (before, *padding), *rest = geometry
    grad, depth, reach = grad.contiguous(), grad.shape[2], weight.shape[2] - 1
    largest = max(1, SLAB // max(x[0, :, 0].numel(), grad[0, :, 0].numel()))
    count = max(2 if len(x) == 1 else 1, math.ceil(depth / largest))
    size = math.ceil(depth / count)
    slabs = [(sample, start) for sample in range(len(x)) for start in range(0, depth, size)]
    groups = [slabs[at : at + 2] for at in range(0, len(slabs) - 1, 2)] or [slabs]
    if len(slabs) > 2 and len(slabs) % 2:
        groups[-1].append(slabs[-1])
    most = len(groups[-1])
    seen = x.new_empty(most, size + reach, *x.shape[3:], x.shape[1])
    behind = grad.new_empty(most, size, *grad.shape[3:], grad.shape[1])
    total = torch.zeros_like(weight)
    for group in groups:
        for place, (sample, start) in enumerate(group):
            _turn(x[sample], start - before, seen[place])
            _turn(grad[sample], start, behind[place])
        pair = (behind[: len(group)].movedim(-1, 1), seen[: len(group)].movedim(-1, 1))
        some = (*pair, weight, None, stride, (0, *padding), *rest)
        total += aten.convolution_backward(*some, [False, True, False])[1]
    return total


def _turn(volume: Tensor, start: int, slab: Tensor) -> None:
    """Writes planes of a volume (C, D, H, W) from ``start`` on into slab (n, H, W, C), zeros where it has none."""
    low, high = max(start, 0), min(start + len(slab), volume.shape[1])
    if low >= high:
        slab.zero_()
        return
    slab[: low - start].zero_()
    slab[high - start :].zero_()
    planes = volume[:, low:high].flatten(1).contiguous()  # torch turns a contiguous matrix in blocks
    slab[low - start : high - start].view(-1, len(volume)).copy_(planes.T)


def is_slow_transposed(module: Any, weight: Tensor, x: Tensor) -> bool:
    """Whether torch runs this transposed convolution slowly, as the last blocks of a 3-D U-Net on a CPU.

    A weight equal to the layer's own keeps torch's way, so that a new adapter changes no bit of the output.
    """
    plain = x.device.type == "cpu" and x.ndim == weight.ndim and x.numel() > 0 and x.is_contiguous()
    narrow = plain and x.shape[1] <= FEW_CHANNELS and _is_volume_on_avx2(module, x) and in_plain_eager(x, weight)
    offloaded = module.weight.device != weight.device  # then this is the change alone, beside the layer's own output
    return narrow and weight[0, 0].numel() > 1 and (offloaded or not torch.equal(weight, module.weight))


def conv_transpose(module: Any, weight: Tensor, bias: Tensor | None, x: Tensor, extra: list[int]) -> Tensor:
    """A transposed convolution with this weight; for those that ``is_slow_transposed`` names. extra: output padding."""
    geometry = (module.stride, module.padding, module.dilation, True, extra, 1)
    y: Tensor = _TransposedVolume.apply(x, weight, bias, geometry)  # type: ignore[no-untyped-call]
    return y


class _TransposedVolume(torch.autograd.Function):
    """Shapes: x (B, I, *S), weight (I, O, *K) -> (B, O, *S'). Channels last, torch is faster even with the copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.geometry = geometry
        size = 1 if x[0, ..., 0].numel() > LEAST_PLANES else len(x)
        y = x.new_empty(0)
        for start in range(0, len(x), size):
            some = aten.convolution(channels_last(x[start : start + size]), weight, bias, *geometry)
            y = x.new_empty(len(x), *some.shape[1:]) if start == 0 else y
            copy_from_last(some, y[start : start + size])
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():
            return again(ctx, aten.convolution, (x, weight, bias), ctx.geometry, grad)
        mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False]
        grad_x, grad_weight, _ = aten.convolution_backward(grad, x, weight, None, *ctx.geometry, mask)
        grad_bias = grad.sum([dim for dim in range(grad.ndim) if dim != 1]) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None
