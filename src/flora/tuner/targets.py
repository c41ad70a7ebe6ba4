"""Which weights a config means, with which ranks: resolved and checked in full before the model is changed."""

from __future__ import annotations

import difflib
import math
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from peft.tuners.tuners_utils import BaseTunerLayer, NoMatchingPeftModuleError
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import PreTrainedModel

from flora.errors import UserError
from flora.layers.axes import roles_of
from flora.layers.layout import is_usual, of_module
from flora.layers.table import Layer, parameter, refusal, weight_shape
from flora.tucker.fold import parse_fold
from flora.tucker.form import count_params
from flora.tucker.ranks import Weight, resolve, solve_budget
from flora.tuner.adapted import Target, row_for
from flora.tuner.config import FloraConfig

SHORTHANDS = {
    "all": ("linear", "conv", "embedding", "bilinear", "attention", "recurrent"),
    "all-linear": ("linear",),
    "all-conv": ("conv",),
}


@dataclass(frozen=True)
class Site:
    """A module that a config targets: its name, itself, and its row (or a row made for one raw parameter)."""

    name: str
    module: nn.Module
    row: Layer


def modules_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module that could be a target: adapted layers unwrapped, what is inside them left out."""
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            inside.append(f"{name}.")
        yield name, module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def expand(shorthand: str, model: nn.Module) -> set[str]:
    """The names that "all", "all-linear" or "all-conv" stands for, the output head of a transformers model excepted.

    Raises:
        NoMatchingPeftModuleError: nothing in the model is of these kinds.
    """
    kinds, head = SHORTHANDS[shorthand], _output_head(model)
    tied = _tied(model)
    names, skipped = set(), []
    for name, module in modules_of(model):
        row = row_for(module)
        if not name or row is None or row.kind not in kinds or refusal_for(module) or _inside_attention(name, model):
            continue
        if any(name == key or name.startswith(f"{key}.") for key in head):
            continue
        if any(id(parameter(module, weight)) in tied for weight in row.weights(module)):
            skipped.append(name)
        else:
            names.add(name)
    if skipped:
        warnings.warn(
            f"target_modules={shorthand!r} leaves out {', '.join(sorted(skipped))}: the weight is tied to another "
            f"module's",
            stacklevel=2,
        )
    if not names:
        raise NoMatchingPeftModuleError(
            f"target_modules={shorthand!r} matches nothing: {type(model).__name__} has no layer of kind "
            f"{' or '.join(kinds)} that can be adapted outside its head"
        )
    return names


def refusal_for(module: nn.Module) -> str | None:
    """Why a module cannot be adapted; quantised linears of any class can."""
    return None if row_for(module) is not None and not hasattr(module, "weight") else refusal(module)


def raw_parameter(name: str, module: nn.Module, leaf: str) -> Site:
    """A site for one raw parameter of a module."""
    count = len(weight_shape(module, leaf))
    stack = ("expert", "in", "out") if getattr(module, "is_transposed", False) else ("expert", "out", "in")
    names = {1: ("channels",), 2: ("out", "in"), 3: stack}
    axes = names.get(count, tuple(f"d{mode}" for mode in range(count)))
    return Site(name, module, Layer("parameter", lambda _: {leaf: axes}))


def find_sites(config: FloraConfig, model: nn.Module, matches: Callable[[FloraConfig, str], object]) -> list[Site]:
    """Every module and raw parameter that the config targets.

    Raises:
        ValueError: a target cannot be adapted; names it and says why.
    """
    sites = []
    for name, module in modules_of(model):
        if name and matches(config, name):
            row, reason = row_for(module), refusal_for(module)
            if row is None or reason is not None:
                raise UserError(f"Target module {name} ({type(module).__name__}) is not supported: {reason}")
            if _inside_attention(name, model):
                raise UserError(
                    f"Target module {name} is never called: nn.MultiheadAttention reads its weight; "
                    f"target the attention module {name.rpartition('.')[0]} itself"
                )
            sites.append(Site(name, module, row))
    wanted = config.target_parameters or []
    for name, module in modules_of(model):
        for leaf, _ in module.named_parameters(recurse=False) if name else ():
            full = f"{name}.{leaf}"
            if any(full == key or full.endswith(f".{key}") for key in wanted):
                sites.append(raw_parameter(name, module, leaf))
    _check_ties(sites, model)
    return sites


def targets_of(config: FloraConfig, site: Site) -> dict[str, Target]:
    """For each weight of a site: its shape, fold, ranks and scale.

    Raises:
        ValueError, TypeError: ranks or fold do not fit the weight; the message names it and its dimensions.
    """
    targets = {}
    for weight, axes in site.row.weights(site.module).items():
        shape, name = weight_shape(site.module, weight), f"{site.name}.{weight}"
        pattern = config.fold_for(site.name, weight) or site.row.folds(site.module).get(weight)
        fold = parse_fold(pattern, shape, name) if pattern else None
        sizes, names = (fold.shape, fold.axes) if fold else (shape, axes)
        roles = roles_of(axes, fold)
        ranks = resolve(sizes, config.rank_for(site.name, weight), config.kernel_r, axes=names, roles=roles, name=name)
        targets[weight] = Target(shape, ranks, config.scale_for(site.name, weight), roles, fold)
    return targets


def record_folds(config: FloraConfig, sites: list[Site]) -> None:
    """Writes the folds that layers have by default into the config, so that a saved adapter says how to read it."""
    for site in sites:
        for weight, pattern in site.row.folds(site.module).items():
            if config.fold_for(site.name, weight) is None:
                config.fold[exact_pattern(f"{site.name}.{weight}")] = pattern


def exact_pattern(name: str) -> str:
    """A pattern for one weight and no other whose name ends like it (``conv.weight`` is also a suffix of others)."""
    return f"^{re.escape(name)}"


def record_layouts(config: FloraConfig, sites: list[Site]) -> None:
    """Writes into the config what the dimensions of a weight mean, where its name and shape do not tell."""
    config.layout = {}
    for site in sites:
        found = of_module(site.module)
        for weight in site.row.weights(site.module):
            name = f"{site.name}.{weight}"
            if weight in found and not is_usual(name, found[weight]):
                config.layout[name] = found[weight].to_json()


class Free(NamedTuple):
    """What a budget is left for, after the user's own entries."""

    weights: dict[str, Weight]  # by the pattern that holds for this weight alone
    budget: int


