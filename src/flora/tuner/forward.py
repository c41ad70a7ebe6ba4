"""How one forward of an adapted layer runs: summed, beside or called.

* **summed**: the layer's own function once, with ``W + s dW`` in place of W.
* **beside**: the base layer as a module, plus the change of its output by each adapter.
* **called**: the module with ``W + s dW`` as its parameters, where its forward is not a plain function of W.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flora.errors import UserError
from flora.layers import device
from flora.layers.planning import KINDS, Choice, Work, choose
from flora.layers.shell import call_with, forward_is_replaced, has_hooks, run_between_hooks, weights_are_elsewhere
from flora.layers.table import is_plain
from flora.tucker.delta import TuckerDelta
from flora.tuner.adapted import AdaptedLayer


def straight_output(layer: AdaptedLayer, x: Any) -> Any:
    """The output in the usual case, or None: ``adapted_output`` then says how the layer runs.

    The usual case is one active adapter, on a layer whose row has a fused function, called with one tensor of a shape
    that was met before. On a GPU small layers take as long as the host takes to launch them, so everything here is
    looked up once and past ``nn.Module.__getattr__``. What may have changed since the last call is checked again.
    """
    if type(x) is not Tensor or torch.compiler.is_compiling():
        return None

    own = layer.__dict__
    fused, active, modules = own["row"].fused, own["_active_adapter"], own["_modules"]
    if type(active) is list and len(active) == 1:
        active = active[0]
    if fused is None or type(active) is not str or own["_disable_adapters"] or own["merged_adapters"]:
        return None

    base, delta = modules["base_layer"], modules[own["adapter_layer_names"][0]]._modules.get(active)
    stored = base._parameters
    if delta is None or "weight" not in stored or not _is_bare(layer, base, delta):
        return None

    facts = (x.shape, x.dtype, x.device, type(base), own["training"], True, active)
    choice = own["choices"].get(facts)
    if choice is None or choice.way == "called" or (own["training"] and own["settings"][active].dropout):
        return None

    return fused(choice, base, stored["weight"], stored.get("bias"), delta, x)


def _is_bare(layer: AdaptedLayer, base: nn.Module, delta: TuckerDelta) -> bool:
    """Whether nothing stands between the layer and its parameters: no hook, no other tensor in front, no sharding."""
    own, weight = base.__dict__, base._parameters["weight"]
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
        or "_hf_hook" in delta.__dict__
        or "weight" in own
        or type(weight) is not nn.Parameter
        or hasattr(weight, SHARDED)
        or layer.quantization_backend is not None
    )


def adapted_output(layer: AdaptedLayer, active: list[str], *args: Any, **kwargs: Any) -> Any:
    """The output of a layer with these adapters, for the arguments of its forward."""
    choice = choice_for(layer, active, args[0] if args else next(iter(kwargs.values()), None))
    if choice.way == "called":
        return _called(layer, active, *args, **kwargs)

    way = _summed if choice.way == "summed" else _beside
    return _between_hooks(layer, partial(way, choice, layer, active), *args, **kwargs)


def _between_hooks(layer: AdaptedLayer, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``run(*args, **kwargs)``; hooks of the base layer see, and may change, what the layer is given and returns."""
    if has_hooks(layer.base_layer) and not _is_in_parts(layer):
        return run_between_hooks(layer.base_layer, run, *args, **kwargs)
    return run(*args, **kwargs)


def _is_in_parts(layer: AdaptedLayer) -> bool:
    """Whether the weight is sharded, so that it is whole only while hooks of the base layer itself have gathered it."""
    # DeepSpeed's mark, and that of a DTensor.
    return any(hasattr(layer.base_layer.weight, mark) for mark in (SHARDED, "device_mesh"))


# ---- which way -----------------------------------------------------------------------------------------------------


def choice_for(layer: AdaptedLayer, active: list[str], x: Any) -> Choice:
    """How the layer runs on this input. What the shapes decide is decided once for each of them.

    Args:
        layer: with its adapters.
        active: the adapters that run.
        x: the first argument of the layer's forward.
    """
    if not isinstance(x, Tensor) or layer.row.kind not in KINDS:
        work = Work(layer.row.kind, (), (), 0, 0, compiled=torch.compiler.is_compiling())
        return _choose(layer, active, work)

    # A compiler works the choice out while it traces, from shapes that may be symbols: nothing is stored for later.
    if torch.compiler.is_compiling():
        return _choose(layer, active, _work(layer, active, x, compiled=True))

    # Everything that the choice depends on is the key of the layer's memory of choices. Deciding again at each forward
    # would cost more time than a small layer takes.
    base = layer.base_layer
    own = readable(layer) and not forward_is_replaced(base)
    facts: tuple[Any, ...] = (x.shape, x.dtype, x.device, type(base), layer.training, own, *active)

    try:
        choice = layer.choices.get(facts)
    except TypeError:
        # The sizes are a tracer's symbols, which cannot be looked up.
        return _choose(layer, active, _work(layer, active, x, compiled=True))

    if choice is None:
        choice = _choose(layer, active, _work(layer, active, x, compiled=False))

        # Inputs of ever new lengths would fill the memory.
        if len(layer.choices) >= MOST_CHOICES:
            layer.choices.clear()

        layer.choices[facts] = choice

    return choice


