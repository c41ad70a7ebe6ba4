"""Which ranks for which layer: what each rank would cost and keep, and how a budget lowers the total error most.

The kept energy of a truncated HOSVD is that of the leading corner of the full one's core, so one decomposition gives
the error of every rank at once. A budget then goes where an extra parameter removes most error, along the lower convex
hull of each layer's (parameters, error) points.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from flora.errors import BudgetError, counted
from flora.tucker.decomposition import leading, singular_values
from flora.tucker.form import count_params, mode_product

# How many ranks per mode are tried first, where few will do.
FIRST = 64
# How many ranks are tried per mode of a tensor with more than two modes; up to here all of them.
GRID = 24


@dataclass(frozen=True)
class Choice:
    """Ranks for one layer: what they cost, and the squared error of the truncated HOSVD they leave."""

    ranks: tuple[int, ...]
    params: int
    error: float


def choices(tensor: Tensor, *, most: int | None = None) -> list[Choice]:
    """The ranks worth choosing for a tensor, from cheap to expensive, each with less error than the one before.

    The first costs nothing and leaves the layer out (ranks of zero).

    Args:
        tensor: what is decomposed.
        most: the largest rank of a mode that is tried, by default all; a few cost much less than all of a large tensor.
    """
    total, most = float(tensor.double().square().sum()), most or max(tensor.shape)

    if tensor.ndim == 2:
        found = _of_matrix(tensor, total, most)
    else:
        found = _of_tensor(tensor, total, most)

    return _worth_choosing(found, Choice((0,) * tensor.ndim, 0, total))


def choices_of_energy(energy: Tensor, shape: Sequence[int], total: float) -> list[Choice]:
    """The ranks worth choosing for tensors that share their factors, such as the gradients of several batches.

    A mode may be kept whole at any rank of the others: it then costs no factor. A mode with a factor has at most the
    product of the other ranks, which is all that it can reach.

    Args:
        energy: squares of the common core in its singular vectors, summed over the tensors, ``(K1, ..., KN)``, Kn <= In
        shape: ``(I1, ..., IN)``.
        total: the squared norm of all the tensors, the error where the layer is left out.
    """
    # The form of ranks (r1, ..., rN) keeps the energy of the core's corner [:r1, ..., :rN]. A cumulative sum along
    # every mode gives that of all corners at once; of each mode only the ranks on its grid are looked at.
    kept = energy.double()
    grids = []
    for mode, size in enumerate(shape):
        grid = sorted({*_grid(size, energy.shape[mode]), size})
        ends = torch.tensor([min(rank, energy.shape[mode]) - 1 for rank in grid])
        kept = kept.cumsum(mode).index_select(mode, ends)
        grids.append(grid)

    # shape: (combinations, N), in the order of the flattened energies
    ranks = torch.cartesian_prod(*[torch.tensor(grid) for grid in grids]).reshape(-1, len(shape))
    sizes = torch.tensor(shape)
    product = ranks.prod(1, keepdim=True)
    is_whole = ranks == sizes
    params = product[:, 0] + (ranks * sizes * ~is_whole).sum(1)
    useful = ((ranks * ranks <= product) | is_whole).all(1)

    found = zip(ranks[useful].tolist(), params[useful].tolist(), kept.flatten()[useful].tolist(), strict=True)
    listed = [Choice(tuple(own), count, max(total - energy, 0.0)) for own, count, energy in found]

    return _worth_choosing(listed, Choice((0,) * len(shape), 0, total))


def _worth_choosing(found: Sequence[Choice], nothing: Choice) -> list[Choice]:
    """From cheap to expensive, each with less error than all cheaper ones; ``nothing`` is the first."""
    best = [nothing]
    for choice in sorted(found, key=lambda choice: (choice.params, choice.error)):
        if choice.error < best[-1].error:
            best.append(choice)
    return best


def _of_matrix(tensor: Tensor, total: float, most: int) -> list[Choice]:
    """Both ranks alike: singular vectors come in pairs."""
    values = singular_values(tensor, most)
    left = (total - values.cumsum(0)).clamp(min=0).tolist()
    return [
        Choice((rank, rank), count_params(tensor.shape, (rank, rank)), error)
        for rank, error in enumerate(left, start=1)
    ]


def _of_tensor(tensor: Tensor, total: float, most: int) -> list[Choice]:
    # The same as ``choices_of_energy``, for one tensor: its coordinates in the singular vectors of each mode, whose
    # leading corners are the truncated forms.
    core = tensor.float() if tensor.dtype != torch.float64 else tensor

    for mode in range(tensor.ndim):
        core = mode_product(core, leading(tensor, mode, most)[1].T.to(core.dtype), mode)

    grids = [_grid(size, width) for size, width in zip(tensor.shape, core.shape, strict=True)]
    kept = core.square()
    for mode, grid in enumerate(grids):
        ends = torch.tensor([min(rank, core.shape[mode]) - 1 for rank in grid])
        kept = kept.cumsum(mode, dtype=torch.float64).index_select(mode, ends)

    left = (total - kept).clamp(min=0).flatten().tolist()
    table = torch.cartesian_prod(*[torch.tensor(grid) for grid in grids]).reshape(-1, tensor.ndim).tolist()

    return [
        Choice(tuple(ranks), count_params(tensor.shape, ranks), error) for ranks, error in zip(table, left, strict=True)
    ]


def _grid(size: int, reach: int) -> list[int]:
    """Ranks to try for a mode: all of a small one, else ever wider steps, always up to what the mode can reach."""
    most = min(size, reach)
    if most <= GRID:
        return list(range(1, most + 1))

    # Every small rank, then as many again whose ratio is the same from one to the next.
    half = GRID // 2
    ratio = (most / half) ** (1 / half)
    wider = [min(most, round(half * ratio**power)) for power in range(1, half + 1)]

    return sorted({*range(1, half + 1), *wider, most})


def is_cut(choice: Choice, shape: Sequence[int], most: int) -> bool:
    """Whether a mode has the largest rank that was tried (``most`` of :func:`choices`), and could have a larger one."""
    return any(rank == most < size for rank, size in zip(choice.ranks, shape, strict=True))


def for_energy(options: Sequence[Choice], energy: float) -> Choice:
    """The cheapest choice that keeps at least this fraction of the squared norm."""
    allowed = (1 - energy) * options[0].error
    return next((choice for choice in options if choice.error <= allowed), options[-1])


def spend(options: Mapping[str, Sequence[Choice]], budget: int) -> dict[str, Choice]:
    """One choice per layer, at most ``budget`` parameters in all, for the least total squared error.

    Args:
        options: layer -> its :func:`choices`; what the first of them costs is spent in any case.
        budget: parameters to spend.

    Raises:
        BudgetError: it does not buy the first choices.
    """
    # Along the lower convex hull of a layer's (parameters, error) points every step removes less error per parameter
    # than the one before. So taking the steps of all layers from the steepest on is the best use of a budget, up to the
    # last step that no longer fits.
    chosen = {name: listed[0] for name, listed in options.items()}
    left = budget - sum(choice.params for choice in chosen.values())
    if left < 0:
        raise BudgetError(
            f"budget of {budget:,} parameters is below {budget - left:,}, what the smallest ranks of "
            f"{counted(len(chosen), 'weight')} cost; raise it, or target fewer weights"
        )

    steps = [
        (_slope(before, after), name, after)
        for name, listed in options.items()
        for before, after in pairwise(_hull(listed))
    ]
    # Steepest first; hulls keep each layer in order. Once a step does not fit, later ones of its layer cost more still.
    for _, name, choice in sorted(steps, key=lambda step: step[:2]):
        cost = choice.params - chosen[name].params
        if cost <= left:
            chosen[name], left = choice, left - cost

    return _fill(options, chosen, left)


def _slope(before: Choice, after: Choice) -> float:
    """The error that each further parameter removes, as a negative number."""
    return (after.error - before.error) / (after.params - before.params)


def _hull(listed: Sequence[Choice]) -> list[Choice]:
    """The lower convex hull of the (params, error) points, which come sorted."""
    # A point is dropped when the next one lies below the line through it: the step to it was less steep than the step
    # that follows.
    hull: list[Choice] = []
    for choice in listed:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _fill(options: Mapping[str, Sequence[Choice]], chosen: dict[str, Choice], left: int) -> dict[str, Choice]:
    """What the hulls leave over goes to the single steps, off the hull too, that remove most error."""
    while True:
        best: tuple[float, str, Choice] | None = None
        for name, listed in options.items():
            held = chosen[name]

            # Choices come with rising cost and falling error: the last one that fits is the best.
            choice = listed[bisect_right(listed, held.params + left, key=lambda choice: choice.params) - 1]
            if choice.error < held.error and (best is None or held.error - choice.error > best[0]):
                best = (held.error - choice.error, name, choice)

        if best is None:
            return chosen

        _, name, choice = best
        left -= choice.params - chosen[name].params
        chosen[name] = choice
