"""The picture of the page: test scores without tuning over trainable parameters, a panel for each task."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks.quality.pairs import OURS, Cell, interval
from flora.comparison.methods import METHODS
from flora.report.plots import colour_of

# A method has one colour and one mark in all panels; those that are not here are told in the tables only.
MARKS = {"bitfit": "X", "lora": "^", "lycoris": "P", "flora": "D", OURS: "o", "full": "s"}
LOOKS = {method: (colour_of(method), mark) for method, mark in MARKS.items()}
COLUMNS = 3  # of panels
BESIDE = 1.12  # between neighbours that have the same number of parameters


def quality_over_parameters(
    path: Path, chosen: Mapping[tuple[str, str], Cell], tasks: Sequence[str], titles: Mapping[str, str]
) -> None:
    """Writes the picture.

    Args:
        path: the PNG to write.
        chosen: (task, method) -> its trainings.
        tasks: a panel each, in this order.
        titles: of the panels.
    """
    rows = math.ceil(len(tasks) / COLUMNS)
    figure = Figure(figsize=(3.6 * COLUMNS, 3.3 * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for panel in panels[len(tasks) :]:
        panel.set_axis_off()

    panels = panels[: len(tasks)]
    for panel, task in zip(panels, tasks, strict=True):
        _draw(panel, {method: chosen[task, method] for method in LOOKS if (task, method) in chosen})
        panel.set_title(titles[task].replace(": ", "\n"), fontsize="medium")

    for panel in panels[::COLUMNS]:
        panel.set_ylabel("test score")

    marks = {label: mark for panel in panels for mark, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(marks.values(), marks.keys(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _draw(panel: Axes, found: Mapping[str, Cell]) -> None:
    """The mean of each method with its interval, and a dot for each seed; ours in front."""
    sizes = {method: statistics.median(line["parameters"] for line in cell.lines) for method, cell in found.items()}
    floor = _floor(found)
    for method, cell in found.items():
        same = [other for other, size in sizes.items() if abs(math.log(size / sizes[method])) < 0.1]
        place = sizes[method] * BESIDE ** (same.index(method) - (len(same) - 1) / 2)
        mean, half = interval(cell.test)
        colour, mark = LOOKS[method]
        panel.plot([place] * len(cell.test), list(cell.test.values()), ".", color=colour, alpha=0.35, markersize=4)
        if mean < floor:
            panel.annotate(f"{mean:.2f}", (place, floor), (0, 8), textcoords="offset points", ha="center", color=colour)
            mean, half = floor, 0.0

        panel.errorbar(
            place,
            mean,
            yerr=half,
            fmt=mark,
            capsize=3,
            color=colour,
            label=METHODS[method].title,
            markersize=8,
            zorder=3 if method == OURS else 2,
            clip_on=mean != floor,
        )

    panel.set_ylim(bottom=floor)
    panel.set_xscale("log")
    panel.margins(x=0.15)
    panel.set_xlabel("trainable parameters")
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.grid(alpha=0.3)


def _floor(found: Mapping[str, Cell]) -> float:
    """Where the panel ends below: what is much worse than the adapters is drawn there, with its score."""
    adapters = [interval(cell.test)[0] for method, cell in found.items() if METHODS[method].matched]
    tops = [interval(cell.test)[0] for cell in found.values()]
    return max(0.0, min(adapters) - max(0.05, max(tops) - min(adapters)))
