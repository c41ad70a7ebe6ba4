"""``flora inspect``: what is in an adapter, layer by layer, without forming any dense update."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from flora.convert import load
from flora.convert.arithmetic import core_in_orthonormal_basis
from flora.convert.base_model import Base
from flora.storage.size import size


def mode_energy(core: Tensor, mode: int) -> list[float]:
    """The share of the squared norm in each direction of a mode, strongest first; all zero for a zero core."""
    unfolded = core.movedim(mode, 0).reshape(core.shape[mode], -1)
    gram = unfolded @ unfolded.T if unfolded.shape[0] <= unfolded.shape[1] else unfolded.T @ unfolded

    energy = torch.linalg.eigvalsh(gram).clamp(min=0).flip(0)

    return (energy / energy.sum().clamp(min=torch.finfo(energy.dtype).tiny)).tolist()  # type: ignore[no-any-return]


def in_order(name: str) -> list[tuple[int, str]]:
    """What names are sorted by, so that layer 2 comes before layer 10.

    Examples:
        >>> sorted(["blocks.10.conv", "blocks.2.conv"], key=in_order)
        ['blocks.2.conv', 'blocks.10.conv']
    """
    return [(int(part), "") if _is_number(part) else (-1, part) for part in name.split(".")]


def _is_number(part: str) -> bool:
    """Whether a part of a name is the number of a layer; no model has so many that it takes ten digits."""
    return part.isdecimal() and len(part) < 10


def effective_rank(energy: list[float]) -> float:
    """How many directions of equal strength would spread the energy as widely: the exponential of its entropy.

    Examples:
        >>> effective_rank([0.25, 0.25, 0.25, 0.25]), effective_rank([1.0, 0.0])
        (4.0, 1.0)
    """
    return math.exp(-sum(share * math.log(share) for share in energy if share > 0))


def anatomy(folder: Path, base: Base | nn.Module | str | Path | None = None) -> dict[str, Any]:
    """What is in an adapter.

    Args:
        folder: Of the adapter, or its file.
        base: Its base model, where the file alone does not tell which layers it is for.

    Returns:
        ``layers`` (weight, shape, ranks, parameters, bytes, scale, norm of the change, energy and effective rank per
        mode), ``extras`` (tensors saved beside the adapter, such as a head) and totals.

    Raises:
        FileNotFoundError, ValueError: the adapter cannot be read.
    """
    adapter = load(folder, base=base)
    layers = []
    for name, entry in sorted(adapter.weights.items(), key=lambda item: in_order(item[0])):
        core = core_in_orthonormal_basis(entry.form)
        energy = [mode_energy(core, mode) for mode in range(core.ndim)]
        layers.append(
            {
                "weight": name,
                "shape": list(entry.form.shape),
                "ranks": list(entry.form.ranks),
                "parameters": entry.form.num_params,
                "bytes": entry.form.num_params * entry.form.core.element_size(),
                "scale": entry.scale,
                "norm": abs(entry.scale) * float(core.norm()),
                "energy": energy,
                "effective_ranks": [effective_rank(shares) for shares in energy],
            }
        )

    extras = {name: list(value.shape) for name, value in adapter.extras.items()}

    return {
        "folder": str(folder),
        "layers": layers,
        "extras": extras,
        "parameters": sum(layer["parameters"] for layer in layers),
        "extra_parameters": sum(math.prod(shape) for shape in extras.values()),
        "bytes": sum(layer["bytes"] for layer in layers),
    }


def top_half(energy: list[float]) -> float:
    """The share that the strongest half of the directions holds."""
    return sum(energy[: math.ceil(len(energy) / 2)])


def _cells(layer: dict[str, Any]) -> dict[str, str]:
    return {
        "weight": layer["weight"],
        "shape": "x".join(map(str, layer["shape"])),
        "ranks": "x".join(map(str, layer["ranks"])),
        "parameters": f"{layer['parameters']:,}",
        "size": size(layer["bytes"]),
        "scale": f"{layer['scale']:g}",
        "norm of dW": f"{layer['norm']:.4g}",
        "energy, top half per mode": " ".join(f"{top_half(energy):4.0%}" for energy in layer["energy"]),
    }


def anatomy_text(report: dict[str, Any]) -> str:
    """The report as a table."""
    rows = [_cells(layer) for layer in report["layers"]]
    table = tabulate(rows, headers="keys", tablefmt="simple", colalign=("left", *["right"] * 7), disable_numparse=True)
    extras = [f"  {name}: {'x'.join(map(str, shape))}" for name, shape in report["extras"].items()]
    return "\n".join([table, "", *(["saved in full:", *extras, ""] if extras else []), summary(report)])


def summary(report: dict[str, Any]) -> str:
    """The totals in a sentence."""
    return (
        f"{len(report['layers'])} adapted weights, {report['parameters']:,} parameters ({size(report['bytes'])}), and "
        f"{report['extra_parameters']:,} parameters saved in full"
    )