def weights_to_spend_on(config: FloraConfig, sites: list[Site], model: nn.Module) -> Free:
    """The weights whose ranks the user left open, and how many parameters there are for them."""
    # ZeRO-3 has partitioned what has a ds_shape.
    total = sum(math.prod(getattr(value, "ds_shape", value.shape)) for value in model.parameters())
    asked = config.budget or 0
    budget = int(asked * total) if asked < 1 else int(asked)
    free: dict[str, Weight] = {}

    for site in sites:
        for weight, target in targets_of(config, site).items():
            sizes = target.fold.shape if target.fold else target.shape
            if config.rank_for(site.name, weight) is config.r:
                free[exact_pattern(f"{site.name}.{weight}")] = Weight(sizes, target.roles)
            else:
                budget -= count_params(sizes, target.ranks)
    return Free(free, budget)


def spend_budget(config: FloraConfig, sites: list[Site], model: nn.Module) -> None:
    """Solves the ranks that the budget buys, after the user's own entries, and writes them into ``rank_pattern``."""
    if config.budget is None:
        return
    free = weights_to_spend_on(config, sites, model)
    solved = solve_budget(free.weights, free.budget, config.kernel_r) if free.weights else {}
    config.rank_pattern = {
        **config.rank_pattern,
        **{pattern: list(ranks) for pattern, ranks in solved.items()},
    }
    config.budget = None


def warn_if_larger(config: FloraConfig, sites: list[Site]) -> None:
    """Warns when an adapter costs more than the weight it changes."""
    larger = []
    for site in sites:
        for weight, target in targets_of(config, site).items():
            sizes = target.fold.shape if target.fold else target.shape
            if count_params(sizes, target.ranks) > math.prod(sizes):
                larger.append(f"{site.name}.{weight}")
    if larger:
        warnings.warn(
            f"the adapter has more parameters than the weight itself in {len(larger)} of {len(sites)} layers "
            f"(first: {larger[0]}); lower r or exclude them",
            stacklevel=2,
        )