def expected_choice(layer: AdaptedLayer, adapter: str, positions: int, cpu: bool) -> tuple[Choice, Work]:
    """How a layer will run in training, from its shapes alone.

    Args:
        layer: with its adapters; its tensors may be on the meta device.
        adapter: the one that runs.
        positions: of the output, in one step.
        cpu: whether that is on a CPU.
    """
    work = Work(layer.row.kind, (), (), 0, 0, cpu=cpu)

    if layer.row.kind in KINDS:
        transposed, stride = _strides(layer.get_base_layer())
        inputs = positions // stride if transposed else positions * stride

        work = _shaped(layer, adapter, inputs, positions, cpu, 4, False)

    return _choose(layer, [adapter], work), work


def _choose(layer: AdaptedLayer, active: list[str], work: Work) -> Choice:
    # Adapters that want different ways cannot all have theirs: beside is the one that any of them may insist on,
    # because it never adds to W.
    row, settings = layer.row, [layer.settings[name] for name in active]
    ways = {each.way for each in settings}
    wanted = "beside" if "beside" in ways else "auto"

    if len(ways) == 1:
        wanted = settings[0].way

    # A stack of experts may stay apart from its update; no other parameter can.
    if row.kind == "parameter":
        is_stack = len(layer.delta(active[0]).stored_shapes()[0]) == 3 and not work.compiled
        return choose(work, wanted, can_sum=False, can_add=is_stack)

    return choose(
        work,
        wanted,
        is_function=layer.quantization_backend is not None or is_plain(layer.base_layer),
        can_sum=row.apply is not None,
        can_add=row.factored is not None,
        readable=row.factored is None or readable(layer),
        dropping=layer.training and any(each.dropout for each in settings),
    )


def _work(layer: AdaptedLayer, active: list[str], x: Tensor, *, compiled: bool) -> Work:
    """What this input asks of the layer."""
    # Positions of the input: ids, rows of a matrix, or pixels of all samples. Those of the output follow from the
    # strides.
    base: Any = layer.get_base_layer()

    if layer.row.kind == "embedding":
        inputs = x.numel()
    elif layer.row.kind == "linear":
        inputs = x.numel() // max(1, x.shape[-1])
    else:
        inputs = x.numel() // max(1, base.in_channels)

    transposed, stride = _strides(base)
    outputs = inputs * stride if transposed else inputs // stride

    size = (x if x.is_floating_point() else base.weight).element_size()

    return _shaped(layer, active[0], inputs, outputs, device.on_cpu(x), size, compiled)


def _shaped(
    layer: AdaptedLayer, adapter: str, inputs: int, outputs: int, cpu: bool, element_size: int, compiled: bool
) -> Work:
    base, delta = layer.get_base_layer(), layer.delta(adapter)
    shape, ranks = delta.stored_shapes()
    groups, transposed = getattr(base, "groups", 1), _strides(base)[0]
    return Work(layer.row.kind, shape, ranks, inputs, outputs, groups, transposed, cpu, element_size, compiled)


def _strides(base: Any) -> tuple[bool, int]:
    """Whether a convolution is transposed, and the product of its strides; 1 for other layers."""
    stride = 1
    for step in getattr(base, "stride", ()):
        stride *= step
    return bool(getattr(base, "transposed", False)), stride


def readable(layer: AdaptedLayer) -> bool:
    """Whether the weight is an ordinary tensor in its place and may be read.

    An offloaded, sharded or quantised base layer has to be called as a module.
    """
    base = layer.base_layer
    if weights_are_elsewhere(base):
        return False

    weight = base.weight

    return (
        type(weight) in (nn.Parameter, Tensor) and layer.quantization_backend is None and not hasattr(weight, SHARDED)
    )


# How many choices a layer remembers.
MOST_CHOICES = 64
# An attribute of weights that DeepSpeed ZeRO-3 has partitioned.
SHARDED = "ds_shape"


# ---- the three ways ------------------------------------------------------------------------------------------------


def _called(layer: AdaptedLayer, active: list[str], *args: Any, **kwargs: Any) -> Any:
    """The base module as it is, with W + dW as its weights."""
    changed = {weight: layer.summed(active, weight) for weight in layer.attributes}
    return call_with(layer.base_layer, changed, *args, **kwargs)


