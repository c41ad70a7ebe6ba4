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
from flora.layers.gate import again, without_autocast
from flora.tucker.form import kronecker

LARGEST_KERNEL = 1024  # pixels of a kernel whose factors are seen as one
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

    factors: tuple[Tensor | None, ...]
    rows: tuple[Tensor, ...]


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
        return operation.run(x, _formed(weight, core, factors, scale).to(x.dtype), bias)
    y: Tensor = _Summed.apply(x, weight, bias, operation, scale, core, *factors)  # type: ignore[no-untyped-call]
    return y


def _formed(weight: Tensor, core: Tensor, factors: Factors, scale: float) -> Tensor:
    """``W + s dW`` in operations that autograd itself differentiates, without a step through Python in backward."""
    # Three factors of a kernel are one launch as a Kronecker product; of two, torch's own operations are as fast.
    modes = _kernel_modes(core, factors, 3)
    if modes:
        kernel: Tensor = _Kronecker.apply(*_of_modes(factors, modes))  # type: ignore[no-untyped-call]
        core, factors = _merged(core, factors, kernel)

    steps = _steps(core, factors)
    rows, factor = steps.rows[0], factors[0]

    if weight.dtype not in device.HALF:
        return _sum(weight, steps, scale)
    if factor is None:
        return _rounded_sum(weight, steps, scale)

    # The last step of the chain, W + s * factor @ rows.T, with its own rounding in half precision.
    # shape: (I1, rest)
    matrix = weight.reshape(-1, rows.shape[0])
    changed: Tensor = _RoundedSum.apply(matrix, factor, rows, scale)  # type: ignore[no-untyped-call]

    return changed.view(weight.shape)


class _RoundedSum(torch.autograd.Function):
    """``device.add_update`` in half precision; the gradient passes the rounding by."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, factor: Tensor, rows: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(factor, rows)
        return device.add_update(weight, factor, rows, scale)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> Any:
        factor, rows = ctx.saved_tensors

        # A gradient of the gradient is wanted: the same two products, as operations that torch differentiates.
        if torch.is_grad_enabled():
            wide = ctx.scale * grad.to(factor.dtype)
            return None, wide @ rows, wide.t() @ factor, None

        grad_factor = device.product(grad, rows.to(grad.dtype), factor.dtype, ctx.scale)
        grad_rows = device.product(grad.t(), factor.to(grad.dtype), rows.dtype, ctx.scale)

        return None, grad_factor.to(factor.dtype), grad_rows.to(rows.dtype), None


class _Kronecker(torch.autograd.Function):
    """The Kronecker product of three matrices, in one launch each way on a GPU."""

    @staticmethod
    def forward(ctx: Any, *factors: Tensor) -> Tensor:
        ctx.save_for_backward(*factors)
        return device.kronecker(factors)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> Any:
        factors = ctx.saved_tensors
        if torch.is_grad_enabled():
            return again(ctx, _kronecker, factors, (), grad)
        return tuple(device.kronecker_gradients(grad.contiguous(), factors))


def _kronecker(*factors: Tensor) -> Tensor:
    found = kronecker(factors, [factor.shape[1] for factor in factors])
    if found is None:
        raise AssertionError("there are factors")
    return found


def run_plain(
    operation: Operation, x: Tensor, weight: Tensor, bias: Tensor | None, core: Tensor, factors: Factors, scale: float
) -> Tensor:
    """The same in plain operations, for a compiler and for gradients of gradients."""
    modes = _kernel_modes(core, factors)
    if modes:
        core, factors = _merged(core, factors, _kronecker(*_of_modes(factors, modes)))

    steps = _steps(core, factors)

    if weight.dtype in device.HALF:
        changed = _rounded_sum(weight, steps, scale)
    else:
        changed = _sum(weight, steps, scale)

    return operation.run(x, changed.to(x.dtype), bias)


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


def _rounded_sum(weight: Tensor, steps: Steps, scale: float) -> Tensor:
    """``_sum`` in half precision, in operations that a compiler fuses; the gradient passes the rounding by."""
    rows, factor = steps.rows[0], steps.factors[0]
    update = rows.t() if factor is None else torch.mm(factor, rows.t())

    if scale != 1:
        update = scale * update

    return with_update(weight, update.view(weight.shape) if factor is not None else update.reshape(weight.shape))


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
        one_core, one_kernel = core, factors

        if modes:
            one_core, one_kernel = _merged(core, factors, device.kronecker(_of_modes(factors, modes)))

        steps = _steps(one_core, one_kernel)
        y = operation.run(x, _sum(weight, steps, scale).to(x.dtype), bias)
        # A caller may change the output in place, which autograd refuses of a view made in here.
        if y._is_view():
            y = torch.ops.aten._unsafe_view(y, y.shape)

        ctx.operation, ctx.scale, ctx.modes, ctx.count = operation, scale, modes, len(factors)
        ctx.save_for_backward(x, weight, bias, core, *factors, *steps.factors, *steps.rows)

        return y

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, bias, core, *saved = ctx.saved_tensors
        operation, scale, factors = ctx.operation, ctx.scale, saved[: ctx.count]

        if torch.is_grad_enabled():
            return again(ctx, _differentiable, (x, weight, bias, operation, scale, core, *factors), (), grad)

        # Saved were the factors as they were given, then the factors and the rows of the steps, equally many of each.
        steps_taken = (len(saved) - ctx.count) // 2
        steps = Steps(tuple(saved[ctx.count : -steps_taken]), tuple(saved[-steps_taken:]))
        wants_x = ctx.needs_input_grad[0]
        used = _sum(weight, steps, scale).to(x.dtype) if wants_x else weight

        # The layer's own backward gives the gradient of the whole weight, as full fine-tuning has it. It lives only
        # until it is projected onto core and factors.
        grad_x, grad_weight = operation.gradients(grad, x, used, wants_x)

        grad_core, *grad_factors = _project(grad_weight, steps, scale, core.dtype)

        # What came back for the one factor of the kernel is split into the gradients of the factors it was made of.
        if ctx.modes:
            of_kernel = device.kronecker_gradients(grad_factors.pop(), _of_modes(factors, ctx.modes))
            grad_factors += [None] * (ctx.count - 2)

            for mode, gradient in zip(ctx.modes, of_kernel, strict=True):
                grad_factors[mode] = gradient

        if not ctx.needs_input_grad[2]:
            grad_bias = None
        else:
            grad_bias = operation.bias_gradient(grad)

        return grad_x, None, grad_bias, None, None, grad_core.reshape(core.shape), *grad_factors


def _differentiable(
    x: Tensor, weight: Tensor, bias: Tensor | None, operation: Operation, scale: float, core: Tensor, *factors: Any
) -> Tensor:
    return run_plain(operation, x, weight, bias, core, factors, scale)


def _kernel_modes(core: Tensor, factors: Factors, least: int = 2) -> list[int]:
    """The modes of a convolution's kernel whose factors are seen as one: two or three, if the product is small."""
    if len(factors) < 4:
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


