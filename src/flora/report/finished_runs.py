"""Finished runs side by side, as text and as a page."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from tabulate import tabulate

from flora.report.charts import chart, legend_below
from flora.report.page import Cell, Charts, Notes, Page, Section, Table, number, render, words
from flora.storage.size import size

RUNS = ("#3b7dd8", "#d1495b", "#4c9f50", "#c98a1b", "#8a6fd1", "#12808f", "#8d6e53", "#c2549b")
OTHER_DATA = (
    "The runs differ in their task, so they may have been measured on different test sets: their numbers say something "
    "about each run, and nothing about which is better."
)
ONE_SEED = "Each run has one seed: `flora compare CONFIG --seeds 0,1,2` tells a difference from chance."

Report = Mapping[str, Any]


def finished_text(report: Report) -> str:
    """The runs as a table, and the settings in which they differ.

    Args:
        report: Of :func:`flora.comparison.finished.finished_runs`.
    """
    metric = report["metric"]
    lines = [
        {
            "run": run["name"],
            f"{metric} (test)": f"{run['measured']['test'][metric]:.4f}",
            f"{metric} (validation)": f"{run['measured']['validation'][metric]:.4f}",
            "trained": f"{run['measured']['trainable_parameters']:,}",
            "file": size(run["measured"]["adapter_bytes"]),
            "steps": f"{run['measured']['steps']:,}",
            "time": f"{run['measured']['seconds']:,.1f} s",
        }
        for run in report["runs"]
    ]
    table = tabulate(lines, headers="keys", tablefmt="simple", colalign=("left", *["right"] * 6), disable_numparse=True)
    told = [f"  {key}: {' | '.join(map(str, values))}" for key, values in report["differences"].items()]

    return "\n".join([table, "", *(["differ in:", *told, ""] if told else []), *_notes(report)])


def finished_page(report: Report) -> str:
    """The same as a page that stands alone, with the curves of all runs."""
    metric, runs = report["metric"], report["runs"]
    names = [run["name"] for run in runs]
    panels = list(dict.fromkeys(panel for run in runs for panel in run["curves"]))
    charts = [chart(f"{panel} of every run against steps", partial(_draw, runs=runs, panel=panel)) for panel in panels]

    columns = (
        "run", f"{metric} (test)", f"{metric} (validation)", "trained parameters", "file", "steps", "time", "seed",
        "recipe",
    )  # fmt: skip
    rows = []
    for run in runs:
        measured = run["measured"]
        seconds = measured["seconds"]
        rows.append(
            [
                words(run["name"]),
                number(measured["test"][metric], ".4f"),
                number(measured["validation"][metric], ".4f"),
                number(measured["trainable_parameters"]),
                Cell(size(measured["adapter_bytes"]), measured["adapter_bytes"]),
                number(measured["steps"]),
                Cell(f"{seconds:,.1f} s", seconds),
                number(measured["seed"], "d"),
                words(measured["recipe"]),
            ]
        )

    sections: list[Section] = [Charts("Curves", charts), Table("Run by run", columns, rows, _notes(report), words=(8,))]
    if report["differences"]:
        differing = [
            [words(key), *(words(str(value)) for value in values)] for key, values in report["differences"].items()
        ]
        places = tuple(range(1, len(runs) + 1))
        sections.append(Table("What they differ in", ("setting", *names), differing, words=places, sortable=False))
    else:
        sections.append(Notes("What they differ in", ["In no setting."]))

    return render(Page(f"{len(runs)} runs compared by {metric}", ", ".join(names), [], sections))


def _notes(report: Report) -> list[str]:
    if report["same_data"]:
        return [ONE_SEED]
    return [OTHER_DATA]


def _draw(axes: Axes, runs: list[dict[str, Any]], panel: str) -> None:
    """The curves of a panel, a colour for each run; validation beside training is dashed."""
    for index, run in enumerate(runs):
        curves = run["curves"].get(panel, [])
        for curve in curves:
            dashed = len(curves) > 1 and curve.label == "validation"
            label = f"{run['name']}{', validation' if dashed else ''}"
            style: Any = {"linestyle": "--" if dashed else "-", "color": RUNS[index % len(RUNS)]}
            axes.plot(curve.steps, curve.values, marker="o", markersize=3, label=label, **style)

    axes.set(title=panel, xlabel="step", ylabel=panel)
    legend_below(axes)
