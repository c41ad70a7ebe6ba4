"""The fused function of linear layers; ``fused`` says what it is about."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flora.layers import plain as kernels
from flora.layers.conv.channels import on_cpu, product
from flora.layers.gate import again, summed, sums_weights, without_autocast
from flora.tucker.form import Tucker

CACHED = 2**19  # numbers that a CPU's cache holds
LEAST_ROWS = 64  # that a product is worth its call for
BLOCK = 16  # rows that products work on at a time; others waste a part of the last block


def linear(weight: Tensor, bias: Tensor | None, form: Tucker, scale: float, x: Tensor) -> Tensor:
    """``F.linear(x, weight + scale * form, bias)``. x: (..., in), weight and form: (out, in)."""
    out, inner = form.factors
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    y: Tensor = _Linear.apply(rows, weight, bias, form.core, inner, out, scale)  # type: ignore[no-untyped-call]
    return y if x.ndim == 2 else y.view(*x.shape[:-1], y.shape[-1])


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
        scaled = _scaled(core, scale)
        up, down = _skinny(scaled, inner, out, x.dtype)
        ctx.scale, ctx.whole, hidden = scale, sums_weights(x, weight), None
        if ctx.whole:
            y = F.linear(x, summed(weight, up, down), bias)
        else:
            y, hidden = products(x, weight, bias, up, down)
        made = (None, None, None) if on_cpu(x) else (scaled, up, down)
        ctx.save_for_backward(x, weight, bias, core, inner, out, hidden, *made)
        return y

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, bias, core, inner, out, hidden, scaled, up, down = ctx.saved_tensors
        scale, whole = ctx.scale, ctx.whole
        if torch.is_grad_enabled():
            return again(ctx, _plain_linear, (x, weight, bias, core, inner, out), (scale,), grad)
        if scaled is None:
            scaled = _scaled(core, scale)
            up, down = _skinny(scaled, inner, out, x.dtype)
        matrix = weight if ctx.needs_input_grad[0] else None
        grad_x, grad_down, grad_up = gradients_of_products(
            grad.contiguous(), x, matrix, whole, up, down, hidden, core.dtype
        )
        grad_core, grad_inner, grad_out = _unfold(scaled, inner, out, grad_down, grad_up)
        grad_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, None, grad_bias, _scaled(grad_core, scale), grad_inner, grad_out, None


def products(
    x: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor | None, down: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The output (T, O) and the hidden tensor (T, J), None without up (O, J); down: (J, I).

    The change is written first, the layer's own product added to it.
    """
    hidden = None
    if up is None:
        y = torch.mm(x, down.t())
        y = y if bias is None else y.add_(bias)
    else:
        hidden = narrow(x, down.t())
        y = _widened(hidden, up, bias)
    return y.addmm_(x, weight.t()), hidden


def gradients_of_products(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    whole: bool,
    up: Tensor | None,
    down: Tensor,
    hidden: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Of x (T, I), down (J, I) and up (O, J).

    Args:
        grad: (T, O).
        x: (T, I).
        weight: (O, I); None if the gradient of x is not wanted.
        whole: whether the layer ran with W + dW.
        up: (O, J); None for the identity.
        down: (J, I).
        hidden: (T, J) if it was kept.
        dtype: of the last two gradients, where the device gives it without rounding first.
    """
    back, grad_down, grad_up = _of_skinny(x, grad, up, down, hidden, dtype)
    if weight is None:
        return None, grad_down, grad_up
    grad_x = torch.mm(grad, summed(weight, up, down)) if whole else torch.mm(back, down).addmm_(grad, weight)
    return grad_x, grad_down, grad_up


def _scaled(core: Tensor, scale: float) -> Tensor:
    return core if scale == 1 else scale * core


def _of_skinny(
    x: Tensor, grad: Tensor, up: Tensor | None, down: Tensor, hidden: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of the hidden tensor (T, J), of down (J, I) and of up (O, J).

    Each product reads x or grad once more; on a CPU they take turns on some rows, which stay in its cache.
    """
    if up is None:
        return grad, outer(x, grad, dtype).t(), None
    if on_cpu(x) and x.dtype in (torch.float32, torch.float64):  # in half precision sums would be rounded
        parts = math.ceil(max(1, len(x)) / max(LEAST_ROWS, CACHED // (x.shape[1] + grad.shape[1])))
        if parts > 1:
            size = BLOCK * math.ceil(len(x) / parts / BLOCK)
            return _in_turns(x, grad, up, down, hidden, size)
    hidden = narrow(x, down.t()) if hidden is None else hidden
    back = narrow(grad, up)
    return back, outer(x, back, dtype).t(), outer(grad, hidden, dtype)


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


def narrow(x: Tensor, matrix: Tensor) -> Tensor:
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


def outer(wide: Tensor, small: Tensor, dtype: torch.dtype) -> Tensor:
    """``wide.T @ small``, (T, C) and (T, J) -> (C, J), in the faster order; ``dtype`` as of ``product``."""
    if on_cpu(wide):
        return torch.mm(small.t(), wide).t()
    return product(wide.t(), small, dtype)


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
