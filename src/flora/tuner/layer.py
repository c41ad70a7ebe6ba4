"""``FloraLayer``: any layer of the table with its adapters; the forward (two ways), merge and unmerge."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from flora.layers.planning import KINDS, plan
from flora.layers.table import LAYERS, Layer, call_with, find_layer, is_plain, parameter, refusal, weight_shape
from flora.tucker.delta import TuckerDelta
from flora.tucker.fold import Fold
from flora.tuner.config import FloraConfig

BASE = "__base__"  # PEFT's word for "no adapter" in adapter_names


@dataclass(frozen=True)
class Target:
    """What one adapter gets on one weight."""

    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    scale: float
    axes: tuple[str, ...]
    fold: Fold | None = None


@dataclass(frozen=True)
class Settings:
    """What one adapter of one layer runs with, besides its parameters."""

    path: str
    dropout: float
    scale: dict[str, float]  # by weight, as configured; the delta holds the scale in force


def row_for(module: nn.Module, **quantization: Any) -> Layer | None:
    """The row of a module in the table; a quantised linear of a foreign class goes by the row of ``nn.Linear``."""
    found = find_layer(module)
    if found is not None:
        return found[1]
    return LAYERS[nn.Linear] if resolve_quantization_backend(module, **quantization) is not None else None


class FloraLayer(nn.Module, BaseTunerLayer):
    """A layer with FLoRA adapters, in the place of the layer itself.

    The parameters of adapter ``name`` are ``tucker_<weight>.<name>.core`` and ``.factor_0 ..``. Attributes that it does
    not have are looked up on the base layer.

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
            raise ValueError(f"cannot adapt this layer: {refusal(base)}")
        self.row = found
        self.attributes = {name: f"tucker_{name.replace('.', '_')}" for name in found.weights(base)}
        self.adapter_layer_names = tuple(self.attributes.values())
        for attribute in self.adapter_layer_names:
            self.add_module(attribute, nn.ModuleDict())
        self.settings: dict[str, Settings] = {}
        self.merged_adapters: list[str] = []
        self.called = False
        self._backup: dict[str, Tensor] = {}  # the weights as they were, when merged safely
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

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name.startswith("__"):  # copy and pickle look for these on the instance
                raise
            return getattr(self.base_layer, name)

    def deltas(self, weight: str | None = None) -> nn.ModuleDict:
        """Adapter name -> ``TuckerDelta`` of one weight, by default of the only or first one."""
        attribute = self.attributes[weight] if weight is not None else self.adapter_layer_names[0]
        return cast(nn.ModuleDict, self._modules[attribute])

    def delta(self, adapter: str, weight: str | None = None) -> TuckerDelta:
        """The Tucker form of one adapter on one weight, by default the only or first one."""
        return cast(TuckerDelta, self.deltas(weight)[adapter])

    def _live(self, adapters: Iterable[str]) -> Iterator[tuple[str, str, TuckerDelta]]:
        """(adapter, weight, delta) of those adapters that this layer has."""
        for adapter in adapters:
            for weight in self.attributes if adapter in self.settings else ():
                yield adapter, weight, self.delta(adapter, weight)

    def update_layer(self, name: str, config: FloraConfig, targets: Mapping[str, Target]) -> None:
        """Adds (or replaces) the adapter ``name``, one Tucker form for each weight of the layer."""
        for weight, target in targets.items():
            self.deltas(weight)[name] = TuckerDelta(
                target.shape,
                target.ranks,
                scale=target.scale,
                fold=target.fold,
                init=config.init,
                axes=target.axes,
                init_weights=config.init_weights,
            )
        path = self._choose_path(name, config.path, targets)
        scales = {weight: target.scale for weight, target in targets.items()}
        self.settings[name] = Settings(path, config.dropout, scales)
        self._move_adapter_to_device_of_base_layer(name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _choose_path(self, name: str, path: str, targets: Mapping[str, Target]) -> str:
        base = self.get_base_layer()
        if self.row.factored is None:
            return "rebuild"
        if path != "auto":
            return path
        if self.quantization_backend is not None or self.row.kind not in KINDS:
            return "factored"
        form = self.delta(name).stored_form
        strides = getattr(base, "stride", ())
        stride = int(torch.Size(strides).numel()) if strides else 1
        return plan(form.shape, form.ranks, kind=self.row.kind, stride=stride, groups=getattr(base, "groups", 1)).path

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[torch.device | None, torch.dtype | None]:
        if self.quantization_backend is not None:
            return super()._get_base_layer_device_and_dtype(base_layer)  # type: ignore[no-any-return, no-untyped-call]
        weight = parameter(self.get_base_layer(), next(iter(self.attributes)))
        return weight.device, weight.dtype

    # ---- forward ---------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """The layer's output with the active adapters; takes what the base layer takes.

        Args:
            *args: of the base layer.
            adapter_names: an adapter for each sample of the batch, set by PEFT in inference; else the active ones.
            **kwargs: of the base layer.
        """
        if not self.called and not torch.compiler.is_compiling():
            self.called = True
        if self.disable_adapters and self.merged:
            self.unmerge()
        if adapter_names is not None and not self.disable_adapters:
            return self._mixed(adapter_names, *args, **kwargs)
        active = [name for name in self.active_adapters if name in self.settings]
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(*args, **kwargs)
        if "_fsdp_wrapped_module" in self.base_layer._modules:
            raise ValueError(
                "the base layer of an adapted layer is wrapped by FSDP on its own, apart from its adapter: "
                f"{self.base_layer}; wrap whole blocks (auto_wrap_policy by the class of the transformer block)"
            )
        return self._adapted(active, *args, **kwargs)

    def _adapted(self, active: list[str], *args: Any, **kwargs: Any) -> Any:
        base = self.base_layer
        if not self._adds_up() or (self.row.apply is None and any(self._rebuilds(name) for name in active)):
            stored = {name: parameter(base, name) for name in self.attributes}
            weights = {name: (old + self._dense(active, name)).to(old.dtype) for name, old in stored.items()}
            return call_with(base, weights, *args, **kwargs)
        rebuilt = [name for name in active if self._rebuilds(name)]
        if self.row.apply is not None and rebuilt == active and self._reads_weight():
            weight = parameter(base, "weight") + self._dense(active)
            return self.row.apply(base, weight, getattr(base, "bias", None), *args, **kwargs)
        out, beside = self._fused(active, *args, **kwargs), active[1:]
        if out is None:
            out, beside = base(*args, **kwargs), active
        if self.quantization_backend is not None:
            out = self.quantization_backend.maybe_clone_base_result(out)
        for name in beside:
            out = out + self._change(name, *args, **kwargs).to(out.dtype)
        return out

    def _fused(self, active: list[str], *args: Any, **kwargs: Any) -> Tensor | None:
        """The base layer's output and the change by the first adapter in one function, where that is possible."""
        settings = self.settings[active[0]]
        dropping = bool(settings.dropout) and self.training
        if self.row.fused is None or settings.path != "factored" or dropping or not self._is_in_place():
            return None
        delta = self.delta(active[0])
        return self.row.fused(self.base_layer, delta.stored_form, delta.scale, *args, **kwargs)

    def _change(self, name: str, *args: Any, **kwargs: Any) -> Tensor:
        """The change of the output by one adapter, beside the base layer's own output."""
        base, delta = self.get_base_layer(), self.delta(name)
        args, kwargs = self._drop(name, args, kwargs)
        if self._rebuilds(name) and self.row.apply is not None:
            first = args[0] if args else next(iter(kwargs.values()))
            dtype = first.dtype if first.is_floating_point() else delta.core.dtype
            return self.row.apply(base, delta.dense().to(dtype), None, *args, **kwargs)
        if self.row.factored is None:
            raise ValueError(f"{type(base).__name__} has no factored path")
        return self.row.factored(base, delta.stored_form, delta.scale, *args, **kwargs)

    def _mixed(self, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """One adapter per sample: the base layer once, then each adapter on its own samples."""
        if self.merged:
            raise ValueError("adapter_names needs unmerged adapters; call unmerge_adapter() first")
        known = [name for name in dict.fromkeys(names) if name in self.settings]
        out: Tensor = self.base_layer(*args, **kwargs)
        if not known:
            return out
        if not self._adds_up() or self.row.kind not in KINDS or isinstance(self.base_layer, nn.EmbeddingBag):
            raise ValueError(
                f"adapter_names (an adapter for each sample) is not possible on {type(self.base_layer).__name__}: its "
                f"output "
                "is no sum of the base layer's and the adapter's; run one batch per adapter, with set_adapter"
            )
        first, rest = (args[0], args[1:]) if args else (kwargs.pop(next(iter(kwargs))), ())
        if len(names) != first.shape[0]:
            raise ValueError(
                f"adapter_names has {len(names)} entries for a batch of {first.shape[0]}; give one for each"
            )
        out = out.clone()
        for name in known:
            rows = torch.tensor([row for row, wanted in enumerate(names) if wanted == name], device=first.device)
            change = self._change(name, first[rows], *rest, **kwargs)
            out[rows] = out[rows] + change.to(out.dtype)
        return out

    def _adds_up(self) -> bool:
        """Whether the output with W + dW is the base layer's output plus what its row computes with dW."""
        return self.quantization_backend is not None or is_plain(self.base_layer)

    def _rebuilds(self, name: str) -> bool:
        """Dropout on the input of the adapter rules out W + dW, so it takes the factored path where there is one."""
        settings = self.settings[name]
        dropping = bool(settings.dropout) and self.training and self.row.factored is not None
        return settings.path == "rebuild" and not dropping and self.quantization_backend is None

    def _reads_weight(self) -> bool:
        """Whether ``W + dW`` may be formed here; in half precision a small dW would be rounded away in the sum."""
        return self._is_in_place() and self.base_layer.weight.dtype in (torch.float32, torch.float64)

    def _is_in_place(self) -> bool:
        """Whether the weight is an ordinary tensor in its place and may be read.

        A hooked, offloaded, sharded or quantised base layer has to be called as a module.
        """
        base = self.base_layer
        hooked = base._forward_hooks or base._forward_pre_hooks or "_hf_hook" in vars(base)
        weight = base.weight
        plain = type(weight) in (Tensor, nn.Parameter) and not hasattr(weight, "ds_shape")
        return plain and not hooked and self.quantization_backend is None

    def _dense(self, names: list[str], weight: str | None = None) -> Tensor:
        """The sum of the dense updates of these adapters, in their own dtype."""
        total = self.delta(names[0], weight).dense()
        for name in names[1:]:
            total = total + self.delta(name, weight).dense()
        return total

    def _drop(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Dropout on the layer's input; ids are left as they are."""
        rate = self.settings[name].dropout
        if not rate or not self.training:
            return args, kwargs
        key = None if args else next(iter(kwargs))
        x = args[0] if key is None else kwargs[key]
        if not x.is_floating_point():
            return args, kwargs
        x = F.dropout(x, rate)
        return ((x, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: x})

    # ---- merge -----------------------------------------------------------------------------------------------------

    def get_delta_weight(self, adapter_name: str, weight: str | None = None) -> Tensor:
        """The dense update ``s * dW`` of one adapter, in the shape of the weight and the dtype of the adapter."""
        return self.delta(adapter_name, weight).dense()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the updates of the adapters (by default the active ones) to the base weights.

        Args:
            safe_merge: checks the result first and keeps a copy of the weights, so that ``unmerge`` restores them
                exactly.
            adapter_names: which adapters.

        Raises:
            ValueError: with ``safe_merge``, the result has NaN or infinite entries; the weights are as they were.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.settings]
        if not names:
            return
        before = {weight: self._weight(weight) for weight in self.attributes}
        with torch.no_grad():
            merged = {weight: (old + self._dense(names, weight)).to(old.dtype) for weight, old in before.items()}
        if safe_merge:
            if not all(torch.isfinite(value).all() for value in merged.values()):
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {names[0]} seems to be broken: merging "
                    f"{', '.join(names)} would give NaN or infinite entries; the base weight was left as it is"
                )
            if not self.merged and self.quantization_backend is None:
                self._backup = before
        for weight, value in merged.items():
            self._set_weight(weight, value)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Takes the merged updates out of the base weights again; exact after a safe merge, else to one rounding."""
        if not self.merged:
            return
        with torch.no_grad():
            for weight in self.attributes:
                old = self._backup.get(weight)
                if old is None:
                    value = self._weight(weight)
                    old = (value - self._dense(self.merged_adapters, weight)).to(value.dtype)
                self._set_weight(weight, old)
        self._backup = {}
        self.merged_adapters.clear()

    def _weight(self, name: str) -> Tensor:
        if self.quantization_backend is not None:
            if self.quantization_backend.backend_name == "bnb 4bit":
                # For inference on a CPU bitsandbytes lays the weight out anew, and PEFT would read it wrongly; asking
                # for the state dict puts it back.
                self.get_base_layer().state_dict()
            return self.get_base_weight()
        return parameter(self.get_base_layer(), name).detach()

    def _set_weight(self, name: str, value: Tensor) -> None:
        if self.quantization_backend is not None:
            self.set_base_weight(value)
            return
        owner, leaf = self.get_base_layer().get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if parametrize.is_parametrized(owner, leaf):
            setattr(owner, leaf, value)  # through the parametrization's right inverse
        else:
            getattr(owner, leaf).data = value

    # ---- scale -----------------------------------------------------------------------------------------------------

    def set_scale(self, adapter: str, scale: float) -> None:
        """Sets the scale to ``scale`` times the configured one."""
        for _, weight, delta in self._live([adapter]):
            delta.scale = scale * self.settings[adapter].scale[weight]

    def scale_layer(self, scale: float) -> None:
        """Multiplies the scale of the active adapters."""
        for _, _, delta in self._live(self.active_adapters):
            delta.scale *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides the scale of the active adapters; without an argument restores the configured one."""
        for adapter, weight, delta in self._live(self.active_adapters):
            delta.scale = self.settings[adapter].scale[weight] if scale is None else delta.scale / scale

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT may convert this layer to LoRA from ``get_delta_weight``."""
        return isinstance(self.get_base_layer(), nn.Linear)

    def __repr__(self) -> str:
        return "flora." + super().__repr__()