def _summed(choice: Choice, layer: AdaptedLayer, active: list[str], *args: Any, **kwargs: Any) -> Any:
    """The function of the layer's row, once, with W + dW."""
    # One adapter: the autograd function of the kind, which keeps little. Several, or an input that it does not take:
    # the sum of all updates is formed and the layer's function is called with it.
    row, base = layer.row, layer.base_layer
    if len(active) == 1 and row.fused is not None:
        bias = getattr(base, "bias", None)
        out = row.fused(choice, base, base.weight, bias, layer.delta(active[0]), *args, **kwargs)
        if out is not None:
            return out

    if row.apply is None:
        raise AssertionError("the plan sums where the row has a function of the weight")

    return row.apply(base, layer.summed(active, "weight"), getattr(base, "bias", None), *args, **kwargs)


def _beside(choice: Choice, layer: AdaptedLayer, active: list[str], *args: Any, **kwargs: Any) -> Any:
    """The base layer's output, and the change by each adapter added to it."""
    # The first adapter may share one autograd function with the base layer; it needs the weight itself, and dropout
    # would give the two different inputs. Further adapters are added to the output.
    remaining, out = active, None

    if layer.row.fused is not None and readable(layer) and not _drops(layer, active[0]):
        base: Any = layer.base_layer
        bias = getattr(base, "bias", None)
        out = layer.row.fused(choice, base, base.weight, bias, layer.delta(active[0]), *args, **kwargs)
        remaining = active if out is None else active[1:]

    if out is None:
        out = _base_output(layer, *args, **kwargs)

    if layer.quantization_backend is not None:
        out = layer.quantization_backend.maybe_clone_base_result(out)

    for adapter in remaining:
        out = out + change_of_output(layer, adapter, *args, **kwargs).to(out.dtype)

    return out


def _base_output(layer: AdaptedLayer, *args: Any, **kwargs: Any) -> Any:
    """What the base layer gives; its hooks, if it has any, run around this already unless they gather the weight."""
    if _is_in_parts(layer):
        return layer.base_layer(*args, **kwargs)
    return layer.base_layer.forward(*args, **kwargs)


def _drops(layer: AdaptedLayer, adapter: str) -> bool:
    return layer.training and bool(layer.settings[adapter].dropout)


def change_of_output(layer: AdaptedLayer, adapter: str, *args: Any, **kwargs: Any) -> Tensor:
    """The change of the output by one adapter, beside the base layer's own output."""
    base, delta = layer.get_base_layer(), layer.delta(adapter)
    if layer.row.factored is None:
        raise UserError(f"the change of {type(base).__name__} has no form beside the layer")
    args, kwargs = _drop(layer, adapter, args, kwargs)
    return layer.row.factored(base, delta.stored_form, delta.scale, *args, **kwargs)


def _drop(
    layer: AdaptedLayer, adapter: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Dropout on the layer's input; ids are left as they are."""
    rate = layer.settings[adapter].dropout
    if not rate or not layer.training:
        return args, kwargs

    key = None if args else next(iter(kwargs))

    x = args[0] if key is None else kwargs[key]

    if not x.is_floating_point():
        return args, kwargs

    x = F.dropout(x, rate)

    if key is None:
        return ((x, *args[1:]), kwargs)

    return (args, {**kwargs, key: x})


# ---- an adapter per sample -----------------------------------------------------------------------------------------


def mixed_output(layer: AdaptedLayer, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
    """One adapter per sample: the base layer once, then each adapter on its own samples.

    Raises:
        ValueError: adapters are merged, the batch has another size, or the output is not a sum with the adapter's.
    """
    if layer.merged:
        raise UserError("adapter_names needs unmerged adapters; call unmerge_adapter() first")

    known = [name for name in dict.fromkeys(names) if name in layer.settings]
    if not known:
        return layer.base_layer(*args, **kwargs)  # type: ignore[no-any-return]

    adds_up = layer.quantization_backend is not None or is_plain(layer.base_layer)
    if not adds_up or layer.row.kind not in KINDS or isinstance(layer.base_layer, nn.EmbeddingBag):
        raise UserError(
            f"adapter_names (an adapter for each sample) cannot be used with {type(layer.base_layer).__name__}: its "
            "output is not a sum of the base layer's and the adapter's; run one batch per adapter, with set_adapter"
        )

    return _between_hooks(layer, partial(_mixed_sum, layer, names, known), *args, **kwargs)  # type: ignore[no-any-return]


def _mixed_sum(layer: AdaptedLayer, names: list[str], known: list[str], *args: Any, **kwargs: Any) -> Tensor:
    out: Tensor = _base_output(layer, *args, **kwargs)

    if args:
        first, rest = (args[0], args[1:])
    else:
        first, rest = (kwargs.pop(next(iter(kwargs))), ())

    if len(names) != first.shape[0]:
        raise UserError(f"adapter_names has {len(names)} entries for a batch of {first.shape[0]}; give one for each")

    # The base layer runs on the whole batch. Each adapter gets its own samples, and its change is added to their rows.
    # shape: rows (samples of one adapter,)
    out = out.clone()
    for name in known:
        rows = torch.tensor([row for row, wanted in enumerate(names) if wanted == name], device=first.device)
        change = change_of_output(layer, name, first[rows], *rest, **kwargs)
        out[rows] = out[rows] + change.to(out.dtype)

    return out
