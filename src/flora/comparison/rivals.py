"""The adapters that FLoRA is compared with, at the ranks that spend a budget: PEFT's, LyCORIS', the authors' scheme.

Each is put on those of FLoRA's targets that it can adapt. PEFT's layers are tried one by one on the meta device; DoRA
also leaves out layers with an output whose weights are all zero.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import peft
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, get_peft_model
from torch import nn

from flora.comparison.authors import AuthorsScheme
from flora.comparison.matching import Costs, match_ranks
from flora.layers.axes import KERNELS, roles_of
from flora.layers.entries import Entries
from flora.layers.patterns import exact_pattern, names_of
from flora.runs.training import First, trainable
from flora.tucker.ranks import resolve
from flora.tuner.config import FloraConfig
from flora.tuner.gradient.start import Start

# How LoKr splits a matrix, from its default, the cheapest, to the most expensive.
LOKR_FACTORS = (-1, 16, 8, 4, 2)
PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Module -> its raw parameters that are adapted; none for a layer as such.
Targets = Mapping[str, list[str]]
# The rank of each module -> a config of PEFT.
Configure = Callable[[dict[str, int], Targets], PeftConfig]


class RefusedError(ValueError):
    """The method cannot adapt this model, or not at this size; the text says why."""


@dataclass(frozen=True)
class Request:
    """What a method is given in addition to the base model.

    Attributes:
        adapter: keyword arguments of ``FloraConfig``; other adapters take their targets and the head from it.
        scale: alpha / r of the other adapters.
        budget: trainable parameters of an adapter, the head not counted.
        first: gives the first training batches and their loss, for methods that start from the data.
        starts: a method that starts from the data says here how.
    """

    adapter: dict[str, Any]
    scale: float
    budget: int
    first: Callable[[], First] | None = None
    starts: list[Start] = field(default_factory=list)

    def first_batches(self) -> First:
        """The first training batches and their loss.

        Raises:
            RefusedError: there are none.
        """
        if self.first is None:
            raise RefusedError("it starts from the data, and none was given")
        return self.first()

    @property
    def head(self) -> list[str]:
        """The modules that every method trains in full."""
        return list(self.adapter.get("modules_to_save") or [])


def lora(base: nn.Module, request: Request, **options: Any) -> nn.Module:
    """PEFT's LoRA; with ``use_dora=True`` its DoRA.

    Raises:
        RefusedError: it can adapt none of the layers, or rank 1 costs too much.
    """
    return _peft(base, request, partial(lora_config, request, options))


def hira(base: nn.Module, request: Request) -> nn.Module:
    """PEFT's HiRA. Raises as :func:`lora` does."""
    return _peft(base, request, lambda ranks, found: newer("HiraConfig")(**fields_of(request, None, ranks, found)))


def newer(name: str) -> Any:
    """A class of PEFT's that an older one lacks.

    Raises:
        RefusedError: this is an older one.
    """
    if not hasattr(peft, name):
        raise RefusedError(f"PEFT {peft.__version__} has no {name}")
    return getattr(peft, name)


def loha(base: nn.Module, request: Request) -> nn.Module:
    """PEFT's LoHa. Raises as :func:`lora` does."""
    return _peft(base, request, lambda ranks, found: LoHaConfig(**fields_of(request, "alpha", ranks, found)))


def lokr(base: nn.Module, request: Request) -> nn.Module:
    """PEFT's LoKr. Its default split spends little at any rank, so the first split that reaches the budget is taken.

    Raises as :func:`lora` does.
    """
    spent: dict[int, PeftConfig] = {}
    for factor in LOKR_FACTORS:
        configure = partial(_lokr, request, factor)

        try:
            ranks, found = solve(base, request, configure)
        except RefusedError:
            if spent:
                break

            raise

        cost = sum(peft_costs(base, configure, ranks, found).values())
        spent[cost] = configure(ranks, found)

        if cost >= 0.95 * request.budget:
            break

    return attach(base, spent[max(spent)])


