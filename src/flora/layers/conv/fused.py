"""A convolution and its change in one autograd function, in the way that the plan chose.

Where the gradient is taken through the whole weight, ``layers/summed.py`` does it. Here it is taken through narrow
tensors, for layers of one group: down to few channels, a convolution of the layer's own geometry there, and up again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flora.layers import device, plain, summed
from flora.layers.conv.channels import add_projected, outer, project
from flora.layers.conv.geometry import Geometry, Placed, of_conv, of_transposed
from flora.layers.conv.pointwise import pointwise
from flora.layers.gate import again, prepare, without_autocast
from flora.layers.planning import Choice
from flora.tucker.delta import TuckerDelta
from flora.tucker.form import mode_product


def conv(
    choice: Choice, module: Any, weight: Tensor, bias: Tensor | None, delta: TuckerDelta, input: Tensor
) -> Tensor | None:
    """Conv1d to Conv3d with the change, or None for inputs that it does not take. input: (batch, in, *spatial)."""
    if input.ndim != weight.ndim:
        return None
    return _run(choice, weight, bias, delta, of_conv(module, input))


def conv_transpose(
    choice: Choice,
    module: Any,
    weight: Tensor,
    bias: Tensor | None,
    delta: TuckerDelta,
    input: Tensor,
    output_size: list[int] | None = None,
) -> Tensor | None:
    """The same for ConvTranspose1d to ConvTranspose3d."""
    if input.ndim != weight.ndim:
        return None
    return _run(choice, weight, bias, delta, of_transposed(module, input, output_size))


def _run(choice: Choice, weight: Tensor, bias: Tensor | None, delta: TuckerDelta, placed: Placed) -> Tensor | None:
    # Through the whole weight: any number of groups, any kernel, in the order of the weight.
    x, geometry = placed
    if choice.gradient == "dense":
        return summed.run(geometry, x, weight, bias, delta)

    ready = prepare(x, weight, bias)
    if ready is None or not ready.fused:
        return None

    with ready.autocast:
        return _narrow(choice, weight, ready.bias, delta, ready.x, geometry)


def _narrow(
    choice: Choice, weight: Tensor, bias: Tensor | None, delta: TuckerDelta, x: Tensor, geometry: Geometry
) -> Tensor | None:
    # Through narrow tensors: the factors of the channels are applied to the activations, which the groups of a
    # convolution would each have to do for themselves.
    if geometry.groups > 1:
        return None

    form, sums = delta.stored_form.scaled(delta.scale), choice.way == "summed"
    first, second = form.factors[:2]

    out, inner = (second, first) if geometry.transposed else (first, second)

    # A kernel of one pixel without padding is a product on the channels, dW = out @ down, and needs no convolution.
    # shape: down (Jo, I)
    weight = device.cast(weight, x.dtype)
    if weight[0, 0].numel() == 1 and not geometry.transposed and not any(geometry.padding):
        core = form.core.flatten(1)

        down = core if inner is None else core @ inner.T

        return pointwise(x, weight, bias, down, out, geometry.stride, sums)

    kernel = plain.kernel_factor(form)
    y: Tensor = _Conv.apply(x, weight, bias, form.core, kernel, inner, out, geometry, sums)  # type: ignore[no-untyped-call]

    return y


# The change of a convolution by a Tucker form is three convolutions in a row:
#
#     x (B, I, *S)  --inner.T, 1x1-->  (B, Ji, *S)  --core over the kernel-->  (B, Jo, *S')  --out, 1x1-->  (B, O, *S')
#
# The one in the middle has the layer's own stride, padding and dilation, but few channels. The other two are products
# on the channels. Backward walks the chain from its end. Only x is kept: the narrow tensors are cheap to compute again.
class _Conv(torch.autograd.Function):
    """The layer once with W + dW, or beside its change; the gradients of the form through few channels.

    Shapes: x (B, I, *S), weight as of the layer, core (Jo, Ji, *R) or transposed (Ji, Jo, *R), kernel
    (prod(K), prod(R)) or None where R = K, inner (I, Ji) or None, out (O, Jo) or None -> (B, O, *S').
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        core: Tensor,
        kernel: Tensor | None,
        inner: Tensor | None,
        out: Tensor | None,
        geometry: Geometry,
        sums: bool,
    ) -> Tensor:
        ctx.geometry, ctx.sums = geometry, sums
        ctx.save_for_backward(x, weight, bias, core, kernel, inner, out)
        small_core = _small_core(core, kernel, weight)

        if sums:
            return geometry.run(x, _changed(weight, small_core, inner, out, geometry), bias)

        y = geometry.run(x, weight, bias)

        # shape: (B, Ji, *S), then (B, Jo, *S')
        few = project(inner, x) if inner is not None else x

        hidden = geometry.run(few, small_core, None)

        if out is None:
            y += hidden
        else:
            add_projected(y, out, hidden)

        return y

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, bias, core, kernel, inner, out = ctx.saved_tensors
        geometry, wants_x = ctx.geometry, ctx.needs_input_grad[0]

        if torch.is_grad_enabled():
            return again(ctx, _plain_conv, (x, weight, bias, core, kernel, inner, out), (geometry,), grad)

        # The forward's narrow tensors are computed once more: that costs less than keeping them.
        small_core = _small_core(core, kernel, weight)

        few = project(inner, x) if inner is not None else x

        grad_out, grad_hidden = None, grad

        if out is not None:
            grad_out = outer(grad, geometry.run(few, small_core, None), out.dtype)
            grad_hidden = project(out, grad)

        # The convolution in few channels gives the gradient of its input and of its weight. Where ``inner`` is the
        # identity its input is x itself, whose gradient is wanted only if the layer did not run with W + dW.
        needs_few = inner is not None or (wants_x and not ctx.sums)
        grad_few, grad_small_core = geometry.gradients(grad_hidden, few, small_core, needs_few)
        grad_core, grad_kernel = _unfold_kernel(grad_small_core.to(core.dtype), core, kernel)

        if inner is None or grad_few is None:
            grad_inner = None
        else:
            grad_inner = outer(x, grad_few, inner.dtype)

        # The gradient of x is that of the function which ran: of one convolution with W + dW, or of the frozen one plus
        # the gradient that came back through the change, added in place.
        grad_x = None

        if wants_x and ctx.sums:
            grad_x = geometry.input_gradient(grad, x, _changed(weight, small_core, inner, out, geometry))
        elif wants_x and grad_few is not None:
            grad_x = geometry.input_gradient(grad, x, weight)

            if inner is None:
                grad_x += grad_few
            else:
                add_projected(grad_x, inner, grad_few)

        if not ctx.needs_input_grad[2]:
            grad_bias = None
        else:
            grad_bias = geometry.bias_gradient(grad)

        return grad_x, None, grad_bias, grad_core, grad_kernel, grad_inner, grad_out, None, None


