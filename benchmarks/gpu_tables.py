"""The part of the page about a CUDA device."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.ratios import ratio
from benchmarks.tables import DASH, MIB, NAMES, markdown
from benchmarks.verdicts import Row

SHOWN = ("frozen", "full", "flora", "prepared", "lora")
HEADS = {**NAMES, "prepared": "`flora.prepare`"}
TITLES = {  # of the rows, in words
    "convnext": "ConvNeXt-V2-Large",
    "unet": "diffusion U-Net",
    "unet3d": "3-D U-Net",
    "resnet": "ResNet-50",
    "llama": "two Mixtral blocks with experts",
    "linear-4096-4096": "Linear 4096 -> 4096",
    "linear-4096-1024": "Linear 4096 -> 1024",
    "linear-4096-14336": "Linear 4096 -> 14336",
    "linear-768-3072": "Linear 768 -> 3072",
}
MODES = {
    "eager": "The host prepares each kernel, and the device is waited for after each step.",
    "compiled": "The blocks of the model under `torch.compile`; the host still launches each kernel.",
    "captured": "The eager step recorded once as a CUDA graph and replayed: the time of the device alone.",
}


def section(result: Row) -> list[str]:
    """Times and peak memory in each mode."""
    rows = [*result["rows"], *result["models"]]
    parts = ["## On a GPU", f"{result['machine']['device']}, {result['dtype']}."]
    if "commit_note" in result:
        parts.append(f"The commit is {result['commit_note']}.")
    parts += ["Where FLoRA loses:", "\n".join(losses(rows)) or "Nowhere."]
    for mode, meaning in MODES.items():
        timed = [row for row in rows if _is_timed(row, mode)]
        missing = [title(row) for row in rows if not _is_timed(row, mode)]

        parts += [f"### {mode.capitalize()}", meaning, times(timed, mode)]
        if missing:
            parts.append(f"Not measured: {', '.join(missing)}.")
        if mode != "captured":
            parts += ["Peak memory of a step, MiB:", peaks(timed, mode)]
    return parts


def title(row: Row) -> str:
    """What the row measured, in words."""
    return TITLES.get(row["case"], row["case"])


def _is_timed(row: Row, mode: str) -> bool:
    return mode in row.get("methods", {}).get("frozen", {}).get("ms", {})


def losses(rows: Sequence[Row]) -> list[str]:
    """A line for every row and mode in which FLoRA takes longer than LoRA, or 1.05 times full fine-tuning."""
    lines = []
    for row in rows:
        for mode in MODES:
            if not _is_timed(row, mode):
                continue
            behind = [
                f"{times:.2f} times {NAMES[name]}"
                for name, limit in (("lora", 1.0), ("full", 1.05))
                if (times := ratio(row, "flora", name, mode=mode)) is not None and times > limit
            ]
            if behind:
                lines.append(f"* {title(row)}, {mode}: {' and '.join(behind)}")
    return lines


def times(rows: Sequence[Row], mode: str) -> str:
    """The frozen step in milliseconds, the others relative to it."""
    shown = _shown(rows)[1:]
    lines = []
    for row in rows:
        frozen = row["methods"]["frozen"]["ms"][mode]["median"]
        others = [ratio(row, name, "frozen", mode=mode) for name in shown]
        cells = [f"{times:.2f}" if times else DASH for times in others]
        size = f"{row['size']}, r = {row['rank']}"
        if mode == "compiled" and "compiled_part" in row:
            size = f"{size}, {row['compiled_part']}"
        lines.append([title(row), size, f"{frozen:.2f}", *cells])
    return markdown(lines, ["what", "input", "frozen, ms", *(HEADS[name] for name in shown)])


def peaks(rows: Sequence[Row], mode: str) -> str:
    """Peak memory of a step."""
    shown = _shown(rows)
    lines = [[title(row), *(_peak(row["methods"].get(name, {}), mode) for name in shown)] for row in rows]
    return markdown(lines, ["what", *(HEADS[name] for name in shown)])


def _shown(rows: Sequence[Row]) -> list[str]:
    """The methods that were measured on any of the rows."""
    return [name for name in SHOWN if any(name in row["methods"] for row in rows)]


def _peak(method: Row, mode: str) -> str:
    size = method.get("peak", {}).get(mode)
    return DASH if size is None else f"{size / MIB:.0f}"
