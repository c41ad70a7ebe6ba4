"""Plots, as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

MARKERS = "osD^vPX*"
APART = 1.12  # methods of the same size are drawn side by side, by this factor


def loss_curve(path: Path, history: Sequence[dict[str, Any]], title: str) -> None:
    """The training loss, and the evaluation loss where there is one, against the step.

    Args:
        path: the PNG to write.
        history: ``log_history`` of the Trainer's state.
        title: above the plot.
    """
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for key, label in (("loss", "training"), ("eval_loss", "validation")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    axes.set(xlabel="step", ylabel="loss", title=title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def accuracy_against_parameters(path: Path, rows: Sequence[dict[str, Any]], metric: str, title: str) -> None:
    """Each method's mean with its standard deviation as error bar, the single seeds as dots; parameters on a log axis.

    Methods of the same size stand side by side.

    Args:
        path: the PNG to write.
        rows: of ``compare.summarise``.
        metric: the name of what is on the vertical axis.
        title: above the plot.
    """
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for index, row in enumerate(rows):
        colour, place = f"C{index}", apart(rows, index)
        bar = {"fmt": MARKERS[index % len(MARKERS)], "capsize": 4, "color": colour, "label": row["method"]}
        axes.errorbar(place, row["mean"], yerr=row["std"], **bar)
        axes.scatter([place] * len(row["values"]), row["values"], s=10, alpha=0.4, color=colour)
    axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.set(xlabel="trainable parameters", ylabel=f"{metric} (test)", title=title)
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=120)


def apart(rows: Sequence[dict[str, Any]], index: int) -> float:
    """Where a method is drawn: at its parameters, or beside the earlier methods of the same size (to 5 %)."""
    size = rows[index]["trainable_parameters"]
    same = [other for other, row in enumerate(rows) if abs(row["trainable_parameters"] / size - 1) < 0.05]
    return float(size * APART ** (same.index(index) - (len(same) - 1) / 2))
