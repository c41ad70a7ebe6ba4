"""Writes what is generated into the pages: the tables between the marks ``<!-- layers -->`` and ``<!-- digits -->``.

Run by ``make docs``; the tests fail where a page is not what this writes.
"""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

from flora import LAYERS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "docs" / "index.md"]
SHORTHANDS = {"linear": "`all`, `all-linear`", "conv": "`all`, `all-conv`", "norm": "by name"}
DIGITS = ROOT / "benchmarks" / "results" / "digits.json"  # compare.json of `make run`


EXPORT = {
    "linear": "LoRA, Kohya, dense",
    "conv": "LoRA and Kohya (not transposed; LoRA with one group only), dense",
    "embedding": "LoRA (not bags), dense",
}


def layer_table() -> str:
    """One row per kind and way: the layers of ``flora.LAYERS``, how they are computed, targeted and exported."""
    groups: dict[tuple[str, str], list[str]] = {}
    for cls, row in LAYERS.items():
        ways = "rebuild" if row.factored is None else "rebuild, factored"
        groups.setdefault((row.kind, ways), []).append(f"`{name_of(cls)}`")
    lines = [
        "| kind | layers | exact ways | merge | export besides merged weights | `target_modules` |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {kind} | {', '.join(names)} | {ways} | yes | {EXPORT.get(kind, 'dense')} | "
        f"{SHORTHANDS.get(kind, '`all`')} |"
        for (kind, ways), names in groups.items()
    ]
    experts = "stacks of fused experts: LoRA; all: dense"
    lines.append(
        f"| any parameter | of any number of dimensions | rebuild, factored for stacks of experts | yes | {experts} | "
        "`target_parameters` |"
    )
    return "\n".join(lines)


def digits_table() -> str:
    """The comparison that ``make run`` makes, from its result."""
    report = json.loads(DIGITS.read_text(encoding="utf-8"))
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
        f"PEFT {versions['peft']}, commit {report['commit'][:7]}: [digits.json](benchmarks/results/digits.json).",
    ]
    return "\n".join(lines)


NAMES = {"frozen": "head only", "flora": "**FLoRA**", "lora": "LoRA (where it can)", "full": "full fine-tuning"}
TABLES = {"layers": layer_table, "digits": digits_table}


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
        page = pattern.sub(partial(_between, table()), page)
    return page


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(render(path.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"written {path.relative_to(ROOT)}")
