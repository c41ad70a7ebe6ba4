"""The factored path beside a frozen layer, as one autograd function that keeps the input and little else.

Written as separate operations, an adapter beside a layer reads and writes the activations again for each product,
scaling and sum, and keeps every intermediate. Here the core is folded into the factor that leaves the smaller inner
rank. Where the activations outnumber the weights, the layer runs once with W + dW, and only the gradients of the small
matrices are taken in the small space. Otherwise the skinny product writes the change first, the bias with it, and the
layer's own product is added to that: so the change costs no pass over the activations beyond the one that the bias
takes in any case. The gradient of the input is made alike.

``can_fuse`` says when it may be used; otherwise, and for the gradient of a gradient, ``kernels`` does the same in plain
operations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flora import kernels
from flora.planning import SUM_PAYS_FROM
from flora.tucker import Tucker

CACHED = 2**19  # numbers that a CPU's cache holds
LEAST_ROWS = 64  # that a product is worth its call for


def can_fuse(x: Tensor, weight: Tensor) -> bool:
    """Whether the fused function does what separate operations would: eager mode, one dtype, a frozen weight."""
    return not weight.requires_grad and in_plain_eager(x, weight)


def in_plain_eager(x: Tensor, weight: Tensor) -> bool:
    """Whether nothing watches or rewrites the operations: no compiler, autocast, functorch or forward-mode gradient."""
    return not (
        torch.compiler.is_compiling()
        or x.dtype != weight.dtype
        or torch.is_autocast_enabled(x.device.type)
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def linear(weight: Tensor, bias: Tensor | None, form: Tucker, scale: float, x: Tensor) -> Tensor:
    """``F.linear(x, weight + scale * form, bias)``. x: (..., in), weight and form: (out, in)."""
    out, inner = form.factors
    rows = x.reshape(-1, x.shape[-1])
    y: Tensor = _Linear.apply(rows, weight, bias, form.core, inner, out, scale)  # type: ignore[no-untyped-call]
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
        up, down = _skinny(scale * core, inner, out, x.dtype)
        ctx.scale, ctx.whole = scale, sums_weights(x, weight)
        if ctx.whole:
            ctx.save_for_backward(x, weight, bias, core, inner, out, None)
            return F.linear(x, summed(weight, up, down), bias)
        hidden = None if up is None else down @ x.T  # (J, T): this way round it is faster at a small rank
        y = x @ down.T if up is None or hidden is None else _product(hidden, up, bias)
        if up is None and bias is not None:
            y += bias
        y.addmm_(x, weight.T)
        ctx.save_for_backward(x, weight, bias, core, inner, out, hidden)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, bias, core, inner, out, hidden = ctx.saved_tensors
        scale = ctx.scale
        if torch.is_grad_enabled():
            return again(ctx, _plain_linear, (x, weight, bias, core, inner, out), (scale,), grad)
        grad = grad.contiguous()
        scaled = scale * core
        up, down = _skinny(scaled, inner, out, x.dtype)
        back, grad_down, grad_up = _of_skinny(x, grad, up, down, hidden)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ summed(weight, up, down) if ctx.whole else (back.T @ down).addmm_(grad, weight)
        grad_core, grad_inner, grad_out = _unfold(scaled, inner, out, grad_down, grad_up)
        grad_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, None, grad_bias, scale * grad_core, grad_inner, grad_out, None


def _of_skinny(
    x: Tensor, grad: Tensor, up: Tensor | None, down: Tensor, hidden: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of the hidden tensor (J, T), of down (J, I) and of up (O, J).

    Each product reads x or grad once more; on a CPU they take turns on some rows, which stay in its cache.
    """
    if up is None:
        return grad.T, grad.T @ x, None
    size = count = max(1, x.shape[0])
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):  # in half precision sums would be rounded
        parts = math.ceil(count / max(LEAST_ROWS, CACHED // (x.shape[1] + grad.shape[1])))
        size = math.ceil(count / parts)
    seen, behind, back = x.split(size), grad.split(size), []
    known = [None] * len(seen) if hidden is None else hidden.split(size, 1)
    for rows, grad_rows, own in zip(seen, behind, known, strict=True):
        inside = torch.mm(down, rows.T) if own is None else own
        back.append(torch.mm(up.T, grad_rows.T))
        if len(back) == 1:
            grad_down, grad_up = torch.mm(back[0], rows), torch.mm(inside, grad_rows)
        else:
            grad_down.addmm_(back[-1], rows)
            grad_up.addmm_(inside, grad_rows)
    return torch.cat(back, 1) if len(back) > 1 else back[0], grad_down, grad_up.T


def sums_weights(x: Tensor, weight: Tensor) -> bool:
    """Whether to run the layer once with W + dW instead of adding into output and gradient. x: (., in, ..).

    It pays where the activations outnumber the weights. Not in half precision: the sum would round a small dW away.
    """
    activations = x.numel() // max(1, x.shape[1]) * sum(weight.shape[:2])
    return weight.dtype in (torch.float32, torch.float64) and activations > SUM_PAYS_FROM * weight.numel()


def summed(weight: Tensor, up: Tensor | None, down: Tensor) -> Tensor:
    """W + dW by one product into a copy of W."""
    return weight + down if up is None else torch.addmm(weight, up, down)


def _product(hidden: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
    """``hidden.T @ up.T + bias`` written once: the bias is one more column. hidden: (J, T), up: (O, J) -> (T, O)."""
    if bias is not None:
        hidden = torch.cat([hidden, hidden.new_ones(1, hidden.shape[1])])
        up = torch.cat([up, bias.unsqueeze(1)], 1)
    return hidden.T @ up.T


def _folds_down(core: Tensor, inner: Tensor | None) -> bool:
    return inner is None or core.shape[0] <= core.shape[1]


def _skinny(core: Tensor, inner: Tensor | None, out: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
    """The form as up (O, J) @ down (J, I); up is None for the identity."""
    if inner is None:
        up, down = out, core
    elif _folds_down(core, inner):
        up, down = out, core @ inner.T
    else:
        up, down = (core if out is None else out @ core), inner.T
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
        return grad_down @ inner, grad_down.T @ core, grad_up
    if grad_up is None:
        raise AssertionError("up is a matrix when the core is folded into it")
    grad_core = grad_up if out is None else out.T @ grad_up
    return grad_core, grad_down.T, None if out is None else grad_up @ core.T


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


def again(ctx: Any, plain: Any, inputs: Sequence[Tensor | None], rest: Sequence[Any], grad: Tensor) -> Any:
    """The gradient with a graph of its own (double backward): the same step in plain operations."""
    wanted = {index: value for index, value in enumerate(inputs) if value is not None and ctx.needs_input_grad[index]}
    with torch.enable_grad():
        y = plain(*inputs, *rest)
        found = torch.autograd.grad(y, list(wanted.values()), grad, create_graph=True)
    grads = dict(zip(wanted, found, strict=True))
    return tuple(grads.get(index) for index in range(len(ctx.needs_input_grad)))
