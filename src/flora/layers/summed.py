"""The summed way: a layer runs once with ``W' = W + s dW``, and the gradient of W' is projected onto core and factors.

That costs what training the weight in full costs, and a few products of small matrices. Both directions go mode by
mode, the last one first. Each step is one plain product: it contracts the last dimension of what there is and puts the
mode's full size in front, so nothing has to be rearranged between the steps, and after the first mode the numbers lie
in the order of the weight:

    core (J1 J2 J3)  ->  (I3 J1 J2)  ->  (I2 I3 J1)  ->  dW (I1 I2 I3)

Backward walks the same steps from the other end, two products for each: one gives the gradient of the factor, the other
is what the next step starts from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from flora.layers import device
from flora.layers.gate import again, call_of, without_autocast

LARGEST_KERNEL = 1024  # pixels of a kernel whose factors are seen as one
LEAST_MODES = 3  # of such a kernel, where W + dW is kept; for two, the launches take the host longer than they save
Factors = Sequence[Tensor | None]  # a matrix (I, J) for each mode, None for the identity


class Operation(Protocol):
    """What a layer does with its weight."""

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output."""

    def gradients(self, grad: Tensor, x: Tensor, weight: Tensor, wants_x: bool) -> tuple[Tensor | None, Tensor]:
        """The gradients of the input, None where it is not wanted, and of the weight, from that of the output."""

    def bias_gradient(self, grad: Tensor) -> Tensor:
        """The gradient of the bias."""


class Steps(NamedTuple):
    """How dW is formed: ``dW = factors[0] @ rows[0].T``, and ``rows[n]`` from ``factors[n + 1] @ rows[n + 1].T``.

    Attributes:
        factors: shape (In, Jn) each, None for the identity.
        rows: shape (rest, Jn) each, the numbers before that step.
    """

    factors: Factors
    rows: Sequence[Tensor]


def run(
    operation: Operation, x: Tensor, weight: Tensor, bias: Tensor | None, core: Tensor, factors: Factors, scale: float
) -> Tensor:
    """The layer with ``weight + scale * dW`` in one autograd function that keeps the input and small tensors only.

    Args:
        operation: of the layer.
        x: its input, in the dtype that the layer computes in.
        weight: frozen; it may have another dtype under autocast.
        bias: of the layer.
        core: shape (J1, ..., JN).
        factors: one for each mode of the weight, folded or as it is stored.
        scale: of the update.
    """
    if device.keeps_sum(weight, x, core.shape[0]):
        return operation.run(x, device.cast(_formed(weight, core, factors, scale), x.dtype), bias)
    y: Tensor = _sum_and_run(x, weight, bias, operation, scale, core, *factors)
    return y


def _formed(weight: Tensor, core: Tensor, factors: Factors, scale: float) -> Tensor:
    """``W + s dW``, from which the layer is differentiated as any other.

    Two products in float32 are differentiated by autograd in less time than one step through Python takes. With more
    modes, or in half precision, where the rounding needs such a step in any case, everything is done in it.
    """
    if len(factors) == 2 and weight.dtype not in device.HALF:
        return _sum(weight, _steps(core, factors), scale)
    changed: Tensor = _form_in_one_step(weight, scale, core, *factors)
    return changed


