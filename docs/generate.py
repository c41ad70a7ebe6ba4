"""Writes what is generated into the pages: each table between ``<!-- layers -->`` and ``<!-- /layers -->`` and alike.

Run by ``make docs``. Numbers come from ``benchmarks/results``; the tests fail where a page is not what this writes.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from flora import LAYERS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", ROOT / "docs" / "index.md", ROOT / "docs" / "recipes.md"]
REPOSITORY: str | None = None  # the public address of the repository, once it has one: then README's links are absolute

SHORTHANDS = {"linear": "`all`, `all-linear`", "conv": "`all`, `all-conv`", "norm": "by name"}
EXPORT = {
    "linear": "LoRA, Kohya, dense",
    "conv": "LoRA and Kohya (not transposed; LoRA with one group only), dense",
    "embedding": "LoRA (not bags), dense",
}
# What the others can attach to; tests/test_docs.py tries every layer with PEFT.
PEFT_LORA = {"linear": "yes", "conv": "not transposed", "embedding": "not bags", "attention": "yes"}
LYCORIS = {"linear": "`nn.Linear`", "conv": "not transposed", "norm": "`train_norm`"}
MIB = 2**20


def layer_table() -> str:
    """One row per kind: the layers of ``flora.LAYERS``, who else can adapt them, how they are exported and targeted."""
    kinds: dict[str, list[str]] = {}
    for cls, row in LAYERS.items():
        kinds.setdefault(row.kind, []).append(f"`{name_of(cls)}`")
    lines = [
        "| kind | layers | PEFT's LoRA | LyCORIS | exports, apart from merging | `target_modules` |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {kind} | {', '.join(names)} | {PEFT_LORA.get(kind, 'no')} | {LYCORIS.get(kind, 'no')} | "
        f"{EXPORT.get(kind, 'dense')} | {SHORTHANDS.get(kind, '`all`')} |"
        for kind, names in kinds.items()
    ]
    lines.append(
        "| any parameter | of any number of dimensions, such as fused experts | 2-D and 3-D | no | "
        "stacks of fused experts: LoRA; all: dense | `target_parameters` |"
    )
    return "\n".join(lines)


def digits_table() -> str:
    """The comparison that ``flora compare digits`` makes, from its result."""
    report = read("digits")
    lines = ["| method | trainable parameters | test accuracy |", "|---|---|---|"]
    lines += [
        f"| {NAMES[row['method']]} | {row['trainable_parameters']:,} | {row['mean']:.3f} ± {row['std']:.3f} |"
        for row in report["rows"]
    ]
    machine, versions = report["machine"], report["versions"]
    lines += [
        "",
        f"Mean and standard deviation over the seeds {', '.join(map(str, report['seeds']))}; learning rates chosen on "
        f"validation. Measured on {machine['cores']} CPU cores with torch {versions['torch']}, "
        f"PEFT {versions['peft']}, commit {report['commit'][:7]}.",
    ]
    return "\n".join(lines)


def quality_table() -> str:
    """Each task at equal parameters: where there are such results, with one learning rate and the defaults for all.

    Otherwise, from the older comparisons, each task at its smallest budget.
    """
    if any((RESULTS / "quality").glob("*.jsonl")):
        return _untuned_quality()

    shown = ("flora", "lora", "dora", "lycoris", "full")
    lines = [
        "| task | parameters | " + " | ".join(NAMES[name] for name in shown) + " |",
        "|---|---|" + "---|" * len(shown),
    ]
    for name, task in TASKS.items():
        report = read(name)
        budget = min(report["budgets"])
        rows = {row["method"]: row for row in report["rows"] if row["budget"] in (budget, None)}
        cells = [task, f"{budget:,}", *(_score(rows.get(method, {})) for method in shown)]
        lines.append(f"| {' | '.join(cells)} |")
    seeds = len(read(next(iter(TASKS)))["seeds"])
    lines += ["", f"Mean and standard deviation over {seeds} seeds; learning rates are chosen on validation."]
    return "\n".join(lines)


def _untuned_quality() -> str:
    """The table of the quality page for one learning rate and all defaults."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.quality import page
    from benchmarks.quality.pairs import at_rate, cells
    from benchmarks.quality.run import RATE, stored

    found = cells(stored(sorted((RESULTS / "quality").glob("*.jsonl"))))
    chosen = {place: cell for place, listed in found.items() if (cell := at_rate(listed, RATE)) is not None}
    tasks = [task for task in page.TASKS if (task, page.OURS) in chosen]
    note = (
        f"No tuning: the learning rate {RATE:g} and all defaults for every method and task. ± is half the 95 % "
        "interval over n seeds. Differences, tuned runs and origins: [quality](docs/quality.md)."
    )
    table = page.table(chosen, tasks, methods=page.SHORT)
    # One rate for all, told below; a table on a phone has no room for more.
    table = re.sub(r" +\|", " |", re.sub(r"-{3,}", "---", table.replace(f", {RATE:g})", ")")))
    return f"{table}\n\n{note}"