def explain_no_match(config: FloraConfig, model: nn.Module) -> None:
    """Raises with the nearest names when targets are plainly misspelt; otherwise PEFT's own error follows."""
    if not isinstance(config.target_modules, set) or config.exclude_modules or config.layers_to_transform is not None:
        return
    unmatched = sorted(config.target_modules)
    raise NoMatchingPeftModuleError(
        f"Target modules {unmatched} not found in the base model {type(model).__name__}{near_names(unmatched, model)}. "
        "Please check the target modules; print(model) lists the names, and 'all' takes every layer that can be adapted"
    )


def warn_unmatched(config: FloraConfig, model: nn.Module) -> None:
    """Warns about entries of a list of targets that matched nothing while others did."""
    if not isinstance(config.target_modules, set):
        return
    names = [name for name, _ in modules_of(model)]
    leaves = {part for name in names for part in (name, *(name[at + 1 :] for at, c in enumerate(name) if c == "."))}
    unmatched = sorted(config.target_modules - leaves)
    if unmatched:
        warnings.warn(f"target_modules {unmatched} match nothing{near_names(unmatched, model)}", stacklevel=2)


def warn_unmatched_patterns(config: FloraConfig, sites: list[Site]) -> None:
    """Warns about keys of the pattern fields that match no adapted weight, by its module's name or its own."""
    names = [name for site in sites for w in site.row.weights(site.module) for name in (site.name, f"{site.name}.{w}")]
    for field in ("rank_pattern", "scale_pattern", "fold"):
        unmatched = [
            key for key in getattr(config, field) if not any(get_pattern_key([key], name) == key for name in names)
        ]
        if unmatched:
            warnings.warn(f"{field} keys {unmatched} match no adapted weight and are ignored", stacklevel=2)


def near_names(unmatched: list[str], model: nn.Module) -> str:
    """What might have been meant: the nearest layer names, or the fused experts' parameters."""
    adaptable = [name for name, module in modules_of(model) if row_for(module) is not None]
    words = sorted({name.rpartition(".")[2] for name in adaptable} | set(adaptable))
    hints = []
    for target in unmatched:
        found = difflib.get_close_matches(target, words, n=3)
        if found:
            hints.append(f"instead of {target!r} try {', '.join(map(repr, found))}")
    fused = {
        f"{name.rpartition('.')[2]}.{leaf}"
        for name, module in modules_of(model)
        for leaf, value in module.named_parameters(recurse=False)
        if value.ndim == 3 and row_for(module) is None
    }
    if fused:
        hints.append(
            f"the experts of this model are fused into 3-D parameters, for those pass target_parameters={sorted(fused)}"
        )
    return f": {'; '.join(hints)}" if hints else ""


def _output_head(model: nn.Module) -> list[str]:
    """The modules that make a transformers model's output: its LM head, or what lies outside its backbone."""
    if not isinstance(model, PreTrainedModel):
        return []
    output = model.get_output_embeddings()
    backbone = model.base_model
    if output is not None:
        return [name for name, module in model.named_modules() if module is output]
    return [] if backbone is model else [name for name, module in model.named_children() if module is not backbone]


def _inside_attention(name: str, model: nn.Module) -> bool:
    """Whether the module is the ``out_proj`` of an ``nn.MultiheadAttention``, which is never called as a module."""
    parent = model.get_submodule(name.rpartition(".")[0])
    parent = parent.get_base_layer() if isinstance(parent, BaseTunerLayer) else parent
    return isinstance(parent, nn.MultiheadAttention)


def _tied(model: nn.Module) -> dict[int, list[str]]:
    """Parameters that stand in more than one place, by id, with their names."""
    owners: dict[int, list[str]] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(value), []).append(name)
    return {key: names for key, names in owners.items() if len(names) > 1}


def _check_ties(sites: list[Site], model: nn.Module) -> None:
    tied = _tied(model)
    for site in sites:
        for weight in site.row.weights(site.module):
            names = tied.get(id(parameter(site.module, weight)))
            if names:
                raise UserError(
                    f"Target module {site.name} has a tied weight ({' = '.join(names)}): an adapter on one end would "
                    f"untie "
                    "them without a word, and merging would change both. Exclude it (exclude_modules), or untie "
                    "first: load "
                    "the model with tie_word_embeddings=False and copy the embedding into the output head"
                )
