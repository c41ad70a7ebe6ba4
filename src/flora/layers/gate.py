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

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from flora.layers.planning import SUM_PAYS_FROM


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


def can_compile(x: Tensor, weight: Tensor) -> bool:
    """Whether a compiler is at work that may be given an operation of ours; an exporter needs torch's own."""
    exporting = getattr(torch.compiler, "_is_exporting_flag", False)  # is_exporting() is True under older compilers
    return (
        torch.compiler.is_dynamo_compiling()
        and not exporting
        and not weight.requires_grad
        and x.dtype == weight.dtype
        and not torch.is_autocast_enabled(x.device.type)
    )


def in_its_dtype(
    run: Callable[[Tensor, Tensor, Tensor | None], Tensor | None], x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor | None:
    """``run(x, weight, bias)``; under autocast with all of them in its dtype, as the layer itself would compute.

    Autocast is off within, so that the small matrices are folded in the dtype of the adapter.
    """
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return run(x, weight, bias)
    if torch.float64 in (x.dtype, weight.dtype):  # autocast leaves it alone
        return None
    dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        return run(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def without_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward that computes in the dtypes of its tensors also where it is called under autocast."""

    @wraps(backward)
    def wrapped(ctx: Any, grad: Tensor) -> Any:
        kind = grad.device.type
        if not torch.is_autocast_enabled(kind):
            return backward(ctx, grad)
        with torch.autocast(kind, enabled=False):
            return backward(ctx, grad)

    return wrapped


def sums_weights(x: Tensor, weight: Tensor) -> bool:
    """Whether to run the layer once with W + dW instead of adding into output and gradient. x: (., in, ..).

    It pays where the activations outnumber the weights. Not in half precision: the sum would round a small dW away.
    """
    activations = x.numel() // max(1, x.shape[1]) * sum(weight.shape[:2])
    return weight.dtype in (torch.float32, torch.float64) and activations > SUM_PAYS_FROM * weight.numel()


def summed(weight: Tensor, up: Tensor | None, down: Tensor) -> Tensor:
    """W + dW by one product into a copy of W."""
    return weight + down if up is None else torch.addmm(weight, up, down)


def again(ctx: Any, plain: Any, inputs: Sequence[Tensor | None], rest: Sequence[Any], grad: Tensor) -> Any:
    """The gradient with a graph of its own (double backward): the same step in plain operations."""
    wanted = {index: value for index, value in enumerate(inputs) if value is not None and ctx.needs_input_grad[index]}
    with torch.enable_grad():
        y = plain(*inputs, *rest)
        found = torch.autograd.grad(y, list(wanted.values()), grad, create_graph=True)
    grads = dict(zip(wanted, found, strict=True))
    return tuple(grads.get(index) for index in range(len(ctx.needs_input_grad)))
