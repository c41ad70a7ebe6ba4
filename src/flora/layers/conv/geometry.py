"""What a convolution does with its weight, apart from the weight: stride, padding and the like, as torch takes them."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from flora.layers.conv import kernel_gradient
from flora.layers.plain import output_padding

aten = torch.ops.aten


class Geometry(NamedTuple):
    """The arguments of ``aten.convolution`` after the bias, in its order."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution.

        Args:
            x: shape (batch, in, *spatial).
            weight: shape (out, in / groups, *kernel), transposed (in, out / groups, *kernel).
            bias: shape (out,).
        """
        return torch.convolution(x, weight, bias, *self)

    def run_wide(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The same with a weight that may have a wider dtype."""
        return self.run(x, weight.to(x.dtype), bias)

    def gradients(self, grad: Tensor, x: Tensor, weight: Tensor, wants_x: bool) -> tuple[Tensor | None, Tensor]:
        """Of the input, None where it is not wanted, and of the weight."""
        # Torch gives both gradients in one call. Where it is slow on the kernel's, that one is computed apart.
        grad_weight = kernel_gradient.gradient(self, x, grad, weight)
        if grad_weight is not None:
            return self.input_gradient(grad, x, weight) if wants_x else None, grad_weight

        grad_x, grad_weight, _ = aten.convolution_backward(grad, x, weight, None, *self, [wants_x, True, False])

        return grad_x, cast("Tensor", grad_weight)

    def input_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Of the input alone."""
        found: Tensor = aten.convolution_backward(grad, x, weight, None, *self, [True, False, False])[0]
        return found

    def bias_gradient(self, grad: Tensor) -> Tensor:
        """Of the bias."""
        return grad.sum([dim for dim in range(grad.ndim) if dim != 1])


class Placed(NamedTuple):
    """An input, padded where torch's own convolution would not do it, and the geometry that is left."""

    x: Tensor
    geometry: Geometry


def of_conv(module: Any, x: Tensor) -> Placed:
    """Of Conv1d to Conv3d; padding other than zeros, or more on one side, is written into the input.

    Args:
        module: the layer.
        x: shape (batch, in, *spatial).
    """
    # ``aten.convolution`` pads with zeros, the same on both sides. "same" of an odd kernel is of that kind; reflection,
    # a circle, or one more pixel on one side have to be written into the input first.
    padding = module.padding
    if module.padding_mode != "zeros" or isinstance(padding, str):
        # shape: two numbers for each dimension, the last dimension first
        sides = module._reversed_padding_repeated_twice
        if module.padding_mode == "zeros" and sides[::2] == sides[1::2]:
            padding = tuple(sides[::2][::-1])
        else:
            if module.padding_mode == "zeros":
                mode = "constant"
            else:
                mode = module.padding_mode

            x = F.pad(x, sides, mode=mode)
            padding = (0,) * len(module.kernel_size)

    none = (0,) * len(module.kernel_size)

    return Placed(x, Geometry(module.stride, padding, module.dilation, False, none, module.groups))


def of_transposed(module: Any, x: Tensor, output_size: list[int] | None = None) -> Placed:
    """Of ConvTranspose1d to ConvTranspose3d, for the output size that was asked for."""
    if output_size is None:
        extra = module.output_padding
    else:
        extra = output_padding(module, x, output_size)
    return Placed(x, Geometry(module.stride, module.padding, module.dilation, True, tuple(extra), module.groups))