def _small_core(core: Tensor, kernel: Tensor | None, weight: Tensor) -> Tensor:
    """The core over the whole kernel, in the dtype of the weight: (J1, J2, *K)."""
    if kernel is None:
        full = core
    else:
        full = plain.apply_kernel(core, kernel, weight.shape[2:])
    return full.to(weight.dtype)


def _unfold_kernel(grad: Tensor, core: Tensor, kernel: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The gradients of core and kernel from that of the core over the whole kernel."""
    if kernel is None:
        return grad, None

    # The core over the whole kernel is the product  core (J1 * J2, prod(R)) @ kernel.T (prod(R), prod(K)).
    # shape: (J1 * J2, prod(K))
    rows = grad.reshape(-1, len(kernel))
    return (rows @ kernel).view(core.shape), rows.T @ core.reshape(len(rows), -1)


def _changed(
    weight: Tensor, small_core: Tensor, inner: Tensor | None, out: Tensor | None, geometry: Geometry
) -> Tensor:
    """``W + dW`` in the order of the weight: (out, in, *kernel), or (in, out, *kernel) of a transposed convolution."""
    first, second = (inner, out) if geometry.transposed else (out, inner)

    # The core gets the factor of the weight's second dimension; the product with the first factor is then added to W.
    # shape: (J1, I2, *K)
    if second is None:
        part = small_core
    else:
        part = mode_product(small_core, second.to(small_core.dtype), 1)

    return device.add_update(weight.flatten(1), first, part.flatten(1).T, 1.0).view(weight.shape)


def _plain_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    core: Tensor,
    kernel: Tensor | None,
    inner: Tensor | None,
    out: Tensor | None,
    geometry: Geometry,
) -> Tensor:
    """The same in plain operations, for the gradient of a gradient."""
    if inner is None:
        few = x
    else:
        few = torch.einsum("bi...,ij->bj...", x, inner.to(x.dtype))

    hidden = geometry.run(few, _small_core(core, kernel, weight), None)

    if out is None:
        change = hidden
    else:
        change = torch.einsum("bj...,oj->bo...", hidden, out.to(x.dtype))

    return geometry.run(x, weight, bias) + change
