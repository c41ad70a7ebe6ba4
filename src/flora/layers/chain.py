"""Which products form dW: worked out from shapes alone, once for each adapter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

LARGEST_KERNEL = 1024  # pixels of a kernel whose factors are seen as one
LEAST_MODES = 3  # of such a kernel, where W + dW is kept; for two, the launches take the host longer than they save
Factors = Sequence[Tensor | None]  # a matrix (I, J) for each mode, None for the identity


class Step(NamedTuple):
    """One product of the chain: ``factor @ rows.T``.

    Attributes:
        mode: of the factor; of several neighbours that are kept whole, which are one step, the first.
        rest: rows of what there is before this step, ``rows``.
        rank: columns of it.
    """

    mode: int
    rest: int
    rank: int


class Chain(NamedTuple):
    """How dW is formed from tensors of certain shapes.

    Attributes:
        kernel: the modes whose factors are multiplied into one first, and count as mode 2 then.
        steps: the last mode first; the first mode's is the product that is added to W.
    """

    kernel: tuple[int, ...]
    steps: tuple[Step, ...]


def both_chains(core: Tensor, factors: Factors) -> tuple[Chain, Chain]:
    """Where W + dW is formed once more in backward, and where it is kept."""
    merging, keeping = _kernel_modes(core, factors), _kernel_modes(core, factors, LEAST_MODES)
    return chain_of(core, factors, merging), chain_of(core, factors, keeping)


def chain_of(core: Tensor, factors: Factors, kernel: Sequence[int] = ()) -> Chain:
    """How dW is formed; the factors of the modes ``kernel`` are one by then."""
    # shape: of the core, mode by mode at its full size from the end
    ranks = list(core.shape)
    sizes = [rank if factor is None else factor.shape[0] for rank, factor in zip(ranks, factors, strict=True)]
    whole = [factor is None for factor in factors]

    if kernel:
        ranks, sizes = [*ranks[:2], math.prod(ranks[2:])], [*sizes[:2], math.prod(sizes[2:])]
        whole = [*whole[:2], False]

    steps: list[Step] = []
    numel, mode = math.prod(ranks), len(ranks)

    while mode > 1:
        mode -= 1
        rank, size = ranks[mode], sizes[mode]

        # Without a factor the mode is only put in front, and its neighbours that are kept whole with it.
        if whole[mode]:
            while mode > 1 and whole[mode - 1]:
                mode -= 1
                rank *= ranks[mode]
            if rank == 1:
                continue
            size = rank

        steps.append(Step(mode, numel // rank, rank))
        numel = numel // rank * size

    steps.append(Step(0, numel // ranks[0], ranks[0]))

    return Chain(tuple(kernel), tuple(steps))


def _kernel_modes(core: Tensor, factors: Factors, least: int = 2) -> list[int]:
    """The modes of a convolution's kernel whose factors are seen as one: two or three, if the product is small."""
    if len(factors) < 2 + least:
        return []

    modes = [mode for mode in range(2, len(factors)) if core.shape[mode] > 1 or factors[mode] is not None]
    if not least <= len(modes) <= 3:
        return []

    size = 1
    for mode in modes:
        factor = factors[mode]
        if factor is None:
            return []

        size *= factor.shape[0]

    if size <= LARGEST_KERNEL:
        return modes

    return []
