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
from typing import Any, Protocol

import torch
from torch import Tensor

from flora.layers import device
from flora.layers.chain import Chain, Factors, Step, both_chains, chain_of
from flora.layers.gate import again, as_it_is, call_of, prepare, without_autocast
from flora.layers.prepared import changed_weight
from flora.tucker.delta import TuckerDelta

FEW_STEPS = 3  # of a chain that autograd differentiates


class Operation(Protocol):
    """What a layer does with its weight."""

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output."""

    def run_wide(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The same in plain operations, with a weight that may have a wider dtype than the input."""

    def gradients(self, grad: Tensor, x: Tensor, weight: Tensor, wants_x: bool) -> tuple[Tensor | None, Tensor]:
        """The gradients of the input, None where it is not wanted, and of the weight, from that of the output."""

    def bias_gradient(self, grad: Tensor) -> Tensor:
        """The gradient of the bias."""


def run(operation: Operation, x: Tensor, weight: Tensor, bias: Tensor | None, delta: TuckerDelta) -> Tensor | None:
    """The layer with the change, or None where its dtypes do not fit each other as they are."""
    if as_it_is(x, weight):
        return _run_fused(operation, x, weight, bias, delta)

    ready = prepare(x, weight, bias)
    if ready is None:
        return None

    with ready.autocast:
        if ready.fused:
            return _run_fused(operation, ready.x, weight, ready.bias, delta)
        return run_plain(operation, ready.x, weight, ready.bias, *delta.tensors(), delta.scale)


def _run_fused(operation: Operation, x: Tensor, weight: Tensor, bias: Tensor | None, delta: TuckerDelta) -> Tensor:
    core, factors = delta.tensors()
    keeps = device.keeps_sum(weight, x, core.shape[0])

    if keeps:
        prepared = changed_weight(x, delta, weight, core, factors)
        if prepared is not None:
            return operation.run(x, device.cast(prepared, x.dtype), bias)

    # Worked out once for each adapter, whose shapes stay.
    known = delta.__dict__
    chains: tuple[Chain, Chain] | None = known.get("chains")
    if chains is None:
        chains = known["chains"] = both_chains(core, factors)

    chain, scale = chains[keeps], delta.scale

    if not keeps:
        y: Tensor = _sum_and_run(x, weight, bias, operation, chain, scale, core, *factors)
        return y

    # A few products in float32 are differentiated by autograd in less time than one step through Python takes. With
    # more, or in half precision, where the rounding needs such a step in any case, everything is done in it.
    if len(chain.steps) <= FEW_STEPS and not chain.kernel and weight.dtype not in device.HALF:
        changed = _sum(weight, factors[0], _rows(core, factors, chain.steps)[-1], scale)
    else:
        changed = _form_in_one_step(weight, (chain, scale), core, *factors)

    return operation.run(x, device.cast(changed, x.dtype), bias)


