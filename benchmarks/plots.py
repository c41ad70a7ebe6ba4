"""The plot of the page: the step time of every method on every row, relative to the frozen layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.ratios import ratio
from flora.report.plots import colour_of

LOOKS = {
    "full": ("full fine-tuning", "s"),
    "flora": ("FLoRA", "o"),
    "lora": ("PEFT LoRA, equal rank", "^"),
    "lora-params": ("PEFT LoRA, equal parameters", "v"),
    "lokr": ("PEFT LoKr", "D"),
    "lycoris": ("LyCORIS LoCon, Tucker", "P"),
    "authors": ("the authors' scheme", "X"),
}


def step_times(rows: list[dict[str, Any]], path: Path) -> None:
    """A row for each layer and a mark for each method, on a logarithmic axis; FLoRA in front."""
    figure = Figure(figsize=(8.4, 0.42 * len(rows) + 2), layout="constrained")
    axes = figure.subplots()
    for method, (label, marker) in LOOKS.items():
        points = [(times, place) for place, row in enumerate(rows) if (times := ratio(row, method, "frozen"))]
        if points:
            front = 3 if method == "flora" else 2
            axes.scatter(
                *zip(*points, strict=True), marker=marker, color=colour_of(method), label=label, s=42, zorder=front
            )
    axes.axvline(1, color="black", linewidth=1, label="frozen")
    axes.set_yticks(range(len(rows)), [row["case"] for row in rows])
    axes.invert_yaxis()
    axes.set_xscale("log")
    ticks = [1, 1.2, 1.5, 2, 3, 5, 8]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("training step relative to the frozen layer's, one thread")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    figure.savefig(path, dpi=110, metadata={"Software": None})
