"""``flora inspect``: what is in an adapter, layer by layer, without forming any dense update."""

from __future__ import annotations

import html
import math
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from flora.convert import load
from flora.convert.arithmetic import core_in_orthonormal_basis
from flora.storage.size import size

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; width: 100% }
th, td { padding: .3rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #ddd }
th { border-bottom: 2px solid #888 }
th:first-child, td:first-child, td:last-child { text-align: left }
.bar { display: inline-block; height: .8em; background: #4c78a8 }
"""


def mode_energy(core: Tensor, mode: int) -> list[float]:
    """The share of the squared norm in each direction of a mode, strongest first; all zero for a zero core."""
    unfolded = core.movedim(mode, 0).flatten(1)
    if unfolded.shape[0] <= unfolded.shape[1]:
        gram = unfolded @ unfolded.T
    else:
        gram = unfolded.T @ unfolded

    energy = torch.linalg.eigvalsh(gram).clamp(min=0).flip(0)

    return (energy / energy.sum().clamp(min=torch.finfo(energy.dtype).tiny)).tolist()  # type: ignore[no-any-return]


def anatomy(folder: Path) -> dict[str, Any]:
    """What is in an adapter.

    Returns:
        ``layers`` (weight, shape, ranks, parameters, bytes, scale, norm of the change, energy per mode), ``extras``
        (tensors saved beside the adapter, such as a head) and totals.

    Raises:
        FileNotFoundError, ValueError: the adapter cannot be read.
    """
    adapter = load(folder)
    layers = []
    for name, entry in adapter.weights.items():
        core = core_in_orthonormal_basis(entry.form)
        layers.append(
            {
                "weight": name,
                "shape": list(entry.form.shape),
                "ranks": list(entry.form.ranks),
                "parameters": entry.form.num_params,
                "bytes": entry.form.num_params * entry.form.core.element_size(),
                "scale": entry.scale,
                "norm": abs(entry.scale) * float(core.norm()),
                "energy": [mode_energy(core, mode) for mode in range(core.ndim)],
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


def anatomy_page(report: dict[str, Any]) -> str:
    """The report as a page that stands alone, with a bar for each norm."""
    largest = max((layer["norm"] for layer in report["layers"]), default=0.0) or 1.0
    rows = []
    for layer in report["layers"]:
        cells = [f"<td>{html.escape(text)}</td>" for text in _cells(layer).values()]
        bar = f'<td><span class="bar" style="width:{120 * layer["norm"] / largest:.0f}px"></span></td>'
        rows.append(f"<tr>{''.join(cells)}{bar}</tr>")

    if report["layers"]:
        head = "".join(f"<th>{name}</th>" for name in _cells(report["layers"][0]))
    else:
        head = ""

    title = html.escape(report["folder"])

    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        f"<h1>{title}</h1><p>{html.escape(summary(report))}.</p><table><tr>{head}<th></th></tr>{''.join(rows)}</table></html>\n"
    )
