"""``FloraLayer``: any layer of the table with its adapters; the forward (two ways), merge and unmerge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from flora.delta import TuckerDelta
from flora.layers import find_layer, is_plain, refusal, weight_shape
from flora.planning import plan
from flora.tuner.config import FloraConfig


@dataclass(frozen=True)
class Settings:
    """What one adapter of one layer runs with, besides its parameters."""

    path: str
    dropout: float
    scale: float  # as configured; the delta holds the scale in force


class FloraLayer(nn.Module, BaseTunerLayer):
    """A layer with FLoRA adapters, in the place of the layer itself.

    The parameters of adapter ``name`` are ``tucker_<weight>.<name>.core`` and ``.factor_0 ..``.

    Args:
        base_layer: the layer to adapt, listed in ``flora.LAYERS``.

    Raises:
        ValueError: the layer cannot be adapted; the text says why.
    """

    other_param_names = ("settings",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        found = find_layer(base_layer)
        reason = refusal(base_layer)
        if found is None or reason is not None:
            raise ValueError(f"cannot adapt this layer: {reason}")
        self.row = found[1]
        self.base_layer = base_layer
        self.adapter_layer_names = (f"tucker_{self.row.weight}",)
        self.add_module(self.adapter_layer_names[0], nn.ModuleDict())
        self.settings: dict[str, Settings] = {}
        self.merged_adapters: list[str] = []
        self._backup: Tensor | None = None  # of the weight, when merged safely
        self._disable_adapters = False
        self.cast_input_dtype_enabled = True
        shape = dict(zip(self.row.axes, weight_shape(base_layer, self.row.weight), strict=True))
        self.in_features, self.out_features = shape.get("in"), shape.get("out")

    @property
    def deltas(self) -> nn.ModuleDict:
        """Adapter name -> ``TuckerDelta``."""
        return getattr(self, self.adapter_layer_names[0])  # type: ignore[no-any-return]

    def update_layer(self, name: str, config: FloraConfig, ranks: tuple[int, ...], scale: float) -> None:
        """Adds (or replaces) the adapter ``name`` with these ranks."""
        base = self.get_base_layer()
        shape = weight_shape(base, self.row.weight)
        self.deltas[name] = TuckerDelta(shape, ranks, scale=scale, init=config.init, init_weights=config.init_weights)
        path = config.path
        if path == "auto":
            strides, groups = getattr(base, "stride", ()), getattr(base, "groups", 1)
            stride = int(torch.Size(strides).numel()) if strides else 1
            path = plan(shape, ranks, kind=self.row.kind, stride=stride, groups=groups).path
        self.settings[name] = Settings(path, config.dropout, scale)
        self._move_adapter_to_device_of_base_layer(name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    # ---- forward ---------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output with the active adapters; takes what the base layer takes."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [name for name in self.active_adapters if name in self.deltas]
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(*args, **kwargs)  # type: ignore[no-any-return]
        return self._adapted(active, *args, **kwargs)

    def _adapted(self, active: list[str], *args: Any, **kwargs: Any) -> Tensor:
        base = self.base_layer
        if not is_plain(base):
            weight = getattr(base, self.row.weight)
            swapped = {self.row.weight: weight + self._dense(active).to(weight.dtype)}
            return torch.func.functional_call(base, swapped, args, kwargs)  # type: ignore[no-any-return]
        x = args[0] if args else next(iter(kwargs.values()))
        rebuilt = [name for name in active if self._rebuilds(name)]
        if rebuilt == active and self._reads_weight():
            weight = getattr(base, self.row.weight) + self._dense(active)
            return self.row.apply(base, x, weight, getattr(base, "bias", None))
        out = base(*args, **kwargs)
        if rebuilt:
            dtype = x.dtype if x.is_floating_point() else out.dtype
            out = out + self.row.apply(base, x, self._dense(rebuilt).to(dtype), None).to(out.dtype)
        for name in active:
            if name not in rebuilt:
                delta = self.deltas[name]
                out = out + self.row.factored(base, self._drop(x, name), delta.form, delta.scale).to(out.dtype)
        return out

    def _rebuilds(self, name: str) -> bool:
        """Dropout on the input of the adapter rules out W + dW, so it takes the factored path."""
        settings = self.settings[name]
        return settings.path == "rebuild" and not (settings.dropout and self.training)

    def _reads_weight(self) -> bool:
        """Whether ``W + dW`` may be formed here: the weight is an ordinary float32 (or 64) tensor in its place.

        In half precision a small dW would be rounded away in the sum, and a hooked, offloaded or sharded base layer has
        to be called as a module. Then the update is applied beside the base layer's own output.
        """
        base = self.base_layer
        weight = getattr(base, self.row.weight)
        hooked = base._forward_hooks or base._forward_pre_hooks or hasattr(base, "_hf_hook")
        plain = type(weight) in (Tensor, nn.Parameter) and weight.shape == weight_shape(base, self.row.weight)
        return plain and not hooked and weight.dtype in (torch.float32, torch.float64)

    def _dense(self, names: list[str]) -> Tensor:
        """The sum of the dense updates of these adapters."""
        total: Tensor = self.deltas[names[0]].dense()
        for name in names[1:]:
            total = total + self.deltas[name].dense()
        return total

    def _drop(self, x: Tensor, name: str) -> Tensor:
        rate = self.settings[name].dropout
        return F.dropout(x, rate, self.training) if rate and x.is_floating_point() else x

    # ---- merge -----------------------------------------------------------------------------------------------------

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """The dense update ``s * dW`` of one adapter, shape ``weight.shape``, in the adapter's dtype."""
        return self.deltas[adapter_name].dense()  # type: ignore[no-any-return]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the updates of the adapters (by default the active ones) to the base weight.

        Args:
            safe_merge: checks the result first and keeps a copy of the weight, so that ``unmerge`` restores it exactly.
            adapter_names: which adapters.

        Raises:
            ValueError: with ``safe_merge``, the result has NaN or infinite entries; the weight is as it was.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.deltas]
        if not names:
            return
        weight = self._weight()
        with torch.no_grad():
            merged = (weight + self._dense(names)).to(weight.dtype)
        if safe_merge:
            if not torch.isfinite(merged).all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {names[0]} seems to be broken: merging "
                    f"{', '.join(names)} would give NaN or infinite entries; the base weight was left as it is"
                )
            if not self.merged:
                self._backup = weight
        self._set_weight(merged)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Takes the merged updates out of the base weight again; exact after a safe merge, else to one rounding."""
        if not self.merged:
            return
        if self._backup is not None:
            self._set_weight(self._backup)
            self._backup = None
        else:
            weight = self._weight()
            with torch.no_grad():
                self._set_weight((weight - self._dense(self.merged_adapters)).to(weight.dtype))
        self.merged_adapters.clear()

    def _weight(self) -> Tensor:
        return getattr(self.get_base_layer(), self.row.weight).detach()  # type: ignore[no-any-return]

    def _set_weight(self, value: Tensor) -> None:
        base, name = self.get_base_layer(), self.row.weight
        if parametrize.is_parametrized(base, name):
            setattr(base, name, value)  # through the parametrization's right inverse
        else:
            getattr(base, name).data = value

    # ---- scale -----------------------------------------------------------------------------------------------------

    def set_scale(self, adapter: str, scale: float) -> None:
        """Sets the scale to ``scale`` times the configured one."""
        if adapter in self.deltas:
            self.deltas[adapter].scale = scale * self.settings[adapter].scale

    def scale_layer(self, scale: float) -> None:
        """Multiplies the scale of the active adapters."""
        for name in self.active_adapters:
            if name in self.deltas:
                self.deltas[name].scale *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides the scale of the active adapters; without an argument restores the configured one."""
        for name in self.active_adapters:
            if name in self.deltas:
                delta = self.deltas[name]
                delta.scale = self.settings[name].scale if scale is None else delta.scale / scale

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT may convert this layer to LoRA from ``get_delta_weight``."""
        return isinstance(self.get_base_layer(), nn.Linear)

    def __repr__(self) -> str:
        return "flora." + super().__repr__()
