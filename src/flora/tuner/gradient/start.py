"""``start`` and ``adapt``: an adapter that begins with one step along the task's own gradient.

The size of the step is found by trying a few on batches that the gradient does not come from: the smallest that gains
at least 80 % of what the best one gains. Where none lowers the loss the adapter begins as its config says.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from tqdm import tqdm

from flora.errors import UserError, WrongTypeError, counted
from flora.layers.entries import BLOCKS
from flora.tucker.ranks import solve_budget
from flora.tuner import targets
from flora.tuner.config import FloraConfig
from flora.tuner.gradient.allocate import Allocation, allocate, write_ranks
from flora.tuner.gradient.collect import (
    AdaptedWeight,
    Batches,
    Loss,
    adapted_weights,
    collect,
    first_batches,
    loss_of,
    mean_loss,
    stored_weight,
)
from flora.tuner.gradient.forms import Ray, place_directions, place_step, ray
from flora.tuner.gradient.sketch import Directions, Sketch, of_first_process
from flora.tuner.merging import base_weight
from flora.tuner.parameter import ParamWrapper
from flora.tuner.resolution import Resolution

BATCHES = 12
# The relative sizes of the step that are tried. Larger ones often lower the loss on the judging batches further, but
# what is trained from there ends lower on validation: such a step has learnt its few batches by heart.
STEPS = (0.0, 0.003, 0.01)
# The share of the best gain that is enough; a smaller step that gets it is the safer one.
ENOUGH = 0.8


@dataclass(frozen=True)
class Start:
    """How an adapter began. ``print(start)`` says it.

    Attributes:
        step: the change of each weight relative to its norm; 0 means the start as configured.
        losses: step -> mean loss on the batches for judging.
        batches: how many gave the gradient, and how many judged.
        seconds: how long all of it took.
        weights: how many begin along the gradient.
        left_out: weights that got no rank.
    """

    step: float
    losses: dict[float, float]
    batches: tuple[int, int]
    seconds: float
    weights: int
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.step:
            told = (
                f"step {self.step:g} of each weight's norm, loss {self.losses[0.0]:.4f} -> "
                f"{self.losses[self.step]:.4f} on {counted(self.batches[1], 'other batch', 'other batches')}"
            )
        elif self.losses:
            told = f"no step lowers the loss of {self.losses[0.0]:.4f}, so the adapter begins as configured"
        else:
            told = "the gradient of every weight is zero or not finite, so the adapter begins as configured"

        if self.left_out:
            out = f"; {counted(len(self.left_out), 'weight gets', 'weights get')} no rank"
        else:
            out = ""

        return f"start from the gradient: {told} ({counted(self.weights, 'weight')}, {self.seconds:.1f} s){out}"


class Chosen(NamedTuple):
    """What a probe has found.

    Attributes:
        allocation: the ranks; empty where none are to be chosen, or nothing tells where to.
        found: the directions of the gradients, by weight; empty without a probe.
    """

    allocation: Allocation
    found: dict[str, Directions | None]


class Adapted(NamedTuple):
    """An adapted model, and how its adapter began."""

    model: PeftModel
    start: Start


def start(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Loss | None = None,
    adapter_name: str | None = None,
    count: int = BATCHES,
) -> Start:
    """Lets a fresh adapter begin with one step along the gradient of the frozen weights.

    Args:
        model: with a FLoRA adapter that has not been trained. Under several processes every one of them calls this,
            before the model is wrapped, with batches of its own.
        batches: a loader or a list; dicts are given as keyword arguments, tuples as positional ones. The last quarter
            of those that are used judges the size of the step.
        loss: ``(model, batch) -> loss``; by default the one that the model returns.
        adapter_name: by default the active one.
        count: how many batches are used at most.

    Returns:
        The step that was taken, and the losses of all that were tried.

    Raises:
        ValueError: the model has no such adapter, it is merged or trained already, there are fewer than two batches, or
            a gradient cannot be had. The model is then as it was.

    Examples:
        >>> layer = nn.Sequential(nn.Linear(8, 4))
        >>> model = get_peft_model(layer, FloraConfig(r=2, target_modules=["0"]))
        >>> data = [(torch.randn(16, 8), torch.randn(16, 4)) for _ in range(4)]
        >>> begun = start(model, data, loss=lambda model, batch: (model(batch[0]) - batch[1]).square().mean())
        >>> begun.batches
        (3, 1)
    """
    began = time.perf_counter()
    loss = _checked(loss)
    weights = _fresh_weights(model, adapter_name)
    parts = first_batches(batches, count)
    found = _measure(model, weights, parts, loss, _reach(weights))
    return _begin(model, weights, found, parts, loss, began)


def _checked(loss: Loss | None) -> Loss:
    """The loss that was given; by default the one that the model returns."""
    if loss is not None and not callable(loss):
        raise WrongTypeError(f"loss must be a function (model, batch) -> loss, got {loss!r}")
    return loss or loss_of


def adapt(
    base: nn.Module,
    config: FloraConfig,
    batches: Iterable[Any],
    *,
    loss: Loss | None = None,
    adapter_name: str = "default",
    count: int = BATCHES,
    choose_ranks: bool = False,
) -> PeftModel:
    """``get_peft_model`` that knows the task: the adapter begins along the task's gradient.

    What is saved is an ordinary adapter.

    Args:
        base: the base model.
        config: of the adapter; it is not changed.
        batches: a loader or a list, as of :func:`start`.
        loss: ``(model, batch) -> loss``; by default the one that the model returns.
        adapter_name: as in PEFT.
        count: how many batches are used at most.
        choose_ranks: with ``config.budget``, ranks go to the weights and modes where the gradient is, and a weight may
            be left out. By default the ranks are those that the config asks for.

    Returns:
        The adapted model.

    Raises:
        ValueError: as :func:`start`; or the budget is too small, or ranks are to be chosen without one.

    Examples:
        >>> layer = nn.Sequential(nn.Linear(8, 4))
        >>> data = [(torch.randn(16, 8), torch.randn(16, 4)) for _ in range(4)]
        >>> squares = lambda model, batch: (model(batch[0]) - batch[1]).square().mean()
        >>> config = FloraConfig(budget=24, target_modules=["0"])
        >>> model = adapt(layer, config, data, loss=squares, choose_ranks=True)
        >>> sum(value.numel() for value in model.parameters() if value.requires_grad) <= 24
        True
    """
    return adapt_and_tell(base, config, batches, _checked(loss), adapter_name, count, choose_ranks).model


def adapt_and_tell(
    base: nn.Module,
    config: FloraConfig,
    batches: Iterable[Any],
    loss: Loss,
    name: str = "default",
    most: int = BATCHES,
    choose_ranks: bool = False,
) -> Adapted:
    """:func:`adapt`, with how the adapter began."""
    began = time.perf_counter()
    _check_adaptable(base, config, choose_ranks)

    config = copy.deepcopy(config)
    trained = {value for value in base.parameters() if value.requires_grad}
    parts = first_batches(batches, most)

    if choose_ranks:
        chosen = _probe_ranks(base, config, parts, loss, trained)
    else:
        chosen = Chosen(Allocation({}), {})

    model = cast("PeftModel", get_peft_model(cast("Any", base), config, adapter_name=name))

    try:
        weights = _fresh_weights(model, name)
        found = chosen.found or _measure(model, weights, parts, loss, _reach(weights))
        begun = _begin(model, weights, found, parts, loss, began)
    except BaseException:
        _take_off(model, trained)
        raise

    left_out = tuple(chosen.allocation.left_out)

    return Adapted(model, replace(begun, left_out=left_out, seconds=time.perf_counter() - began))


def _check_adaptable(base: nn.Module, config: FloraConfig, choose_ranks: bool) -> None:
    if not isinstance(config, FloraConfig):
        raise WrongTypeError(f"adapt needs a FloraConfig, got {config!r}; write FloraConfig(r=8, target_modules='all')")

    if isinstance(base, PeftModel):
        raise UserError(
            "the model already has an adapter, and adapt attaches one itself; give the base model, or call "
            "flora.start(model, batches) for the adapter that is there"
        )

    if choose_ranks and config.budget is None:
        raise UserError(
            "ranks are chosen from the gradient within a budget, and the config has none; write "
            "FloraConfig(budget=0.01), a part of the model's parameters, or leave choose_ranks out"
        )

    if choose_ranks and config.fold == BLOCKS:
        raise UserError(
            "fold='blocks' folds weights by their shapes, and the gradient chooses ranks for unfolded ones; leave out "
            "choose_ranks, or the fold"
        )


def _probe_ranks(
    base: nn.Module, config: FloraConfig, parts: Batches, loss: Loss, trained: set[nn.Parameter]
) -> Chosen:
    """The ranks that the budget buys where the gradients are, which it writes into the config."""
    # The ranks are needed to attach the adapter, and the gradients to choose the ranks. So a probe of rank 1 is
    # attached first, its gradients give the ranks, and it is taken off again before the adapter itself is attached.
    with torch.random.fork_rng([]):
        probe = _attach_probe(base, config)

    try:
        weights = adapted_weights(probe, "probe")
        chosen = _choose_ranks(probe, weights, config, parts, loss)
    finally:
        _take_off(probe, trained)

    if chosen.allocation.ranks:
        write_ranks(config, chosen.allocation, weights)

    return chosen


def _take_off(model: PeftModel, trained: set[nn.Parameter]) -> None:
    """The base model as it was before an adapter was attached."""
    base = cast("Any", model.base_model).unload()
    for value in base.parameters():
        value.requires_grad_(value in trained)


def _attach_probe(base: nn.Module, config: FloraConfig) -> PeftModel:
    """The same targets at rank 1, only to find them and to hear their gradients."""
    probe = copy.deepcopy(config)
    probe.r, probe.rank_pattern, probe.kernel_r, probe.budget = 1, {}, 1, None
    probe.scale, probe.alpha, probe.scale_pattern = 1.0, None, {}
    probe.modules_to_save, probe.trainable_token_indices, probe.bias = None, None, "none"

    # Whatever is to be said is said when the adapter itself is attached.
    probe.inference_mode = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cast("PeftModel", get_peft_model(cast("Any", base), probe, adapter_name="probe"))


def _choose_ranks(
    probe: PeftModel, weights: Sequence[AdaptedWeight], config: FloraConfig, parts: Batches, loss: Loss
) -> Chosen:
    """What the gradients are, and the ranks that the budget buys where they are."""
    # What the budget would buy in equal ranks is the yardstick: how far the gradients have to be known, and what a
    # weight without a gradient keeps. All weights of one module belong to one site.
    sites = [_site(adapted) for adapted in weights]
    once = {(site.name, *site.row.weights(site.module)): site for site in sites}
    resolution = Resolution(config, once.values())
    free = resolution.open_weights(config.budget or 0, probe)
    if free.weights:
        solved = solve_budget(free.weights, free.budget, config.kernel_r)
    else:
        solved = {}

    equal = {adapted.name: solved[adapted.name] for adapted in weights if adapted.name in solved}
    reach = {}
    for adapted in weights:
        own = resolution.weights[adapted.name].target.ranks
        ranks = equal.get(adapted.name, own)
        reach[adapted.name] = max(8, 2 * max(_below(ranks, adapted.shape)))

    found = _measure(probe, weights, parts, loss, reach)
    if not any(found.values()) or not equal:
        return Chosen(Allocation({}), found)

    open_weights = [adapted for adapted in weights if adapted.name in equal]

    return Chosen(allocate(open_weights, found, equal, free.budget), found)


def _site(adapted: AdaptedWeight) -> targets.Site:
    base = adapted.layer.get_base_layer()
    if isinstance(adapted.layer, ParamWrapper):
        return targets.raw_parameter(adapted.module, base, adapted.weight)
    return targets.Site(adapted.module, base, adapted.layer.row)


def _fresh_weights(model: nn.Module, adapter_name: str | None) -> list[AdaptedWeight]:
    name = adapter_name or getattr(model, "active_adapter", "default")
    weights = adapted_weights(model, cast("str", name))
    if not weights:
        there = ", ".join(sorted(getattr(model, "peft_config", ())))
        if there:
            remedy = f"give adapter_name one of {there}"
        else:
            remedy = "attach one with get_peft_model first"
        raise UserError(f"the model has no FLoRA adapter {name!r}; {remedy}")

    for adapted in weights:
        if adapted.layer.merged:
            raise UserError("the adapter is merged into the weights; call unmerge_adapter() first")

        if adapted.delta.dense().count_nonzero():
            raise UserError(
                f"{adapted.name} has been changed: only an adapter that has not been trained can be started; "
                "attach a fresh one, with init_weights=True"
            )

    return weights


def _measure(
    model: nn.Module, weights: Sequence[AdaptedWeight], parts: Batches, loss: Loss, reach: dict[str, int]
) -> dict[str, Directions | None]:
    """The directions of every weight's gradients."""
    for adapted in weights:
        stored_weight(adapted)

    sketches = {}
    for adapted in weights:
        seed, device = zlib.crc32(adapted.name.encode()), adapted.delta.form.core.device
        sketches[adapted.name] = Sketch(adapted.shape, reach[adapted.name], len(parts.gradient), seed, device)

    collect(model, weights, sketches, parts.gradient, loss)

    return {name: sketch.directions() for name, sketch in sketches.items()}


