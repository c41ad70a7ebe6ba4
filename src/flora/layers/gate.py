"""When a layer and its change may be one autograd function, and what such functions share.

Written as separate operations, an adapter reads and writes the activations again for each product, scaling and sum, and
keeps every intermediate. The functions of ``summed``, ``linear``, ``conv`` and ``experts`` keep the layer's input and
small tensors. They are right in eager mode with a frozen weight; wherever something watches or rewrites the operations
(a compiler, functorch, forward-mode gradients), and for the gradient of a gradient, the same is written in plain
operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Ready(NamedTuple):
    """What a layer computes with.

    Attributes:
        x: the input, under autocast in its dtype.
        bias: likewise.
        fused: whether the autograd functions may be used, rather than plain operations.
        autocast: None, or what to run it in: off within, so that the small matrices keep the dtype of the adapter.
    """

    x: Tensor
    bias: Tensor | None
    fused: bool
    autocast: AbstractContextManager[Any] | None


def prepare(x: Tensor, weight: Tensor, bias: Tensor | None) -> Ready | None:
    """How a layer is to be run, or None where its dtypes do not fit each other as they are."""
    kind = x.device.type
    fused = is_plain_eager() and not weight.requires_grad

    if not casts(kind):
        if x.dtype != weight.dtype:
            return None
        return Ready(x, bias, fused, None)

    # Autocast leaves it alone.
    if torch.float64 in (x.dtype, weight.dtype):
        return None

    dtype = torch.get_autocast_dtype(kind)

    bias = bias.to(dtype) if bias is not None else None

    return Ready(x.to(dtype), bias, fused, torch.autocast(kind, enabled=False))


def casts(kind: str) -> bool:
    """Whether autocast is on for this type of device."""
    return kind != "meta" and torch.is_autocast_enabled(kind)


def is_plain_eager() -> bool:
    """Whether nothing watches or rewrites the operations: no compiler, functorch or forward-mode gradient."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def can_fuse(x: Tensor, weight: Tensor) -> bool:
    """Whether an autograd function does what separate operations would: eager mode, one dtype, a frozen weight."""
    autocast = casts(x.device.type)
    return not weight.requires_grad and x.dtype == weight.dtype and not autocast and is_plain_eager()


def is_exporting() -> bool:
    """Whether an exporter traces the model, which needs operations of torch alone."""
    # is_exporting() is True under older compilers.
    return getattr(torch.compiler, "_is_exporting_flag", False)


def in_its_dtype(
    run: Callable[[Tensor, Tensor, Tensor | None], Tensor | None], x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor | None:
    """``run(x, weight, bias)``; under autocast with all of them in its dtype, as the layer itself would compute.

    Autocast is off within, so that the small matrices are folded in the dtype of the adapter.
    """
    kind = x.device.type
    if not casts(kind):
        return run(x, weight, bias)
    # Autocast leaves it alone.
    if torch.float64 in (x.dtype, weight.dtype):
        return None

    dtype = torch.get_autocast_dtype(kind)

    with torch.autocast(kind, enabled=False):
        return run(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def without_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward that computes in the dtypes of its tensors also where it is called under autocast."""

    @wraps(backward)
    def wrapped(ctx: Any, grad: Tensor) -> Any:
        kind = grad.device.type
        if not casts(kind):
            return backward(ctx, grad)
        with torch.autocast(kind, enabled=False):
            return backward(ctx, grad)

    return wrapped


def again(ctx: Any, plain: Any, inputs: Sequence[Any], rest: Sequence[Any], grad: Tensor) -> Any:
    """The gradient with a graph of its own (double backward): the same step in plain operations."""
    wanted = {index: value for index, value in enumerate(inputs) if value is not None and ctx.needs_input_grad[index]}
    with torch.enable_grad():
        y = plain(*inputs, *rest)
        found = torch.autograd.grad(y, list(wanted.values()), grad, create_graph=True)
    gradients = dict(zip(wanted, found, strict=True))
    return tuple(gradients.get(index) for index in range(len(ctx.needs_input_grad)))
