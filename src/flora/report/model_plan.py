"""``flora plan``: what would be adapted in a model and what it costs, from its config alone, on the meta device."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, cast

import torch
from peft import get_peft_model
from peft.utils import ModulesToSaveWrapper
from tabulate import tabulate
from torch import nn

from flora.convert.base_model import meta_model
from flora.errors import WrongTypeError, user_errors
from flora.layers.names import PREFIX
from flora.layers.planning import costs
from flora.layers.table import find_layer, refusal
from flora.storage.size import size
from flora.tucker.delta import TuckerDelta
from flora.tuner.config import FloraConfig
from flora.tuner.forward import expected_choice
from flora.tuner.layer import FloraLayer, named_layers

BYTES_PER_TRAINED = 16  # float32: the parameter, its gradient and the two moments of AdamW


@dataclass(frozen=True)
class Row:
    """Equal adapted weights: what they are, and what one of them costs per training step."""

    layer: str
    kind: str
    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    parameters: int
    way: str
    mflops: float | None


def model_plan(model: str | nn.Module, adapter: dict[str, Any], *, positions: int = 4096) -> dict[str, Any]:
    """What FLoRA would adapt in a model.

    Args:
        model: a hub id, a local folder, the config of a transformers model as JSON or YAML, or a module.
        adapter: keyword arguments of ``FloraConfig``.
        positions: output positions per training step that the operations are counted for.

    Returns:
        ``rows`` with their ``count``, ``left_out`` with reasons, and totals.

    Raises:
        ValueError: the model's config cannot be read, or nothing in it matches.
    """
    config = FloraConfig(**adapter)
    if isinstance(model, nn.Module):
        return plan_model(model, config, positions=positions).report

    return _planned(meta_model(model), model, config, positions)


def plan_model(model: nn.Module, config: FloraConfig, *, positions: int = 4096, device: str | None = None) -> ModelPlan:
    """What FLoRA would adapt in a model of your own, and what it costs; the model is left as it is.

    Args:
        model: Any module; its weights are neither read nor copied.
        config: Of the adapter.
        positions: Output positions per training step that the operations are counted for.
        device: "cpu" or "gpu", that the ways are chosen for; by default what torch finds here.

    Returns:
        The plan; ``print`` it.

    Raises:
        ValueError: Nothing in the model matches the config.

    Examples:
        >>> network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 3))
        >>> plan = plan_model(network, FloraConfig(target_modules="all"))
        >>> [row["ranks"] for row in plan.report["rows"]]
        [(8, 3, 2, 2), (8, 8, 2, 2)]
    """
    if not isinstance(model, nn.Module):
        raise WrongTypeError(
            f"plan_model needs a model in memory, got a {type(model).__name__}; for a folder or a hub id: "
            f"flora plan {model}"
        )
    if not isinstance(config, FloraConfig):
        raise WrongTypeError(
            f"plan_model needs a FloraConfig, got {config!r}; write FloraConfig(r=8, target_modules='all')"
        )

    # A copy whose parameters and buffers are on the meta device: deepcopy takes what the memo has for them.
    memo: dict[int, Any] = {}
    for tensor in model.buffers():
        memo[id(tensor)] = torch.empty_like(tensor, device="meta")
    for tensor in model.parameters():
        memo[id(tensor)] = nn.Parameter(torch.empty_like(tensor, device="meta"), tensor.requires_grad)

    base = copy.deepcopy(model, memo)

    return ModelPlan(_planned(base, type(model).__name__, copy.deepcopy(config), positions, device))


@dataclass(frozen=True)
class ModelPlan:
    """What an adapter would be in a model. ``print(plan)`` shows a table.

    Attributes:
        report: ``rows`` with their ``count``, ``left_out`` with reasons, and totals, as plain values.
    """

    report: dict[str, Any]

    def __str__(self) -> str:
        return plan_text(self.report)


def _planned(
    base: nn.Module, name: str, config: FloraConfig, positions: int, device: str | None = None
) -> dict[str, Any]:
    """The report for a model that is on the meta device, which is adapted on the way."""
    total = sum(parameter.numel() for parameter in base.parameters())

    # PEFT refuses names that the model does not have.
    with torch.device("meta"), user_errors(ValueError):
        adapted = get_peft_model(cast("Any", base), config)

    device = device or ("gpu" if torch.cuda.is_available() else "cpu")
    counts = Counter(_rows(adapted, positions, device == "cpu"))
    wholes = [module for module in adapted.modules() if isinstance(module, ModulesToSaveWrapper)]
    in_full = sum(value.numel() for module in wholes for value in module.parameters() if value.requires_grad)
    trained = in_full + sum(row.parameters * count for row, count in counts.items())

    return {
        "model": name,
        "class": type(base).__name__,
        "positions": positions,
        "device": device,
        "rows": [{**asdict(row), "count": count} for row, count in counts.items()],
        "left_out": [
            {"layer": layer, "reason": reason, "count": count}
            for (layer, reason), count in Counter(_left_out(adapted)).items()
        ],
        "model_parameters": total,
        "trainable_parameters": trained,
        "adapter_bytes": 4 * trained,
        "training_bytes": BYTES_PER_TRAINED * trained,
        "model_bytes_16_bit": 2 * total,
    }


def _generic(name: str) -> str:
    """A module's name with its numbers replaced, so that the blocks of a model are one line."""
    # A number is a part of the name that is all digits, with a dot or an end of the name on either side.
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _rows(adapted: nn.Module, positions: int, cpu: bool) -> Iterator[Row]:
    for name, layer in named_layers(adapted):
        label = _generic(name)

        for inner, delta in layer.named_modules():
            if isinstance(delta, TuckerDelta) and not inner.startswith("base_layer."):
                weight = inner.partition(".")[0].removeprefix("tucker_")
                form, kind = delta.form, layer.row.kind
                cost = _cost(layer, inner.rpartition(".")[2], positions, cpu)
                shown = label

                if weight != "weight":
                    shown = f"{label} {weight}"

                yield Row(shown, kind, form.shape, form.ranks, form.num_params, cost.way, cost.mflops)


