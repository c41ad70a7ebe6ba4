"""The ranks at which a method has as many of them as it may spend."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flora.errors import UserError

# One rank for all layers -> layer -> trainable parameters.
Costs = Callable[[int], Mapping[str, int]]


def match_ranks(costs: Costs, budget: int) -> dict[str, int]:
    """A rank for each layer, such that all together cost at most ``budget`` and nearly that.

    The largest rank that all layers can have, and then one more for single layers: of the steps that fit, the most
    expensive first.

    Args:
        costs: what each layer costs when all have that rank; it must not fall with the rank.
        budget: trainable parameters to spend.

    Raises:
        ValueError: rank 1 costs more than that.
    """
    least = sum(costs(1).values())
    if least > budget:
        raise UserError(f"rank 1 costs {least:,} parameters, more than the {budget:,} that every adapter may spend")

    low, high = 1, 2
    while sum(costs(high).values()) <= budget:
        # Nothing more can be had.
        if costs(high) == costs(low):
            return dict.fromkeys(costs(low), low)

        low, high = high, 2 * high

    while high - low > 1:
        middle = (low + high) // 2
        if sum(costs(middle).values()) <= budget:
            low = middle
        else:
            high = middle

    now, more = costs(low), costs(low + 1)
    left = budget - sum(now.values())
    ranks = dict.fromkeys(now, low)
    for name in sorted(now, key=lambda name: now[name] - more[name]):
        if 0 < more[name] - now[name] <= left:
            left -= more[name] - now[name]
            ranks[name] += 1

    return ranks
