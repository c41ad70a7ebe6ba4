"""Where modules stand in the tree: one module may stand in several places."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn


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