def lycoris(base: nn.Module, request: Request) -> nn.Module:
    """LyCORIS' LoCon with ``use_tucker``. Its modules replace the forward of the layers and live in ``base.lycoris``.

    Raises:
        RefusedError: the package is not installed; otherwise as :func:`lora` does.
    """
    try:
        from lycoris.modules.locon import LoConModule
    except ImportError:
        raise RefusedError("lycoris-lora is not installed") from None

    modules = dict(base.named_modules())
    names = [name for name in targets(base, request.adapter) if type(modules[name]) in PLAIN]
    base.requires_grad_(False)

    def attach(name: str, rank: int) -> nn.Module:
        options = {"multiplier": 1.0, "lora_dim": rank, "alpha": request.scale * rank, "use_tucker": True}
        return cast("nn.Module", LoConModule(name.replace(".", "_"), modules[name], **options))

    ranks = match(lambda rank: {name: trainable(attach(name, rank)) for name in names}, request)
    adapters = nn.ModuleList(attach(name, rank) for name, rank in ranks.items())
    for adapter in adapters:
        cast("Any", adapter).apply_to()

    base.add_module("lycoris", adapters)

    return train_head(base, request.head)


def authors(base: nn.Module, request: Request) -> nn.Module:
    """The authors' dense scheme, our own code of it, on linear layers and on convolutions of one group, as theirs.

    Raises as :func:`lora` does.
    """
    modules = dict(base.named_modules())
    config = FloraConfig(**request.adapter)
    entries = Entries(vars(config))
    names = [
        name
        for name in targets(base, request.adapter)
        if type(modules[name]) in PLAIN and getattr(modules[name], "groups", 1) == 1
    ]

    axes_of = {2: ("out", "in"), **{2 + dims: ("out", "in", *kernel) for dims, kernel in KERNELS.items()}}

    def ranks_of(name: str, rank: int) -> tuple[int, ...]:
        shape = cast("nn.Parameter", modules[name].weight).shape
        return resolve(shape, rank, config.kernel_r, roles=roles_of(axes_of[len(shape)]))

    def cost(name: str, rank: int) -> int:
        shape, ranks = cast("nn.Parameter", modules[name].weight).shape, ranks_of(name, rank)
        return math.prod(ranks) + sum(size * own for size, own in zip(shape, ranks, strict=True))

    ranks = match(lambda rank: {name: cost(name, rank) for name in names}, request)
    base.requires_grad_(False)

    for name, rank in ranks.items():
        parent, _, leaf = name.rpartition(".")
        scheme = AuthorsScheme(modules[name], ranks_of(name, rank), entries.scale(names_of(name)), zero=True)
        setattr(base.get_submodule(parent), leaf, scheme)

    return train_head(base, request.head)


def targets(base: nn.Module, adapter: dict[str, Any]) -> dict[str, list[str]]:
    """The modules that FLoRA adapts with this configuration, of each the raw parameters; ``base`` is left as it is."""
    adapted = get_peft_model(cast("Any", base), FloraConfig(**{**adapter, "modules_to_save": None}))
    tuner = cast("Any", adapted.base_model)
    found: dict[str, list[str]] = {name: [] for name in tuner.targeted_module_names}
    for name in tuner.targeted_parameter_names:
        owner, _, leaf = name.rpartition(".")
        found.setdefault(owner, []).append(leaf)

    adapted.unload()

    return found


def train_head(base: nn.Module, head: list[str]) -> nn.Module:
    """Also trains the parameters of the head's modules."""
    for name, parameter in base.named_parameters():
        if any(f".{part}." in f".{name}" for part in head):
            parameter.requires_grad_(True)
    return base


def default_budget(base: nn.Module, adapter: dict[str, Any], rank: int) -> int:
    """What PEFT's LoRA of that rank costs on FLoRA's targets, the head not counted."""
    request = Request(adapter, 1.0, 0)
    configure = partial(lora_config, request, {})
    found = supported(base, request, configure)
    return sum(peft_costs(base, configure, dict.fromkeys(found, rank), found).values())


def lora_config(request: Request, options: dict[str, Any], ranks: dict[str, int], found: Targets) -> PeftConfig:
    """LoRA at these ranks."""
    return LoraConfig(**fields_of(request, "lora_alpha", ranks, found), **options)


