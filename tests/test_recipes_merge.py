"""What every ``-tiny`` recipe writes merges into an ordinary model that computes the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flora.recipes import config_names
from flora.runs.merging import merge
from flora.runs.reloading import load_adapter, load_base
from flora.runs.sample_inputs import random_inputs
from flora.runs.settings import read
from flora.runs.training import train

TINY = [name for name in config_names() if name.endswith("-tiny")]
IN_TIME = {"digits-tiny", "audio_classify-tiny"}  # the others belong to the slow suite


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The samples are made once for all recipes."""
    folder = tmp_path_factory.getbasetemp() / "samples-for-merging"
    monkeypatch.setenv("FLORA_CACHE", str(folder))


@pytest.mark.parametrize(
    "name", [name if name in IN_TIME else pytest.param(name, marks=pytest.mark.slow) for name in TINY]
)
def test_the_output_merges(name: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(read(name, [f"output={run}", "training.disable_tqdm=true", "training.max_steps=2", "training.save_steps=2"]))

    done = merge(run, tmp_path / "merged")
    assert done.layers.changed > 0
    assert done.difference is not None, done.reason

    base = load_base(run)
    merged = type(base).from_pretrained(tmp_path / "merged").eval()
    inputs = random_inputs(base)
    with torch.no_grad():
        outputs = [model(**inputs)[0] for model in (merged, load_adapter(base, run))]
    assert torch.allclose(outputs[0].float(), outputs[1].float(), atol=1e-3, rtol=1e-3)


def test_every_recipe_is_tried() -> None:
    assert len(TINY) >= 10
    assert set(TINY) > IN_TIME
