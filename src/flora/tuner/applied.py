"""What a file or a model does not say by itself: a scale that was set for now, an adapter that is merged in already."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn
from transformers import PreTrainedModel

from flora.layers.merged import MARK, fingerprint
from flora.layers.names import UNSAVED, unsaved
from flora.tuner.adapted import AdaptedLayer


def warn_of_scale(layers: Iterable[AdaptedLayer], adapter: str) -> None:
    """Warns, when an adapter is saved, of layers that run at another scale than the config says."""
    changed = [
        layer.place
        for layer in layers
        if adapter in layer.settings
        and any(layer.delta(adapter, weight).scale != scale for weight, scale in layer.settings[adapter].scale.items())
    ]

    if changed:
        warnings.warn(
            f"{len(changed)} layers (first: {changed[0]}) of the adapter {adapter!r} run at a scale that set_scale or "
            "scale_layer gave them; the file keeps the scale of the config. To save another, attach with that scale",
            stacklevel=2,
        )


def mark_merged(model: nn.Module, layers: Sequence[AdaptedLayer], adapters: Iterable[str]) -> None:
    """Notes in the config of a model of transformers which adapters are about to be merged into it."""
    if not isinstance(model, PreTrainedModel):
        return

    marks = list(getattr(model.config, MARK, None) or [])
    for adapter in adapters:
        held = [layer for layer in layers if adapter in layer.settings]
        deltas = [layer.delta(adapter, weight) for layer in held for weight in layer.attributes]
        tensors = [value for delta in deltas for value in delta.parameters()]
        if tensors and not any(value.is_meta for value in tensors):
            marks.append(fingerprint(tensors))

    if marks:
        setattr(model.config, MARK, marks)


def save_merged(model: nn.Module, layers: Sequence[AdaptedLayer]) -> None:
    """Has a model of transformers save the weights that it computes itself, once something is merged into them."""
    if unsaved(model):
        merged = {f"{layer.place}.{weight}" for layer in layers for weight in layer.attributes}
        setattr(model, UNSAVED, set(unsaved(model)) - merged)


def warn_if_merged(model: nn.Module, adapter: str, state: Mapping[str, Tensor], prefix: str) -> None:
    """Warns, when an adapter is loaded, if the model's config says that it is merged into the model already.

    Args:
        model: the base model, or PEFT's around it.
        adapter: the name it is loaded under.
        state: the tensors of the file.
        prefix: of the names of those that are the adapter's.
    """
    marks = getattr(getattr(model, "config", None), MARK, None)
    if marks and fingerprint(value for key, value in state.items() if f".{prefix}" in key) in marks:
        warnings.warn(
            f"the adapter {adapter!r} is merged into this model already, as {MARK} in the model's config says: it "
            "would be applied twice; load it on the model it was trained on",
            stacklevel=2,
        )