class _Formed(torch.autograd.Function):
    """``W + s dW`` in the dtype of the weight; the gradient passes its rounding by."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: float, core: Tensor, *factors: Tensor | None) -> Tensor:
        modes = _kernel_modes(core, factors, LEAST_MODES)
        steps = _form(core, factors, modes)
        ctx.scale, ctx.modes, ctx.count = scale, modes, len(factors)
        ctx.save_for_backward(weight, core, *factors, *_to_save(steps, modes))

        return _sum(weight, steps, scale)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> Any:
        weight, core, *saved = ctx.saved_tensors
        factors, steps = _saved_steps(saved, ctx.count, ctx.modes)

        if torch.is_grad_enabled():
            return again(ctx, _formed_plain, (weight, ctx.scale, core, *factors), (), grad)

        return None, None, *_gradients(grad, core, factors, steps, ctx.modes, ctx.scale)


_form_in_one_step = call_of(_Formed)


def _formed_plain(weight: Tensor, scale: float, core: Tensor, *factors: Tensor | None) -> Tensor:
    """The same in plain operations.

    The factors of a kernel's modes stay apart here: as products of matrices a compiler leaves them to the device, where
    their Kronecker product and its gradients would each be kernels that it generates.
    """
    # A weight with one channel, or one pixel, lies in memory the same way in either order.
    if weight.ndim == 4 and weight.shape[1] > 1 and weight[0, 0].numel() > 1:
        return with_update(weight, _channels_last(weight, core, factors, scale))

    steps = _steps(core, factors)

    if weight.dtype in device.HALF:
        return with_update(weight, _update(steps, scale).reshape(weight.shape))

    return _sum(weight, steps, scale)


def _channels_last(weight: Tensor, core: Tensor, factors: Factors, scale: float) -> Tensor:
    """The update of a convolution over images, with the channels of its second mode innermost in memory.

    A compiler stores such a weight, its gradient and the core in that order, so nothing has to be copied.
    """
    first, second, *kernel = factors
    core = core.permute(0, 2, 3, 1)
    if scale != 1:
        core = scale * core

    # Where the kernel is whole, its pixels stay where they are. Otherwise the chain moves every mode to its place.
    if any(factor is not None for factor in kernel) or second is None:
        steps = _steps(core, (first, *kernel, second))
    else:
        # shape: (J1 K, J2), then (J1, K I2)
        spread = torch.mm(core.reshape(-1, core.shape[3]), second.t()).view(core.shape[0], -1)
        steps = Steps((first,), (spread.t(),))

    rows, inner, *pixels = weight.shape

    return _update(steps, 1.0).reshape(rows, *pixels, inner).permute(0, 3, 1, 2)


def _update(steps: Steps, scale: float) -> Tensor:
    """``s dW`` as a matrix (I1, rest), by the last of its products."""
    rows, factor = steps.rows[0], steps.factors[0]
    update = rows.t() if factor is None else torch.mm(factor, rows.t())

    if scale == 1:
        return update

    return scale * update


def run_plain(
    operation: Operation, x: Tensor, weight: Tensor, bias: Tensor | None, core: Tensor, factors: Factors, scale: float
) -> Tensor:
    """The same in plain operations, for a compiler and for gradients of gradients."""
    return operation.run(x, _formed_plain(weight, scale, core, *factors).to(x.dtype), bias)


def with_update(weight: Tensor, update: Tensor) -> Tensor:
    """``W + dW`` in the dtype of W, in plain operations; in half precision rounded without bias.

    The gradient passes the rounding by.
    """
    if weight.dtype not in device.HALF:
        return (weight + update).to(weight.dtype)
    # Rounding has no useful gradient. ``total + (rounded - exact)`` has the value of the rounded sum, and the gradient
    # of the sum, because the bracket is a constant to autograd.
    total = weight.float() + update.float()
    exact = total.detach()
    return (total + (device.rounded(exact, weight.dtype) - exact)).to(weight.dtype)


class _Summed(torch.autograd.Function):
    """Shapes: x, weight, bias and the output as of the operation, core (J1, ..., JN), factors (In, Jn) or None."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        operation: Operation,
        scale: float,
        core: Tensor,
        *factors: Tensor | None,
    ) -> Tensor:
        # The factors of the kernel's two or three modes are multiplied into one first, so that the chain has three
        # steps for a convolution of any number of dimensions: kernel, inputs, outputs.
        modes = _kernel_modes(core, factors)
        steps = _form(core, factors, modes)
        y = operation.run(x, device.cast(_sum(weight, steps, scale), x.dtype), bias)
        # A caller may change the output in place, which autograd refuses of a view made in here.
        if y._is_view():
            y = torch.ops.aten._unsafe_view(y, y.shape)

        ctx.operation, ctx.scale, ctx.modes, ctx.count = operation, scale, modes, len(factors)
        ctx.save_for_backward(x, weight, bias, core, *factors, *_to_save(steps, modes))

        return y

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, bias, core, *saved = ctx.saved_tensors
        operation, scale = ctx.operation, ctx.scale
        factors, steps = _saved_steps(saved, ctx.count, ctx.modes)

        if torch.is_grad_enabled():
            return again(ctx, _differentiable, (x, weight, bias, operation, scale, core, *factors), (), grad)

        wants_x = ctx.needs_input_grad[0]
        used = device.cast(_sum(weight, steps, scale), x.dtype) if wants_x else weight

        # The layer's own backward gives the gradient of the whole weight, as full fine-tuning has it. It lives only
        # until it is projected onto core and factors.
        grad_x, grad_weight = operation.gradients(grad, x, used, wants_x)

        if not ctx.needs_input_grad[2]:
            grad_bias = None
        else:
            grad_bias = operation.bias_gradient(grad)

        return grad_x, None, grad_bias, None, None, *_gradients(grad_weight, core, factors, steps, ctx.modes, scale)


_sum_and_run = call_of(_Summed)


def _differentiable(
    x: Tensor, weight: Tensor, bias: Tensor | None, operation: Operation, scale: float, core: Tensor, *factors: Any
) -> Tensor:
    return run_plain(operation, x, weight, bias, core, factors, scale)


def _kernel_modes(core: Tensor, factors: Factors, least: int = 2) -> list[int]:
    """The modes of a convolution's kernel whose factors are seen as one: two or three, if the product is small."""
    if len(factors) < 2 + least:
        return []

    modes = [mode for mode in range(2, len(factors)) if core.shape[mode] > 1 or factors[mode] is not None]
    if not least <= len(modes) <= 3:
        return []

    size = 1
    for mode in modes:
        factor = factors[mode]
        if factor is None:
            return []

        size *= factor.shape[0]

    if size <= LARGEST_KERNEL:
        return modes

    return []


