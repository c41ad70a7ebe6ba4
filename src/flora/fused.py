"""The factored path beside a frozen layer, as one autograd function that keeps the input and little else.

Written as separate operations, an adapter beside a layer reads and writes the activations again for each product,
scaling and sum, and keeps every intermediate. Here the change is added in place into the layer's own output and into
the gradient of its input, the core is folded into the factor that leaves the smaller inner rank, and the small
intermediates are computed again in backward. Products are ordered so that the skinny side is contiguous, which the BLAS
libraries reward.

``can_fuse`` says when it may be used; otherwise, and for the gradient of a gradient, ``kernels`` does the same in plain
operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flora import kernels
from flora.tucker import Tucker

SUM_PAYS_ABOVE = 1.5  # tokens per width of the input (or output) from which a linear layer runs with W + dW


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
        hidden = None
        if _sums_weights(x.shape[0], x.shape[1], weight):
            y = F.linear(x, _stand_in(weight, up, down), bias)
        else:
            y = F.linear(x, weight, bias)
            hidden = x @ down.T.contiguous()
            if up is None:
                y += hidden
            else:
                y.addmm_(hidden, up.T)
        ctx.save_for_backward(x, weight, bias, core, inner, out, None if up is None else hidden)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, bias, core, inner, out, hidden = ctx.saved_tensors
        scale = ctx.scale
        if torch.is_grad_enabled():
            return again(ctx, _plain_linear, (x, weight, bias, core, inner, out), (scale,), grad)
        grad = grad.contiguous()
        up, down = _skinny(scale * core, inner, out, x.dtype)
        back = grad if up is None else grad @ up  # (T, J)
        grad_x = None
        if ctx.needs_input_grad[0]:
            if _sums_weights(x.shape[0], grad.shape[1], weight):
                grad_x = grad @ _stand_in(weight, up, down)
            else:
                grad_x = grad @ weight
                grad_x.addmm_(back, down)
        grad_down = back.T @ x  # (J, I)
        grad_up = None
        if up is not None:
            hidden = x @ down.T.contiguous() if hidden is None else hidden
            grad_up = (hidden.T @ grad).T  # (O, J)
        grad_core, grad_inner, grad_out = _unfold(scale * core, inner, out, grad_down, grad_up)
        grad_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, None, grad_bias, scale * grad_core, grad_inner, grad_out, None


def _sums_weights(tokens: int, width: int, weight: Tensor) -> bool:
    """Whether one product with W + dW is cheaper than adding into the (tokens, other) result of the one with W.

    The sum has ``width`` rows of that many entries. Not in half precision: it would round a small dW away.
    """
    return weight.dtype in (torch.float32, torch.float64) and tokens > SUM_PAYS_ABOVE * width


def _stand_in(weight: Tensor, up: Tensor | None, down: Tensor) -> Tensor:
    """W + dW by one product into a copy of W."""
    return weight + down if up is None else torch.addmm(weight, up, down)


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