class _Formed(torch.autograd.Function):
    """``W + s dW`` in the dtype of the weight; the gradient passes its rounding by."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, how: tuple[Chain, float], core: Tensor, *factors: Tensor | None) -> Tensor:
        chain, scale = how
        kernel, rows = _form(core, factors, chain)
        # The weight is frozen, and only a gradient with a graph asks for it.
        ctx.given = weight, chain, scale
        ctx.save_for_backward(core, *factors, kernel, *rows)

        return _sum(weight, factors[0], rows[-1], scale)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> Any:
        weight, chain, scale = ctx.given
        core, *saved = ctx.saved_tensors

        if torch.is_grad_enabled():
            return again(ctx, _formed_plain, (weight, scale, core, *saved[: core.ndim]), (), grad)

        return None, None, *_gradients(grad, core, saved, chain, scale)


_form_in_one_step = call_of(_Formed)


def _formed_plain(weight: Tensor, scale: float, core: Tensor, *factors: Tensor | None) -> Tensor:
    """The same in plain operations."""
    return _formed_wide(weight, scale, core, *factors).to(weight.dtype)


def _formed_wide(weight: Tensor, scale: float, core: Tensor, *factors: Tensor | None) -> Tensor:
    """The same numbers; those of a half precision are still in float32.

    The factors of a kernel's modes stay apart here: as products of matrices a compiler leaves them to the device, where
    their Kronecker product and its gradients would each be kernels that it generates.
    """
    # A weight with one channel, or one pixel, lies in memory the same way in either order.
    if weight.ndim == 4 and weight.shape[1] > 1 and weight[0, 0].numel() > 1:
        return _sum_wide(weight, _channels_last(weight, core, factors, scale))

    rows = _rows(core, factors, chain_of(core, factors).steps)

    # A compiler would make one product of a product and a sum of matrices, and write all of W in float32 first. A sum
    # of tensors with a mode more it leaves apart, and fuses it with the rounding.
    if weight.dtype in device.HALF:
        update = _update(factors[0], rows[-1], scale).reshape(weight.shape)
        return _sum_wide(weight.unsqueeze(0), update.unsqueeze(0)).squeeze(0)

    return _sum(weight, factors[0], rows[-1], scale)


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
        moved = (first, *kernel, second)
        last = _rows(core, moved, chain_of(core, moved).steps)[-1]
    else:
        # shape: (J1 K, J2), then (J1, K I2)
        last = torch.mm(core.reshape(-1, core.shape[3]), second.t()).view(core.shape[0], -1).t()

    rows, inner, *pixels = weight.shape

    return _update(first, last, 1.0).reshape(rows, *pixels, inner).permute(0, 3, 1, 2)


def _update(factor: Tensor | None, rows: Tensor, scale: float) -> Tensor:
    """``s dW`` as a matrix (I1, rest), by the last of its products."""
    update = rows.t() if factor is None else torch.mm(factor, rows.t())

    if scale == 1:
        return update

    return scale * update


def run_plain(
    operation: Operation, x: Tensor, weight: Tensor, bias: Tensor | None, core: Tensor, factors: Factors, scale: float
) -> Tensor:
    """The same in plain operations, for a compiler and for gradients of gradients."""
    return operation.run_wide(x, _formed_wide(weight, scale, core, *factors), bias)


def with_update(weight: Tensor, update: Tensor) -> Tensor:
    """``W + dW`` in the dtype of W, in plain operations; in half precision rounded without bias.

    The gradient passes the rounding by.
    """
    return _sum_wide(weight, update).to(weight.dtype)


def _sum_wide(weight: Tensor, update: Tensor) -> Tensor:
    """The same numbers; those of a half precision are still in float32."""
    if weight.dtype not in device.HALF:
        return (weight + update).to(weight.dtype)

    # Rounding has no useful gradient. ``total + (rounded - exact)`` has the value of the rounded sum, and the gradient
    # of the sum, because the bracket is a constant to autograd.
    total = weight.float() + update.float()
    exact = total.detach()

    return total + (device.rounded(exact, weight.dtype) - exact)


class _Summed(torch.autograd.Function):
    """Shapes: x, weight, bias and the output as of the operation, core (J1, ..., JN), factors (In, Jn) or None."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        operation: Operation,
        chain: Chain,
        scale: float,
        core: Tensor,
        *factors: Tensor | None,
    ) -> Tensor:
        kernel, rows = _form(core, factors, chain)
        y = operation.run(x, device.cast(_sum(weight, factors[0], rows[-1], scale), x.dtype), bias)
        # A caller may change the output in place, which autograd refuses of a view made in here.
        if y._is_view():
            y = torch.ops.aten._unsafe_view(y, y.shape)

        ctx.given = operation, chain, scale
        ctx.save_for_backward(x, weight, bias, core, *factors, kernel, *rows)

        return y

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, bias, core, *saved = ctx.saved_tensors
        operation, chain, scale = ctx.given

        if torch.is_grad_enabled():
            factors = saved[: core.ndim]
            return again(ctx, _differentiable, (x, weight, bias, operation, chain, scale, core, *factors), (), grad)

        wants_x = ctx.needs_input_grad[0]
        used = weight

        if wants_x:
            used = device.cast(_sum(weight, saved[0], saved[-1], scale), x.dtype)

        # The layer's own backward gives the gradient of the whole weight, as full fine-tuning has it. It lives only
        # until it is projected onto core and factors.
        grad_x, grad_weight = operation.gradients(grad, x, used, wants_x)

        if not ctx.needs_input_grad[2]:
            grad_bias = None
        else:
            grad_bias = operation.bias_gradient(grad)

        return grad_x, None, grad_bias, None, None, None, *_gradients(grad_weight, core, saved, chain, scale)


_sum_and_run = call_of(_Summed)


def _differentiable(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    operation: Operation,
    chain: Chain,
    scale: float,
    core: Tensor,
    *factors: Any,
) -> Tensor:
    return run_plain(operation, x, weight, bias, core, factors, scale)


def _of_modes(factors: Factors, modes: Sequence[int]) -> list[Tensor]:
    return [factor for mode, factor in enumerate(factors) if mode in modes and factor is not None]


def _form(core: Tensor, factors: Factors, chain: Chain) -> tuple[Tensor | None, list[Tensor]]:
    """The factors of the kernel's modes as one, None where the chain leaves them apart, and ``_rows``."""
    if not chain.kernel:
        return None, _rows(core, factors, chain.steps)
    kernel = device.kronecker(_of_modes(factors, chain.kernel))
    return kernel, _rows(core, (*factors[:2], kernel), chain.steps)


