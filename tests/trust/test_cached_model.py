"""A base model that is trained once: whole or not at all, the same bits, and the threads as they were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_recipe import Drawn, TinyConfig, TinyModel

from flora.storage.cached_model import train_base

OPTIONS = {"max_steps": 3, "learning_rate": 0.1, "disable_tqdm": True, "use_cpu": True}


class Broken(Drawn):
    """Rows that cannot be read."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        raise OSError("the disk is gone")


def train(folder: Path, rows: type[Drawn] = Drawn) -> None:
    train_base(folder, lambda: TinyModel(TinyConfig()), lambda: rows(5, 1), "numbers", **OPTIONS)


def test_it_is_trained_once_and_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    train(tmp_path / "first")
    assert f"training the base model on numbers, once; it is kept in {tmp_path / 'first'}" in capsys.readouterr().out

    torch.manual_seed(17)
    train(tmp_path / "second")
    first, second = (TinyModel.from_pretrained(tmp_path / name).state_dict() for name in ("first", "second"))
    torch.manual_seed(0)
    start = TinyModel(TinyConfig()).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], start[name]) for name in first)

    # What is there is taken, and the rows are not even read.
    capsys.readouterr()
    train(tmp_path / "first", Broken)
    assert capsys.readouterr().out == ""
    assert torch.get_num_threads() == threads


def test_nothing_is_left_of_one_that_failed(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    with pytest.raises(OSError, match="the disk is gone"):
        train(tmp_path / "base", Broken)
    assert not list(tmp_path.iterdir())
    assert torch.get_num_threads() == threads
