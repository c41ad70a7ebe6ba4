"""A rank request (one int, one int per mode, or a budget) becomes one tuple of ints for one weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from flora.errors import BudgetError, UserError, WrongTypeError, counted
from flora.tucker.form import count_params

Ranks = int | list[int] | tuple[int, ...]

# What a layer does with one mode of its weight: it has an output for each entry, sums over it, sums over it as a
# convolution over its kernel, or picks one entry of it.
Role = Literal["output", "summed", "kernel", "stack"]


def describe(name: str, shape: Sequence[int], axes: Sequence[str]) -> str:
    """How a weight is named in messages: ``conv1.weight (out=64, in=3, kh=7, kw=7)``."""
    dims = ", ".join(f"{axis}={size}" for axis, size in zip(axes, shape, strict=True))
    return f"{name} ({dims})"


def check_rank(value: object, what: str) -> None:
    """Raises unless ``value`` is an int of at least 1 (a bool is not one)."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise WrongTypeError(f"{what} must be an int, got {value!r} of type {type(value).__name__}")
    if value < 1:
        raise UserError(f"{what} must be at least 1, got {value}")


def check_shape(shape: object) -> tuple[int, ...]:
    """The shape of a weight as a tuple.

    Raises:
        WrongTypeError: It is something else, such as the weight itself; says what to give.
    """
    kind = type(shape).__name__
    if isinstance(shape, Sequence) and not isinstance(shape, str):
        for mode, size in enumerate(shape):
            check_rank(size, f"shape[{mode}]")
        return tuple(shape)

    if hasattr(shape, "shape"):
        raise WrongTypeError(f"shape is a {kind}, expected the sizes of its dimensions; give weight.shape")
    raise WrongTypeError(f"shape must be the sizes of a weight's dimensions, such as (64, 3, 7, 7), got a {kind}")


def check_request(r: object, what: str = "r") -> None:
    """Raises unless ``r`` is a rank (an int of at least 1) or a non-empty list of them."""
    if isinstance(r, (list, tuple)):
        if not r:
            raise UserError(f"{what} is an empty list; give one rank per dimension or a single int")

        for mode, rank in enumerate(r):
            check_rank(rank, f"{what}[{mode}]")
    else:
        check_rank(r, what)


