"""A linear layer and its change in one autograd function, in the way that the plan chose.

Where the gradient is taken through the whole weight, ``layers/summed.py`` does it. Here it is taken through narrow
products: the core is folded into the factor that leaves the smaller inner rank, so that dW is ``up @ down``. Either the
layer runs once with W + dW, or the narrow product writes the change first, with the bias, and the layer's own product
is added to that; the gradient of the input is made alike.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from flora.layers import device, plain, summed
from flora.layers.gate import again, call_of, is_compiled, prepare, without_autocast
from flora.layers.linear import compiled
from flora.layers.linear.products import gradients_of_products, products, sum_of_weights
from flora.layers.planning import Choice
from flora.tucker.delta import TuckerDelta
from flora.tucker.form import Tucker


class Product(NamedTuple):
    """What a linear layer does with its weight.

    Attributes:
        transposed: whether the weight is stored as (in, out), as in GPT-2's Conv1D.
    """

    transposed: bool

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer: x (..., in) -> (..., out)."""
        return F.linear(x, weight.t() if self.transposed else weight, bias)

    def run_wide(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The same with a weight that may have a wider dtype, which its gradient then has under a compiler."""
        if weight.dtype != torch.float32 or x.dtype not in device.HALF or not is_compiled():
            return self.run(x, weight.to(x.dtype), bias)
        return compiled.dense(x, weight.t() if self.transposed else weight, bias)

    def gradients(self, grad: Tensor, x: Tensor, weight: Tensor, wants_x: bool) -> tuple[Tensor | None, Tensor]:
        """Of the input, None where it is not wanted, and of the weight."""
        # shape: (T, out), (T, in)
        grad_rows, rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])

        left, right = (rows, grad_rows) if self.transposed else (grad_rows, rows)

        grad_weight = torch.mm(left.t(), right)

        if not wants_x:
            return None, grad_weight

        grad_x = torch.mm(grad_rows, weight.t() if self.transposed else weight)

        return grad_x.view(x.shape), grad_weight

    def bias_gradient(self, grad: Tensor) -> Tensor:
        """Of the bias."""
        return grad.reshape(-1, grad.shape[-1]).sum(0)


def linear(
    choice: Choice, module: Any, weight: Tensor, bias: Tensor | None, delta: TuckerDelta, input: Tensor
) -> Tensor | None:
    """A linear layer with the change, or None for inputs that it does not take. input: (..., in) -> (..., out)."""
    if choice.gradient == "dense":
        return summed.run(STRAIGHT, input, weight, bias, delta)
    return small(choice, weight, bias, delta.stored_form, delta.scale, input)


def linear_transposed(
    choice: Choice, module: Any, weight: Tensor, bias: Tensor | None, delta: TuckerDelta, x: Tensor
) -> Tensor | None:
    """The same for a weight stored as (in, out), as in GPT-2's Conv1D."""
    if choice.gradient == "dense":
        return summed.run(TRANSPOSED, x, weight, bias, delta)
    form = delta.stored_form
    turned = Tucker(form.core.T, (form.factors[1], form.factors[0]))
    return small(choice, weight.T, bias, turned, delta.scale, x)


STRAIGHT, TRANSPOSED = Product(False), Product(True)


def small(choice: Choice, weight: Tensor, bias: Tensor | None, form: Tucker, scale: float, x: Tensor) -> Tensor | None:
    """``F.linear(x, weight + scale * form, bias)`` with gradients by narrow products.

    Args:
        choice: of the plan.
        weight: shape (out, in), as the form.
        bias: shape (out,).
        form: of the update, without the scale.
        scale: of the update.
        x: shape (..., in).

    Returns:
        The output, or None where separate operations have to do it.
    """
    ready = prepare(x, weight, bias)
    if ready is None:
        return None

    with ready.autocast:
        return _small(choice, device.cast(weight, ready.x.dtype), ready.bias, form, scale, ready.x, ready.fused)


def _small(
    choice: Choice, weight: Tensor, bias: Tensor | None, form: Tucker, scale: float, x: Tensor, fused: bool
) -> Tensor | None:
    # A compiler is given the layer as one operation. Whatever else watches gets separate operations.
    if not fused:
        if not is_compiled() or weight.requires_grad:
            return None
        return compiled.linear(weight, bias, form, scale, x)

    out, inner = form.factors

    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])

    sums = choice.way == "summed"
    y: Tensor = _run(rows, weight, bias, form.core, inner, out, scale, sums)

    if x.ndim == 2:
        return y

    return y.view(*x.shape[:-1], y.shape[-1])


