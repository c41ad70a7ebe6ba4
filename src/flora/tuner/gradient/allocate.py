"""Ranks where the gradient is: a budget goes to the weights and modes that keep most of the gradients' energy.

Each weight's energy counts as one, so that no weight wins by the size of its gradient alone. A layer may be left out,
and none gets more than a few times its share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from flora.layers.patterns import exact_pattern
from flora.tucker.allocation import Choice, choices_of_energy, spend
from flora.tucker.form import count_params
from flora.tuner.config import FloraConfig
from flora.tuner.gradient.collect import AdaptedWeight
from flora.tuner.gradient.sketch import Directions
from flora.tuner.parameter import ParamWrapper

# A weight gets at most so many times what equal ranks would give it.
MOST = 4


class Allocation(NamedTuple):
    """The ranks of every weight, by its name; zeros where it is left out."""

    ranks: dict[str, tuple[int, ...]]

    @property
    def left_out(self) -> list[str]:
        """The weights that get nothing."""
        return [name for name, ranks in self.ranks.items() if not any(ranks)]


def allocate(
    weights: Sequence[AdaptedWeight],
    found: Mapping[str, Directions | None],
    equal: Mapping[str, tuple[int, ...]],
    budget: int,
) -> Allocation:
    """Ranks per mode that spend at most ``budget``.

    Args:
        weights: the weights to spend on.
        found: their gradients' directions; weights without any keep the equal ranks.
        equal: the ranks that the budget would buy for all alike.
        budget: parameters.
    """
    left = budget
    fixed: dict[str, tuple[int, ...]] = {}
    options: dict[str, list[Choice]] = {}

    for adapted in weights:
        name, directions = adapted.name, found[adapted.name]
        share = count_params(adapted.shape, equal[name])

        if directions is None:
            fixed[name] = equal[name]
            left -= share
            continue

        # The first choice is to leave the weight out. A layer of which other weights are adapted cannot lose one of
        # them, and neither can a raw parameter lose its wrapper, so there the list begins with the smallest ranks.
        listed = choices_of_energy(directions.energy / directions.total, adapted.shape, 1.0)
        must_stay = isinstance(adapted.layer, ParamWrapper) or len(adapted.layer.attributes) > 1

        if must_stay and len(listed) > 1:
            listed = listed[1:]

        options[name] = [listed[0], *(choice for choice in listed[1:] if choice.params <= MOST * share)]

    chosen = {name: choice.ranks for name, choice in spend(options, left).items()}

    return Allocation({adapted.name: {**fixed, **chosen}[adapted.name] for adapted in weights})


def write_ranks(config: FloraConfig, allocation: Allocation, weights: Sequence[AdaptedWeight]) -> None:
    """Puts the ranks into ``rank_pattern``, and leaves out of the targets what gets none.

    Args:
        config: of the adapter, changed in place.
        allocation: of the weights whose ranks were open.
        weights: every targeted one, those with ranks of the user's own too.
    """
    kept = {name: ranks for name, ranks in allocation.ranks.items() if any(ranks)}
    config.rank_pattern = {
        **config.rank_pattern,
        **{exact_pattern(name): list(ranks) for name, ranks in kept.items()},
    }
    config.budget = None
    if allocation.left_out:
        # Plain names would also hold for longer ones that end so. Raw parameters stay in ``target_parameters``.
        layers = [each for each in weights if not isinstance(each.layer, ParamWrapper)]
        kept_layers = {exact_pattern(each.module) for each in layers if each.name not in allocation.left_out}
        config.target_modules = kept_layers or None
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