def _steps(core: Tensor, factors: Factors) -> Steps:
    """The products that form dW, all but the last."""
    # Each step sees what there is as a matrix whose columns are the last mode, still in its rank, and multiplies it by
    # that mode's factor from the left: (I, J) @ (J, rest) = (I, rest). The mode now has its full size and stands in
    # front, and the mode before it has become the last one. Nothing is copied between two steps.
    rows: list[Tensor] = []
    current, ranks = core, core.shape
    for mode in range(len(factors) - 1, -1, -1):
        # shape: (rest, J), then (I, rest)
        if current.ndim == 2 and current.shape[1] == ranks[mode]:
            matrix = current
        else:
            matrix = current.reshape(-1, ranks[mode])

        rows.append(matrix)

        if mode:
            factor = factors[mode]
            # factor @ matrix.T
            current = matrix.t() if factor is None else F.linear(factor, matrix)

    rows.reverse()

    return Steps(tuple(factors), tuple(rows))


def _sum(weight: Tensor, steps: Steps, scale: float) -> Tensor:
    """``W + s dW``: the last product, into a copy of W."""
    rows, factor = steps.rows[0], steps.factors[0]
    matrix = weight.reshape(-1, rows.shape[0])
    return device.add_update(matrix, factor, rows, scale).view(weight.shape)


def _project(grad: Tensor, steps: Steps, scale: float, dtype: torch.dtype) -> list[Any]:
    """The gradients of the core and of each factor from that of the weight.

    The weight's own gradient is multiplied in its own precision, everything after that in the adapter's.
    """
    # The chain of ``_steps`` backwards. A step was out = factor @ rows.T, so the gradient of its factor is
    # grad_out @ rows and that of its rows is grad_out.T @ factor. The rows of a step are the output of the one before.
    found: list[Any] = []

    # shape: (I1, rest)
    current = grad.reshape(-1, steps.rows[0].shape[0])
    for mode, (factor, rows) in enumerate(zip(steps.factors, steps.rows, strict=True)):
        if mode:
            # shape: (I, rest), from (rest of the mode before, its J)
            current = current.reshape(-1, rows.shape[0])

        times = scale if mode == 0 else 1.0

        if factor is None:
            found.append(None)
            current = current.t().to(dtype)

            if times != 1:
                current = times * current

            continue

        narrow_rows, narrow_factor = rows.to(current.dtype), factor.to(current.dtype)
        found.append(device.product(current, narrow_rows, dtype, times).to(dtype))
        current = device.product(current.t(), narrow_factor, dtype, times).to(dtype)

    return [current, *found]
