"""The fused linear layer as one operation, for a compiler.

Traced as separate products, the sum in place becomes a copy and a sum, or a second pass over the output. So a compiler
sees ``flora::linear`` and ``flora::linear_backward``, which do what ``fused_linear`` does; it folds the small matrices
itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, library

from flora.layers import gate as fused
from flora.layers.conv.channels import on_cpu
from flora.layers.linear import fused as fused_linear
from flora.layers.linear.fused import gradients_of_products, products
from flora.layers.plain import fold_matrix
from flora.tucker.form import Tucker


def with_change(weight: Tensor, bias: Tensor | None, form: Tucker, scale: float, input: Tensor) -> Tensor | None:
    """``linear`` of this file or of ``fused_linear``, whichever may be used; None where neither may."""

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        if fused.can_fuse(x, weight):
            return fused_linear.linear(weight, bias, form, scale, x)
        return linear(weight, bias, form, scale, x) if fused.can_compile(x, weight) else None

    return fused.in_its_dtype(run, input, weight, bias)


def linear(weight: Tensor, bias: Tensor | None, form: Tucker, scale: float, x: Tensor) -> Tensor | None:
    """``F.linear(x, weight + scale * form, bias)``, or None where dW is no product of two matrices.

    Args:
        weight: (out, in), as the form.
        bias: (out,).
        form: of the update, without the scale.
        scale: of the update.
        x: (..., in).
    """
    up, down = fold_matrix(form, scale)
    if up is None:
        return None
    rows = x.reshape(-1, x.shape[-1])
    small, wanted = (up.to(x.dtype), down.to(x.dtype)), (x.requires_grad, bias is not None and bias.requires_grad)
    y: Tensor = _Linear.apply(rows, weight, bias, *small, *wanted)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], y.shape[-1])


class _Linear(torch.autograd.Function):
    """What a compiler traces: x (T, I), weight (O, I), up (O, J), down (J, I) -> (T, O).

    The gradient is not registered with the operation: then every call of it would pass through Python once more.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        up: Tensor,
        down: Tensor,
        wants_x: bool,
        wants_bias: bool,
    ) -> Tensor:
        y, hidden = torch.ops.flora.linear(x, weight, bias, up, down)
        ctx.save_for_backward(x, weight, up, down, hidden)
        ctx.wanted = wants_x, wants_bias
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        wants_x, wants_bias = ctx.wanted
        grad_x, grad_up, grad_down = torch.ops.flora.linear_backward(grad, *ctx.saved_tensors, wants_x)
        grad_bias = grad.sum(0) if wants_bias else None
        return grad_x if wants_x else None, None, grad_bias, grad_up, grad_down, None, None


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The output and the hidden tensor (T, J)."""
    y, hidden = products(x, weight, bias, up, down)
    if hidden is None:
        raise AssertionError("up is a matrix here")
    return y, hidden


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, up: Tensor, down: Tensor, hidden: Tensor, wants_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, empty if it is not wanted, of up and of down."""
    matrix = weight if wants_x else None
    grad_x, grad_down, grad_up = gradients_of_products(grad.contiguous(), x, matrix, False, up, down, hidden, up.dtype)
    if grad_up is None:
        raise AssertionError("up is a matrix here")
    return x.new_empty(0) if grad_x is None else grad_x, grad_up, grad_down


def _forward_shapes(x: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight.shape[0]), _narrow(x, x.shape[0], down.shape[0])


def _backward_shapes(
    grad: Tensor, x: Tensor, weight: Tensor, up: Tensor, down: Tensor, hidden: Tensor, wants_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = x.new_empty(x.shape if wants_x else (0,))
    return grad_x, _narrow(x, *up.shape), _narrow(x, *down.shape[::-1]).t()


def _narrow(like: Tensor, rows: int, columns: int) -> Tensor:
    """An empty tensor in the layout that narrow products have."""
    return like.new_empty(columns, rows).t() if on_cpu(like) else like.new_empty(rows, columns)


library.define("flora::linear", "(Tensor x, Tensor weight, Tensor? bias, Tensor up, Tensor down) -> (Tensor, Tensor)")
library.define(
    "flora::linear_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor up, Tensor down, Tensor hidden, bool wants_x)"
    " -> (Tensor, Tensor, Tensor)",
)
library.impl("flora::linear", "default", _forward)
library.impl("flora::linear_backward", "default", _backward)
library.register_fake("flora::linear", _forward_shapes)
library.register_fake("flora::linear_backward", _backward_shapes)
