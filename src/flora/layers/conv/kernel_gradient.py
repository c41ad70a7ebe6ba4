"""The gradient of a large depthwise kernel, as ConvNeXt's 7 x 7, which torch computes slowly on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flora.layers import device

LARGE_KERNEL = 25  # pixels from which torch's own gradient is slow
CACHED = 2**18  # numbers that a CPU's cache holds


def is_slow(geometry: Any, weight: Tensor, x: Tensor) -> bool:
    """Whether torch computes the gradient of this kernel slowly, and ``depthwise`` does better.

    Args:
        geometry: a ``Geometry``.
        weight: shape (channels, 1, *kernel).
        x: shape (batch, channels, *spatial).
    """
    if geometry.groups == 1 or geometry.transposed or x.ndim < 4 or x.numel() == 0:
        return False
    each_channel = geometry.groups == x.shape[1] and weight.shape[:2] == (x.shape[1], 1)
    large = weight[0].numel() >= LARGE_KERNEL and x.dtype in (torch.float32, torch.float64)
    return each_channel and large and device.on_cpu(x)


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
    samples = max(1, CACHED // x[0].numel())
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