# A Tucker form of a matrix has two factors, so the core can be multiplied into one of them: dW = up @ down with
# up (O, J) and down (J, I), where J is the smaller of the two ranks. The products of the layer are then
#
#     forward   hidden (T, J) = x @ down.T,   y = x @ W.T + hidden @ up.T
#     backward  grad_hidden = grad @ up,      grad_x = grad @ W + grad_hidden @ down,
#               grad_down = grad_hidden.T @ x,   grad_up = grad.T @ hidden
#
# or, summed, y = x @ (W + up @ down).T and grad_x = grad @ (W + up @ down), with the same gradients of up and down.
class _Linear(torch.autograd.Function):
    """Shapes: x (T, I), weight (O, I), core (Jo, Ji), inner (I, Ji) or None, out (O, Jo) or None -> (T, O)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        core: Tensor,
        inner: Tensor | None,
        out: Tensor | None,
        scale: float,
        sums: bool,
    ) -> Tensor:
        folded = _folded(core, inner, out, scale, x.dtype)
        hidden, changed = None, None

        if sums:
            changed = sum_of_weights(weight, folded.exact_up, folded.exact_down)
            y = F.linear(x, changed, bias)
        else:
            y, hidden = products(x, weight, bias, folded.up, folded.down)

        # W + dW is formed once more in backward, unless it is small beside what LoRA would keep of this layer.
        if changed is not None and not device.keeps_sum(weight, x, core.shape[0]):
            changed = None

        # A GPU keeps the small matrices for backward; on a CPU forming them again is cheaper than keeping them.
        ctx.scale, ctx.sums = scale, sums
        ctx.save_for_backward(x, weight, bias, core, inner, out, hidden, changed, *device.kept(x, *folded))

        return y

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, bias, core, inner, out, hidden, changed, *kept = ctx.saved_tensors
        scale = ctx.scale

        if torch.is_grad_enabled():
            return again(ctx, _plain_linear, (x, weight, bias, core, inner, out), (scale,), grad)

        # They were not kept (see forward).
        folded = Folded(*kept) if kept[0] is not None else _folded(core, inner, out, scale, x.dtype)

        beside = None

        if not ctx.needs_input_grad[0]:
            changed = None
        elif not ctx.sums:
            beside = weight
        elif changed is None:
            changed = sum_of_weights(weight, folded.exact_up, folded.exact_down)

        found = gradients_of_products(grad.contiguous(), x, changed, beside, folded.up, folded.down, hidden, core.dtype)
        grad_core, grad_inner, grad_out = _unfold(folded.scaled, inner, out, found.down, found.up)

        grad_bias = grad.sum(0) if ctx.needs_input_grad[2] else None

        return found.x, None, grad_bias, _scaled(grad_core, scale), grad_inner, grad_out, None, None


_run = call_of(_Linear)


class Folded(NamedTuple):
    """The form as two matrices, exact in the dtype of the adapter, and in the dtype of the input.

    Attributes:
        scaled: the core times the scale, shape (Jo, Ji).
        exact_up: shape (O, J), None for the identity.
        exact_down: shape (J, I).
        up: as ``exact_up``.
        down: as ``exact_down``.
    """

    scaled: Tensor
    exact_up: Tensor | None
    exact_down: Tensor
    up: Tensor | None
    down: Tensor


def _folded(core: Tensor, inner: Tensor | None, out: Tensor | None, scale: float, dtype: torch.dtype) -> Folded:
    scaled = _scaled(core, scale)
    exact_up, exact_down = _fold(scaled, inner, out)

    if exact_up is None:
        up = None
    else:
        up = device.cast(exact_up, dtype)

    return Folded(scaled, exact_up, exact_down, up, device.cast(exact_down, dtype))


def _scaled(core: Tensor, scale: float) -> Tensor:
    """``scale * core``, without a copy where the scale is 1."""
    if scale == 1:
        return core
    return scale * core


def _folds_down(core: Tensor, inner: Tensor | None) -> bool:
    """Whether the core goes into ``down``, because its first rank is the smaller one. core: (Jo, Ji)."""
    return inner is None or core.shape[0] <= core.shape[1]


def _fold(core: Tensor, inner: Tensor | None, out: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """The form as up (O, J) @ down (J, I), the core in the factor that leaves the smaller J; up None: the identity."""
    if inner is None:
        return out, core
    if _folds_down(core, inner):
        return out, torch.mm(core, inner.t())
    return core if out is None else torch.mm(out, core), inner.t()


def _unfold(
    core: Tensor, inner: Tensor | None, out: Tensor | None, grad_down: Tensor, grad_up: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of core, inner and out from those of up and down, in the dtype of the adapter."""
    # The three cases of ``_fold``, differentiated: a core that is ``down`` itself, one that was multiplied into it
    # (down = core @ inner.T), and one that was multiplied into ``up`` (up = out @ core, down = inner.T).
    grad_down = device.cast(grad_down, core.dtype)

    if grad_up is not None:
        grad_up = device.cast(grad_up, core.dtype)
    if inner is None:
        return grad_down, None, grad_up
    if _folds_down(core, inner):
        return torch.mm(grad_down, inner), torch.mm(grad_down.t(), core), grad_up

    if grad_up is None:
        raise AssertionError("up is a matrix when the core is folded into it")
    if out is None:
        return grad_up, grad_down.t(), None

    return torch.mm(out.t(), grad_up), grad_down.t(), torch.mm(grad_up, core.t())


def _plain_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    core: Tensor,
    inner: Tensor | None,
    out: Tensor | None,
    scale: float,
) -> Tensor:
    """The same in plain operations, for the gradient of a gradient."""
    return F.linear(x, weight, bias) + plain.linear(None, Tucker(core, (out, inner)), scale, x)
