"""The plot of the page: the step time of every method on every row, relative to the frozen layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.ratios import ratio

LOOKS = {
    "full": ("full fine-tuning", "s", "0.45"),
    "flora": ("FLoRA", "o", "C3"),
    "lora": ("PEFT LoRA, equal rank", "^", "C0"),
    "lora-params": ("PEFT LoRA, equal parameters", "v", "C9"),
    "lokr": ("PEFT LoKr", "D", "C1"),
    "lycoris": ("LyCORIS LoCon, Tucker", "P", "C2"),
    "authors": ("the authors' scheme", "X", "C4"),
}


def step_times(rows: list[dict[str, Any]], path: Path) -> None:
    """A row for each layer and a mark for each method, on a logarithmic axis; FLoRA in front."""
    figure = Figure(figsize=(8.4, 0.42 * len(rows) + 2), layout="constrained")
    axes = figure.subplots()
    for method, (label, marker, colour) in LOOKS.items():
        points = [(times, place) for place, row in enumerate(rows) if (times := ratio(row, method, "frozen"))]
        if points:
            front = 3 if method == "flora" else 2
            axes.scatter(*zip(*points, strict=True), marker=marker, color=colour, label=label, s=42, zorder=front)
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
