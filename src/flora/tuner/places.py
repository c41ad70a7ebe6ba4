"""Where modules stand in the tree, and whether tensors of a file have a place there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Place(NamedTuple):
    """Where a module stands in the tree."""

    parent: nn.Module
    name: str


def places_of(model: nn.Module) -> dict[int, list[Place]]:
    """The places of each module that stands in several, by its id: nnU-Net's blocks do, weights and all."""
    places: dict[int, list[Place]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            places.setdefault(id(child), []).append(Place(parent, name))
    return {key: found for key, found in places.items() if len(found) > 1}


def under_all_names(model: nn.Module, kind: type[nn.Module], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file under every name that their module has; a file has those of the first place only.

    Args:
        model: with modules of that kind.
        kind: of module whose tensors the file may have.
        state: the tensors of the file, by full name.
    """
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, kind):
            names.setdefault(id(module), []).append(name)

    found = dict(state)
    for first, *others in (each for each in names.values() if len(each) > 1):
        inside = {key.removeprefix(first): value for key, value in state.items() if key.startswith(f"{first}.")}
        for other in others:
            found.update({other + rest: value for rest, value in inside.items() if other + rest not in state})

    return found


def find_misfit(own: Mapping[str, torch.Size], given: Mapping[str, Tensor], prefix: str) -> str | None:
    """What is wrong with the first tensor that has no place in the model, or another shape there; None if all fit."""
    for key, value in given.items():
        layer, found, tensor = key.removeprefix("base_model.model.").partition(f".{prefix}")
        if found and key not in own:
            return f"it has {tensor!r} for the layer {layer!r}, which the base model lacks or adapts with other ranks"

        if found and own[key] != value.shape:
            here = f"of shape {tuple(value.shape)} in the file, but the base model needs {tuple(own[key])}"
            return f"{layer!r} has {tensor!r} {here}"

    return None