def _score(row: dict[str, Any]) -> str:
    return f"{row['mean']:.3f} ± {row['std']:.3f}" if "mean" in row else "-"


def gpu_table() -> str:
    """Where FLoRA loses on a GPU; then each method's time and memory, of whole models and its worst linear layer."""
    report = read("gpu")
    shown = ("frozen", "flora", "lora", "full")
    lines = [
        "| training step | | " + " | ".join(NAMES[name] if name != "frozen" else name for name in shown) + " |",
        "|---|---|---|---|---|---|",
    ]
    linear = [row for row in report["rows"] if row.get("group") == "linear" and "methods" in row]
    worst = max(linear, key=lambda row: _eager(row, "flora") / _eager(row, "lora"))
    chosen = [*(row for row in report["models"] if "methods" in row), worst]
    for row in chosen:
        methods = [row["methods"].get(name, {}) for name in shown]
        label = f"{CASES.get(row['case'], row['case'])}, {row['size']}"
        for mode, meaning in MODES.items():
            times = [method.get("ms", {}).get(mode, {}).get("median") for method in methods]
            if any(times):
                lines.append(f"| {label} | {meaning} | {' | '.join(_number(value, 'ms', 1) for value in times)} |")
        peaks = [method.get("peak", {}).get("eager") for method in methods]
        megabytes = [None if value is None else value / MIB for value in peaks]
        lines.append(f"| | peak memory, eager | {' | '.join(_number(value, 'MiB', 0) for value in megabytes)} |")
    versions = report["versions"]
    lines += [
        "",
        f"{report['machine']['device']}, {report['dtype']}, torch {versions['torch']}, PEFT {versions['peft']}, rank "
        f"{chosen[0]['rank']} for both adapters, commit {'about ' if report.get('commit_is_approximate') else ''}"
        f"{report['commit'][:7]}. A step is a forward and a backward without an optimiser.",
        "",
        *_against_lora(chosen),
    ]
    return "\n".join([*_where_it_loses([*report["models"], *linear]), "", *lines])


def _eager(row: dict[str, Any], method: str) -> float:
    return float(row["methods"][method]["ms"]["eager"]["median"])


