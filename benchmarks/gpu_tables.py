"""The part of the page about a CUDA device."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.ratios import ratio
from benchmarks.tables import DASH, MIB, NAMES, markdown
from benchmarks.verdicts import Row

SHOWN = ("frozen", "full", "flora", "lora")
MODES = {
    "eager": "The host prepares each kernel, and the device is waited for after each step.",
    "compiled": "The blocks of the model under `torch.compile`; the host still launches each kernel.",
    "captured": "The eager step recorded once as a CUDA graph and replayed: the time of the device alone.",
}


def section(result: Row) -> list[str]:
    """Times and peak memory in each mode."""
    rows = [*result["rows"], *result["models"]]
    parts = ["## On a GPU", f"{result['machine']['device']}, {result['dtype']}."]
    for mode, meaning in MODES.items():
        parts += [f"### {mode.capitalize()}", meaning, times(rows, mode)]
        if mode != "captured":
            parts += ["Peak memory of a step, MiB:", peaks(rows, mode)]
    return parts


def times(rows: Sequence[Row], mode: str) -> str:
    """The frozen step in milliseconds, the others relative to it."""
    lines = []
    for row in rows:
        if "skipped" in row:
            lines.append([row["case"], row["skipped"], *[DASH] * len(SHOWN)])
            continue
        if mode not in row["methods"]["frozen"]["ms"]:
            lines.append([row["case"], "not measured", *[DASH] * len(SHOWN)])
            continue
        frozen = row["methods"]["frozen"]["ms"][mode]["median"]
        others = [ratio(row, name, "frozen", mode=mode) for name in SHOWN[1:]]
        cells = [f"{times:.2f}" if times else DASH for times in others]
        lines.append([row["case"], f"{row['size']}, r = {row['rank']}", f"{frozen:.2f}", *cells])
    return markdown(lines, ["what", "input", "frozen, ms", *(NAMES[name] for name in SHOWN[1:])])


def peaks(rows: Sequence[Row], mode: str) -> str:
    """Peak memory of a step."""
    lines = [
        [row["case"], *(_peak(row["methods"].get(name, {}), mode) for name in SHOWN)]
        for row in rows
        if "skipped" not in row
    ]
    return markdown(lines, ["what", *(NAMES[name] for name in SHOWN)])


def _peak(method: Row, mode: str) -> str:
    size = method.get("peak", {}).get(mode)
    return DASH if size is None else f"{size / MIB:.0f}"
