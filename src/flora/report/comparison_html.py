"""The HTML page of a comparison: quality against parameters, differences and intervals, learning rates, a table."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes

from flora.report.charts import chart, legend_below
from flora.report.comparison import CONFIDENCE, Row, against, comparison_notes, name_with_budget
from flora.report.page import Cell, Chart, Charts, Notes, Page, Section, Table, number, render, words
from flora.report.plots import MARKERS, colour_of, draw_quality, log_axis
from flora.storage.size import size


def comparison_html(report: Row) -> str:
    """What was compared, as a page that stands alone.

    Args:
        report: What is in ``compare.json``.
    """
    rows = [row for row in report["rows"] if "refused" not in row]
    metric, machine = report["metric"], report["machine"]
    sections: list[Section] = []

    if rows:
        sections = [Charts("At a glance", _charts(rows, metric)), _table(rows, metric)]
    sections.append(Notes("How to read it", comparison_notes(report)))

    runs = sum(len(row["values"]) for row in rows)
    seconds = sum(row["seconds"] * len(row["values"]) for row in rows)
    tiles = [
        ("methods", f"{len({row['method'] for row in rows})}"),
        ("seeds", f"{len(report['seeds'])}"),
        ("final runs", f"{runs}"),
        ("training time of these", f"{seconds:,.0f} s"),
        ("parameters of an adapter", ", ".join(f"{budget:,}" for budget in report["budgets"])),
    ]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lead = (
        f"Measured on {machine['system']}, {machine['cores']} cores, {machine['device']}; {versions}; commit "
        f"{report['commit'] or 'unknown'}."
    )
    subject = report.get("subject") or report["recipe"]

    return render(Page(f"{subject}: the methods compared", lead, tiles, sections))


def _charts(rows: Sequence[Row], metric: str) -> list[Chart]:
    def quality(axes: Axes) -> None:
        draw_quality(axes, rows, metric)
        axes.set_title("Quality against parameters")
        legend_below(axes)

    charts = [chart(f"{metric} on the test set against trainable parameters, one point per seed", quality)]
    pairs = [(row, difference) for row in rows if (difference := against(row, rows)) is not None]

    if pairs:
        what = f"FLoRA's {metric} minus that of each method"
        charts.append(chart(what, lambda axes: _draw_pairs(axes, pairs, metric), lines=len(pairs)))
    if any(len(row["search"]) > 1 for row in rows):
        charts.append(
            chart(f"{metric} on validation against the learning rate", lambda axes: _draw_rates(axes, rows, metric))
        )

    return charts


def _draw_pairs(axes: Axes, pairs: Sequence[tuple[Row, tuple[float, float]]], metric: str) -> None:
    """A line for each method: the mean difference, and its interval where there are several seeds."""
    names = [name_with_budget(row) for row, _ in pairs]
    for place, (row, (mean, half)) in enumerate(pairs):
        width = 0.0 if math.isnan(half) else half
        axes.errorbar(mean, place, xerr=width, fmt="o", capsize=3, color=colour_of(row["method"]))

    axes.axvline(0, color="#888888", linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set(title="FLoRA minus each", xlabel=f"{metric}, {CONFIDENCE:.0%} interval")


def _draw_rates(axes: Axes, rows: Sequence[Row], metric: str) -> None:
    """A curve for each method, dashed for its further budgets; a rate at which training diverged has no point."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    drawn: set[str] = set()
    for row in rows:
        points = sorted((float(rate), score) for rate, score in row["search"].items() if math.isfinite(score))
        if not points:
            continue

        method = row["method"]
        line, label = ("--", None) if method in drawn else ("-", row["title"])
        mark = MARKERS[methods.index(method) % len(MARKERS)]
        axes.plot(*zip(*points, strict=True), line + mark, markersize=4, color=colour_of(method), label=label)
        drawn.add(method)

    log_axis(axes, "{x:g}")
    axes.set(title="The search for the learning rate", xlabel="learning rate", ylabel=f"{metric} (validation)")
    legend_below(axes)


def _table(rows: Sequence[Row], metric: str) -> Table:
    columns = (
        "method", f"{metric} (test)", "spread", f"FLoRA minus it, {CONFIDENCE:.0%}", "trainable parameters",
        "learning rate", "s / step", "peak memory", "file", "each seed",
    )  # fmt: skip
    values = [row["mean"] for row in rows]
    least, most = min(values), max(values)
    lines = []
    for row in rows:
        share = (row["mean"] - least) / (most - least) if most > least else 0.0
        lines.append(
            [
                words(name_with_budget(row)),
                number(row["mean"], ".4f", share),
                number(row["std"], ".4f") if len(row["values"]) > 1 else Cell("", ""),
                _difference(against(row, rows)),
                number(row["trainable_parameters"]),
                number(row["learning_rate"], "g"),
                number(row["seconds_per_step"], ".3f"),
                _bytes(row["peak_memory"]),
                _bytes(row["file_bytes"]),
                words(" ".join(f"{value:.4f}" for value in row["values"])),
            ]
        )

    return Table("Method by method", columns, lines, ["The bar spans the lowest to the highest mean."], words=(9,))


def _difference(difference: tuple[float, float] | None) -> Cell:
    if difference is None:
        return Cell("", "")

    mean, half = difference
    if math.isnan(half):
        return number(mean, "+.4f")

    return Cell(f"{mean:+.4f} ± {half:.4f}", mean)


def _bytes(count: float | None) -> Cell:
    if count is None:
        return Cell("", "")
    return Cell(size(count), count)
