"""The products of a linear layer with ``W + up @ down``: its output, and the gradients by narrow tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flora.layers import device


class Gradients(NamedTuple):
    """Of x (T, I), None where it is not wanted, down (J, I) and up (O, J), None without up."""

    x: Tensor | None
    down: Tensor
    up: Tensor | None


class Narrow(NamedTuple):
    """The gradients of the hidden tensor (T, J), of down (J, I) and of up (O, J), None without up."""

    hidden: Tensor
    down: Tensor
    up: Tensor | None


def sum_of_weights(weight: Tensor, up: Tensor | None, down: Tensor) -> Tensor:
    """``weight + up @ down``; weight (O, I), up (O, J) or None for the identity, down (J, I)."""
    return device.add_update(weight, up, down.t(), 1.0)


def products(
    x: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor | None, down: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The layer's output and the hidden tensor (T, J), which is None without up.

    The change is written first, and the layer's own product added to it: so the change costs no pass over the output
    beyond the one that the bias takes in any case.

    Args:
        x: shape (T, I).
        weight: shape (O, I).
        bias: shape (O,).
        up: shape (O, J), None for the identity.
        down: shape (J, I).
    """
    hidden = None

    if up is None:
        y = torch.mm(x, down.t())

        if bias is not None:
            y = y.add_(bias)
    else:
        hidden = device.project(x, down.t())
        y = device.widen(hidden, up, bias)

    return y.addmm_(x, weight.t()), hidden


def gradients_of_products(
    grad: Tensor,
    x: Tensor,
    changed: Tensor | None,
    beside: Tensor | None,
    up: Tensor | None,
    down: Tensor,
    hidden: Tensor | None,
    dtype: torch.dtype,
) -> Gradients:
    """The gradients of a linear layer and its change.

    Args:
        grad: of the output, shape (T, O).
        x: shape (T, I).
        changed: W + dW, shape (O, I), where the layer ran with it and the gradient of x is wanted.
        beside: W, shape (O, I), where the change ran beside it and the gradient of x is wanted.
        up: shape (O, J), None for the identity.
        down: shape (J, I).
        hidden: shape (T, J) if it was kept.
        dtype: of the gradients of down and up, where the device gives it without rounding first.
    """
    # The gradient of x is one product with the weight that ran: with W + dW, or with W, added to what came back through
    # the change (``addmm_`` adds the large product into the small one, which saves a pass over grad_x).
    narrow = _narrow_gradients(x, grad, up, down, hidden, dtype)
    grad_x = None

    if changed is not None:
        grad_x = torch.mm(grad, changed)
    elif beside is not None:
        grad_x = torch.mm(narrow.hidden, down).addmm_(grad, beside)

    return Gradients(grad_x, narrow.down, narrow.up)


def _narrow_gradients(
    x: Tensor, grad: Tensor, up: Tensor | None, down: Tensor, hidden: Tensor | None, dtype: torch.dtype
) -> Narrow:
    """What ``Narrow`` says. Each of four products reads x or grad once more, unless they take turns on some rows."""
    if up is None:
        return Narrow(grad, device.outer(x, grad, dtype).t(), None)

    together = device.rows_at_a_time(len(x), x.shape[1] + grad.shape[1], x)
    if together < len(x):
        return _in_turns(x, grad, up, down, hidden, together)

    if hidden is None:
        hidden = device.project(x, down.t())

    grad_hidden = device.project(grad, up)

    return Narrow(grad_hidden, device.outer(x, grad_hidden, dtype).t(), device.outer(grad, hidden, dtype))


def _in_turns(x: Tensor, grad: Tensor, up: Tensor, down: Tensor, hidden: Tensor | None, together: int) -> Narrow:
    """The same on some rows at a time, all of it transposed, so that rows of x and grad are fetched once."""
    # A CPU's cache holds some rows of x and of the gradient at a time. While they are there, all four products use
    # them: two give the narrow tensors of these rows, two add to the gradients of down and up. Everything is transposed
    # because a product with few rows is faster than one with few columns.
    grad_hidden: list[Tensor] = []
    grad_down = grad_up = x.new_empty(0)
    for start in range(0, len(x), together):
        rows, grad_rows = x[start : start + together], grad[start : start + together]

        # shape: (J, some rows)
        if hidden is None:
            some_hidden = torch.mm(down, rows.t())
        else:
            some_hidden = hidden[start : start + together].t()

        grad_hidden.append(torch.mm(up.t(), grad_rows.t()))

        if start == 0:
            grad_down, grad_up = torch.mm(grad_hidden[0], rows), torch.mm(some_hidden, grad_rows)
        else:
            grad_down.addmm_(grad_hidden[-1], rows)
            grad_up.addmm_(some_hidden, grad_rows)

    return Narrow(torch.cat(grad_hidden, 1).t(), grad_down, grad_up.t())
