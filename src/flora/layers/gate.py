"""When a layer and its change may be one autograd function, and what such functions share.

Written as separate operations, an adapter reads and writes the activations again for each product, scaling and sum, and
keeps every intermediate. The functions of ``summed``, ``linear``, ``conv`` and ``experts`` keep the layer's input and
small tensors. They are right in eager mode with a frozen weight; wherever something watches or rewrites the operations
(a compiler, functorch, forward-mode gradients), and for the gradient of a gradient, the same is written in plain
operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
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
        autocast: what to run it in. Autocast is off within, so that the small matrices keep the dtype of the adapter.
    """

    x: Tensor
    bias: Tensor | None
    fused: bool
    autocast: AbstractContextManager[Any]


_AS_IT_IS = nullcontext()


def prepare(x: Tensor, weight: Tensor, bias: Tensor | None) -> Ready | None:
    """How a layer is to be run, or None where its dtypes do not fit each other as they are."""
    kind = x.device.type
    fused = is_plain_eager() and not weight.requires_grad

    if not casts(kind):
        if x.dtype != weight.dtype:
            return None
        return Ready(x, bias, fused, _AS_IT_IS)

    # Autocast does not touch float64, so neither does the layer.
    if torch.float64 in (x.dtype, weight.dtype):
        return None

    # The layer itself would be cast by autocast; an autograd function is not, so its input and bias are cast here.
    dtype = torch.get_autocast_dtype(kind)
    bias = bias.to(dtype) if bias is not None else None

    return Ready(x.to(dtype), bias, fused, torch.autocast(kind, enabled=False))


def as_it_is(x: Tensor, weight: Tensor) -> bool:
    """Whether ``prepare`` would change nothing and allow the autograd functions, told in less time."""
    same = x.dtype == weight.dtype and not weight.requires_grad
    return same and not torch._C._is_any_autocast_enabled() and is_plain_eager()


def casts(kind: str) -> bool:
    """Whether autocast is on for this type of device."""
    return kind != "meta" and torch.is_autocast_enabled(kind)


def outside_autocast(kind: str) -> AbstractContextManager[Any]:
    """Autocast off for this type of device, so that the small matrices keep the dtype of the adapter."""
    if not casts(kind):
        return _AS_IT_IS
    return torch.autocast(kind, enabled=False)


def is_plain_eager() -> bool:
    """Whether nothing watches or rewrites the operations: no compiler, trace, functorch or forward-mode gradient."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def is_walled_off() -> bool:
    """Whether what runs now may use nothing that has a graph from outside: a part that backward runs once more.

    A checkpointed block has hooks on what is saved for backward, or runs within a backward.
    """
    return (
        torch._C._autograd._top_saved_tensors_default_hooks(True) is not None or torch._C._current_graph_task_id() != -1
    )


def call_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """The call of an autograd function where functorch is known not to be active.

    ``apply`` first looks through all arguments for its tensors, which takes the host as long as two launches.
    """
    return super(torch.autograd.Function, function).apply  # type: ignore[misc, no-any-return]


def is_exporting() -> bool:
    """Whether an exporter traces the model, which needs operations of torch alone."""
    # torch.compiler.is_exporting() is True under older compilers as well, which do not export.
    return getattr(torch.compiler, "_is_exporting_flag", False)


def is_compiled() -> bool:
    """Whether a compiler traces the model that takes operations of this library as they are."""
    return torch.compiler.is_dynamo_compiling() and not is_exporting()


def without_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward that computes in the dtypes of its tensors also where it is called under autocast."""

    @wraps(backward)
    def wrapped(ctx: Any, grad: Tensor) -> Any:
        if not torch._C._is_any_autocast_enabled() or not casts(grad.device.type):
            return backward(ctx, grad)
        with torch.autocast(grad.device.type, enabled=False):
            return backward(ctx, grad)

    return wrapped


def again(ctx: Any, plain: Any, inputs: Sequence[Any], rest: Sequence[Any], grad: Tensor | Sequence[Tensor]) -> Any:
    """The gradient with a graph (double backward): the same step in plain operations."""
    # autograd calls backward with grad enabled when the gradient itself is to be differentiated (create_graph=True). An
    # autograd function that calls fused kernels has no graph to offer then, so the layer is run once more in operations
    # that torch differentiates, and its gradient is taken with a graph.
    wanted = {index: value for index, value in enumerate(inputs) if value is not None and ctx.needs_input_grad[index]}
    with torch.enable_grad():
        y = plain(*inputs, *rest)
        found = torch.autograd.grad(y, list(wanted.values()), grad, create_graph=True)
    gradients = dict(zip(wanted, found, strict=True))
    return tuple(gradients.get(index) for index in range(len(ctx.needs_input_grad)))
