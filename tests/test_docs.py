"""The pages: every Python block runs, what is generated is up to date, links lead somewhere."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import nn

import flora
import flora_arguments
import flora_cli
import test_trl
from flora.recipes import config_names
from flora.runs.settings import read, split_flags

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
PYTHON_BLOCKS = {  # by page; a page that is not named has none
    "README.md": 1, "choosing.md": 6, "index.md": 7, "llms.md": 2, "own_network.md": 5, "volumes.md": 2,
}  # fmt: skip
LANGUAGES = {"python", "console", "bibtex"}  # of the console blocks, the commands of flora are parsed


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


def photos(folder: Path) -> None:
    """Images of different sizes in folders, as people have them."""
    for index in range(15):
        path = folder / "photos" / ("apples", "limes", "plums")[index % 3] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30 + index, 21), (17 * index, 80, 90)).save(path)


def language_model(folder: Path) -> None:
    """A tiny model in the place where the page names a large one."""
    for part in (test_trl.base(), test_trl.tokenizer()):
        part.save_pretrained(folder / "Qwen" / "Qwen3-0.6B")


READERS_HAVE = {"own_network.md": photos, "llms.md": language_model}


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning", "ignore:.*will be removed in v6.*:FutureWarning")
@pytest.mark.parametrize("page", [page for page in PAGES if page.name in PYTHON_BLOCKS], ids=lambda page: page.name)
def test_the_blocks_of_a_page_run_one_after_the_other(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    READERS_HAVE.get(page.name, lambda folder: None)(tmp_path)
    namespace: dict[str, object] = {"__name__": page.stem}
    ran = 0
    for line, source in blocks(page, "python"):
        exec(compile("\n" * (line - 1) + source, str(page), "exec"), namespace)  # errors name the line of the page
        ran += 1
    assert ran == PYTHON_BLOCKS[page.name]


def test_every_block_is_counted_and_marked() -> None:
    assert len(PAGES) >= 16
    assert {page.name: n for page in PAGES if (n := len(blocks(page, "python")))} == PYTHON_BLOCKS
    for page in PAGES:
        fences = BLOCK.findall(page.read_text(encoding="utf-8"))
        assert {language for language, _ in fences} <= LANGUAGES, page.name


@pytest.mark.parametrize("name", ["README.md", "docs/index.md", "docs/recipes.md"])
def test_what_is_generated_is_up_to_date(name: str) -> None:
    page = (ROOT / name).read_text(encoding="utf-8")
    written = generator()
    assert ROOT / name in written.PAGES
    if name == "README.md":
        page = written.absolute(page, written.REPOSITORY)
    assert written.render(page) == page, "run `make docs`"


def test_the_table_of_layers_has_every_layer() -> None:
    table = generator().layer_table()
    # The column of the layers; another one names a layer that LyCORIS knows.
    listed = re.findall(r"`\w+\.(\w+)`", " ".join(line.split("|")[2] for line in table.splitlines()))
    assert sorted(listed) == sorted(cls.__name__ for cls in flora.LAYERS)


LAYERS: dict[type, Callable[[type], nn.Module]] = {
    nn.Embedding: lambda cls: cls(7, 8),
    nn.EmbeddingBag: lambda cls: cls(7, 8),
    nn.Bilinear: lambda cls: cls(8, 8, 6),
    nn.MultiheadAttention: lambda cls: cls(8, 2),
    nn.GroupNorm: lambda cls: cls(2, 8),
}


def test_what_peft_can_adapt_is_what_the_table_says() -> None:
    """LoRA of the installed PEFT is put on one layer of each class."""
    said = generator().PEFT_LORA
    wrong = []
    for cls, row in flora.LAYERS.items():
        if "Conv" in cls.__name__ and cls.__module__.startswith("torch"):
            layer = cls(8, 8, 3)
        elif row.kind == "norm" and cls is not nn.GroupNorm:
            layer = cls(8)
        else:
            layer = LAYERS.get(cls, lambda cls: cls(8, 8))(cls)
        try:
            transposed = cls.__name__ == "Conv1D"
            get_peft_model(nn.Sequential(layer), LoraConfig(r=2, target_modules=["0"], fan_in_fan_out=transposed))
            can = True
        except ValueError:
            can = False
        told = said.get(row.kind, "no")
        excepted = (told == "not transposed" and "Transpose" in cls.__name__) or (
            told == "not bags" and "Bag" in cls.__name__
        )
        if can != (told != "no" and not excepted):
            wrong.append((cls.__name__, told, can))
    assert not wrong


def test_links_of_the_readme_are_absolute_where_there_is_an_address() -> None:
    page = "[guide](docs/index.md) ![picture](docs/a.png) [x](https://x.org) [here](#here)"
    assert generator().absolute(page, None) == page
    assert generator().absolute(page, "https://git.example/me/it") == (
        "[guide](https://git.example/me/it/blob/main/docs/index.md) "
        "![picture](https://git.example/me/it/raw/main/docs/a.png) [x](https://x.org) [here](#here)"
    )


def commands() -> list[tuple[str, list[str]]]:
    """Every `$ flora ...` of the pages, as arguments."""
    return [
        (page.name, shlex.split(line.partition("flora ")[2], comments=True))
        for page in PAGES
        for _, source in blocks(page, "console")
        for line in source.splitlines()
        if line.startswith("$ flora ")
    ]


@pytest.mark.parametrize(("page", "words"), commands())
def test_every_command_is_one_that_the_parser_takes(page: str, words: list[str]) -> None:
    args = flora_arguments.parse(words, flora_cli.COMMANDS)
    config = getattr(args, "config", None)
    if config in config_names():
        read(config, split_flags(args.overrides)[1])
    elif config is not None:
        assert config.endswith(".yaml")


def test_the_website_has_every_page_and_every_public_name() -> None:
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = set(re.findall(r"^  - .*: (\w+\.md)$", site, re.MULTILINE))
    assert pages == {page.name for page in (ROOT / "docs").glob("*.md")}
    described = re.findall(
        r"^::: flora\.(?:[\w.]+\.)?(\w+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert sorted(described) == sorted(flora.__all__)


def test_tables_that_can_be_unfolded_are_tables_on_the_website_too() -> None:
    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md")]
    assert any("<details markdown>" in page for page in pages)
    assert "md_in_html" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_website_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "api" / "index.html").is_file()


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


# Messages of other programs -> the module of theirs that has the text; None where it comes from Python or a binary.
THEIRS = {
    "KeyError: 'TUCKER'": None,
    "module 'flora' has no attribute 'FloraConfig'": None,
    "The version of PEFT you are using is not compatible, please use a version >=": "transformers.utils.peft_utils",
    "Target modules ... not found in the base model.": "peft.tuners.tuners_utils",
    "CUDA out of memory": None,
}


def texts(path: Path) -> str:
    """Every text in the code of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return "\n".join(
        node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def test_each_message_that_people_search_for_is_one_that_is_printed() -> None:
    page = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8").partition("## Questions")[0]
    messages = re.findall(r"^### `(.*)`$", page, re.MULTILINE)
    assert len(messages) >= 20
    assert page.count("\n### ") == len(messages)
    assert set(THEIRS) <= set(messages)

    source = ROOT / "src"
    ours = [texts(path) for path in [*source.glob("*.py"), *(source / "flora").rglob("*.py")]]
    for message in messages:
        if message not in THEIRS:
            found = ours
        elif THEIRS[message] is None:
            continue
        else:
            found = [texts(Path(str(importlib.util.find_spec(str(THEIRS[message])).origin)))]  # type: ignore[union-attr]

        parts = message.split("...")
        assert any(all(part in text for part in parts) for text in found), message