def _rows(core: Tensor, factors: Factors, steps: Sequence[Step]) -> list[Tensor]:
    """What there is before each step."""
    # Each step sees what there is as a matrix whose columns are the last mode, still in its rank, and multiplies it by
    # that mode's factor from the left: (I, J) @ (J, rest) = (I, rest). The mode now has its full size and stands in
    # front, and the mode before it has become the last one. Nothing is copied between two steps.
    current = core
    rows: list[Tensor] = []

    # shape: (rest, J), then (I, rest)
    for mode, rest, rank in steps:
        current = current.reshape(rest, rank)
        rows.append(current)
        if mode:
            factor = factors[mode]
            current = current.mT if factor is None else torch.mm(factor, current.mT)

    return rows


def _sum(weight: Tensor, factor: Tensor | None, rows: Tensor, scale: float) -> Tensor:
    """``W + s dW``: the last product, with the factor of the first mode, into a copy of W."""
    # shape: (I1, rest)
    rest, shape = rows.shape[0], weight.shape
    if len(shape) == 2 and shape[1] == rest:
        return device.add_update(weight, factor, rows, scale)
    return device.add_update(weight.reshape(-1, rest), factor, rows, scale).view(shape)


def _gradients(grad: Tensor, core: Tensor, saved: Sequence[Any], chain: Chain, scale: float) -> list[Any]:
    """The gradients of the core and of each factor from that of the weight.

    Args:
        grad: of the weight.
        core: of the form.
        saved: its factors, and what ``_form`` gave.
        chain: that formed dW.
        scale: of the update.
    """
    count = core.ndim
    kernel, *rows = saved[count:]

    if kernel is None:
        return _project(grad, saved, rows, chain.steps, scale, core)

    # What came back for the one factor of the kernel is split into the gradients of the factors it was made of.
    found = _project(grad, (*saved[:2], kernel), rows, chain.steps, scale, core)
    of_kernel = device.kronecker_gradients(found[3], _of_modes(saved[:count], chain.kernel))
    found[3:] = [None] * (count - 2)

    for mode, gradient in zip(chain.kernel, of_kernel, strict=True):
        found[1 + mode] = gradient

    return found


def _project(
    grad: Tensor, factors: Sequence[Any], rows: Sequence[Any], steps: Sequence[Step], scale: float, core: Tensor
) -> list[Any]:
    """The gradients of the core and of each factor that the chain sees, from that of the weight.

    A large weight's own gradient is multiplied in its own precision, everything else in the adapter's.
    """
    # The chain of ``_rows`` backwards. A step was out = factor @ rows.T, so the gradient of its factor is
    # grad_out @ rows and that of its rows is grad_out.T @ factor. The rows of a step are the output of the one before.
    found: list[Any] = [None] * (1 + core.ndim)
    current = device.widened(grad, core.dtype)

    # The first of them has the scale in it, and from then on the numbers have the adapter's dtype.
    if scale != 1 or current.dtype != core.dtype:
        found[1], current = _first(current.reshape(-1, steps[-1].rest), factors[0], rows[-1], scale, core.dtype)
        steps = steps[:-1]

    # shape: (I, rest), then (rest of the mode before, its J)
    for index in range(len(steps) - 1, -1, -1):
        mode, rest, _ = steps[index]
        factor, current = factors[mode], current.reshape(-1, rest)

        if factor is None:
            current = current.mT
        else:
            found[1 + mode] = torch.mm(current, rows[index])
            current = torch.mm(current.mT, factor)

    found[0] = current.reshape(core.shape)

    return found


def _first(
    grad: Tensor, factor: Tensor | None, rows: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor]:
    """The gradients of the factor (I, J) and of the rows (rest, J) of a product ``scale * factor @ rows.T``.

    Args:
        grad: of the product, shape (I, rest), in a dtype of its own.
        factor: None for the identity.
        rows: of the adapter's dtype, as the factor.
        scale: of the product.
        dtype: of the result.
    """
    if factor is None:
        return None, _scaled(device.cast(grad.mT, dtype), scale)

    narrow_rows, narrow_factor = device.cast(rows, grad.dtype), device.cast(factor, grad.dtype)
    of_factor = device.product(grad, narrow_rows, dtype, scale)
    of_rows = device.product(grad.mT, narrow_factor, dtype, scale)

    return device.cast(of_factor, dtype), device.cast(of_rows, dtype)


def _scaled(x: Tensor, scale: float) -> Tensor:
    """``scale * x``, without a copy where the scale is 1."""
    if scale == 1:
        return x
    return scale * x
