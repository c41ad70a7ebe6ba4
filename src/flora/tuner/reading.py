"""A weight of an adapted layer that somebody reads instead of calling the layer: it is ``W + s dW``.

State-space models, fused qkv projections, resized position embeddings and convolutions that decode from a cache read
``layer.weight``. They get a ``Reading``: a tensor with the type, shape and device of the weight, whose values are
formed when an operation first needs them. So code that only asks for ``layer.weight.dtype`` costs next to nothing, and
a reading is never older than the moment of the reading. Gradients flow to core and factors.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial, reduce
from types import FunctionType
from typing import Any, NamedTuple

import torch
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from flora.errors import UserError
from flora.layers.shell import run_as_shell, shell_of
from flora.layers.summed import with_update
from flora.tucker.form import Tucker
from flora.tuner.adapted import AdaptedLayer
from flora.tuner.forward import SHARDED
from flora.tuner.merging import base_weight, unmerge
from flora.tuner.read_tensors import Reading, Unreadable

# What an exporter or tracer puts in the place of an ordinary tensor.
STAND_INS = (FakeTensor, FunctionalTensor)

# While a batch runs with an adapter for each sample, a weight that is read would have to be several.
ADAPTER_PER_SAMPLE: ContextVar[bool] = ContextVar("adapter_per_sample", default=False)

# How many threads run such a batch, for code that is compiled: a compiler knows no ``ContextVar``.
BATCHES_WITH_ADAPTER_PER_SAMPLE = 0
_COUNTING = threading.Lock()


@contextmanager
def adapter_per_sample() -> Iterator[None]:
    """Within, every sample of a batch has its adapter."""
    token = ADAPTER_PER_SAMPLE.set(True)
    _count(1)

    try:
        yield
    finally:
        ADAPTER_PER_SAMPLE.reset(token)
        _count(-1)


def _count(step: int) -> None:
    global BATCHES_WITH_ADAPTER_PER_SAMPLE
    with _COUNTING:
        BATCHES_WITH_ADAPTER_PER_SAMPLE += step


class Update(NamedTuple):
    """What one adapter adds to a weight."""

    # Over the folded dimensions.
    form: Tucker
    scale: float


def attribute(layer: AdaptedLayer, name: str) -> Any:
    """What ``layer.name`` is where the layer has no such attribute: the base layer's, with the adapters in force.

    A weight is read as ``W + s dW``. A method or property that the base layer's own class defines may read a weight
    too, so it runs on a shell with those weights.
    """
    # The attribute may be a weight, a module with a weight inside (``out_proj``), or code of the base layer's class
    # that reads a weight. Only what torch wrote itself is known not to read one.
    base = layer.base_layer
    weights = _weights_of(layer)
    if not weights:
        return getattr(base, name)
    if name in weights:
        return read(*weights[name])

    inside = {
        weight[len(name) + 1 :]: read(*place) for weight, place in weights.items() if weight.startswith(f"{name}.")
    }
    if inside:
        return shell_of(getattr(base, name), inside)

    bare = layer.get_base_layer()
    if not _may_read(type(bare), name):
        return getattr(base, name)

    def with_weights(run: Callable[[nn.Module], Any]) -> Any:
        return run_as_shell(bare, {weight: read(*place) for weight, place in _weights_of(layer).items()}, run)

    if isinstance(getattr(type(bare), name), property):
        return with_weights(lambda shell: getattr(shell, name))

    return lambda *args, **kwargs: with_weights(lambda shell: getattr(shell, name)(*args, **kwargs))


def _weights_of(layer: AdaptedLayer) -> dict[str, tuple[AdaptedLayer, str]]:
    """Weight -> the wrapper that changes it, with its name there: those in force, of this wrapper and those inside."""
    found: dict[str, tuple[AdaptedLayer, str]] = {}
    part: nn.Module = layer
    while isinstance(part, AdaptedLayer):
        # As a call does: what is merged is taken out while adapters are disabled.
        if part.disable_adapters and part.merged:
            unmerge(part)

        for weight in part.attributes if part.in_force() else ():
            found.setdefault(weight, (part, weight))

        part = part.base_layer

    return found


def _may_read(cls: type, name: str) -> bool:
    """Whether a class has a method or property of this name that torch did not write: it may read a weight."""
    owner = next((each for each in cls.__mro__ if name in vars(each)), None)
    if owner is None or owner.__module__.partition(".")[0] == "torch":
        return False
    return isinstance(vars(owner)[name], (FunctionType, property))


def read(layer: AdaptedLayer, weight: str) -> Tensor:
    """``W + s dW`` of the adapters in force; the stored weight where there is none.

    Args:
        layer: of which the weight is read.
        weight: its name in the base layer.

    Returns:
        A tensor with the type and shape of the stored weight. Where there is no ``W + s dW``, because the weight is
        packed or sharded, it answers questions about the weight and refuses every operation.

    Raises:
        UserError: an adapter runs for each sample, so there is no one weight; or the model is traced by symbols.
    """
    adapters = layer.in_force()
    stored = layer.stored(weight)
    if not adapters:
        return stored

    if isinstance(stored, torch.fx.Proxy):
        raise UserError(
            f"{layer.place}: its {weight} is read while torch.fx traces the model symbolically, where W + s dW cannot "
            "be formed; merge the adapter first, or use torch.export"
        )

    can_be_summed = _is_ordinary(layer, stored) or _stands_for_numbers(layer, stored)
    if not can_be_summed:
        return _unreadable(layer, weight, stored)

    if BATCHES_WITH_ADAPTER_PER_SAMPLE and (torch.compiler.is_compiling() or ADAPTER_PER_SAMPLE.get()):
        raise UserError(
            f"adapter_names (an adapter for each sample) cannot be used with {layer.place}: its {weight} is read "
            "instead of the layer being called; run one batch per adapter, with set_adapter"
        )

    if _is_watched() or type(stored) in STAND_INS:
        _note(layer, weight)
        return with_update(_values(layer, stored), layer.dense(adapters, weight))

    updates = [Update(layer.delta(adapter, weight).form, layer.delta(adapter, weight).scale) for adapter in adapters]
    read_as: Tensor = _Read.apply(layer, weight, updates, stored, *_tensors(updates))  # type: ignore[no-untyped-call]

    return read_as


def _is_ordinary(layer: AdaptedLayer, stored: Tensor) -> bool:
    """Whether the weight is a tensor of numbers, as a whole and in its place."""
    if layer.quantization_backend is not None or type(stored) not in (Tensor, nn.Parameter, *STAND_INS):
        return False
    return not hasattr(stored, SHARDED)


def _stands_for_numbers(layer: AdaptedLayer, stored: Tensor) -> bool:
    """Whether a quantised weight shows itself as the floating-point tensor that it stands for, as torchao's do."""
    backend = layer.quantization_backend
    if backend is None or isinstance(backend, ForwardOnlyQuantizationBackend) or not stored.is_floating_point():
        return False
    return stored.shape == (layer.out_features, layer.in_features)


