"""``adapter.start: gradient`` in a config: what is printed and written, and a run that goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from flora.runs.evaluating import evaluate
from flora.runs.settings import FILE, read
from flora.runs.training import train
from flora.storage.atomic import read_json

QUICK = ("task.base_epochs=12", "training.num_train_epochs=2", "adapter.start=gradient-ranks", "adapter.budget=900")


def test_a_run_that_begins_along_the_gradient(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = read("digits-tiny", [f"output={tmp_path / 'run'}", *QUICK])
    metrics = train(settings)
    assert "start from the gradient: step" in capsys.readouterr().out
    assert metrics["start"]["step"] > 0
    assert read(str(settings.output / FILE)).start == "gradient-ranks"
    adapter = read_json(settings.output / "adapter_config.json")
    assert "start" not in adapter
    assert len({tuple(ranks) for ranks in adapter["rank_pattern"].values()}) > 1
    assert evaluate(settings.output)[1] is True


def test_a_checkpoint_keeps_the_ranks_that_the_gradient_gave(tmp_path: Path) -> None:
    settings = read("digits-tiny", [f"output={tmp_path / 'run'}", "training.save_steps=2", *QUICK])
    whole = train(settings)
    (settings.output / "metrics.json").unlink()
    again = train(settings, resume=True)
    assert again["resumed_at"] is not None
    assert again["trainable_parameters"] == whole["trainable_parameters"]


def test_a_single_batch_begins_as_configured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ("training.per_device_train_batch_size=5000", "training.max_steps=1")
    metrics = train(read("digits-tiny", [f"output={tmp_path / 'run'}", *QUICK, *few]))
    assert "needs two batches or more" in (told := capsys.readouterr().out)
    assert "got 1; give more data or smaller batches; the adapter begins as configured" in told
    assert metrics["start"] is None


def test_a_start_that_does_not_exist() -> None:
    with pytest.raises(
        ValueError, match=r"adapter.start is 'gradients', expected one of init, gradient, gradient-ranks"
    ):
        read("digits-tiny", ["adapter.start=gradients"])


def test_ranks_without_a_budget() -> None:
    with pytest.raises(ValueError, match=r"adapter.start=gradient-ranks: .*there is none; add adapter.budget=0.01"):
        read("digits-tiny", ["adapter.start=gradient-ranks", "adapter.budget=null"])