def _begin(
    model: nn.Module,
    weights: Sequence[AdaptedWeight],
    found: dict[str, Directions | None],
    parts: Batches,
    loss: Loss,
    began: float,
) -> Start:
    """Takes the step that the other batches are for."""
    # The tensors are written for each size that is tried. Where no size is better, or anything fails, the start as it
    # was configured is written back. Processes agree by taking what the first one has.
    before = [(value, value.detach().clone()) for adapted in weights for value in adapted.delta.parameters()]
    rays = [ray for adapted in weights if (ray := _ray_of(adapted, found[adapted.name])) is not None]
    best, losses = 0.0, {}

    try:
        if rays:
            losses = _try_steps(model, rays, parts, loss)
            best = smallest_good_step(losses)
    finally:
        if not best:
            with torch.no_grad():
                for value, old in before:
                    value.copy_(old)

    if best:
        for one in rays:
            place_step(one, best)

        for value, _ in before:
            of_first_process(value.data)

    counts = (len(parts.gradient), len(parts.judging))

    return Start(best, losses, counts, time.perf_counter() - began, len(rays))


def _ray_of(adapted: AdaptedWeight, found: Directions | None) -> Ray | None:
    if found is None:
        return None
    return ray(adapted.delta, found, float(base_weight(adapted.layer, adapted.weight).double().norm()))