def _lokr(request: Request, factor: int, ranks: dict[str, int], found: Targets) -> PeftConfig:
    return LoKrConfig(**fields_of(request, "alpha", ranks, found), decompose_factor=factor)


def fields_of(request: Request, alpha: str | None, ranks: dict[str, int], found: Targets) -> dict[str, Any]:
    """What the configs of PEFT have in common; names of modules match exactly."""
    least = min(ranks.values())
    patterns = {name: exact_pattern(name) + (rf"\.({'|'.join(found[name])})" if found[name] else "") for name in ranks}
    higher = {patterns[name]: rank for name, rank in ranks.items() if rank != least}
    raw = [f"{name}.{leaf}" for name in ranks for leaf in found[name]]
    scales = {}

    if alpha is not None:
        scales = {
            alpha: request.scale * least,
            "alpha_pattern": {pattern: request.scale * rank for pattern, rank in higher.items()},
        }

    return {
        "r": least,
        **scales,
        "target_modules": "|".join(re.escape(name) for name in ranks if not found[name]) or None,
        "rank_pattern": higher,
        "modules_to_save": request.head or None,
        **({"target_parameters": raw} if raw else {}),
    }


def _peft(base: nn.Module, request: Request, configure: Configure) -> nn.Module:
    return attach(base, configure(*solve(base, request, configure)))


def attach(base: nn.Module, config: PeftConfig) -> nn.Module:
    """PEFT's model, without its warning that patterns for raw parameters matched no module."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match")
        warnings.filterwarnings("ignore", "lora with eva initialization used with low_cpu_mem_usage=False")
        return get_peft_model(cast("Any", base), config)


def solve(base: nn.Module, request: Request, configure: Configure) -> tuple[dict[str, int], Targets]:
    """The ranks that spend the budget on the layers which PEFT can adapt in this way."""
    found = supported(base, request, configure)
    return match(lambda rank: peft_costs(base, configure, dict.fromkeys(found, rank), found), request), found


def match(costs: Costs, request: Request) -> dict[str, int]:
    """A rank for each layer, such that all together spend the budget.

    Raises:
        RefusedError: there is no layer, or rank 1 costs too much.
    """
    if not costs(1):
        raise RefusedError("it can adapt none of FLoRA's layers")
    try:
        return match_ranks(costs, request.budget)
    except ValueError as error:
        raise RefusedError(str(error)) from None


def supported(base: nn.Module, request: Request, configure: Configure) -> Targets:
    """Those of FLoRA's targets that PEFT puts this kind of adapter on without a warning that it cannot be merged."""
    modules = dict(base.named_modules())
    found = {}
    for name, leaves in targets(base, request.adapter).items():
        layer = nn.Sequential(copy.deepcopy(modules[name]).to("meta"))

        # What PEFT refuses, each adapter with an error of its own kind, is left out.
        with warnings.catch_warnings(), suppress(ValueError, NotImplementedError, TypeError, UserWarning):
            warnings.filterwarnings("error", "LoRA adapter added to ConvNd layer with groups")
            config = _without_head(configure({"0": 1}, {"0": leaves}))
            if getattr(config, "use_dora", False) and _has_zero_row(modules[name]):
                continue

            attach(layer, config)
            found[name] = leaves

    return found


def _has_zero_row(layer: nn.Module) -> bool:
    """Whether the weights of one output are all zero: DoRA divides by their norm, so that its result is NaN."""
    weight = getattr(layer, "weight", None)
    return weight is not None and not bool(weight.flatten(1).any(1).all())


def _without_head(config: PeftConfig) -> PeftConfig:
    cast("Any", config).modules_to_save = None
    return config


def peft_costs(base: nn.Module, configure: Configure, ranks: dict[str, int], found: Targets) -> dict[str, int]:
    """Module -> trainable parameters of its adapter, by building it on the meta device."""
    if not ranks:
        return {}
    adapted = attach(copy.deepcopy(base).to("meta"), _without_head(configure(ranks, found)))
    inner = cast("Any", adapted.base_model).model
    return {name: trainable(inner.get_submodule(name)) for name in ranks}