class _Cost(NamedTuple):
    """The way that a layer will run, and millions of operations per step beyond the frozen layer's where known."""

    way: str
    mflops: float | None


def _cost(layer: FloraLayer, adapter: str, positions: int, cpu: bool) -> _Cost:
    choice, work = expected_choice(layer, adapter, positions, cpu)
    known = {option: round(cost.flops / 1e6, 1) for option, cost in costs(work)}
    return _Cost(str(choice), known.get(choice))


def _left_out(adapted: nn.Module) -> Iterator[tuple[str, str]]:
    """Modules that have parameters but are not adapted, and why."""
    inside: list[str] = []
    for name, module in adapted.named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue

        if isinstance(module, FloraLayer):
            inside.append(f"{name}.")
        elif isinstance(module, ModulesToSaveWrapper):
            inside.append(f"{name}.")
            kind = type(module.original_module).__name__
            yield f"{_generic(name.removeprefix(PREFIX))} ({kind})", "trained in full, in modules_to_save"
        elif next(module.parameters(recurse=False), None) is not None:
            label = f"{_generic(name.removeprefix(PREFIX))} ({type(module).__name__})"

            if find_layer(module) is None:
                yield label, "not in the table of layers"
            else:
                yield label, refusal(module) or "not among target_modules"


def plan_text(report: dict[str, Any]) -> str:
    """The report as people read it."""
    lines = [_line(row) for row in report["rows"]]
    aligned = ("left", "left", "right", "right", "right", "left", "right")
    table = tabulate(lines, headers="keys", tablefmt="simple", colalign=aligned, disable_numparse=True)
    left = [f"  {_counted(item)}: {item['reason']}" for item in report["left_out"]]
    if left:
        left = ["not adapted:", *left, ""]

    count, total = report["trainable_parameters"], report["model_parameters"]
    summary = [
        f"{report['class']}: {total:,} parameters, {count:,} to train ({count / total:.3%})",
        f"adapter file {size(report['adapter_bytes'])}; adapter, gradients and AdamW {size(report['training_bytes'])} "
        f"(float32); base weights {size(report['model_bytes_16_bit'])} in 16 bits",
        f"MFLOP/step: beyond the frozen layers, at {report['positions']:,} output positions "
        f"on a {report['device'].upper()}",
    ]

    return "\n".join([table, "", *left, *summary])


def _line(row: dict[str, Any]) -> dict[str, str]:
    operations = "-"
    if row["mflops"] is not None:
        operations = f"{row['mflops'] * row['count']:,.0f}"

    return {
        "layer": _counted(row),
        "kind": row["kind"],
        "shape": "x".join(map(str, row["shape"])),
        "ranks": "x".join(map(str, row["ranks"])),
        "parameters": f"{row['parameters'] * row['count']:,}",
        "way": row["way"],
        "MFLOP/step": operations,
    }


def _counted(row: dict[str, Any]) -> str:
    """The name of a layer, with how many there are of it."""
    if row["count"] == 1:
        return str(row["layer"])
    return f"{row['layer']}  x{row['count']}"