def _try_steps(model: nn.Module, rays: Sequence[Ray], parts: Batches, loss: Loss) -> dict[float, float]:
    """The loss for each size of the step, up to the first that does not lower it."""
    for one in rays:
        place_directions(one)

    losses = {}
    for size in tqdm(STEPS, desc="start: size of the step", unit="size", disable=None, leave=False):
        for one in rays:
            place_step(one, size)

        losses[size] = mean_loss(model, parts.judging, loss)

        # Along a line the loss falls and then rises: still larger steps do not lower it either.
        if size and not losses[size] < losses[0.0]:
            break

    return losses


def smallest_good_step(losses: dict[float, float]) -> float:
    """The smallest step that gains ``ENOUGH`` of the best gain; 0 where none lowers the loss."""
    gains = {size: losses[0.0] - value for size, value in losses.items()}
    finite = {size: gain for size, gain in gains.items() if math.isfinite(gain)}
    best = max(finite.values(), default=0.0)
    if best <= 0:
        return 0.0
    return min(size for size, gain in finite.items() if gain >= ENOUGH * best)


def _reach(weights: Sequence[AdaptedWeight]) -> dict[str, int]:
    """The largest rank of each weight's modes that have a factor."""
    return {adapted.name: max(_below(adapted.delta.form.ranks, adapted.shape)) for adapted in weights}


def _below(ranks: Sequence[int], shape: Sequence[int]) -> list[int]:
    """The ranks of the modes that are not whole; [1] where all are."""
    return [rank for rank, size in zip(ranks, shape, strict=True) if rank < size] or [1]
