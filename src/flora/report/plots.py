"""Curves of a training and the plot of a comparison: what is drawn, and as which file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

MARKERS = "osD^vPX*<>"
# One colour for each method, in every plot; what is of one kind is of one hue. They are read on white and on black.
COLOURS = {
    "flora": "#d1495b",
    "flora-gradient": "#ff7f50",
    "flora-blocks": "#e8590c",
    "flora-ranks": "#f2a25c",
    "flora-norms": "#d9829f",
    "lora": "#3b7dd8",
    "lora-params": "#6cc0e5",
    "lora-gradient": "#5aa0a8",
    "lora-ga": "#12808f",
    "rslora": "#6f9be0",
    "dora": "#5b5bd6",
    "pissa": "#2aa198",
    "eva": "#3f6f8f",
    "miss": "#8a6fd1",
    "hira": "#b07cc6",
    "oft": "#9a4f8a",
    "loha": "#c2549b",
    "lokr": "#c98a1b",
    "lycoris": "#4c9f50",
    "authors": "#8a7f2c",
    "full": "#777777",
    "frozen": "#a8a8a8",
    "bitfit": "#8d6e53",
}
OTHER = "#555566"  # of a method that is not in the table

TRAINING, VALIDATION, RATE = COLOURS["lora"], COLOURS["flora"], COLOURS["lycoris"]


class Curve(NamedTuple):
    """Values at steps of a training."""

    label: str
    steps: list[int]
    values: list[float]
    colour: str


def colour_of(method: str) -> str:
    """The colour of a method, by its key in ``flora compare``."""
    return COLOURS.get(method, OTHER)


def training_curves(
    history: Sequence[Mapping[str, Any]], metric: str, end: Mapping[str, float], steps: int
) -> dict[str, list[Curve]]:
    """What is drawn of a training: panel -> its curves; those without a point are left out.

    Args:
        history: ``log_history`` of the Trainer's state.
        metric: The metric of the recipe.
        end: What was measured on validation after the last step.
        steps: The number of that step.
    """
    last = {"step": steps, **{f"eval_{name}": value for name, value in end.items()}}
    entries = [entry for entry in history if "step" in entry]
    if not any(entry["step"] == steps and f"eval_{metric}" in entry for entry in entries):
        entries.append(last)

    panels = {
        "loss": [("training", "loss", TRAINING), ("validation", "eval_loss", VALIDATION)],
        metric: [("validation", f"eval_{metric}", VALIDATION)],
        "learning rate": [("learning rate", "learning_rate", RATE)],
    }
    found = {}
    for panel, wanted in panels.items():
        curves = []
        for label, key, colour in wanted:
            points = [entry for entry in entries if key in entry]
            if points:
                values = [float(entry[key]) for entry in points]
                curves.append(Curve(label, [entry["step"] for entry in points], values, colour))

        if curves:
            found[panel] = curves

    return found


def draw_curves(axes: Axes, panel: str, curves: Sequence[Curve]) -> None:
    """Puts the curves of a panel on axes; a single point is drawn as a mark."""
    for curve in curves:
        marker = "o" if len(curve.steps) < 40 else None
        # A mark on the edge, such as a score of 0, is drawn whole.
        options: Any = {"marker": marker, "markersize": 3.5, "clip_on": False, "zorder": 3}
        axes.plot(curve.steps, curve.values, color=curve.colour, label=curve.label, **options)

    axes.set(xlabel="step", ylabel=panel)

    # Around a single point the axis would show values that no share can have.
    values = [value for curve in curves for value in curve.values]
    if len(values) == 1 and 0 <= values[0] <= 1:
        axes.set_ylim(0, 1.04)

    axes.set_xlim(0, 1.04 * max(step for curve in curves for step in curve.steps))


def training_plot(path: Path, panels: Mapping[str, Sequence[Curve]], title: str) -> None:
    """Writes the curves of a training as a PNG, its panels one above the other.

    Args:
        path: Of the file.
        panels: Of :func:`training_curves`; at least one.
        title: Above the plot.
    """
    figure = Figure(figsize=(6, 0.6 + 2.1 * len(panels)), layout="constrained")
    places = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axes, (panel, curves) in zip(places, panels.items(), strict=True):
        draw_curves(axes, panel, curves)
        axes.grid(alpha=0.3)

        if len(curves) > 1:
            axes.legend(frameon=False, fontsize="small")
        if axes is not places[-1]:
            axes.set_xlabel("")

    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=120)


def quality_against_parameters(path: Path, rows: Sequence[dict[str, Any]], metric: str, title: str) -> None:
    """Each method's mean with its standard deviation as error bar over its parameters, a line through its budgets.

    Every seed is a small point. Methods of the same size stand side by side.

    Args:
        path: the PNG to write.
        rows: of ``compare.json``; those of methods that refused the task are left out.
        metric: the name of what is on the vertical axis.
        title: above the plot.
    """
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    draw_quality(axes, rows, metric)
    axes.set_title(title)
    axes.grid(alpha=0.3, which="both")
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=120)


def draw_quality(axes: Axes, rows: Sequence[Mapping[str, Any]], metric: str) -> None:
    """The same on axes that are there."""
    rows = [row for row in rows if "refused" not in row]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for index, method in enumerate(methods):
        own = [row for row in rows if row["method"] == method]
        places = [_apart(rows, row) for row in own]
        ours, colour = method == "flora", colour_of(method)
        axes.errorbar(
            places,
            [row["mean"] for row in own],
            yerr=[row["std"] for row in own],
            fmt=f"-{MARKERS[index % len(MARKERS)]}",
            capsize=3,
            color=colour,
            label=own[0]["title"],
            linewidth=2 if ours else 1,
            markersize=8 if ours else 5,
            zorder=3 if ours else 2,
        )

        for place, row in zip(places, own, strict=True):
            if len(row["values"]) > 1:
                axes.plot([place] * len(row["values"]), row["values"], ".", color=colour, markersize=5, alpha=0.45)

    axes.margins(x=0.08)
    log_axis(axes, "{x:,.0f}")
    axes.set(xlabel="trainable parameters, head included", ylabel=f"{metric} (test)")


def log_axis(axes: Axes, form: str) -> None:
    """Makes the horizontal axis logarithmic, with plain numbers in this format at the powers of ten."""
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(form)
    axes.xaxis.set_minor_formatter(NullFormatter())


def _apart(rows: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> float:
    """Where a method is drawn: at its parameters, or a little beside other methods of the same size (to 5 %)."""
    size = row["trainable_parameters"]
    same = [other for other in rows if abs(other["trainable_parameters"] / size - 1) < 0.05]
    return float(size * 1.03 ** (same.index(row) - (len(same) - 1) / 2))