def resolve(
    shape: Sequence[int],
    r: Ranks = 8,
    kernel_r: int | None = 2,
    *,
    axes: Sequence[str] | None = None,
    roles: Sequence[Role] | None = None,
    name: str = "weight",
) -> tuple[int, ...]:
    """The ranks ``(J1, ..., JN)`` of the Tucker form of one weight.

    A list gives every rank and is taken as it is. An int asks for rank ``r`` on the channel modes and ``kernel_r`` on
    the kernel modes. It is lowered to the size of a mode, and to the product of the other ranks, because a rank above
    that product adds parameters and no expressiveness. Where the form can then be any tensor of that shape, all modes
    are kept whole, which is cheaper. A rank equal to its size means that the mode is kept whole (no factor).

    Args:
        shape: ``(I1, ..., IN)`` of the weight.
        r: one int, or one int per dimension in the order of ``shape``.
        kernel_r: rank of each kernel mode; None keeps the kernel modes whole.
        axes: a name per dimension, used in messages.
        roles: the role of each dimension; without it none is a kernel mode.
        name: the weight's name, used in messages.

    Raises:
        TypeError: a rank is not an int.
        ValueError: a rank is below 1, the list has the wrong length, or a listed rank is above its dimension.

    Examples:
        >>> resolve((512, 256, 3, 3), 32, 2, roles=("output", "summed", "kernel", "kernel"))
        (32, 32, 2, 2)
        >>> resolve((96, 1, 7, 7), 8, 2, roles=("output", "summed", "kernel", "kernel"))
        (4, 1, 2, 2)
    """
    axes = tuple(axes or (f"d{mode}" for mode in range(len(shape))))

    kernel = _kernel_modes(shape, roles)
    check_request(r)

    if isinstance(r, (list, tuple)):
        if len(r) != len(shape):
            raise UserError(
                f"ranks {tuple(r)} have {len(r)} {'entry' if len(r) == 1 else 'entries'} but "
                f"{describe(name, shape, axes)} has {len(shape)} dims; give one rank per dim or a single int"
            )

        for rank, size, axis in zip(r, shape, axes, strict=True):
            if rank > size:
                raise UserError(
                    f"rank {rank} of mode '{axis}' is above its size {size} in {describe(name, shape, axes)}; "
                    f"give at most {size} (a rank equal to the size keeps the mode whole)"
                )

        return tuple(r)

    if kernel_r is not None:
        check_rank(kernel_r, "kernel_r")
    # A 1-D form with a factor would cost more than the weight and reach less.
    if len(shape) == 1:
        return tuple(shape)

    ranks = []
    for size, is_kernel in zip(shape, kernel, strict=True):
        wanted = r
        if is_kernel:
            # None keeps the mode whole.
            wanted = kernel_r or size

        ranks.append(min(wanted, size))

    # The unfolding of mode n is (In, product of the other sizes), so no tensor of this shape has a higher rank there
    # than the smaller of the two. A form with all these ranks is any tensor of the shape, and so it cannot have fewer
    # parameters than the weight itself.
    lowered = _lower_to_reach(ranks, kernel)
    reach = tuple(min(size, math.prod(shape) // size) for size in shape)
    if lowered == reach:
        return tuple(shape)

    return lowered


def _kernel_modes(shape: Sequence[int], roles: Sequence[Role] | None) -> tuple[bool, ...]:
    """Which modes are those of a convolution's kernel."""
    if roles is None:
        return (False,) * len(shape)
    return tuple(role == "kernel" for role in roles)


def _lower_to_reach(ranks: list[int], kernel: Sequence[bool]) -> tuple[int, ...]:
    """Lowers each channel rank to the product of the other ranks, the most that its mode can reach."""
    # The core's unfolding of mode n is (Jn, product of the other ranks): more rows than columns are never used.
    # Lowering one rank lowers the product for the others, so it is repeated until nothing changes.
    changed = True
    while changed:
        changed = False
        for mode, is_kernel in enumerate(kernel):
            others = math.prod(ranks) // ranks[mode]
            if not is_kernel and ranks[mode] > others:
                ranks[mode], changed = others, True

    return tuple(ranks)


@dataclass(frozen=True)
class Weight:
    """A weight to be adapted, as far as ranks are concerned: its shape and the roles of its dimensions."""

    shape: tuple[int, ...]
    roles: tuple[Role, ...]


def solve_budget(weights: Mapping[str, Weight], budget: int, kernel_r: int | None = 2) -> dict[str, tuple[int, ...]]:
    """Ranks per weight that spend at most ``budget`` trainable parameters, and as many of them as ranks allow.

    One rank is raised for all weights together while it fits; what is left is spent by raising single weights, the
    lowest rank first and of those the most expensive step, until no step is affordable.

    Args:
        weights: name -> shape and roles.
        budget: trainable parameters to spend on core and factors.
        kernel_r: rank of each kernel mode, as in :func:`resolve`.

    Raises:
        BudgetError: the budget is below what rank 1 everywhere costs.
    """
    ladders = {weight: _Ladder(weight, kernel_r) for weight in set(weights.values())}
    of = {name: ladders[weight] for name, weight in weights.items()}
    least = sum(ladder.cost(ladder.best(1)) for ladder in of.values())
    if budget < least:
        raise BudgetError(
            f"budget of {budget} parameters is below {least}, the cost of rank 1 on the "
            f"{counted(len(weights), 'targeted weight')}; raise the budget, lower kernel_r or target fewer modules"
        )

    def total(r: int) -> int:
        return sum(ladder.cost(ladder.best(r)) for ladder in of.values())

    low, high = 1, max(ladder.top for ladder in of.values())
    # The largest uniform rank that fits.
    while low < high:
        middle = (low + high + 1) // 2
        if total(middle) <= budget:
            low = middle
        else:
            high = middle - 1

    # What is left buys one more step for single weights. ``min`` takes the lowest level first, and of those the most
    # expensive step, so that no weight runs ahead while another could still be raised.
    level = {name: ladder.best(low) for name, ladder in of.items()}
    left = budget - total(low)
    while steps := [
        (level[name], -price, name)
        for name, ladder in of.items()
        if (price := ladder.price(level[name])) is not None and price <= left
    ]:
        _, earned, name = min(steps)
        level[name], left = of[name].best(level[name] + 1), left + earned

    return {name: ladder.ranks(level[name]) for name, ladder in of.items()}


class _Ladder:
    """The rank requests that make sense for one weight, and what each costs.

    The cost falls where a rank reaches the size of its mode, because the mode is whole then and needs no factor;
    requests just below that are passed over.
    """

    def __init__(self, weight: Weight, kernel_r: int | None) -> None:
        self.weight, self.kernel_r = weight, kernel_r
        total = math.prod(weight.shape)
        kernel = _kernel_modes(weight.shape, weight.roles)
        channels = [size for size, is_kernel in zip(weight.shape, kernel, strict=True) if not is_kernel]
        self.top = max([min(size, total // size) for size in channels], default=1)
        self.sizes = sorted({size for size in channels if size <= self.top}, reverse=True)
        self._costs: dict[int, int] = {}

    def ranks(self, r: int) -> tuple[int, ...]:
        return resolve(self.weight.shape, r, self.kernel_r, roles=self.weight.roles)

    def cost(self, r: int) -> int:
        if r not in self._costs:
            self._costs[r] = count_params(self.weight.shape, self.ranks(r))
        return self._costs[r]

    def best(self, r: int) -> int:
        """The highest request of at least r that costs no more than r."""
        r = min(r, self.top)
        larger = (size for size in [self.top, *self.sizes] if size > r and self.cost(size) <= self.cost(r))
        return next(larger, r)

    def price(self, r: int) -> int | None:
        """What the next request above r costs more; None at the top."""
        if r >= self.top:
            return None
        return self.cost(self.best(r + 1)) - self.cost(r)
