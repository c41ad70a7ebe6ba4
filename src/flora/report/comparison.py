"""The page of a comparison: its table, what was matched, and whether merged models agree with unmerged ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate


def comparison_table(rows: Sequence[Mapping[str, Any]], metric: str, style: str = "github") -> str:
    """One line per method.

    Args:
        rows: of ``compare.json``.
        metric: its name.
        style: a format of tabulate.
    """
    lines = [
        {
            "method": row["method"],
            "trainable parameters": f"{row['trainable_parameters']:,}",
            f"{metric} (test)": f"{row['mean']:.4f} ± {row['std']:.4f}",
            "learning rate": f"{row['learning_rate']:g}",
            "seconds": f"{row['seconds']:.1f}",
            "file": size(row["file_bytes"]),
        }
        for row in rows
    ]
    return str(
        tabulate(lines, headers="keys", tablefmt=style, colalign=("left", *["right"] * 5), disable_numparse=True)
    )


def size(count: int) -> str:
    """Bytes as people read them."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} B"


def comparison_notes(report: Mapping[str, Any]) -> list[str]:
    """What a reader must know beside the table, a sentence each."""
    rows = report["rows"]
    counts = ", ".join(
        f"{row['method']} {row['trainable_parameters']:,}" for row in rows if row["merge_difference"] is not None
    )
    layers = report["adapted_layers"]
    notes = [
        f"Mean and standard deviation over the seeds {', '.join(map(str, report['seeds']))}; each learning rate was "
        "chosen on validation from the same grid with the first seed; the test set was used by the final runs only."
    ]
    if counts:
        notes.append(
            f"Adapters at matched trainable parameters ({counts}, head included): the budget is what LoRA costs "
            f"({report['budget']:,} without the head). FLoRA adapts {layers['flora']} layers; LoRA {layers['lora']}"
            + (", as it refuses the grouped convolutions." if layers["lora"] < layers["flora"] else ".")
        )
    notes += [
        f"{row['method']}: the learning rate {row['learning_rate']:g} is at the edge of the grid."
        for row in rows
        if len(row["search"]) > 1
        and f"{row['learning_rate']:g}" in (next(iter(row["search"])), list(row["search"])[-1])
    ]
    return notes + _verdicts(rows) + merge_notes(rows)


def _verdicts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """FLoRA against each other method, seed by seed."""
    ours = next((row for row in rows if row["method"] == "flora"), None)
    if ours is None:
        return []
    notes = []
    for row in rows:
        if row is ours:
            continue
        difference = ours["mean"] - row["mean"]
        spread = max(ours["std"], row["std"])
        wins = sum(a > b for a, b in zip(ours["values"], row["values"], strict=True))
        notes.append(
            f"flora minus {row['method']}: {difference:+.4f} ({'more' if abs(difference) > spread else 'less'} than "
            f"the spread of {spread:.4f}; better with {wins} of {len(ours['values'])} seeds)."
        )
    return notes


def merge_notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """How far merged models are from unmerged ones."""
    return [
        f"{row['method']}: merged and unmerged agree, largest difference of the outputs {row['merge_difference']:.2e} "
        f"({len(row['values'])} seeds)."
        for row in rows
        if row["merge_difference"] is not None
    ]


def comparison_page(report: Mapping[str, Any]) -> str:
    """``README.md`` of the comparison's folder."""
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    notes = "\n".join(f"* {note}" for note in comparison_notes(report))
    return (
        f"# {report['recipe']}: the methods compared\n\n{comparison_table(report['rows'], report['metric'])}\n\n"
        f"![{report['metric']} against trainable parameters](compare.png)\n\n{notes}\n\n"
        f"Measured on {machine['system']}, {machine['cores']} cores, {machine['device']}; {versions}; commit "
        f"{report['commit'] or 'unknown'}. Every run: `compare.json` and `runs/`.\n"
    )