def _of_modes(factors: Factors, modes: Sequence[int]) -> list[Tensor]:
    return [factor for mode, factor in enumerate(factors) if mode in modes and factor is not None]


def _merged(core: Tensor, factors: Factors, kernel: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The form with the factors of the kernel's modes as one, which saves two launches for each of them."""
    return core.reshape(core.shape[0], core.shape[1], -1), (factors[0], factors[1], kernel)


def _form(core: Tensor, factors: Factors, modes: Sequence[int]) -> Steps:
    """The products that form dW, all but the last; the factors of ``modes`` as one."""
    if modes:
        core, factors = _merged(core, factors, device.kronecker(_of_modes(factors, modes)))
    return _steps(core, factors)


def _to_save(steps: Steps, modes: Sequence[int]) -> Sequence[Any]:
    """What a backward needs of the steps besides the factors of the form."""
    if modes:
        return steps.factors[2], *steps.rows
    return steps.rows


def _saved_steps(saved: list[Any], count: int, modes: Sequence[int]) -> tuple[list[Any], Steps]:
    """The factors of the form, and the steps as ``_to_save`` gave them."""
    factors, rest = saved[:count], saved[count:]
    if modes:
        return factors, Steps((factors[0], factors[1], rest[0]), rest[1:])
    return factors, Steps(factors, rest)


def _gradients(
    grad: Tensor, core: Tensor, factors: Sequence[Any], steps: Steps, modes: Sequence[int], scale: float
) -> list[Any]:
    """The gradients of the core and of each factor from that of the weight."""
    grad_core, *grad_factors = _project(grad, steps, scale, core.dtype)

    # What came back for the one factor of the kernel is split into the gradients of the factors it was made of.
    if modes:
        of_kernel = device.kronecker_gradients(grad_factors.pop(), _of_modes(factors, modes))
        grad_factors += [None] * (len(factors) - 2)

        for mode, gradient in zip(modes, of_kernel, strict=True):
            grad_factors[mode] = gradient

    return [grad_core.reshape(core.shape), *grad_factors]


def _steps(core: Tensor, factors: Factors) -> Steps:
    """The products that form dW, all but the last."""
    # Each step sees what there is as a matrix whose columns are the last mode, still in its rank, and multiplies it by
    # that mode's factor from the left: (I, J) @ (J, rest) = (I, rest). The mode now has its full size and stands in
    # front, and the mode before it has become the last one. Nothing is copied between two steps.
    rows: list[Tensor] = []
    current, ranks = core, core.shape
    for mode in range(len(factors) - 1, -1, -1):
        # shape: (rest, J), then (I, rest)
        if current.ndim > 2 or current.shape[1] != ranks[mode]:
            current = current.reshape(-1, ranks[mode])

        rows.append(current)

        if mode:
            factor = factors[mode]
            # factor @ current.T
            current = current.t() if factor is None else F.linear(factor, current)

    rows.reverse()

    return Steps(factors, rows)


def _sum(weight: Tensor, steps: Steps, scale: float) -> Tensor:
    """``W + s dW``: the last product, into a copy of W."""
    rows, factor = steps.rows[0], steps.factors[0]
    if weight.shape[1:] == rows.shape[:1]:
        return device.add_update(weight, factor, rows, scale)
    return device.add_update(weight.reshape(-1, rows.shape[0]), factor, rows, scale).view(weight.shape)


def _project(grad: Tensor, steps: Steps, scale: float, dtype: torch.dtype) -> list[Any]:
    """The gradients of the core and of each factor from that of the weight.

    The weight's own gradient is multiplied in its own precision, everything after that in the adapter's.
    """
    # The chain of ``_steps`` backwards. A step was out = factor @ rows.T, so the gradient of its factor is
    # grad_out @ rows and that of its rows is grad_out.T @ factor. The rows of a step are the output of the one before.
    found: list[Any] = []
    current, times = grad, scale

    # shape: (I1, rest), then (I, rest) from (rest of the mode before, its J)
    for factor, rows in zip(steps.factors, steps.rows, strict=True):
        current = current.reshape(-1, rows.shape[0])

        if factor is None:
            found.append(None)
            current = device.cast(current.t(), dtype)
            if times != 1:
                current = times * current
        elif times == 1 and current.dtype == dtype:
            found.append(torch.mm(current, rows))
            current = torch.mm(current.t(), factor)
        else:
            narrow_rows, narrow_factor = device.cast(rows, current.dtype), device.cast(factor, current.dtype)
            found.append(device.cast(device.product(current, narrow_rows, dtype, times), dtype))
            current = device.cast(device.product(current.t(), narrow_factor, dtype, times), dtype)

        times = 1.0

    return [current, *found]
