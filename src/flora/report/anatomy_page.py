"""The page of ``flora inspect --html``: every layer in a table that sorts, energy and effective ranks as charts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from flora.report.anatomy import summary, top_half
from flora.report.charts import chart, legend_below
from flora.report.page import Cell, Charts, Notes, Page, Section, Table, number, render, words
from flora.storage.size import size

SHARES = np.linspace(0, 1, 41)  # of the directions of a mode
MODES = ("#3b7dd8", "#d1495b", "#4c9f50", "#c98a1b", "#8a6fd1", "#8d6e53")  # a colour for each mode, first to last


def anatomy_page(report: dict[str, Any]) -> str:
    """What is in an adapter, as a page that stands alone.

    Args:
        report: Of :func:`flora.report.anatomy.anatomy`.
    """
    layers = report["layers"]
    sections: list[Section] = []
    changed = [layer for layer in layers if layer["norm"] > 0]

    if changed:
        sections.append(_charts(layers))
    elif layers:
        sections.append(Notes("Not trained yet", ["Every change is zero, so there is no energy to show."]))

    sections.append(_layer_table(layers))

    if report["extras"]:
        rows = [
            [words(name), Cell("x".join(map(str, shape)) or "1", math.prod(shape)), number(math.prod(shape))]
            for name, shape in report["extras"].items()
        ]
        sections.append(Table("Saved in full", ("tensor", "shape", "parameters"), rows))

    tiles = [
        ("adapted weights", f"{len(layers):,}"),
        ("parameters", f"{report['parameters']:,}"),
        ("size", size(report["bytes"])),
        ("parameters saved in full", f"{report['extra_parameters']:,}"),
        ("norm of all changes", f"{math.hypot(*(layer['norm'] for layer in layers)):.4g}"),
    ]

    return render(Page(f"Adapter {Path(report['folder']).name}", f"{summary(report)}.", tiles, sections))


def _layer_table(layers: list[dict[str, Any]]) -> Table:
    largest = max((layer["norm"] for layer in layers), default=0.0) or 1.0
    columns = (
        "weight", "number", "norm of dW", "shape", "ranks", "effective ranks", "energy, top half", "parameters", "size",
        "scale",
    )  # fmt: skip
    rows = []
    for place, layer in enumerate(layers, start=1):
        halves = [top_half(energy) for energy in layer["energy"]]
        filled = [used / rank for used, rank in zip(layer["effective_ranks"], layer["ranks"], strict=True)]
        rows.append(
            [
                words(layer["weight"]),
                number(place),
                number(layer["norm"], ".4g", layer["norm"] / largest),
                Cell("x".join(map(str, layer["shape"])), math.prod(layer["shape"])),
                Cell("x".join(map(str, layer["ranks"])), math.prod(layer["ranks"])),
                Cell(" ".join(f"{used:.1f}" for used in layer["effective_ranks"]), sum(filled) / len(filled)),
                Cell(" ".join(f"{half:.0%}" for half in halves), sum(halves) / len(halves)),
                number(layer["parameters"]),
                Cell(size(layer["bytes"]), layer["bytes"]),
                number(layer["scale"], "g"),
            ]
        )

    parameters, stored = (sum(layer[key] for layer in layers) for key in ("parameters", "bytes"))
    norm = math.hypot(*(layer["norm"] for layer in layers))
    total = (
        f"all {len(layers):,}", "", f"{norm:.4g}", "", "", "", "", f"{parameters:,}", size(stored), "",
    )  # fmt: skip
    notes = (
        "Columns with several numbers have one for each mode, in the order of the shape. The effective rank is the "
        "exponential of the energy's entropy: far below the rank, a smaller rank would do. Shapes and ranks are sorted "
        "by their product, effective ranks and energies by their mean share.",
    )

    return Table("Layer by layer", columns, rows, notes, total=total)


def _charts(layers: list[dict[str, Any]]) -> Charts:
    """At least one of the layers has changed."""
    changed = [(place, layer) for place, layer in enumerate(layers, start=1) if layer["norm"] > 0]
    curves = _curves(layers)

    def norms(axes: Axes) -> None:
        places, heights = range(1, len(layers) + 1), [layer["norm"] for layer in layers]
        axes.vlines(places, 0, heights, color=MODES[0], linewidth=max(1, min(8, 200 / len(layers))))
        axes.set(title="Norm of each change", xlabel="number of the layer", ylabel="norm of dW")
        axes.set_ylim(bottom=0)

    def energies(axes: Axes) -> None:
        for mode, held in sorted(curves.items()):
            colour = MODES[mode % len(MODES)]
            low, middle, high = np.percentile(np.stack(held), (10, 50, 90), axis=0)
            axes.fill_between(SHARES, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.plot(SHARES, middle, color=colour, label=f"mode {mode + 1}")

        axes.plot([0, 1], [0, 1], color="#888888", linewidth=1, linestyle=":")
        directions = "share of a mode's directions, strongest first"
        axes.set(title="Energy per mode", xlabel=directions, ylabel="share of the energy")
        legend_below(axes)

    def used(axes: Axes) -> None:
        for mode in sorted({mode for _, layer in changed for mode in range(len(layer["ranks"]))}):
            points = [
                (place, layer["effective_ranks"][mode] / layer["ranks"][mode])
                for place, layer in changed
                if mode < len(layer["ranks"])
            ]
            colour = MODES[mode % len(MODES)]
            axes.plot(*zip(*points, strict=True), "o", markersize=3.5, color=colour, label=f"mode {mode + 1}")

        axes.set(title="Effective rank", xlabel="number of the layer", ylabel="effective rank / rank", ylim=(0, 1.04))
        legend_below(axes)

    charts = [chart("The norm of the change of each layer", norms)]
    notes = []

    # Where every rank is 1 there is one direction to each mode, which holds everything.
    if curves:
        charts += [
            chart("How much of the energy the strongest directions of each mode hold", energies),
            chart("The effective rank of each mode as a share of its rank", used),
        ]
        notes = [
            "Energy per mode: the line is the median layer, the band holds eight of ten. A line far above the dotted "
            "one says that a smaller rank of this mode would do."
        ]

    return Charts("Where the change is", charts, notes)


def _curves(layers: list[dict[str, Any]]) -> dict[int, list[np.ndarray]]:
    """For each mode the energy of its strongest directions in each layer, at ``SHARES``; modes of rank 1 have none."""
    found: dict[int, list[np.ndarray]] = {}
    for layer in layers:
        for mode, energy in enumerate(layer["energy"]):
            if len(energy) > 1 and layer["norm"] > 0:
                held = np.concatenate([[0.0], np.cumsum(energy)])
                found.setdefault(mode, []).append(np.interp(SHARES, np.linspace(0, 1, len(held)), held))

    return found
