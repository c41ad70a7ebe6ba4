"""The fused function of linear layers, in eager mode and, as one operation, under a compiler; ``fused`` tells why."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flora import kernels
from flora.channels import on_cpu, product
from flora.fused import again, summed, sums_weights, without_autocast
from flora.tucker import Tucker

CACHED = 2**19  # numbers that a CPU's cache holds
LEAST_ROWS = 64  # that a product is worth its call for


def linear(weight: Tensor, bias: Tensor | None, form: Tucker, scale: float, x: Tensor) -> Tensor:
    """``F.linear(x, weight + scale * form, bias)``. x: (..., in), weight and form: (out, in)."""
    out, inner = form.factors
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    y: Tensor = _Linear.apply(rows, weight, bias, form.core, inner, out, scale)  # type: ignore[no-untyped-call]
    return y if x.ndim == 2 else y.view(*x.shape[:-1], y.shape[-1])


def compiled(weight: Tensor, bias: Tensor | None, form: Tucker, scale: float, x: Tensor) -> Tensor | None:
    """The same for a compiler, to which the sums in place are one operation; None where dW is no product.

    A compiler that sees them one by one copies the change first, or reads and writes the output once more.
    """
    up, down = kernels.fold_matrix(form, scale)
    if up is None:
        return None
    rows = x.reshape(-1, x.shape[-1])
    y: Tensor = torch.ops.flora.linear(rows, weight, bias, up.to(x.dtype), down.to(x.dtype))[0]
    return y.view(*x.shape[:-1], y.shape[-1])


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
    ) -> Tensor:
        scaled = core if scale == 1 else scale * core
        up, down = _skinny(scaled, inner, out, x.dtype)
        ctx.scale, ctx.whole, hidden = scale, sums_weights(x, weight), None
        if ctx.whole:
            y = F.linear(x, summed(weight, up, down), bias)
        else:
            y, hidden = _products(x, weight, bias, up, down)
        made = (None, None, None) if on_cpu(x) else (scaled, up, down)
        ctx.save_for_backward(x, weight, bias, core, inner, out, hidden, *made)
        return y

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, bias, core, inner, out, hidden, scaled, up, down = ctx.saved_tensors
        scale = ctx.scale
        if torch.is_grad_enabled():
            return again(ctx, _plain_linear, (x, weight, bias, core, inner, out), (scale,), grad)
        if scaled is None:
            scaled = core if scale == 1 else scale * core
            up, down = _skinny(scaled, inner, out, x.dtype)
        matrix = None
        if ctx.needs_input_grad[0]:
            matrix = summed(weight, up, down) if ctx.whole else weight
        grad_x, grad_down, grad_up = _gradients(grad.contiguous(), x, matrix, ctx.whole, up, down, hidden, core.dtype)
        grad_core, grad_inner, grad_out = _unfold(scaled, inner, out, grad_down, grad_up)
        if scale != 1:
            grad_core = scale * grad_core
        grad_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, None, grad_bias, grad_core, grad_inner, grad_out, None


def _products(
    x: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor | None, down: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The output and the hidden tensor (T, J): the change is written first, the layer's own product added to it."""
    hidden = None
    if up is None:
        y = torch.mm(x, down.t())
        y = y if bias is None else y.add_(bias)
    else:
        hidden = _narrow(x, down.t())
        y = _widened(hidden, up, bias)
    return y.addmm_(x, weight.t()), hidden


