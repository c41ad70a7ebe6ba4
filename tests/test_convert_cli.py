"""The verbs convert, extract and merge: what they print, exit code 2 with one line, nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from convert_cases import random_adapter
from flora.convert import load, save
from flora_cli import main
from foreign_models import build
from test_extract import save_model, tuned


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    chosen = random_adapter(build("gpt2"), lambda name, value: name.endswith(("c_attn.weight", "c_fc.weight")))
    save(chosen, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_convert_prints_error_and_sizes(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for to, name in (("lora", "lora"), ("kohya", "k.safetensors"), ("dense", "d.safetensors"), ("flora", "again")):
        target = adapter.parent / name
        assert main(["convert", str(adapter), "--to", to, "--out", str(target)]) == 0
        printed = capsys.readouterr().out
        assert f"{target}: {to}, 4 weights" in printed
        assert "exact (no SVD): largest error" in printed
        assert "source" in printed
        assert len(load(target).weights) == 4


def test_extract_then_merge_gives_the_tuned_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(build("gpt2"), tmp_path / "base")
    save_model(tuned("gpt2"), tmp_path / "tuned")
    base, fine, out = (str(tmp_path / name) for name in ("base", "tuned", "out"))
    assert main(["extract", base, fine, "--rank", "4", "--out", out]) == 0
    printed = capsys.readouterr().out
    assert "transformer.h.0.mlp.c_fc.weight" in printed
    assert "relative error" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"base", "tuned", "out"}
    assert main(["merge", out, "--base", base, "--out", str(tmp_path / "merged")]) == 0
    assert "merged and unmerged model agree on random inputs" in capsys.readouterr().out
    merged = type(build("gpt2")).from_pretrained(tmp_path / "merged")
    for name, value in tuned("gpt2").named_parameters():
        assert torch.allclose(merged.get_parameter(name), value, atol=1e-5), name
    weighted = ["merge", out, out, "--weights", "0.5", "-0.5", "--base", base, "--out", str(tmp_path / "zero")]
    assert main(weighted) == 0
    same = type(build("gpt2")).from_pretrained(tmp_path / "zero")
    assert all(torch.allclose(same.get_parameter(n), v, atol=1e-6) for n, v in build("gpt2").named_parameters())


def test_errors_are_one_line_and_exit_2(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = adapter.parent / "broken"
    broken.mkdir()
    for path in adapter.iterdir():
        (broken / path.name).write_bytes(path.read_bytes()[: -8 if path.suffix == ".safetensors" else None])
    taken, missing = str(adapter), str(adapter.parent / "none")
    before = sorted(adapter.parent.rglob("*"))
    cases = [
        (["convert", str(broken), "--to", "lora", "--out", missing], "truncated or corrupt"),
        (["convert", missing, "--to", "lora", "--out", missing], "adapter not found"),
        (["convert", taken, "--to", "lora", "--out", taken], "exists; choose another output"),
        (["convert", taken, "--to", "lora", "--out", "/proc/none/lora"], "/proc/none"),
        (["extract", taken, taken, "--rank", "2", "--out", missing], "nothing to extract"),
        (["extract", missing, taken, "--rank", "2", "--out", missing], "model not found"),
        (["merge", taken, "--out", missing], "names no base model; give it with --base"),
        (["merge", taken, taken, "--weights", "1", "--out", missing], "one for each"),
    ]
    for argv, message in cases:
        assert main(argv) == 2, argv
        printed = capsys.readouterr()
        assert message in printed.err
        assert printed.err.count("\n") == 1
        assert not printed.out
    assert sorted(adapter.parent.rglob("*")) == before
