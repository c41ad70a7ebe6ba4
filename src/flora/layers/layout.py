"""What the dimensions of a stored weight mean: the kind of layer, the names of its axes, its groups, its fold.

Shapes tell most of it (a 4-D ``weight`` is a convolution), but not an embedding from a linear layer, the groups of a
convolution, GPT-2's transposed linear or the layout of an expert stack. Those come from the adapter's own config
(``layout``, written when it was trained) or from the base model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from flora.errors import UserError
from flora.layers.axes import KERNELS
from flora.layers.table import find_layer


@dataclass(frozen=True)
class Layout:
    """How a stored weight is laid out.

    Attributes:
        kind: "linear", "conv", "embedding", "experts" (a stack of linear weights) or anything else, which only the
            dense formats can hold.
        axes: a name per stored dimension, of ``flora.layers.axes.ROLES``, or ``d0``, ``d1`` where nothing is known.
        groups: of a convolution.
        fold: an einops pattern by which the stored weight is seen as the N-d tensor that the Tucker form lives in.
        place: of a raw parameter, its place among those of its module: PEFT nests its wrappers in that order.
    """

    kind: str
    axes: tuple[str, ...]
    groups: int = 1
    fold: str | None = None
    place: int = 0

    @property
    def is_plain_conv(self) -> bool:
        """Stored as (out, in / groups, *kernel), with one to three kernel dimensions."""
        return self.kind == "conv" and self.axes[:2] == ("out", "in") and len(self.axes) in (3, 4, 5)

    def to_json(self) -> dict[str, Any]:
        """What a file records of it."""
        entry: dict[str, Any] = {"kind": self.kind, "axes": list(self.axes)}
        if self.groups != 1:
            entry["groups"] = self.groups
        if self.fold:
            entry["fold"] = self.fold
        if self.place:
            entry["place"] = self.place

        return entry


def layout_from_json(name: str, entry: object) -> Layout:
    """The inverse of :meth:`Layout.to_json`.

    Raises:
        ValueError: the entry is not what ``to_json`` writes; names the weight.
    """
    if isinstance(entry, Mapping) and isinstance(entry.get("kind"), str) and isinstance(entry.get("axes"), list):
        groups, place, fold = entry.get("groups", 1), entry.get("place", 0), entry.get("fold")
        if _is_count(groups) and isinstance(place, int) and isinstance(fold, (str, type(None))):
            return Layout(entry["kind"], tuple(map(str, entry["axes"])), groups, fold, place)

    raise UserError(
        f"the recorded layout of {name} is {entry!r}, expected a kind and a list of axes; the file was edited"
    )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def from_shape(name: str, shape: tuple[int, ...]) -> Layout:
    """What name and shape alone suggest; right for every weight that :func:`is_usual` holds for."""
    # The ``weight`` of a module with two dimensions is a linear layer's, with three to five a convolution's. A
    # parameter of another name with three is a stack of experts.
    owner, _, leaf = name.rpartition(".")
    if leaf == "weight" and owner and len(shape) == 2:
        return Layout("linear", ("out", "in"))
    if leaf == "weight" and owner and len(shape) in (3, 4, 5):
        return Layout("conv", ("out", "in", *KERNELS[len(shape) - 2]))
    if len(shape) == 2:
        return Layout("linear", ("out", "in"))
    if len(shape) == 3:
        return Layout("experts", ("expert", "out", "in"))

    return Layout("other", tuple(f"d{mode}" for mode in range(len(shape))))


def is_usual(name: str, layout: Layout) -> bool:
    """Whether :func:`from_shape` would find the same, so that it need not be recorded."""
    return from_shape(name, (1,) * len(layout.axes)) == layout


def is_raw(name: str, layout: Layout | None) -> bool:
    """Whether PEFT reaches a weight by ``target_parameters`` alone: it is not the ``weight`` of a layer it knows."""
    return not name.endswith(".weight") or (layout is not None and layout.kind == "other")


def of_module(model: nn.Module) -> dict[str, Layout]:
    """The layout of every weight of a model (which may be on the meta device), by full name, with its default fold."""
    layouts: dict[str, Layout] = {}
    for prefix, module in model.named_modules():
        stem = f"{prefix}." if prefix else ""

        found = find_layer(module)
        if found is not None:
            folds = found[1].folds(module)
            for leaf, axes in found[1].weights(module).items():
                kind, groups = _kind(module, found[1].kind), int(getattr(module, "groups", 1))

                # Parents come first: the projection inside an attention belongs to the attention.
                layouts.setdefault(stem + leaf, Layout(kind, axes, groups, folds.get(leaf)))

        for place, (leaf, parameter) in enumerate(module.named_parameters(recurse=False)):
            name = stem + leaf
            known = layouts.get(name) or _of_parameter(name, module, tuple(parameter.shape))

            if leaf == "weight":
                layouts[name] = known
            else:
                layouts[name] = replace(known, place=place)

    return layouts


def _kind(module: nn.Module, kind: str) -> str:
    """The kind of the table's row, made finer where readers tell apart what the table does not."""
    if isinstance(module, nn.EmbeddingBag):
        return "embedding_bag"
    return kind


def _of_parameter(name: str, module: nn.Module, shape: tuple[int, ...]) -> Layout:
    """Of a parameter that no row of the table has."""
    # Only the layer's own code knows what the dimensions mean.
    if name.endswith("weight") and len(shape) >= 2:
        return Layout("other", tuple(f"d{mode}" for mode in range(len(shape))))
    if len(shape) == 3 and getattr(module, "is_transposed", False):
        return Layout("experts", ("expert", "in", "out"))
    return from_shape(name, shape)


def fold_groups(pattern: str) -> tuple[int, ...]:
    """How many dimensions of the folded tensor make each stored dimension: ``"(three heads dim) in"`` -> ``(3, 1)``.

    Raises:
        ValueError: the pattern is not a list of names and flat groups in parentheses.
    """
    # Sizes ("heads=12") and a right side are cut off; what is left is a list of names and of names in brackets.
    dims = re.sub(r"[,\s]*\w+\s*=\s*\d+", "", pattern.split("->")[0]).strip().rstrip(",").strip()
    tokens = re.findall(r"\([^()]*\)|[^\s()]+", dims)
    groups = tuple(len(token.strip("()").split()) if token.startswith("(") else 1 for token in tokens)
    if not groups or 0 in groups or re.sub(r"\([^()]*\)|[^\s()]+|\s", "", dims):
        raise UserError(f"fold {pattern!r} is not a list of names and groups, such as '(heads dim) in, heads=12'")
    return groups
