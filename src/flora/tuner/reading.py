"""A weight of an adapted layer that somebody reads instead of calling the layer: it is ``W + s dW``.

State-space models, fused qkv projections, resized position embeddings and convolutions that decode from a cache read
``layer.weight``. They get a ``Reading``: a tensor with the type, shape and device of the weight, whose values are
formed when an operation first needs them. So code that only asks for ``layer.weight.dtype`` costs next to nothing, and
a reading is never older than the moment of the reading. Gradients flow to core and factors.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import partial, reduce
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from flora.errors import UserError
from flora.layers.shell import run_as_shell, shell_of
from flora.tucker.form import Tucker
from flora.tuner.adapted import AdaptedLayer

# While a batch runs with an adapter for each sample, a weight that is read would have to be several.
ADAPTER_PER_SAMPLE: ContextVar[bool] = ContextVar("adapter_per_sample", default=False)


NOT_TO_BE_WRITTEN = (
    "the weight of an adapted layer was written to through the layer, where it is W plus the update of the adapters, "
    "formed for this reading; write to the base layer's (layer.get_base_layer()), or merge first"
)


class Update(NamedTuple):
    """What one adapter adds to a weight."""

    form: Tucker  # over the folded dimensions
    scale: float


def attribute(layer: AdaptedLayer, name: str) -> Any:
    """What ``layer.name`` is where the layer has no such attribute: the base layer's, with the adapters in force.

    A weight is read as ``W + s dW``. A method or property that the base layer's own class defines may read a weight
    too, so it runs on a shell with those weights.
    """
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
    """``W + s dW`` of the adapters in force; the stored weight where there is none, or where it cannot be summed.

    Args:
        layer: of which the weight is read.
        weight: its name in the base layer.

    Raises:
        UserError: an adapter runs for each sample, so there is no one weight.
    """
    adapters = layer.in_force()
    stored = layer.stored(weight)
    if not adapters or not _can_be_summed(layer, stored):
        return stored

    if _is_watched():
        _note(layer, weight)
        return layer.summed(adapters, weight)

    if ADAPTER_PER_SAMPLE.get():
        raise UserError(
            f"adapter_names (an adapter for each sample) is not possible with {layer.place}: its {weight} is read "
            "instead of the layer being called; run one batch per adapter, with set_adapter"
        )

    updates = [Update(layer.delta(adapter, weight).form, layer.delta(adapter, weight).scale) for adapter in adapters]
    read_as: Tensor = _Read.apply(layer, weight, updates, stored, *_tensors(updates))  # type: ignore[no-untyped-call]

    return read_as


def _can_be_summed(layer: AdaptedLayer, stored: Tensor) -> bool:
    """Whether the weight is an ordinary tensor; a quantised or sharded one is given as it is, unread by the adapter."""
    ordinary = type(stored) in (Tensor, nn.Parameter) and not hasattr(stored, "ds_shape")
    return ordinary and layer.quantization_backend is None


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


# ---- the tensor ----------------------------------------------------------------------------------------------------


class Reading(Tensor):
    """A tensor without values of its own, until an operation needs them.

    Any operation of torch gets the formed weight in its place. Writing into it is refused: the change would be lost.
    """

    _form: Callable[[], Tensor]
    _formed: Tensor | None
    _rescale: Callable[[float], Callable[[], Tensor]] | None = None  # by a number; gives the new ``form``

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, like: Tensor, form: Callable[[], Tensor]) -> Reading:
        """With the shape, type and device of a tensor; ``form`` gives the values."""
        reading: Reading = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
        )
        reading._form, reading._formed = form, None
        return reading

    def plain(self) -> Tensor:
        """The values, as an ordinary tensor without a graph."""
        if self._formed is None:
            with torch.no_grad():
                self._formed = self._form()
        return self._formed

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return cls(args[0], args[0].plain)

        if func in RESCALING and args[0]._rescale is not None and _is_number(args[1]):
            if func in RESCALING[:2]:
                factor = float(args[1])
            else:
                factor = 1 / float(args[1])

            args[0]._form, args[0]._formed = args[0]._rescale(factor), None
            return args[0]

        written = [value for value in args[:1] if func._schema.is_mutable and isinstance(value, Reading)]
        if written or isinstance((kwargs or {}).get("out"), Reading):
            raise RuntimeError(NOT_TO_BE_WRITTEN)

        args, kwargs = tree_map_only(Reading, Reading.plain, (args, kwargs or {}))

        return func(*args, **kwargs)

    def __setitem__(self, index: Any, value: Any) -> None:
        raise RuntimeError(NOT_TO_BE_WRITTEN)

    def data_ptr(self) -> int:
        """Of the formed values, for kernels that take addresses."""
        return self.plain().data_ptr()

    def tolist(self) -> Any:
        """The values as nested lists."""
        return self.plain().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """The values as an array of numpy; as of any tensor, not while it requires a gradient."""
        return (self.plain().requires_grad_(self.requires_grad)).numpy(force=force)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.plain().clone()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.plain())


# RWKV multiplies and divides its weights in place by a number when it goes from training to inference and back.
RESCALING = (
    torch.ops.aten.mul_.Tensor,
    torch.ops.aten.mul_.Scalar,
    torch.ops.aten.div_.Tensor,
    torch.ops.aten.div_.Scalar,
)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.ndim == 0)


class _Read(torch.autograd.Function):
    """From core and factors to a reading; the gradient by forming the update once more."""

    @staticmethod
    def forward(
        ctx: Any, layer: AdaptedLayer, weight: str, updates: list[Update], stored: Tensor, *tensors: Tensor
    ) -> Tensor:
        ctx.updates = updates
        ctx.save_for_backward(stored, *tensors)

        def form() -> Tensor:
            _note(layer, weight)
            return _sum(stored, updates)

        reading = Reading(stored, form)
        reading._rescale = partial(_rescale, layer, weight)

        return reading

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        saved = ctx.saved_tensors
        # A gradient of the gradient is wanted.
        twice = torch.is_grad_enabled()
        if twice:
            inputs = saved
        else:
            inputs = [value.detach().requires_grad_() for value in saved]

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
    """``W + s dW`` in the dtype of W; the update is formed in the adapters' dtype, also under autocast."""
    with torch.autocast(stored.device.type, enabled=False):
        changes = [update.form.scaled(update.scale).to_dense().reshape(stored.shape) for update in updates]
        return (stored + reduce(torch.add, changes)).to(stored.dtype)


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
