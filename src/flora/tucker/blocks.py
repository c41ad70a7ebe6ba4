"""Channels in blocks: a weight as a grid of blocks that share their factors and have a core each.

At a small rank nearly all parameters are in the factors of the wide modes, and the core is nearly free. In the fold
``(a b) (c d) kw`` the outputs are cut into a parts and the inputs into c. With a, c and the kernel kept whole, one
factor ``B (b, r)`` serves all parts of the outputs and one ``D (d, r)`` all parts of the inputs, and each block has its
own core: ``dW[a, :, c, :, k] = B G[a, :, c, :, k] D'``. For the same parameters the change then has a higher rank as a
matrix: ``a r`` directions of outputs and ``c r`` of inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from flora.tucker.form import count_params
from flora.tucker.ranks import Role

# A stored mode is cut into at most so many parts.
MOST_PARTS = 16
# How many times the rank has to grow before a weight is cut. At 2 times, images lost on validation.
ENOUGH = 3
# The parts of the first two modes in the fold.
AXES = ("a", "b", "c", "d")


class Blocks(NamedTuple):
    """How a weight is cut, and the ranks in that space.

    Attributes:
        parts: of the first two modes.
        ranks: of the modes ``(a, b, c, d, kernel...)``.
    """

    parts: tuple[int, int]
    ranks: tuple[int, ...]

    def pattern(self, kernel: Sequence[str]) -> str:
        """The fold, in einops' notation; ``kernel`` names the modes of the kernel.

        Examples:
            >>> Blocks((4, 2), (4, 3, 2, 3, 3)).pattern(("kw",))
            '(a b) (c d) kw, a=4 c=2'
        """
        a, b, c, d = AXES
        first, second = self.parts
        return " ".join((f"({a} {b})", f"({c} {d})", *kernel)) + f", {a}={first} {c}={second}"


@cache
def cut(shape: tuple[int, ...], roles: tuple[Role, ...], ranks: tuple[int, ...]) -> Blocks | None:
    """The blocks of the highest rank that cost no more than a form of these ranks.

    Args:
        shape: of the weight.
        roles: of its modes.
        ranks: of the form over the stored modes, whose parameters may be spent.

    Returns:
        None where cutting gains too little, or the weight is not that of a convolution over more than one position.

    Examples:
        >>> cut((128, 64, 3), ("output", "summed", "kernel"), (5, 5, 2))
        Blocks(parts=(4, 4), ranks=(4, 4, 4, 4, 3))
        >>> cut((16, 8, 3, 3), ("output", "summed", "kernel", "kernel"), (4, 4, 2, 2)) is None
        True
    """
    # Transposed layers have their inputs first. A linear layer keeps the geometry of LoRA, and so does a 1x1 one.
    is_convolution = {*roles[:2]} == {"output", "summed"} and {*roles[2:]} == {"kernel"}
    if not is_convolution or math.prod(shape[2:]) == 1:
        return None

    share, wanted = count_params(shape, ranks), ENOUGH * min(ranks[:2])
    best, found = wanted - 1, None

    for first in _divisors(shape[0]):
        for second in _divisors(shape[1]):
            view = (first, shape[0] // first, second, shape[1] // second, *shape[2:])
            rank = _largest_rank(view, share)
            reached = rank * min(first, second)
            if reached > best:
                best, found = reached, Blocks((first, second), _ranks(view, rank))

    return found


def _divisors(size: int) -> list[int]:
    """The numbers of parts that a mode may be cut into; no part is narrower than there are parts."""
    return [parts for parts in range(1, MOST_PARTS + 1) if size % parts == 0 and parts * parts <= size]


def _ranks(view: Sequence[int], rank: int) -> tuple[int, ...]:
    """Parts and kernel whole, both channels of a block at this rank."""
    first, _, second, _, *kernel = view
    return (first, rank, second, rank, *kernel)


def _largest_rank(view: Sequence[int], share: int) -> int:
    """The largest rank inside the blocks that the parameters buy; 0 where even 1 costs more."""
    rank = 0
    while rank < min(view[1], view[3]) and count_params(view, _ranks(view, rank + 1)) <= share:
        rank += 1

    return rank
