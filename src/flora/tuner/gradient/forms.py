"""From the directions of a weight's gradients to the tensors of its adapter, so that it changes the weight along them.

With the leading singular vectors A_n of the modes n >= 2 and the mean gradient g, ``C = g x2 A2' ... xN AN'`` and its
first unfolding is ``P S Q'``. The core is ``Q'`` and the first factor ``-kappa P S``: the first change is minus kappa
times the projected gradient. Where the first mode is whole, the core itself is ``-kappa C``.

Such factors let through more of what goes into the layer than random ones of the same size, so that a step of the
optimiser changes the layer more. Where that is more than ``MOST_GAIN`` times, they are made smaller, and what moves
larger by the same: the first change stays, and a learning rate keeps its meaning.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flora.tucker.delta import TuckerDelta
from flora.tucker.form import Tucker, mode_product
from flora.tuner.gradient.sketch import Directions, complete

# The factors let through at most so many times what random ones of the same size do.
MOST_GAIN = 3.0


class Ray(NamedTuple):
    """A change of one weight as far as its direction: ``moving`` times the size of the step goes into the adapter.

    Attributes:
        delta: of the weight.
        still: the form without what moves: core and factors, of which the moving one is not read.
        moving: the first factor, or the core if the first mode is whole, for a change of the norm 1.
        norm: of the weight; a step of relative size t changes it by t times that.
    """

    delta: TuckerDelta
    still: Tucker
    moving: Tensor
    norm: float


def ray(delta: TuckerDelta, found: Directions, norm: float) -> Ray | None:
    """The projected gradient as a direction in the space of the adapter, None where it is zero.

    The lengths of the tensors that stay are those that the configured start gave them, less where the factors let
    through much more than random ones, so that the usual learning rates fit.
    """
    # ``found.mean`` is the mean gradient in the singular vectors of all modes. A mode with a factor keeps its leading
    # coordinates, as many as the rank, and those vectors are the factor. A mode kept whole goes back to its full size.
    # The first mode stays in its coordinates for now.
    form = delta.form
    ranks, shape = form.ranks, form.shape
    factors: list[Tensor | None] = [None] * len(shape)
    core = found.mean

    for mode in range(1, len(shape)):
        if form.factors[mode] is None:
            core = mode_product(core, found.vectors[mode], mode)
            continue

        factors[mode] = complete(found.vectors[mode], ranks[mode])
        reached = core.narrow(mode, 0, min(ranks[mode], core.shape[mode]))
        core = _padded(reached, mode, ranks[mode])

    excess = max(1.0, gain_of(core, found, factors) / MOST_GAIN)

    if form.factors[0] is None:
        moving = -mode_product(core, found.vectors[0], 0)
        still = core.new_zeros(ranks)
        return _scaled(delta, still, factors, moving, norm, excess)

    # The first unfolding of what was kept is P S Q'. The first factor moves and takes -P S; the core holds Q', whose
    # rows are orthonormal. Ranks that the gradient does not fill get further orthonormal rows, and a first factor of
    # zero.
    # shape: left (K1, min), values (min,), right (min, product of the other ranks)
    left, values, right = torch.linalg.svd(core.flatten(1), full_matrices=False)
    count = min(ranks[0], values.numel())
    moving = found.vectors[0].new_zeros(shape[0], ranks[0])
    moving[:, :count] = -(found.vectors[0] @ left[:, :count]) * values[:count]

    if right.shape[1] >= ranks[0]:
        rows = complete(right.T, max(ranks[0], right.shape[0])).T
    else:
        rows = right

    still = core.new_zeros(ranks[0], right.shape[1])
    still[: min(len(rows), ranks[0])] = rows[: ranks[0]]

    return _scaled(delta, still.reshape(ranks), factors, moving, norm, excess)


def gain_of(core: Tensor, found: Directions, factors: list[Tensor | None]) -> float:
    """How much more of the gradient the factors keep than random ones of their size do on average; 1 without any.

    A gradient's directions are those of the layer's inputs, so this is also how much more of the inputs they keep.
    """
    random = math.prod(factor.shape[1] / factor.shape[0] for factor in factors if factor is not None)
    whole = float(found.mean.norm())
    if not whole:
        return 1.0
    return float(core.norm()) / (whole * math.sqrt(random))


def _padded(tensor: Tensor, mode: int, size: int) -> Tensor:
    missing = list(tensor.shape)
    missing[mode] = size - tensor.shape[mode]
    if missing[mode]:
        return torch.cat([tensor, tensor.new_zeros(missing)], mode)
    return tensor


def _scaled(
    delta: TuckerDelta, core: Tensor, factors: list[Tensor | None], moving: Tensor, norm: float, excess: float
) -> Ray | None:
    """The lengths of the start as configured, their product divided by ``excess``; ``moving`` made up for them."""
    size = float(moving.norm())
    if not size or not math.isfinite(size):
        return None

    # dW is the product of all tensors and the scale. ``gain`` is that product without the one that moves, which is
    # divided by it: whatever lengths the others get, the first change has the norm that is asked for.
    form, gain = delta.form, float(delta.scale)
    count = sum(factor is not None for factor in factors)

    # A core that does not move takes the excess; where the core moves, the factors share it.
    if form.factors[0] is None:
        shrink = excess ** (1 / max(1, count))
    else:
        shrink = 1.0

    for mode, factor in enumerate(factors):
        given = form.factors[mode]
        if factor is None or given is None:
            continue

        length = float(given.detach().double().norm()) / math.sqrt(factor.shape[1]) or 1.0
        factors[mode], gain = factor * length / shrink, gain * length / shrink

    if form.factors[0] is not None:
        rows = min(core.shape[0], core[0].numel())
        length = (float(form.core.detach().double().norm()) / math.sqrt(rows) or 1.0) / excess
        core, gain = core * length, gain * length

    return Ray(delta, Tucker(core, tuple(factors)), moving / (size * gain), norm)


@torch.no_grad()
def place_directions(ray: Ray) -> None:
    """Writes everything but what moves."""
    form = ray.delta.form
    if form.factors[0] is not None:
        form.core.copy_(ray.still.core)
    for own, new in zip(form.factors[1:], ray.still.factors[1:], strict=True):
        if own is not None and new is not None:
            own.copy_(new)


@torch.no_grad()
def place_step(ray: Ray, size: float) -> None:
    """Writes what moves, for a change of ``size`` times the norm of the weight."""
    form = ray.delta.form
    if form.factors[0] is None:
        target = form.core
    else:
        target = form.factors[0]
    target.copy_(ray.moving * (size * ray.norm))