def _where_it_loses(rows: list[dict[str, Any]]) -> list[str]:
    """A sentence for each mode with the rows in which FLoRA takes longer than LoRA."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.ratios import ratio

    sentences = []
    for mode, meaning in MODES.items():
        found = [row for row in rows if all(mode in row["methods"][name]["ms"] for name in ("flora", "lora"))]
        behind = []
        for row in found:
            times = ratio(row, "flora", "lora", mode=mode)
            if times is not None and times > 1:
                behind.append(f"{CASES.get(row['case'], row['case'])} ({times:.2f} times LoRA's step)")
        told = f"in {len(behind)} of {len(found)}: {', '.join(behind)}" if behind else f"in none of {len(found)}"
        sentences.append(f"* {meaning}: {told}.")
    return ["Rows in which FLoRA takes longer than LoRA:", "", *sentences]


def _number(value: float | None, unit: str, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f} {unit}"


def _against_lora(rows: list[dict[str, Any]]) -> list[str]:
    """A sentence per row: how FLoRA compares with LoRA and with full fine-tuning, in time and memory."""
    from benchmarks.ratios import ratio

    lines = []
    for row in rows:
        flora, lora = (row["methods"].get(name, {}) for name in ("flora", "lora"))
        parts = []
        for mode, meaning in MODES.items():
            against = [ratio(row, "flora", other, mode=mode) for other in ("lora", "full")]
            if None not in against:
                parts.append(
                    f"{against[0]:.2f} times LoRA's step and {against[1]:.2f} times that of full fine-tuning "
                    f"({meaning})"
                )
        peaks = [method.get("peak", {}).get("eager") for method in (flora, lora)]
        if all(peaks):
            parts.append(f"{peaks[0] / peaks[1]:.2f} of LoRA's peak memory")
        if parts:
            lines.append(f"* {CASES.get(row['case'], row['case'])}: FLoRA takes {'; '.join(parts)}.")
    return lines


def read(name: str) -> dict[str, Any]:
    """A result of the benchmarks."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


MODES = {"eager": "eager", "compiled": "`torch.compile`", "captured": "CUDA graph"}
CASES = {  # the names of the GPU's rows, in words
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
NAMES = {
    "frozen": "head only",
    "flora": "**FLoRA**",
    "lora": "LoRA",
    "dora": "DoRA",
    "lycoris": "LyCORIS LoCon, Tucker",
    "full": "full fine-tuning",
}
TASKS = {
    "quality-cifar": "images (inverted, blurred CIFAR-10 with ResNet-20), accuracy",
    "quality-hippocampus": "volumes (hippocampus MRI, 3-D U-Net), Dice",
    "quality-sst2": "text (SST-2 with a 22 M encoder), accuracy",
}
TABLES: dict[str, Callable[[], str]] = {
    "layers": layer_table,
    "digits": digits_table,
    "quality": quality_table,
    "gpu": gpu_table,
}


def name_of(cls: type) -> str:
    """``nn.Conv2d``, or ``transformers.Conv1D`` for what is not torch's own."""
    package = cls.__module__.partition(".")[0]
    return f"nn.{cls.__name__}" if package == "torch" else f"{package}.{cls.__name__}"


def _between(text: str, match: re.Match[str]) -> str:
    return f"{match[1]}{text}\n{match[2]}"


def render(page: str) -> str:
    """The page with its generated parts as they are now."""
    for mark, table in TABLES.items():
        pattern = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.DOTALL)
        if pattern.search(page):
            page = pattern.sub(partial(_between, table()), page)
    return page


def absolute(page: str, repository: str | None) -> str:
    """The page with links to files of the repository written out, as a package index needs them.

    Example:
        >>> absolute("[guide](docs/index.md) ![](docs/a.png) [x](https://x.org)", "https://git.org/me/it")
        '[guide](https://git.org/me/it/blob/main/docs/index.md) ![](https://git.org/me/it/raw/main/docs/a.png) [x](https://x.org)'
    """
    if repository is None:
        return page

    def written_out(match: re.Match[str]) -> str:
        picture, text, target = match.groups()
        kind = "raw" if picture else "blob"
        return f"{picture}[{text}]({repository}/{kind}/main/{target})"

    return re.sub(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)]+)\)", written_out, page)


if __name__ == "__main__":
    for path in PAGES:
        text = render(path.read_text(encoding="utf-8"))
        if path.name == "README.md":
            text = absolute(text, REPOSITORY)
        path.write_text(text, encoding="utf-8")
        print(f"written {path.relative_to(ROOT)}")
