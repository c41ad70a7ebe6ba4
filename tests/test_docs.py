"""The pages: every Python block runs, what is generated is up to date, links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

import flora

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
PYTHON_BLOCKS = {"README.md": 2, "index.md": 9}  # by page; a page that is not named has none
LANGUAGES = {"python", "console"}  # console blocks are shown, not run


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """The fenced blocks of a page in that language, each with the line it begins on."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, m.start(2)) + 1, m[2]) for m in BLOCK.finditer(text) if m[1] == language]


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", [page for page in PAGES if page.name in PYTHON_BLOCKS], ids=lambda page: page.name)
def test_the_blocks_of_a_page_run_one_after_the_other(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": page.stem}
    ran = 0
    for line, source in blocks(page, "python"):
        exec(compile("\n" * (line - 1) + source, str(page), "exec"), namespace)  # errors name the line of the page
        ran += 1
    assert ran == PYTHON_BLOCKS[page.name]


def test_every_block_is_counted_and_marked() -> None:
    assert len(PAGES) == 9
    assert {page.name: n for page in PAGES if (n := len(blocks(page, "python")))} == PYTHON_BLOCKS
    for page in PAGES:
        fences = BLOCK.findall(page.read_text(encoding="utf-8"))
        assert {language for language, _ in fences} <= LANGUAGES, page.name


@pytest.mark.parametrize("name", ["README.md", "docs/index.md"])
def test_what_is_generated_is_up_to_date(name: str) -> None:
    page = (ROOT / name).read_text(encoding="utf-8")
    assert generator().render(page) == page, "run `make docs`"
    table = page.partition("<!-- layers -->")[2].partition("<!-- /layers -->")[0]
    listed = re.findall(r"`\w+\.(\w+)`", table)
    assert sorted(listed) == sorted(cls.__name__ for cls in flora.LAYERS)


def test_the_guide_names_every_field() -> None:
    from dataclasses import fields

    from peft import PeftConfig

    own = {field.name for field in fields(flora.FloraConfig)} - {field.name for field in fields(PeftConfig)}
    section = (
        (ROOT / "docs" / "index.md").read_text(encoding="utf-8").partition("## The fields")[2].partition("\n## ")[0]
    )
    named = set(
        re.findall(r"`(\w+)[ `]", "\n".join(line.split("|")[1] for line in section.splitlines() if "|" in line))
    )
    assert own <= named
    assert len(own) > 15


def test_links_between_files_lead_somewhere() -> None:
    checked = 0
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
            checked += 1
    assert checked >= 4


def test_the_two_commands_of_the_readme_are_targets() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = re.findall(r"\$ make ([\w-]+)", "".join(source for page in PAGES for _, source in blocks(page, "console")))
    assert {"run", "test"} <= set(named)
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
