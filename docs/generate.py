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
sys.path.insert(0, str(ROOT))  # for the package of the benchmarks
PAGES = [ROOT / "README.md", ROOT / "docs" / "index.md", ROOT / "docs" / "recipes.md"]
REPOSITORY: str | None = None  # the public address of the repository, once it has one: then README's links are absolute

SHORTHANDS = {"linear": "`all`, `all-linear`", "conv": "`all`, `all-conv`", "norm": "`all-norm`"}
EXPORT = {
    "linear": "LoRA, Kohya, dense",
    "conv": "LoRA and Kohya (not transposed; LoRA with one group only), dense",
    "embedding": "LoRA (not bags), dense",
}
# What the others can attach to; tests/test_docs.py tries every layer with PEFT.
PEFT_LORA = {"linear": "yes", "conv": "not transposed", "embedding": "not bags", "attention": "yes"}
LYCORIS = {"linear": "`nn.Linear`", "conv": "not transposed", "norm": "`train_norm`"}


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
    """The table of the quality page for one learning rate and all defaults."""
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


def gpu_table() -> str:
    """FLoRA's step relative to LoRA's and to full fine-tuning's, every row and mode; bold where FLoRA loses."""
    from benchmarks.gpu_tables import title

    report = read("gpu")
    rows = [row for row in [*report["models"], *report["rows"]] if "methods" in row]

    heads = [f"{OTHERS[other]}: {meaning}" for other in OTHERS for meaning in [*MODES.values(), "peak memory"]]
    lines = [f"| FLoRA's step relative to | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    for row in rows:
        cells = [_relative(figure) for other in OTHERS for figure in _against(row, other)]
        lines.append(f"| {title(row)}, {row['size']} | {' | '.join(cells)} |")

    versions = report["versions"]
    lines += [
        "",
        "Below 1 FLoRA is faster, or takes less; **bold**: it loses. Memory is that of an eager step, - was not "
        f"measured. {report['machine']['device']}, {report['dtype']}, torch {versions['torch']}, PEFT "
        f"{versions['peft']}, rank {rows[0]['rank']} for both adapters, commit "
        f"{'about ' if report.get('commit_is_approximate') else ''}{report['commit'][:7]}. A step is a forward and a "
        "backward without an optimiser.",
    ]
    return "\n".join(lines)


def _against(row: dict[str, Any], other: str) -> list[float | None]:
    """FLoRA's time over that of another method in each mode, then its peak memory over the other's."""
    from benchmarks.ratios import ratio

    times = [ratio(row, "flora", other, mode=mode) for mode in MODES]
    ours, theirs = (row["methods"].get(name, {}).get("peak", {}).get("eager") for name in ("flora", other))

    if not ours or not theirs:
        return [*times, None]

    return [*times, ours / theirs]


def _relative(figure: float | None) -> str:
    """A ratio with two digits, bold where FLoRA's is the larger by what these show."""
    if figure is None:
        return "-"
    text = f"{figure:.2f}"
    if float(text) > 1:
        return f"**{text}**"
    return text


def read(name: str) -> dict[str, Any]:
    """A result of the benchmarks."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


MODES = {"eager": "eager", "compiled": "`torch.compile`", "captured": "CUDA graph"}
OTHERS = {"lora": "LoRA", "full": "full"}  # whom FLoRA is held against on a GPU
NAMES = {
    "frozen": "head only",
    "flora": "**FLoRA**",
    "lora": "LoRA",
    "full": "full fine-tuning",
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
