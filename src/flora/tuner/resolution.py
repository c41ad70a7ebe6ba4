"""What a config means for a model: every weight with its ranks, scale, fold and layout, worked out once at attach."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import nn

from flora.layers.axes import roles_of
from flora.layers.entries import Entries
from flora.layers.layout import Layout, is_usual, of_module
from flora.layers.patterns import exact_pattern, names_of
from flora.layers.table import weight_shape
from flora.tucker.blocks import cut
from flora.tucker.fold import parse_fold
from flora.tucker.form import count_params
from flora.tucker.ranks import Ranks, Weight, resolve, solve_budget
from flora.tuner.adapted import Target
from flora.tuner.config import FloraConfig
from flora.tuner.targets import Site


@dataclass(frozen=True)
class Resolved:
    """One weight: what its adapter gets, and what a saved config has to say of it.

    Attributes:
        names: under which the config may speak of it, the closest first; the first is its full name.
        axes: the names of its stored dimensions.
        target: shape, ranks, scale, roles and fold.
        layout: what its dimensions mean, where name and shape do not tell.
        rank, scale, fold: the entry of a table of the config that held for it; None where a default did.
        default_fold: how layers of this kind are folded; None where they are not, or the config says otherwise.
    """

    names: tuple[str, ...]
    axes: tuple[str, ...]
    target: Target
    layout: Layout | None
    rank: Ranks | None
    scale: float | None
    fold: str | None
    default_fold: str | None

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of the N-d tensor that the Tucker form lives in."""
        if self.target.fold is None:
            return self.target.shape
        return self.target.fold.shape

    @property
    def num_params(self) -> int:
        """Of the Tucker form."""
        return count_params(self.sizes, self.target.ranks)


class Open(NamedTuple):
    """What a budget is left for, after the user's own entries."""

    # Full name -> the weight.
    weights: dict[str, Weight]
    budget: int


