"""The page of a comparison: its table, the differences with their confidence, what a reader must know beside it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import t as student
from tabulate import tabulate

from flora.storage.size import size

Row = Mapping[str, Any]
CONFIDENCE = 0.95
OURS = ("flora", "flora-gradient")  # the first of them that was compared is held against the other methods


def comparison_table(rows: Sequence[Row], metric: str, style: str = "github") -> str:
    """One line per method and budget; of methods that refused, why.

    Args:
        rows: of ``compare.json``.
        metric: its name.
        style: a format of tabulate.
    """
    lines = [_line(row, rows, metric) for row in rows if "refused" not in row]
    align = ("left", *["right"] * (len(lines[0]) - 1)) if lines else ()
    return str(tabulate(lines, headers="keys", tablefmt=style, colalign=align, disable_numparse=True))


def _line(row: Row, rows: Sequence[Row], metric: str) -> dict[str, str]:
    title, score = row["title"], f"{row['mean']:.4f}"
    difference, apart, memory = against(row, rows), "", ""

    if row["method"] == _ours(rows):
        title = f"**{title}**"
    if len(row["values"]) > 1:
        score = f"{score} ± {row['std']:.4f}"
    if difference is not None:
        apart = _interval(*difference)
    if row["peak_memory"] is not None:
        memory = size(row["peak_memory"])

    return {
        "method": title,
        "trainable parameters": f"{row['trainable_parameters']:,}",
        f"{metric} (test)": score,
        f"FLoRA minus it, {CONFIDENCE:.0%}": apart,
        "learning rate": f"{row['learning_rate']:g}",
        "s / step": f"{row['seconds_per_step']:.3f}",
        "peak memory": memory,
        "file": size(row["file_bytes"]),
    }


def _interval(mean: float, half: float) -> str:
    if math.isnan(half):
        return f"{mean:+.4f}"
    return f"{mean:+.4f} ± {half:.4f}"


def against(row: Row, rows: Sequence[Row]) -> tuple[float, float] | None:
    """FLoRA's metric minus that of a method at the same budget, seed by seed: the mean, and half its interval.

    The interval is Student's t over the paired differences. A method without a budget is held against FLoRA's largest.

    Returns:
        None for FLoRA itself, or where there is nothing to compare with; the half is NaN for a single seed.
    """
    ours = [other for other in rows if other["method"] == _ours(rows) and "refused" not in other]
    same = [other for other in ours if row["budget"] in (None, other["budget"])]
    if row["method"] == _ours(rows) or not same:
        return None

    best = max(same, key=lambda other: float(other["trainable_parameters"]))
    differences = [a - b for a, b in zip(best["values"], row["values"], strict=True)]
    if len(differences) < 2:
        return differences[0], math.nan

    spread = statistics.stdev(differences) / math.sqrt(len(differences))

    return statistics.mean(differences), float(student.ppf((1 + CONFIDENCE) / 2, len(differences) - 1)) * spread


def _ours(rows: Sequence[Row]) -> str:
    compared = {row["method"] for row in rows}
    return next((method for method in OURS if method in compared), OURS[0])


def comparison_notes(report: Row) -> list[str]:
    """What a reader must know beside the table, a sentence each."""
    rows = [row for row in report["rows"] if "refused" not in row]
    budgets = ", ".join(f"{budget:,}" for budget in report["budgets"])
    seeds = ", ".join(map(str, report["seeds"]))
    if "," in seeds:
        runs = f"Mean and standard deviation over the seeds {seeds}"
    else:
        runs = f"One seed ({seeds}), so no spread"

    chosen = (
        "each learning rate was chosen by the mean of validation over the first seeds (at most three), from one grid "
        "for all, which was extended where an edge was chosen; the test set was used by the final runs only."
    )
    if not any(row["search"] for row in rows):
        chosen = "one learning rate for all, so that nothing was chosen."

    notes = [
        f"{runs}; {chosen}",
        f"Every adapter may spend {budgets} parameters, the head not counted; ranks are solved for that. Each is on "
        "those of FLoRA's layers that it can adapt.",
        *_probed(report),
        f"FLoRA minus it: mean of the differences seed by seed, with the {CONFIDENCE:.0%} interval of Student's t. "
        "Methods without a choice of size are held against FLoRA at its largest. The intervals are not corrected for "
        "the number of pairs.",
        *dict.fromkeys(
            f"{row['title']}: not possible here ({row['refused']})." for row in report["rows"] if "refused" in row
        ),
    ]

    return notes + _edges(rows) + _verdicts(rows) + _merged(rows)


def _probed(report: Row) -> list[str]:
    """That the head was trained before, if it was."""
    epochs = report.get("settings", {}).get("compare", {}).get("probe_epochs", 0)
    if not epochs:
        return []

    return [f"Before every method the head alone was trained for {epochs:g} epochs, on the frozen base."]


def _edges(rows: Sequence[Row]) -> list[str]:
    """The methods that might do better beyond the grid."""
    names = [
        f"{name_with_budget(row)} ({row['learning_rate']:g})"
        for row in rows
        if len(row["search"]) > 1
        and f"{row['learning_rate']:g}" in (next(iter(row["search"])), list(row["search"])[-1])
    ]

    if names:
        return [f"The chosen learning rate is at the edge of the grid for {', '.join(names)}."]

    return []


def name_with_budget(row: Row) -> str:
    """A method, and what its adapter may spend."""
    if row["budget"] is None:
        return str(row["title"])
    return f"{row['title']} at {row['budget']:,}"


def _verdicts(rows: Sequence[Row]) -> list[str]:
    """Where FLoRA wins, loses, and where the seeds do not tell."""
    judged: dict[str, list[str]] = {"better than": [], "worse than": [], "not told apart from": []}
    for row in rows:
        difference = against(row, rows)
        if difference is None or math.isnan(difference[1]):
            continue

        mean, half = difference
        if abs(mean) <= half:
            word = "not told apart from"
        elif mean > 0:
            word = "better than"
        else:
            word = "worse than"

        judged[word].append(f"{name_with_budget(row)} ({mean:+.4f})")

    return [f"FLoRA is {word} {', '.join(names)}." for word, names in judged.items() if names]


def _merged(rows: Sequence[Row]) -> list[str]:
    """How far merged models are from unmerged ones."""
    worst: dict[str, float] = {}
    for row in rows:
        if row["merge_difference"] is not None:
            worst[row["title"]] = max(worst.get(row["title"], 0.0), row["merge_difference"])

    listed = ", ".join(f"{title} {difference:.1e}" for title, difference in worst.items())
    failed = {row["title"]: row["merge_error"] for row in rows if row.get("merge_error")}

    if worst:
        notes = [f"Largest difference between the outputs of a merged model and the unmerged one: {listed}."]
    else:
        notes = []

    return notes + [f"{title} cannot be merged here: {reason}." for title, reason in failed.items()]


def comparison_text(report: Row) -> str:
    """What the command prints of a comparison: its table, its notes, and where the files are."""
    return "\n".join(
        [
            "",
            comparison_table(report["rows"], report["metric"], "simple"),
            "",
            *comparison_notes(report),
            f"written to {report['folder']}: README.md, compare.html, compare.png, compare.json",
        ]
    )


def comparison_page(report: Row) -> str:
    """``README.md`` of the comparison's folder."""
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    notes = "\n".join(f"* {note}" for note in comparison_notes(report))

    return (
        f"# {Path(report['recipe']).stem}: the methods compared\n\n"
        f"{comparison_table(report['rows'], report['metric'])}\n\n"
        f"![{report['metric']} against trainable parameters](compare.png)\n\n{notes}\n\n"
        f"Measured on {machine['system']}, {machine['cores']} cores, {machine['device']}; {versions}; commit "
        f"{report['commit'] or 'unknown'}. Every run: `compare.json` and `runs/`.\n"
    )
