"""Writing the updates of adapters into the base weights, and taking them out again."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from flora.errors import UserError
from flora.layers.table import parameter
from flora.tuner.adapted import AdaptedLayer


def merge(layer: AdaptedLayer, adapters: list[str], safe_merge: bool) -> None:
    """Adds the updates of adapters that the layer has to its base weights; see ``FloraLayer.merge``."""
    before = {weight: base_weight(layer, weight) for weight in layer.attributes}
    with torch.no_grad():
        merged = {weight: (old + layer.dense(adapters, weight)).to(old.dtype) for weight, old in before.items()}

    if safe_merge:
        if not all(torch.isfinite(value).all() for value in merged.values()):
            raise UserError(
                f"NaNs detected in the merged weights. The adapter {adapters[0]} seems to be broken: merging "
                f"{', '.join(adapters)} would give NaN or infinite entries; the base weight was left as it is"
            )
        if not layer.merged and layer.quantization_backend is None:
            layer._backup = before

    for weight, value in merged.items():
        _write(layer, weight, value)
    layer.merged_adapters.extend(adapters)


def unmerge(layer: AdaptedLayer) -> None:
    """Takes the merged updates out of the base weights again; exact after a safe merge, else to one rounding."""
    with torch.no_grad():
        for weight in layer.attributes:
            old = layer._backup.get(weight)
            if old is None:
                value = base_weight(layer, weight)
                old = (value - layer.dense(layer.merged_adapters, weight)).to(value.dtype)
            _write(layer, weight, old)
    layer._backup = {}
    layer.merged_adapters.clear()


def base_weight(layer: AdaptedLayer, weight: str) -> Tensor:
    """A weight of the base layer; of a quantised one, what it stands for."""
    if layer.quantization_backend is not None:
        if layer.quantization_backend.backend_name == "bnb 4bit":
            # For inference on a CPU bitsandbytes lays the weight out anew, and PEFT would read it wrongly; asking
            # for the state dict puts it back.
            layer.get_base_layer().state_dict()
        return layer.get_base_weight()
    return parameter(layer.get_base_layer(), weight).detach()


def _write(layer: AdaptedLayer, weight: str, value: Tensor) -> None:
    """Sets a weight of the base layer."""
    if layer.quantization_backend is not None:
        layer.set_base_weight(value)
        return
    path, _, leaf = weight.rpartition(".")
    owner = layer.get_base_layer().get_submodule(path)
    if parametrize.is_parametrized(owner, leaf):
        setattr(owner, leaf, value)  # through the parametrization's right inverse
    else:
        getattr(owner, leaf).data = value
