"""How one forward of an adapted layer runs: summed, beside or called.

* **summed**: the layer's own function once, with ``W + s dW`` in place of W.
* **beside**: the base layer as a module, plus the change of its output by each adapter.
* **called**: the module with ``W + s dW`` as its parameters, where its forward is no plain function of W.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flora.errors import UserError
from flora.layers.planning import KINDS, plan
from flora.layers.shell import call_with
from flora.layers.table import is_plain, parameter
from flora.tuner.adapted import AdaptedLayer


def choose_path(layer: AdaptedLayer, adapter: str, wanted: str) -> str:
    """The way that an adapter takes through a layer, decided once, when it is added."""
    base = layer.get_base_layer()
    if layer.row.factored is None:
        return "rebuild"
    if wanted != "auto":
        return wanted
    if layer.quantization_backend is not None or layer.row.kind not in KINDS:
        return "factored"

    form = layer.delta(adapter).stored_form
    strides = getattr(base, "stride", ())
    stride = int(torch.Size(strides).numel()) if strides else 1
    groups = getattr(base, "groups", 1)
    return plan(form.shape, form.ranks, kind=layer.row.kind, stride=stride, groups=groups).path


def adapted_output(layer: AdaptedLayer, active: list[str], *args: Any, **kwargs: Any) -> Any:
    """The output of a layer with these adapters, for the arguments of its forward."""
    rebuilt = [adapter for adapter in active if _rebuilds(layer, adapter)]
    if not _adds_up(layer) or (layer.row.apply is None and rebuilt):
        return _called(layer, active, *args, **kwargs)
    if layer.row.apply is not None and rebuilt == active and _may_sum(layer):
        return _summed(layer, active, *args, **kwargs)
    return _beside(layer, active, *args, **kwargs)


# ---- the three ways ------------------------------------------------------------------------------------------------


def _called(layer: AdaptedLayer, active: list[str], *args: Any, **kwargs: Any) -> Any:
    """The base module as it is, with W + dW as its weights."""
    changed = {weight: layer.summed(active, weight) for weight in layer.attributes}
    return call_with(layer.base_layer, changed, *args, **kwargs)


def _summed(layer: AdaptedLayer, active: list[str], *args: Any, **kwargs: Any) -> Any:
    """The function of the layer's row, once, with W + dW."""
    assert layer.row.apply is not None
    base = layer.base_layer
    weight = parameter(base, "weight") + layer.dense(active)
    return layer.row.apply(base, weight, getattr(base, "bias", None), *args, **kwargs)


def _beside(layer: AdaptedLayer, active: list[str], *args: Any, **kwargs: Any) -> Any:
    """The base layer's output, and the change by each adapter added to it."""
    remaining = active[1:]
    out = _fused(layer, active[0], *args, **kwargs)
    if out is None:
        remaining = active
        out = layer.base_layer(*args, **kwargs)

    if layer.quantization_backend is not None:
        out = layer.quantization_backend.maybe_clone_base_result(out)
    for adapter in remaining:
        out = out + change_of_output(layer, adapter, *args, **kwargs).to(out.dtype)
    return out


def _fused(layer: AdaptedLayer, adapter: str, *args: Any, **kwargs: Any) -> Tensor | None:
    """The base layer's output and the change by one adapter in one function, where that is possible."""
    settings = layer.settings[adapter]
    dropping = bool(settings.dropout) and layer.training
    if layer.row.fused is None or settings.path != "factored" or dropping or not _is_in_place(layer):
        return None
    delta = layer.delta(adapter)
    return layer.row.fused(layer.base_layer, delta.stored_form, delta.scale, *args, **kwargs)


def change_of_output(layer: AdaptedLayer, adapter: str, *args: Any, **kwargs: Any) -> Tensor:
    """The change of the output by one adapter, beside the base layer's own output."""
    base, delta = layer.get_base_layer(), layer.delta(adapter)
    args, kwargs = _drop(layer, adapter, args, kwargs)

    if _rebuilds(layer, adapter) and layer.row.apply is not None:
        first = args[0] if args else next(iter(kwargs.values()))
        dtype = first.dtype if first.is_floating_point() else delta.core.dtype
        return layer.row.apply(base, delta.dense().to(dtype), None, *args, **kwargs)
    if layer.row.factored is None:
        raise UserError(f"{type(base).__name__} has no factored path")
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
    return ((x, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: x})


# ---- an adapter per sample -----------------------------------------------------------------------------------------


def mixed_output(layer: AdaptedLayer, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
    """One adapter per sample: the base layer once, then each adapter on its own samples.

    Raises:
        ValueError: adapters are merged, the batch has another size, or the output is no sum with the adapter's.
    """
    if layer.merged:
        raise UserError("adapter_names needs unmerged adapters; call unmerge_adapter() first")
    known = [name for name in dict.fromkeys(names) if name in layer.settings]
    out: Tensor = layer.base_layer(*args, **kwargs)
    if not known:
        return out
    if not _adds_up(layer) or layer.row.kind not in KINDS or isinstance(layer.base_layer, nn.EmbeddingBag):
        raise UserError(
            f"adapter_names (an adapter for each sample) is not possible on {type(layer.base_layer).__name__}: its "
            "output is no sum of the base layer's and the adapter's; run one batch per adapter, with set_adapter"
        )
    first, rest = (args[0], args[1:]) if args else (kwargs.pop(next(iter(kwargs))), ())
    if len(names) != first.shape[0]:
        raise UserError(f"adapter_names has {len(names)} entries for a batch of {first.shape[0]}; give one for each")

    out = out.clone()
    for name in known:
        rows = torch.tensor([row for row, wanted in enumerate(names) if wanted == name], device=first.device)
        change = change_of_output(layer, name, first[rows], *rest, **kwargs)
        out[rows] = out[rows] + change.to(out.dtype)
    return out


# ---- what a layer allows -------------------------------------------------------------------------------------------


def _adds_up(layer: AdaptedLayer) -> bool:
    """Whether the output with W + dW is the base layer's output plus what its row computes with dW."""
    return layer.quantization_backend is not None or is_plain(layer.base_layer)


def _rebuilds(layer: AdaptedLayer, adapter: str) -> bool:
    """Dropout on the input of the adapter rules out W + dW, so it takes the factored path where there is one."""
    settings = layer.settings[adapter]
    dropping = bool(settings.dropout) and layer.training and layer.row.factored is not None
    return settings.path == "rebuild" and not dropping and layer.quantization_backend is None


def _may_sum(layer: AdaptedLayer) -> bool:
    """Whether ``W + dW`` may be formed here; in half precision a small dW would be rounded away in the sum."""
    return _is_in_place(layer) and parameter(layer.base_layer, "weight").dtype in (torch.float32, torch.float64)


def _is_in_place(layer: AdaptedLayer) -> bool:
    """Whether the weight is an ordinary tensor in its place and may be read.

    A hooked, offloaded, sharded or quantised base layer has to be called as a module.
    """
    base = layer.base_layer
    hooked = base._forward_hooks or base._forward_pre_hooks or "_hf_hook" in vars(base)
    weight = base.weight
    plain = type(weight) in (Tensor, nn.Parameter) and not hasattr(weight, "ds_shape")
    return plain and not hooked and layer.quantization_backend is None