class Resolution:
    """Every weight that a config adapts in one model. Injection reads it and the saved config is written from it.

    Args:
        config: of the adapter.
        sites: the modules and raw parameters that it targets.

    Raises:
        UserError: ranks or a fold do not fit a weight; the message names it and its dimensions.
    """

    def __init__(self, config: FloraConfig, sites: Iterable[Site]) -> None:
        self.entries = Entries(vars(config))
        self.weights: dict[str, Resolved] = {}
        for site in sites:
            layouts = of_module(site.module)
            for weight in site.row.weights(site.module):
                found = self._resolve(site, weight, layouts.get(weight))
                self.weights[found.names[0]] = found

    def of(self, site: Site) -> dict[str, Target]:
        """The targets of a site, by weight; a site that the config does not name is resolved now."""
        targets = {}
        for weight in site.row.weights(site.module):
            found = self.weights.get(f"{site.name}.{weight}")
            if found is None:
                found = self._resolve(site, weight, of_module(site.module).get(weight))

            targets[weight] = found.target

        return targets

    def _resolve(self, site: Site, weight: str, layout: Layout | None) -> Resolved:
        names = names_of(site.name, weight)
        axes = site.row.weights(site.module)[weight]
        shape = weight_shape(site.module, weight)

        own_fold = self.entries.fold(names)
        default_fold = None if own_fold is not None else site.row.folds(site.module).get(weight)

        pattern = own_fold or default_fold
        fold = parse_fold(pattern, shape, names[0]) if pattern else None

        sizes, shown = (fold.shape, fold.axes) if fold else (shape, axes)

        roles = roles_of(axes, fold)

        rank = self.entries.ranks.find(names)
        scale = self.entries.scales.find(names)
        ranks = resolve(sizes, self.entries.rank(names), self.entries.kernel_r, axes=shown, roles=roles, name=names[0])
        target = Target(shape, ranks, self.entries.scale(names), roles, fold)

        if layout is not None:
            layout = None if is_usual(names[0], layout) else replace(layout, fold=pattern)

        return Resolved(
            names,
            tuple(axes),
            target,
            layout,
            None if rank is None else rank.value,
            None if scale is None else scale.value,
            own_fold,
            default_fold,
        )

    # ---- the budget ------------------------------------------------------------------------------------------------

    def open_weights(self, budget: float, model: nn.Module) -> Open:
        """The weights whose ranks the user left open, and how many parameters there are for them."""
        # ZeRO-3 has partitioned what has a ds_shape.
        total = sum(math.prod(getattr(value, "ds_shape", value.shape)) for value in model.parameters())

        left = int(budget * total) if budget < 1 else int(budget)

        free: dict[str, Weight] = {}
        for name, found in self.weights.items():
            if found.rank is None:
                free[name] = Weight(found.sizes, found.target.roles)
            else:
                left -= found.num_params

        return Open(free, left)

    def spend(self, budget: float, model: nn.Module) -> None:
        """Gives the open weights the ranks that the budget buys."""
        free = self.open_weights(budget, model)
        if not free.weights:
            return
        for name, ranks in solve_budget(free.weights, free.budget, self.entries.kernel_r).items():
            found = self.weights[name]
            self.weights[name] = replace(found, target=replace(found.target, ranks=ranks), rank=list(ranks))

        spent = sum(self.weights[name].num_params for name in free.weights)
        if 2 * spent < free.budget:
            warnings.warn(
                f"the budget of {free.budget:,} parameters is more than the targeted weights take: with every rank at "
                f"its largest they spend {spent:,}; target more modules, or lower the budget",
                stacklevel=2,
            )

    # ---- blocks ----------------------------------------------------------------------------------------------------

    def cut_into_blocks(self) -> None:
        """Folds the channels where that is worth it, at no more parameters, unless the user listed the ranks."""
        for name, found in self.weights.items():
            target = found.target
            if target.fold is not None or not isinstance(self.entries.rank(found.names), int):
                continue

            blocks = cut(target.shape, target.roles, target.ranks)
            if blocks is None:
                continue

            pattern = blocks.pattern(found.axes[2:])
            fold = parse_fold(pattern, target.shape, name)
            roles = roles_of(found.axes, fold)
            self.weights[name] = replace(
                found,
                target=replace(target, ranks=blocks.ranks, roles=roles, fold=fold),
                layout=found.layout and replace(found.layout, fold=pattern),
                rank=list(blocks.ranks),
                fold=pattern,
            )

    # ---- what is said of it ----------------------------------------------------------------------------------------

    def record(self, config: FloraConfig) -> None:
        """Writes into the config what a reader of the saved adapter needs.

        What a pattern gave a weight is written for that weight's exact name, which holds before any pattern: PEFT sorts
        the keys when it saves, and another of several patterns would then come first. Defaults are not written.
        """
        exact = {exact_pattern(name): found for name, found in self.weights.items()}
        ranks = {key: _plain(found.rank) for key, found in exact.items() if found.rank is not None}
        scales = {key: found.scale for key, found in exact.items() if found.scale is not None}
        folds = {key: fold for key, found in exact.items() if (fold := found.fold or found.default_fold)}
        config.rank_pattern = {**config.rank_pattern, **ranks}
        config.scale_pattern = {**config.scale_pattern, **scales}
        given = {} if isinstance(config.fold, str) else config.fold
        config.fold = {**given, **folds}
        config.layout = {name: found.layout.to_json() for name, found in self.weights.items() if found.layout}
        config.budget = None

    def warn(self) -> None:
        """Warns where an adapter costs more than its weight, and of entries that hold for no adapted weight."""
        larger = [name for name, found in self.weights.items() if found.num_params > math.prod(found.sizes)]
        if larger:
            warnings.warn(
                f"the adapter has more parameters than the weight itself in {len(larger)} of {len(self.weights)} "
                f"weights (first: {larger[0]}); lower r or exclude them",
                stacklevel=2,
            )

        names = {name for found in self.weights.values() for name in found.names}
        for table in (self.entries.ranks, self.entries.scales, self.entries.folds):
            unmatched = table.unmatched(names)
            if unmatched:
                warnings.warn(f"{table.field} keys {unmatched} match no adapted weight and are ignored", stacklevel=2)


def _plain(rank: Ranks) -> int | list[int]:
    """A rank request as a file can hold it."""
    if isinstance(rank, int):
        return rank
    return list(rank)
