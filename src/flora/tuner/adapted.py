"""A layer and the adapters it holds: which there are, on which weights, and with what scale. No forward, no merge."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn

from flora.errors import UserError
from flora.layers.offloading import hooked, in_memory
from flora.layers.planning import Choice
from flora.layers.summed import with_update
from flora.layers.table import LAYERS, Layer, find_layer, parameter, refusal, weight_shape
from flora.tucker.delta import TuckerDelta
from flora.tucker.fold import Fold
from flora.tucker.ranks import Role


@dataclass(frozen=True)
class Target:
    """What one adapter gets on one weight."""

    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    scale: float
    roles: tuple[Role, ...]
    fold: Fold | None = None


@dataclass(frozen=True)
class Settings:
    """The settings of one adapter of one layer."""

    # "auto", "summed" or "beside".
    way: str
    dropout: float
    # The configured scale of each weight; the delta holds the scale in force.
    scale: dict[str, float]


class Change(NamedTuple):
    """The Tucker form that one adapter has on one weight."""

    adapter: str
    weight: str
    delta: TuckerDelta


def row_for(module: nn.Module, **quantization: Any) -> Layer | None:
    """The row of a module in the table; a quantised linear of a foreign class goes by the row of ``nn.Linear``."""
    found = find_layer(module)
    if found is not None:
        return found[1]
    if resolve_quantization_backend(module, **quantization) is None:
        return None
    return LAYERS[nn.Linear]


class AdaptedLayer(nn.Module, BaseTunerLayer):
    """What ``FloraLayer`` holds: the base layer, a Tucker form for each adapter and weight, and their scales.

    The parameters of adapter ``name`` are ``tucker_<weight>.<name>.core`` and ``.factor_0 ..``.

    Args:
        base_layer: the layer to adapt, listed in ``flora.LAYERS``.
        row: its row, when it is not the table's own.
        quantization: what PEFT's quantisation backends need to know of the model.

    Raises:
        ValueError: the layer cannot be adapted; the text says why.
    """

    other_param_names = ("settings",)

    def __init__(
        self, base_layer: nn.Module, row: Layer | None = None, quantization: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.add_module("base_layer", base_layer)
        base = self.get_base_layer()
        self.quantization_backend = resolve_quantization_backend(base, **(quantization or {}))
        found = row or row_for(base, **(quantization or {}))
        if found is None:
            raise UserError(f"cannot adapt this layer: {refusal(base)}")

        self.row = found

        self.attributes = {name: f"tucker_{name.replace('.', '_')}" for name in found.weights(base)}
        self.adapter_layer_names = tuple(self.attributes.values())
        for attribute in self.adapter_layer_names:
            self.add_module(attribute, nn.ModuleDict())

        self.settings: dict[str, Settings] = {}
        # How it runs, by what decides it.
        self.choices: dict[tuple[Any, ...], Choice] = {}
        self.merged_adapters: list[str] = []
        # Its name in the model, once it is put there.
        self.place = ""
        # Called or read by a forward.
        self.reached = False
        self.told_of_dropout = False
        # The weights as they were, when merged safely.
        self._backup: dict[str, Tensor] = {}
        # The scale that each adapter had when it was merged, by adapter and weight.
        self._merged_scales: dict[tuple[str, str], float] = {}
        # Parametrizations that could not hold a merged weight.
        self._taken_off: dict[str, Any] = {}
        self._disable_adapters = False
        self.cast_input_dtype_enabled = True

        first = next(iter(self.attributes))
        axes = found.weights(base)[first]
        sizes = dict(zip(axes, weight_shape(base, first), strict=False))
        self.in_features, self.out_features = sizes.get("in"), sizes.get("out")

    @property
    def base_layer(self) -> nn.Module:
        """The layer itself, or what wraps it."""
        base = self._modules.get("base_layer")
        if base is None:
            raise AttributeError(f"{type(self).__name__} has no base layer yet")
        return base

    # ---- the Tucker forms ------------------------------------------------------------------------------------------

    def deltas(self, weight: str | None = None) -> nn.ModuleDict:
        """Adapter name -> ``TuckerDelta`` of one weight, by default of the only or first one."""
        attribute = self.attributes[weight] if weight is not None else self.adapter_layer_names[0]
        return cast(nn.ModuleDict, self._modules[attribute])

    def delta(self, adapter: str, weight: str | None = None) -> TuckerDelta:
        """The Tucker form of one adapter on one weight, by default the only or first one."""
        return cast(TuckerDelta, self.deltas(weight)[adapter])

    def dense(self, adapters: list[str], weight: str | None = None) -> Tensor:
        """The sum of the dense updates ``s * dW`` of these adapters, in their own dtype."""
        total = self.delta(adapters[0], weight).dense()
        for adapter in adapters[1:]:
            total = total + self.delta(adapter, weight).dense()
        return total

    def in_force(self) -> list[str]:
        """The active adapters that this layer has; none while they are disabled or merged."""
        if self.disable_adapters or self.merged:
            return []
        return [adapter for adapter in self.active_adapters if adapter in self.settings]

    def to_merge(self, adapter_names: list[str] | None) -> list[str]:
        """Those of the adapters (by default the active ones) that this layer has and that are not merged yet."""
        return [name for name in check_adapters_to_merge(self, adapter_names) if name in self.settings]

    def biases(self) -> dict[str, nn.Parameter]:
        """The biases of the base layer, and of the submodules that hold an adapted weight, by dotted name."""
        base = self.get_base_layer()
        owners = dict.fromkeys(("", *(weight.rpartition(".")[0] for weight in self.attributes)))

        return {
            name: value
            for path in owners
            for name, value in base.get_submodule(path).named_parameters(path, recurse=False)
            if "bias" in name.rpartition(".")[2] and name not in self.attributes
        }

    def stored(self, weight: str) -> Tensor:
        """A weight of the base layer as it is stored; one that accelerate has offloaded is brought back."""
        base = self.get_base_layer()
        owner = base.get_submodule(weight.rpartition(".")[0])
        if not hooked([owner]):
            return parameter(base, weight)
        with in_memory([owner]):
            return parameter(base, weight)

    def summed(self, adapters: list[str], weight: str) -> Tensor:
        """``W + s dW`` of these adapters, in the dtype of W; in half precision rounded without bias."""
        stored = self.stored(weight)
        return with_update(stored, self.dense(adapters, weight))

    def get_delta_weight(self, adapter_name: str, weight: str | None = None) -> Tensor:
        """The dense update ``s * dW`` of one adapter, in the shape of the weight and the dtype of the adapter."""
        return self.delta(adapter_name, weight).dense()

    def _changes(self, adapters: Iterable[str]) -> Iterator[Change]:
        """The Tucker forms of those adapters that this layer has."""
        for adapter in adapters:
            for weight in self.attributes if adapter in self.settings else ():
                yield Change(adapter, weight, self.delta(adapter, weight))

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[torch.device | None, torch.dtype | None]:
        if self.quantization_backend is not None:
            return super()._get_base_layer_device_and_dtype(base_layer)  # type: ignore[no-any-return, no-untyped-call]
        weight = parameter(self.get_base_layer(), next(iter(self.attributes)))
        return weight.device, weight.dtype

    # ---- scale -----------------------------------------------------------------------------------------------------

    def set_scale(self, adapter: str, scale: float) -> None:
        """Sets the scale to ``scale`` times the configured one."""
        for change in self._changes([adapter]):
            change.delta.scale = scale * self.settings[adapter].scale[change.weight]

    def scale_layer(self, scale: float) -> None:
        """Multiplies the scale of the active adapters."""
        for change in self._changes(self.active_adapters):
            change.delta.scale *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides the scale of the active adapters; without an argument restores the configured one."""
        for adapter, weight, delta in self._changes(self.active_adapters):
            delta.scale = self.settings[adapter].scale[weight] if scale is None else delta.scale / scale

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT may convert this layer to LoRA from ``get_delta_weight``."""
        return isinstance(self.get_base_layer(), nn.Linear)

    def __repr__(self) -> str:
        return "flora." + super().__repr__()
