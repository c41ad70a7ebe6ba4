"""``FloraLayer``: a layer of the table with its adapters, as PEFT knows it. It stands in the place of the layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor

from flora.errors import UserError
from flora.tucker.delta import TuckerDelta
from flora.tuner import forward, merging
from flora.tuner.adapted import AdaptedLayer, Settings, Target
from flora.tuner.config import FloraConfig

BASE = "__base__"  # PEFT's word for "no adapter" in adapter_names


class FloraLayer(AdaptedLayer):
    """A layer with FLoRA adapters, in the place of the layer itself.

    ``AdaptedLayer`` says what it is made from. How a forward runs stands in ``flora.tuner.forward``, what merging
    does in ``flora.tuner.merging``.
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
        path = self._choose_path(name, config.path, targets)
        scales = {weight: target.scale for weight, target in targets.items()}
        self.settings[name] = Settings(path, config.dropout, scales)
        self._move_adapter_to_device_of_base_layer(name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _choose_path(self, name: str, path: str, targets: Mapping[str, Target]) -> str:
        return forward.choose_path(self, name, path)

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
            raise UserError(
                "the base layer of an adapted layer is wrapped by FSDP on its own, apart from its adapter: "
                f"{self.base_layer}; wrap whole blocks (auto_wrap_policy by the class of the transformer block)"
            )
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
        adapters = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.settings]
        if adapters:
            merging.merge(self, adapters, safe_merge)

    def unmerge(self) -> None:
        """Takes the merged updates out of the base weights again; exact after a safe merge, else to one rounding."""
        if self.merged:
            merging.unmerge(self)
