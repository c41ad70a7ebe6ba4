"""Writes what is generated into the pages: the table of layers, between the marks ``<!-- layers -->``.

Run by ``make docs``; the tests fail where a page is not what this writes.
"""

from __future__ import annotations

import re
from pathlib import Path

from flora import LAYERS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "docs" / "index.md"]
SHORTHANDS = {"linear": "`all`, `all-linear`", "conv": "`all`, `all-conv`", "norm": "by name"}
MARKED = re.compile(r"(<!-- layers -->\n).*?(<!-- /layers -->)", re.DOTALL)


def layer_table() -> str:
    """One row per kind and way: the layers of ``flora.LAYERS``, how they are computed, how they are targeted."""
    groups: dict[tuple[str, str], list[str]] = {}
    for cls, row in LAYERS.items():
        ways = "rebuild" if row.factored is None else "rebuild, factored"
        groups.setdefault((row.kind, ways), []).append(f"`{name_of(cls)}`")
    lines = ["| kind | layers | ways | `target_modules` |", "|---|---|---|---|"]
    lines += [
        f"| {kind} | {', '.join(names)} | {ways} | {SHORTHANDS.get(kind, '`all`')} |"
        for (kind, ways), names in groups.items()
    ]
    return "\n".join(lines)


def name_of(cls: type) -> str:
    """``nn.Conv2d``, or ``transformers.Conv1D`` for what is not torch's own."""
    package = cls.__module__.partition(".")[0]
    return f"nn.{cls.__name__}" if package == "torch" else f"{package}.{cls.__name__}"


def render(page: str) -> str:
    """The page with its generated parts as they are now."""
    return MARKED.sub(lambda match: f"{match[1]}{layer_table()}\n{match[2]}", page)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(render(path.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"written {path.relative_to(ROOT)}")
