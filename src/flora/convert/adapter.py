"""The one in-memory form that every format is read into and written from: ``Adapter``, weight name -> ``Entry``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from flora.errors import UserError
from flora.layers.layout import Layout, fold_groups, from_shape, is_usual
from flora.layers.names import GIVE_BASE, TOKEN_ROWS
from flora.layers.patterns import match_pattern
from flora.tucker.fold import Fold
from flora.tucker.form import Tucker


@dataclass(frozen=True, eq=False)
class Entry:
    """The change of one weight.

    Args:
        form: the Tucker form, in the folded space if ``layout.fold`` is set.
        scale: the constant s; the change is ``scale * form``.
        layout: what the dimensions of the stored weight mean, or None when the files do not say.

    Raises:
        ValueError: the fold of the layout has another number of dimensions than the form.

    Examples:
        >>> import torch
        >>> entry = Entry(Tucker(torch.ones(2, 3), (torch.ones(5, 2), None)), scale=0.5)
        >>> entry.shape, entry.dense()[0, 0].item()
        ((5, 3), 1.0)
    """

    form: Tucker
    scale: float = 1.0
    layout: Layout | None = None

    def __post_init__(self) -> None:
        modes, dims = sum(self.groups_of_modes), self.form.core.ndim
        if self.layout is not None and modes != dims:
            raise UserError(
                f"the fold {self.layout.fold!r} has {modes} dimensions, and the core has {dims} "
                f"{tuple(self.form.core.shape)}; copy the weights and adapter_config.json again, from one save"
            )

    @property
    def groups_of_modes(self) -> tuple[int, ...]:
        """How many modes of the form make each stored dimension; all ones without a fold."""
        fold = self.layout.fold if self.layout else None

        if fold is None:
            return (1,) * self.form.core.ndim

        return fold_groups(fold)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the stored weight."""
        sizes = iter(self.form.shape)
        return tuple(math.prod(next(sizes) for _ in range(count)) for count in self.groups_of_modes)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Of the form, one per mode."""
        return self.form.ranks

    def dense(self) -> Tensor:
        """``scale * form`` in the stored layout, shape :attr:`shape`, in the dtype of the form."""
        return (self.scale * self.form.to_dense()).reshape(self.shape)

    def stored_form(self) -> Tucker:
        """The form with one mode per stored dimension (scale not applied); exact, by merging the modes of each fold.

        A merged dimension has the product of its modes' ranks, and no factor once that reaches its size.
        """
        if all(count == 1 for count in self.groups_of_modes):
            return self.form
        modes = iter(range(self.form.core.ndim))
        groups = tuple(tuple(next(modes) for _ in range(count)) for count in self.groups_of_modes)
        axes = tuple(f"d{mode}" for mode in range(self.form.core.ndim))
        return Fold(axes, self.form.shape, groups).stored_form(self.form)


@dataclass
class Adapter:
    """An adapter of any format.

    Attributes:
        weights: the full name of a weight in the base model, such as ``encoder.0.conv.weight``, -> its change.
        extras: whole tensors that replace those of the base model: modules_to_save, biases.
        config: the adapter's config as its file has it (empty for formats without one).
    """

    weights: dict[str, Entry] = field(default_factory=dict)
    extras: dict[str, Tensor] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def num_params(self) -> int:
        """Numbers stored in the Tucker forms."""
        return sum(entry.form.num_params for entry in self.weights.values())

    @property
    def token_rows(self) -> dict[str, tuple[list[int], Tensor]]:
        """Of ``trainable_token_indices``: an embedding's weight -> the numbers of its rows, and what replaces them.

        Raises:
            ValueError: the config does not name as many rows as there are.
        """
        given = self.config.get("trainable_token_indices") or {}
        found = {}
        for name, rows in self.extras.items():
            if name.endswith(TOKEN_ROWS):
                module = name.removesuffix(TOKEN_ROWS)

                key = match_pattern(given, module) if isinstance(given, Mapping) else None

                numbers = given[key] if key is not None else given

                if not isinstance(numbers, list) or rows.ndim != 2 or len(set(numbers)) != len(rows):
                    raise UserError(
                        f"{name} holds {rows.shape[:1].numel()} rows, and trainable_token_indices of the config is "
                        f"{given}; copy adapter_config.json and the weights again, from one save"
                    )

                found[f"{module}.weight"] = (numbers, rows)

        return found

    def layout(self, name: str) -> Layout:
        """The layout of a weight.

        Raises:
            ValueError: the adapter does not say, and name and shape do not settle it.
        """
        entry = self.weights[name]
        if entry.layout is not None:
            return entry.layout

        guess = from_shape(name, entry.shape)
        if guess.kind == "other":
            return guess

        raise UserError(
            f"{name} of shape {entry.shape} could be {_doubt(guess.kind)}: the adapter does not record which; "
            f"{GIVE_BASE}"
        )

    def with_layouts(self, layouts: Mapping[str, Layout]) -> Adapter:
        """The same adapter with the layouts of its base model; the folds it has are kept.

        Raises:
            ValueError: a weight of the adapter is not in the base model, or has another number of dimensions there.
        """
        weights = {}
        for name, entry in self.weights.items():
            layout = layouts.get(name)
            if layout is None:
                raise UserError(
                    f"the base model has no weight {name!r}; give the base model the adapter was trained on"
                )

            if len(layout.axes) != len(entry.shape) and not layout.fold:
                raise UserError(
                    f"{name} has {len(layout.axes)} dimensions in the base model, {entry.shape} in the adapter; give "
                    "the base model the adapter was trained on"
                )

            given = entry.layout.fold if entry.layout else None

            default = None if entry.form.core.ndim == len(layout.axes) else layout.fold

            weights[name] = replace(entry, layout=replace(layout, fold=given or default))

        return Adapter(weights, dict(self.extras), dict(self.config))

    def recorded_layouts(self) -> dict[str, dict[str, Any]] | None:
        """What shapes do not tell, for the metadata of a file; None if a layout is not known."""
        recorded = {}
        for name, entry in self.weights.items():
            if entry.layout is None:
                return None
            if not is_usual(name, entry.layout):
                recorded[name] = entry.layout.to_json()

        return recorded


def _doubt(kind: str) -> str:
    return {
        "linear": "a Linear, a transposed Conv1D of GPT-2 or an Embedding",
        "conv": "a convolution with or without groups, or a transposed one",
        "experts": "a stack of (out, in) or of (in, out) matrices",
    }[kind]
