"""What every ``-tiny`` recipe writes merges into an ordinary model that computes the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from flora.errors import UserError
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


def test_a_base_without_a_name_is_made_by_its_recipe(tmp_path: Path) -> None:
    """A Python file that the run names makes it again, where that is allowed."""
    run, out, config = tmp_path / "run", tmp_path / "merged", tmp_path / "config.yaml"
    config.write_text(f"recipe: {Path(__file__).parent / 'trust' / 'tiny_recipe.py'}\n")
    quick = ["training.disable_tqdm=true", "training.learning_rate=0.1", "adapter.target_modules=all"]
    settings = read(str(config), [f"output={run}", *quick])
    train(settings)

    with pytest.raises(UserError, match="--run-recipe-file"):
        merge(run, out)
    assert not out.exists()

    merge(run, out, run_recipe_file=True)
    recipe = settings.load_recipe()
    images = recipe.load_data(settings.task, 1).test[2]["pixel_values"][None]
    base, merged, adapted = (recipe.load_base(settings.task).eval() for _ in range(3))
    merged.load_state_dict(load_file(out / "model.safetensors"))
    adapted = PeftModel.from_pretrained(adapted, str(run)).eval()

    found, expected, bare = (model(images).logits for model in (merged, adapted, base))
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, bare, atol=1e-3)


def test_every_recipe_is_tried() -> None:
    assert len(TINY) >= 10
    assert set(TINY) > IN_TIME
