"""``FloraLayer``: a layer of the table with its adapters, as PEFT knows it. It stands in the place of the layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from flora.errors import UserError
from flora.layers.names import PREFIX, module_of
from flora.layers.offloading import hooked, in_memory
from flora.tucker.delta import TuckerDelta
from flora.tuner import forward, merging, reading
from flora.tuner.adapted import AdaptedLayer, Settings, Target
from flora.tuner.config import FloraConfig

# PEFT's word for "no adapter" in adapter_names.
BASE = "__base__"


class FloraLayer(AdaptedLayer):
    """A layer with FLoRA adapters, in the place of the layer itself.

    ``AdaptedLayer`` says what it is made from. How a forward runs stands in ``flora.tuner.forward``, what merging
    does in ``flora.tuner.merging``. Attributes that it does not have are those of the base layer, and a weight that is
    read is ``W + s dW`` (``flora.tuner.reading``).
    """

    def update_layer(self, name: str, config: FloraConfig, targets: Mapping[str, Target]) -> None:
        """Adds (or replaces) the adapter ``name``, one Tucker form for each weight of the layer."""
        for weight, target in targets.items():
            self.deltas(weight)[name] = TuckerDelta(
                target.shape,
                target.ranks,
                scale=target.scale,
                fold=target.fold,
                init=config.init,
                roles=target.roles,
                init_weights=config.init_weights,
            )

        scales = {weight: target.scale for weight, target in targets.items()}
        self.settings[name] = Settings(config.way, config.dropout, scales)
        self.choices.clear()
        self._move_adapter_to_device_of_base_layer(name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    # ---- what others read ------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Copy and pickle look for these on the instance.
            if name == "base_layer" or name.startswith("__"):
                raise

            built = "settings" in vars(self)
            if built:
                return reading.attribute(self, name)

            return getattr(self.base_layer, name)

    @property
    def weight(self) -> Tensor:
        """The weight with the adapters in force, ``W + s dW``; that of ``get_base_layer()`` is W itself.

        A dropout of the adapter has no effect here, because it drops inputs.
        """
        return cast(Tensor, reading.attribute(self, "weight"))

    @property
    def bias(self) -> Any:
        """That of the base layer; with the adapters in force where it is a raw parameter that they adapt."""
        return reading.attribute(self, "bias")

    # ---- forward ---------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """The layer's output with the active adapters; takes what the base layer takes.

        Args:
            *args: of the base layer.
            adapter_names: an adapter for each sample of the batch, set by PEFT in inference; else the active ones.
            **kwargs: of the base layer.
        """
        if not self.reached and not torch.compiler.is_compiling():
            self.reached = True

        if adapter_names is None and len(args) == 1 and not kwargs:
            out = forward.straight_output(self, args[0])
            if out is not None:
                return out

        if self.disable_adapters and self.merged:
            self.unmerge()
        if adapter_names is not None and not self.disable_adapters:
            return self._mixed(adapter_names, *args, **kwargs)

        active = self.in_force()
        if not active:
            return self.base_layer(*args, **kwargs)

        if "_fsdp_wrapped_module" in self.base_layer._modules:
            raise UserError(
                "the base layer of an adapted layer is wrapped by FSDP on its own, apart from its adapter: "
                f"{self.base_layer}; wrap whole blocks (auto_wrap_policy by the class of the transformer block)"
            )

        offloaded = hooked(change.delta for change in self._changes(active))
        if offloaded:
            with in_memory(offloaded):
                return self._adapted(active, *args, **kwargs)

        return self._adapted(active, *args, **kwargs)

    def _adapted(self, active: list[str], *args: Any, **kwargs: Any) -> Any:
        return forward.adapted_output(self, active, *args, **kwargs)

    def _mixed(self, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        return forward.mixed_output(self, names, *args, **kwargs)

    # ---- merge -----------------------------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the updates of the adapters (by default the active ones) to the base weights.

        Args:
            safe_merge: checks the result first and keeps a copy of the weights, so that ``unmerge`` restores them
                exactly.
            adapter_names: which adapters.

        Raises:
            ValueError: with ``safe_merge``, the result has NaN or infinite entries; the weights are as they were.
        """
        adapters = self.to_merge(adapter_names)
        if adapters:
            merging.merge(self, adapters, safe_merge)

    def unmerge(self) -> None:
        """Takes the merged updates out of the base weights again; exact after a safe merge, else to one rounding."""
        if self.merged:
            merging.unmerge(self)


class Named(NamedTuple):
    """An adapted layer, and the name of its module in the base model."""

    name: str
    layer: FloraLayer


def named_layers(model: nn.Module) -> list[Named]:
    """The adapted layers in the order of the model; the wrappers of one module have one name."""
    found = {path: module for path, module in model.named_modules() if isinstance(module, FloraLayer)}
    wrapped = {path.removeprefix(PREFIX) for path in found}
    return [Named(module_of(path, wrapped), layer) for path, layer in found.items()]