def _values(layer: AdaptedLayer, stored: Tensor) -> Tensor:
    """The stored weight as an ordinary tensor."""
    if layer.quantization_backend is None:
        return stored
    return base_weight(layer, "weight").to(stored.dtype)


def _unreadable(layer: AdaptedLayer, weight: str, stored: Tensor) -> Tensor:
    """A stand-in for a weight without ``W + s dW``; under a compiler the weight itself, and a warning."""
    why = (
        f"{layer.place}: its {weight} is read instead of the layer being called. It is quantised or sharded "
        f"({type(stored).__name__}), so the adapter cannot be added to what is read"
    )
    if torch.compiler.is_compiling():
        _warn_while_compiling(f"{why}: what this model computes from it is without the adapter")
        return stored

    return Unreadable(stored, f"{why}; exclude this layer, do not quantise it, or call it")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _warn_while_compiling(text: str) -> None:
    warnings.warn(text, stacklevel=2)


def _is_watched() -> bool:
    """Whether operations are recorded or rewritten, so that the sum has to be formed by plain ones at once."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def _note(layer: AdaptedLayer, weight: str) -> None:
    """Remembers that the layer was reached; says once where its dropout cannot apply."""
    if torch.compiler.is_compiling():
        return

    layer.reached = True
    rates = [layer.settings[adapter].dropout for adapter in layer.in_force()]
    if layer.training and any(rates) and not layer.told_of_dropout:
        layer.told_of_dropout = True
        warnings.warn(
            f"{layer.place}: its {weight} is read instead of the layer being called, so the adapter's dropout of "
            f"{max(rates)} has no effect there",
            stacklevel=2,
        )


class _Read(torch.autograd.Function):
    """From core and factors to a reading; the gradient by forming the update once more."""

    @staticmethod
    def forward(
        ctx: Any, layer: AdaptedLayer, weight: str, updates: list[Update], stored: Tensor, *tensors: Tensor
    ) -> Tensor:
        ctx.updates = updates
        ctx.save_for_backward(stored, *tensors)

        ctx.values = partial(_values, layer)

        def form() -> Tensor:
            _note(layer, weight)
            return _sum(_values(layer, stored), updates)

        reading = Reading(stored, form)
        reading._stored = stored
        if layer.quantization_backend is None:
            reading._rescale = partial(_rescale, layer, weight)

        return reading

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        stored, *tensors = ctx.saved_tensors
        saved = (ctx.values(stored), *tensors)
        # The sum is formed once more with a graph, and that graph is differentiated. If a gradient of the gradient is
        # wanted, its inputs are the saved tensors themselves, so that autograd can continue through them.
        twice = torch.is_grad_enabled()
        if twice:
            inputs = saved
        else:
            inputs = tuple(value.detach().requires_grad_() for value in saved)

        with torch.enable_grad():
            total = _sum(inputs[0], _with_tensors(ctx.updates, inputs[1:]))

        wanted = [index for index in range(len(inputs)) if ctx.needs_input_grad[3 + index]]
        found = torch.autograd.grad(total, [inputs[index] for index in wanted], grads[0], create_graph=twice)
        by_index = dict(zip(wanted, found, strict=True))

        return None, None, None, *(by_index.get(index) for index in range(len(inputs)))


def _rescale(layer: AdaptedLayer, weight: str, factor: float) -> Callable[[], Tensor]:
    """Multiplies a weight by a number in place, and with it every adapter's update; returns what forms the sum."""
    with torch.no_grad():
        layer.stored(weight).mul_(factor)
    for adapter in layer.settings:
        layer.delta(adapter, weight).scale *= factor
    return partial(layer.summed, layer.in_force(), weight)


def _sum(stored: Tensor, updates: Sequence[Update]) -> Tensor:
    """``W + s dW`` as a called layer has it; the update is formed in the adapters' dtype, also under autocast."""
    with torch.autocast(stored.device.type, enabled=False):
        changes = [update.form.scaled(update.scale).to_dense().reshape(stored.shape) for update in updates]
        return with_update(stored, reduce(torch.add, changes))


def _tensors(updates: Sequence[Update]) -> Iterator[Tensor]:
    """The cores and factors of updates, one after the other."""
    for update in updates:
        yield update.form.core
        yield from (factor for factor in update.form.factors if factor is not None)


def _with_tensors(updates: Sequence[Update], tensors: Sequence[Tensor]) -> list[Update]:
    """The same updates with these cores and factors, in the order of ``_tensors``."""
    remaining = iter(tensors)
    found = []
    for update in updates:
        core = next(remaining)
        factors = tuple(None if factor is None else next(remaining) for factor in update.form.factors)
        found.append(Update(Tucker(core, factors), update.scale))

    return found
