"""A rank request (one int, one int per mode, or a budget) becomes one tuple of ints for one weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flora.tucker import count_params

Ranks = int | list[int] | tuple[int, ...]
KERNEL_AXES = frozenset({"kd", "kh", "kw"})


def describe(name: str, shape: Sequence[int], axes: Sequence[str]) -> str:
    """How a weight is named in messages: ``conv1.weight (out=64, in=3, kh=7, kw=7)``."""
    dims = ", ".join(f"{axis}={size}" for axis, size in zip(axes, shape, strict=True))
    return f"{name} ({dims})"


def check_rank(value: object, what: str) -> None:
    """Raises unless ``value`` is an int of at least 1 (a bool is not one)."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{what} must be an int, got {value!r} of type {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{what} must be at least 1, got {value}")


def check_request(r: object, what: str = "r") -> None:
    """Raises unless ``r`` is a rank (an int of at least 1) or a non-empty list of them."""
    if isinstance(r, (list, tuple)):
        if not r:
            raise ValueError(f"{what} is an empty list; give one rank per dimension or a single int")
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
    name: str = "weight",
) -> tuple[int, ...]:
    """The ranks ``(J1, ..., JN)`` of the Tucker form of one weight.

    A list gives every rank and is taken as it is. An int asks for rank ``r`` on the channel modes and ``kernel_r`` on
    the kernel modes (the axes kd, kh, kw); it is lowered to the size of a mode, and to the product of the
    other ranks, because a rank above that product adds parameters and no expressiveness; where the form can then be any
    tensor of that shape, all modes are kept whole if that is cheaper. A rank equal to its size means that the mode is
    kept whole (no factor).

    Args:
        shape: ``(I1, ..., IN)`` of the weight.
        r: one int, or one int per dimension in the order of ``shape``.
        kernel_r: rank of each kernel mode; None keeps the kernel modes whole.
        axes: a name per dimension, used in messages and to tell kernel modes.
        name: the weight's name, used in messages.

    Raises:
        TypeError: a rank is not an int.
        ValueError: a rank is below 1, the list has the wrong length, or a listed rank is above its dimension.

    Example:
        >>> resolve((512, 256, 3, 3), 32, 2, axes=("out", "in", "kh", "kw"))
        (32, 32, 2, 2)
        >>> resolve((96, 1, 7, 7), 8, 2, axes=("out", "in", "kh", "kw"))
        (4, 1, 2, 2)
    """
    axes = tuple(axes) if axes is not None else tuple(f"d{mode}" for mode in range(len(shape)))
    check_request(r)
    if isinstance(r, (list, tuple)):
        if len(r) != len(shape):
            raise ValueError(
                f"ranks {tuple(r)} have {len(r)} {'entry' if len(r) == 1 else 'entries'} but "
                f"{describe(name, shape, axes)} has {len(shape)} dims; give one rank per dim or a single int"
            )
        for rank, size, axis in zip(r, shape, axes, strict=True):
            if rank > size:
                raise ValueError(
                    f"rank {rank} of mode '{axis}' is above its size {size} in {describe(name, shape, axes)}; "
                    f"give at most {size} (a rank equal to the size keeps the mode whole)"
                )
        return tuple(r)
    if kernel_r is not None:
        check_rank(kernel_r, "kernel_r")
    if len(shape) == 1:  # a 1-D form with a factor would cost more than the weight and reach less
        return tuple(shape)
    ranks = []
    for size, axis in zip(shape, axes, strict=True):
        wanted = (kernel_r if kernel_r is not None else size) if axis in KERNEL_AXES else r
        ranks.append(min(wanted, size))
    lowered = _lower_to_reach(ranks, axes)
    reach = tuple(min(size, math.prod(shape) // size) for size in shape)
    full = lowered == reach  # the form is no restriction, so the weight itself is the cheaper parametrisation
    return tuple(shape) if full and math.prod(shape) <= count_params(shape, lowered) else lowered


def _lower_to_reach(ranks: list[int], axes: Sequence[str]) -> tuple[int, ...]:
    """Lowers each channel rank to the product of the other ranks, the most that its mode can reach."""
    changed = True
    while changed:
        changed = False
        for mode, axis in enumerate(axes):
            others = math.prod(ranks) // ranks[mode]
            if axis not in KERNEL_AXES and ranks[mode] > others:
                ranks[mode], changed = others, True
    return tuple(ranks)


@dataclass(frozen=True)
class Weight:
    """A weight to be adapted, as far as ranks are concerned: its shape and the names of its dimensions."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]


def solve_budget(weights: Mapping[str, Weight], budget: int, kernel_r: int | None = 2) -> dict[str, tuple[int, ...]]:
    """Ranks per weight that spend at most ``budget`` trainable parameters, and as many of them as ranks allow.

    One rank is raised for all weights together while it fits; what is left is spent by raising single weights by one,
    the dearest step first.

    Args:
        weights: name -> shape and axes.
        budget: trainable parameters to spend on core and factors.
        kernel_r: rank of each kernel mode, as in :func:`resolve`.

    Raises:
        ValueError: the budget is below what rank 1 everywhere costs.
    """

    def ranks_at(name: str, r: int) -> tuple[int, ...]:
        return resolve(weights[name].shape, r, kernel_r, axes=weights[name].axes, name=name)

    def cost(name: str, r: int) -> int:
        return count_params(weights[name].shape, ranks_at(name, r))

    least = sum(cost(name, 1) for name in weights)
    if budget < least:
        raise ValueError(
            f"budget of {budget} parameters is below {least}, the cost of rank 1 on the {len(weights)} targeted "
            f"weights; raise the budget, lower kernel_r or target fewer modules"
        )
    low, high = 1, max(max(weight.shape) for weight in weights.values())
    while low < high:  # the largest uniform rank that fits
        middle = (low + high + 1) // 2
        low, high = (middle, high) if sum(cost(name, middle) for name in weights) <= budget else (low, middle - 1)
    level = dict.fromkeys(weights, low)
    left = budget - sum(cost(name, low) for name in weights)
    steps = {name: cost(name, low + 1) - cost(name, low) for name in weights}
    for name in sorted(weights, key=lambda key: -steps[key]):
        if 0 < steps[name] <= left:
            level[name] += 1
            left -= steps[name]
    return {name: ranks_at(name, r) for name, r in level.items()}
