"""What a compiler is given for a linear layer, beside its change or with W + dW.

Beside: traced as separate products, the sum in place becomes a copy and a sum, or a second pass over the output. So a
compiler sees ``flora::linear`` and ``flora::linear_backward``, which do what ``linear/fused.py`` does; it folds the
small matrices itself. With W + dW it sees plain products; in half precision the gradient of the weight keeps the sums
of its product unrounded, where the device gives them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, library
from torch.nn import functional as F

from flora.layers import device
from flora.layers.linear.products import gradients_of_products, products
from flora.layers.plain import fold_matrix
from flora.tucker.form import Tucker


def linear(weight: Tensor, bias: Tensor | None, form: Tucker, scale: float, x: Tensor) -> Tensor | None:
    """``F.linear(x, weight + scale * form, bias)``, or None where dW is no product of two matrices.

    Args:
        weight: shape (out, in), as the form.
        bias: shape (out,).
        form: of the update, without the scale.
        scale: of the update.
        x: shape (..., in).
    """
    # The fold stays outside of the operation: the compiler fuses it, and autograd differentiates it.
    up, down = fold_matrix(form, scale)
    if up is None:
        return None

    rows = x.reshape(-1, x.shape[-1])
    wants_x, wants_bias = x.requires_grad, bias is not None and bias.requires_grad
    y: Tensor = _Linear.apply(rows, weight, bias, up, down, wants_x, wants_bias)  # type: ignore[no-untyped-call]

    return y.view(*x.shape[:-1], y.shape[-1])


def dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` in the half precision of x, with a weight in float32 and its gradient in float32.

    Args:
        x: shape (..., in).
        weight: shape (out, in).
        bias: shape (out,).
    """
    rows = x.reshape(-1, x.shape[-1])
    wants_x, wants_bias = x.requires_grad, bias is not None and bias.requires_grad
    y: Tensor = _Dense.apply(rows, weight, bias, wants_x, wants_bias)  # type: ignore[no-untyped-call]

    return y.view(*x.shape[:-1], y.shape[-1])


class _Dense(torch.autograd.Function):
    """x (T, I), weight (O, I), bias (O,) -> (T, O)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, wants_x: bool, wants_bias: bool) -> Tensor:
        weight = weight.to(x.dtype)
        ctx.save_for_backward(x, weight)
        ctx.wanted = wants_x, wants_bias

        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        wants_x, wants_bias = ctx.wanted
        grad_weight = device.cast(device.product(grad.t(), x, torch.float32), torch.float32)

        return grad @ weight if wants_x else None, grad_weight, grad.sum(0) if wants_bias else None, None, None


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
        narrow_up, narrow_down = up.to(x.dtype), down.to(x.dtype)
        y, hidden = torch.ops.flora.linear(x, weight, bias, narrow_up, narrow_down)
        ctx.save_for_backward(x, weight, narrow_up, narrow_down, hidden)
        ctx.wanted, ctx.dtype = (wants_x, wants_bias), up.dtype

        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        wants_x, wants_bias = ctx.wanted
        grad_x, grad_up, grad_down = torch.ops.flora.linear_backward(grad, *ctx.saved_tensors, wants_x, ctx.dtype)

        grad_bias = grad.sum(0) if wants_bias else None

        return grad_x if wants_x else None, None, grad_bias, grad_up, grad_down, None, None


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The output and the hidden tensor (T, J)."""
    y, hidden = products(x, weight, bias, up, down)
    if hidden is None:
        raise AssertionError("up is a matrix here")
    return y, hidden


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, up: Tensor, down: Tensor, hidden: Tensor, wants_x: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, empty if it is not wanted, and those of up and of down in ``dtype``."""
    beside = weight if wants_x else None

    found = gradients_of_products(grad.contiguous(), x, None, beside, up, down, hidden, dtype)
    if found.up is None:
        raise AssertionError("up is a matrix here")

    grad_x = x.new_empty(0) if found.x is None else found.x

    return grad_x, device.cast(found.up, dtype), device.cast(found.down, dtype)


def _forward_shapes(x: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight.shape[0]), device.empty_narrow(x, x.shape[0], down.shape[0])


def _backward_shapes(
    grad: Tensor, x: Tensor, weight: Tensor, up: Tensor, down: Tensor, hidden: Tensor, wants_x: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, like = x.new_empty(x.shape if wants_x else (0,)), x.new_empty(0, dtype=dtype)
    return grad_x, device.empty_narrow(like, *up.shape), device.empty_narrow(like, *down.shape[::-1]).t()


# The compiler asks the ``fake`` versions for shapes and memory layouts, and never looks into the real ones.
library.define("flora::linear", "(Tensor x, Tensor weight, Tensor? bias, Tensor up, Tensor down) -> (Tensor, Tensor)")
library.define(
    "flora::linear_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor up, Tensor down, Tensor hidden, bool wants_x, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor)",
)
library.impl("flora::linear", "default", _forward)
library.impl("flora::linear_backward", "default", _backward)
library.register_fake("flora::linear", _forward_shapes)
library.register_fake("flora::linear_backward", _backward_shapes)
