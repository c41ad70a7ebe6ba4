"""docs/serve.md: its `flora` commands run one after the other, its readers are those that the tests check."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from convert_cases import random_adapter
from flora.convert import load, save
from flora_cli import main
from foreign_models import build
from test_extract import save_model, tuned

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "serve.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\$ (.*)$", PAGE, re.MULTILINE)
OTHERS = {"vllm", "python", "llama-cli", "optimum-cli"}  # programs of others, not installed here
LAYERS = ("c_attn.weight", "c_fc.weight", "wte.weight")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the files that the page names."""
    monkeypatch.chdir(tmp_path)
    save_model(build("gpt2"), Path("base-model"))
    save_model(tuned("gpt2"), Path("fine-tuned"))
    for name, form in {
        "my-adapter": "flora", "peft-lora": "lora", "subject-lora": "lora", "lycoris.safetensors": "kohya"
    }.items():  # fmt: skip
        save(random_adapter(build("gpt2"), lambda key, value: key.endswith(LAYERS), 0.02), name, format=form)
    parts = {"A": torch.randn(2, 12), "E": torch.randn(2, 2), "B": torch.randn(36, 2)}
    torch.save({f"layer.q.lora_{key}": value for key, value in parts.items()}, "authors.pth")
    return tmp_path


@pytest.mark.filterwarnings("ignore:the adapter has more parameters than the weight itself")
def test_the_commands_of_the_page_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = [shlex.split(command)[1:] for command in COMMANDS if command.startswith("flora ")]
    done = set()
    for argv in ours:
        target = argv[argv.index("--out") + 1]
        again = ["--overwrite"] if (place / target).exists() else []  # one name may be written by several commands
        assert main([*argv, *again]) == 0, (argv, capsys.readouterr().err)
        printed = capsys.readouterr().out
        assert target in printed
        done.add((argv[0], target))
        if argv[0] != "merge":
            assert load(target).weights
    assert len(ours) == 11
    assert {verb for verb, _ in done} == {"convert", "merge", "extract"}
    left = {shlex.split(command)[0] for command in COMMANDS} - {"flora"}
    assert left == OTHERS


def test_every_row_of_the_first_table_has_its_section() -> None:
    table = PAGE.partition("| reader |")[2].partition("\n\n")[0]
    readers = [row.split("|")[1].strip() for row in table.splitlines()[2:]]
    assert len(readers) == 8
    sections = " ".join(re.findall(r"^## (.*)$", PAGE, re.MULTILINE))
    for reader in ", ".join(readers).replace("PEFT with `import flora`", "PEFT").split(", "):
        words = reader.removeprefix("kohya ").removesuffix(" without flora").split(" and ")
        assert all(word in sections or "anything else" in word or word == "TensorRT" for word in words), reader
