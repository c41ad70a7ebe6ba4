"""Plots, as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

MARKERS = "osD^vPX*<>"


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


def quality_against_parameters(path: Path, rows: Sequence[dict[str, Any]], metric: str, title: str) -> None:
    """Each method's mean with its standard deviation as error bar over its parameters, a line through its budgets.

    Methods of the same size stand side by side.

    Args:
        path: the PNG to write.
        rows: of ``compare.json``; those of methods that refused the task are left out.
        metric: the name of what is on the vertical axis.
        title: above the plot.
    """
    rows = [row for row in rows if "refused" not in row]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    for index, method in enumerate(methods):
        own = [row for row in rows if row["method"] == method]
        places = [_apart(rows, row) for row in own]
        ours = method == "flora"
        axes.errorbar(
            places,
            [row["mean"] for row in own],
            yerr=[row["std"] for row in own],
            fmt=f"-{MARKERS[index % len(MARKERS)]}",
            capsize=3,
            color=f"C{index}",
            label=own[0]["title"],
            linewidth=2 if ours else 1,
            markersize=8 if ours else 5,
            zorder=3 if ours else 2,
        )

    axes.set_xscale("log")
    axes.margins(x=0.08)
    axes.set(xlabel="trainable parameters, head included", ylabel=f"{metric} (test)", title=title)
    axes.grid(alpha=0.3, which="both")
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=120)


def _apart(rows: Sequence[dict[str, Any]], row: dict[str, Any]) -> float:
    """Where a method is drawn: at its parameters, or a little beside other methods of the same size (to 5 %)."""
    size = row["trainable_parameters"]
    same = [other for other in rows if abs(other["trainable_parameters"] / size - 1) < 0.05]
    return float(size * 1.03 ** (same.index(row) - (len(same) - 1) / 2))
