"""Gradients of kernels that torch computes slowly on a CPU, computed in another way through torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flora.layers import device

LARGE_KERNEL = 25  # pixels of a depthwise kernel from which torch's own gradient is slow, as of ConvNeXt's 7 x 7
NARROW_VOLUME = 64  # channels up to which a volume's gradient pays for copies of input and gradient


def gradient(geometry: Any, x: Tensor, grad: Tensor, weight: Tensor) -> Tensor | None:
    """The gradient of the kernel; None where torch's own way is as good.

    Args:
        geometry: a ``Geometry``.
        x: shape (batch, in, *spatial).
        grad: of the output, shape (batch, out, *spatial').
        weight: shape (out, in / groups, *kernel), transposed (in, out / groups, *kernel).
    """
    if geometry.transposed or x.ndim < 4 or x.numel() == 0 or not device.on_cpu(x):
        return None
    if _is_large_depthwise(geometry, weight, x):
        return depthwise(x, grad, weight, geometry.stride, geometry.padding, geometry.dilation)
    if _is_narrow_volume(geometry, weight, x):
        return _volume(geometry, x, grad, weight)

    return None


def _is_large_depthwise(geometry: Any, weight: Tensor, x: Tensor) -> bool:
    each_channel = geometry.groups == x.shape[1] > 1 and weight.shape[:2] == (x.shape[1], 1)
    return each_channel and weight[0].numel() >= LARGE_KERNEL and x.dtype in (torch.float32, torch.float64)


def _is_narrow_volume(geometry: Any, weight: Tensor, x: Tensor) -> bool:
    dense = geometry.groups == 1 and {*geometry.stride, *geometry.dilation} == {1} and weight[0, 0].numel() > 1
    narrow = x.ndim == 5 and 1 < x.shape[1] <= NARROW_VOLUME and x.is_contiguous() and x.dtype == torch.float32
    return dense and narrow and device.prefers_volumes_channels_last(x)


def _volume(geometry: Any, x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    """Torch's own gradient of a kernel over volumes, from copies of input and gradient with the channels innermost.

    On 16 channels of 64 x 64 x 64 that takes 0.6 of the time, copies included.
    """
    last = [tensor.contiguous(memory_format=torch.channels_last_3d) for tensor in (grad, x)]
    found: Tensor = torch.ops.aten.convolution_backward(*last, weight, None, *geometry, [False, True, False])[1]
    return found


def depthwise(
    x: Tensor, grad: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """The gradient of a depthwise kernel, itself as a depthwise convolution.

    The kernel's pixel at offset k meets, at each output place p, the input at ``stride * p + dilation * k``. So the
    gradient is a convolution of each channel of each sample with that channel's output gradient as the kernel, stride
    and dilation exchanged. A few samples at a time stay in the cache.

    Args:
        x: shape (batch, channels, *spatial).
        grad: of the output, shape (batch, channels, *spatial').
        weight: shape (channels, 1, *kernel).
        stride: of the layer.
        padding: of the layer.
        dilation: of the layer.
    """
    channels, kernel = x.shape[1], weight.shape[2:]
    total = weight.new_zeros(channels, *kernel)
    samples = max(1, device.CACHED // (x[0].numel() + grad[0].numel()))
    for some_x, some_grad in zip(x.split(samples), grad.split(samples), strict=True):
        planes = some_x.shape[0] * channels

        # shape: (1, planes, *offsets), with a few offsets too many where the stride did not divide the input
        of_planes = torch.ops.aten.convolution(
            some_x.reshape(1, planes, *x.shape[2:]),
            some_grad.reshape(planes, 1, *grad.shape[2:]),
            None,
            dilation,
            padding,
            stride,
            False,
            (0,) * len(kernel),
            planes,
        )
        inside = (slice(None), slice(None), *(slice(size) for size in kernel))
        total += of_planes[inside].view(len(some_x), *total.shape).sum(0)

    return total.unsqueeze(1)