def _gradients(
    grad: Tensor,
    x: Tensor,
    matrix: Tensor | None,
    whole: bool,
    up: Tensor | None,
    down: Tensor,
    hidden: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Of x (T, I), down (J, I) and up (O, J); matrix is the weight, or with the change in it if ``whole``."""
    back, grad_down, grad_up = _of_skinny(x, grad, up, down, hidden, dtype)
    if matrix is None:
        return None, grad_down, grad_up
    grad_x = torch.mm(grad, matrix) if whole else torch.mm(back, down).addmm_(grad, matrix)
    return grad_x, grad_down, grad_up


def _of_skinny(
    x: Tensor, grad: Tensor, up: Tensor | None, down: Tensor, hidden: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of the hidden tensor (T, J), of down (J, I) and of up (O, J).

    Each product reads x or grad once more; on a CPU they take turns on some rows, which stay in its cache.
    """
    if up is None:
        return grad, _outer(x, grad, dtype).t(), None
    if on_cpu(x) and x.dtype in (torch.float32, torch.float64):  # in half precision sums would be rounded
        parts = math.ceil(max(1, len(x)) / max(LEAST_ROWS, CACHED // (x.shape[1] + grad.shape[1])))
        if parts > 1:
            return _in_turns(x, grad, up, down, hidden, math.ceil(len(x) / parts))
    hidden = _narrow(x, down.t()) if hidden is None else hidden
    back = _narrow(grad, up)
    return back, _outer(x, back, dtype).t(), _outer(grad, hidden, dtype)


def _in_turns(
    x: Tensor, grad: Tensor, up: Tensor, down: Tensor, hidden: Tensor | None, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``_of_skinny`` returns, ``size`` rows at a time."""
    seen, behind, back = x.split(size), grad.split(size), []
    known = [None] * len(seen) if hidden is None else hidden.t().split(size, 1)
    for rows, grad_rows, own in zip(seen, behind, known, strict=True):
        inside = torch.mm(down, rows.t()) if own is None else own
        back.append(torch.mm(up.t(), grad_rows.t()))
        if len(back) == 1:
            grad_down, grad_up = torch.mm(back[0], rows), torch.mm(inside, grad_rows)
        else:
            grad_down.addmm_(back[-1], rows)
            grad_up.addmm_(inside, grad_rows)
    return torch.cat(back, 1).t(), grad_down, grad_up.t()


def _narrow(x: Tensor, matrix: Tensor) -> Tensor:
    """``x @ matrix``, (T, C) and (C, J) -> (T, J); on a CPU the transposed product, faster at a small rank."""
    return torch.mm(matrix.t(), x.t()).t() if on_cpu(x) else torch.mm(x, matrix)


def _widened(hidden: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
    """``hidden @ up.T + bias`` written once. hidden: (T, J), up: (O, J) -> (T, O)."""
    if bias is None:
        return torch.mm(hidden, up.t())
    if not on_cpu(hidden):
        return torch.addmm(bias, hidden, up.t())
    hidden = torch.cat([hidden.t(), hidden.new_ones(1, len(hidden))])  # a CPU would write the bias first
    return torch.mm(hidden.t(), torch.cat([up, bias.unsqueeze(1)], 1).t())


def _outer(wide: Tensor, narrow: Tensor, dtype: torch.dtype) -> Tensor:
    """``wide.T @ narrow``, (T, C) and (T, J) -> (C, J), in the faster order; ``dtype`` as of ``product``."""
    if on_cpu(wide):
        return torch.mm(narrow.t(), wide).t()
    return product(wide.t(), narrow, dtype)


def _folds_down(core: Tensor, inner: Tensor | None) -> bool:
    return inner is None or core.shape[0] <= core.shape[1]


def _skinny(core: Tensor, inner: Tensor | None, out: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
    """The form as up (O, J) @ down (J, I); up is None for the identity."""
    if inner is None:
        up, down = out, core
    elif _folds_down(core, inner):
        up, down = out, torch.mm(core, inner.t())
    else:
        up, down = (core if out is None else torch.mm(out, core)), inner.t()
    return None if up is None else up.to(dtype), down.to(dtype)


def _unfold(
    core: Tensor, inner: Tensor | None, out: Tensor | None, grad_down: Tensor, grad_up: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of core, inner and out from those of up and down, in the dtype of the adapter."""
    grad_down = grad_down.to(core.dtype)
    grad_up = None if grad_up is None else grad_up.to(core.dtype)
    if inner is None:
        return grad_down, None, grad_up
    if _folds_down(core, inner):
        return torch.mm(grad_down, inner), torch.mm(grad_down.t(), core), grad_up
    if grad_up is None:
        raise AssertionError("up is a matrix when the core is folded into it")
    grad_core = grad_up if out is None else torch.mm(out.t(), grad_up)
    return grad_core, grad_down.t(), None if out is None else torch.mm(grad_up, core.t())


def _plain_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    core: Tensor,
    inner: Tensor | None,
    out: Tensor | None,
    scale: float,
) -> Tensor:
    return F.linear(x, weight, bias) + kernels.linear(None, Tucker(core, (out, inner)), scale, x)


def _forward_op(x: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """For a compiler: x (T, I), weight (O, I), up (O, J), down (J, I) -> output (T, O) and hidden (T, J)."""
    y, hidden = _products(x, weight, bias, up, down)
    if hidden is None:
        raise AssertionError("up is a matrix here")
    return y, hidden


def _backward_op(
    grad: Tensor, x: Tensor, weight: Tensor, up: Tensor, down: Tensor, hidden: Tensor, wants_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x (empty if not wanted), up and down."""
    matrix = weight if wants_x else None
    grad_x, grad_down, grad_up = _gradients(grad.contiguous(), x, matrix, False, up, down, hidden, up.dtype)
    if grad_up is None:
        raise AssertionError("up is a matrix here")
    return x.new_empty(0) if grad_x is None else grad_x, grad_up, grad_down


def _remember(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, _, up, down = inputs
    ctx.save_for_backward(x, weight, up, down, output[1])


def _differentiate(ctx: Any, grad: Tensor, grad_hidden: Tensor | None) -> Any:
    wanted = ctx.needs_input_grad
    found = torch.ops.flora.linear_backward(grad, *ctx.saved_tensors, wanted[0])
    return found[0] if wanted[0] else None, None, grad.sum(0) if wanted[2] else None, found[1], found[2]


def _forward_shapes(x: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight.shape[0]), _empty(x, x.shape[0], down.shape[0])


def _backward_shapes(
    grad: Tensor, x: Tensor, weight: Tensor, up: Tensor, down: Tensor, hidden: Tensor, wants_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = x.new_empty(x.shape if wants_x else (0,))
    return grad_x, _empty(x, *up.shape), _empty(x, *down.shape[::-1]).t()


def _empty(x: Tensor, rows: int, columns: int) -> Tensor:
    """In the layout of ``_narrow`` and ``_outer``."""
    return x.new_empty(columns, rows).t() if on_cpu(x) else x.new_empty(rows, columns)


torch.library.define(
    "flora::linear", "(Tensor x, Tensor weight, Tensor? bias, Tensor up, Tensor down) -> (Tensor, Tensor)"
)
torch.library.define(
    "flora::linear_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor up, Tensor down, Tensor hidden, bool wants_x)"
    " -> (Tensor, Tensor, Tensor)",
)
torch.library.impl("flora::linear", "default", _forward_op)
torch.library.impl("flora::linear_backward", "default", _backward_op)
torch.library.register_fake("flora::linear", _forward_shapes)
torch.library.register_fake("flora::linear_backward", _backward_shapes)
torch.library.register_autograd("flora::linear", _differentiate, setup_context=_remember)
