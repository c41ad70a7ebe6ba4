"""Every script of examples/ runs, with a tiny model."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from flora.data.samples import locate
from flora.errors import UserError
from flora.runs.merging import merge
from flora.runs.settings import read
from flora.runs.training import train

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
ADAPTER = "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache and a working folder of its own; what other packages warn of is theirs."""
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_listed_and_tested() -> None:
    names = sorted(path.stem for path in EXAMPLES.glob("*.py"))
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    own = Path(__file__).read_text(encoding="utf-8")
    assert len(names) >= 7
    for name in names:
        assert f"`{name}.py`" in listed
        assert f'example("{name}")' in own
        assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 75


def test_the_spoken_digits_of_make_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small, read as 16 bits would be, parts without a recording in common, and the start of the training."""
    monkeypatch.chdir(EXAMPLES.parent)
    folder = EXAMPLES / "spoken_digits"
    assert sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) < 3e6
    settings = read(str(folder / "spoken_digits.yaml"))
    recipe = settings.load_recipe()
    data: Any = recipe.load_data(settings.task, 0)
    sounds = [{row.numpy().tobytes() for row in part.sounds} for part in (data.train, data.validation, data.test)]
    assert [len(part) for part in sounds] == [200, 300, 300]
    assert not (sounds[0] & sounds[1] | sounds[0] & sounds[2] | sounds[1] & sounds[2])
    assert data.train.sounds.abs().amax(1).numpy() == pytest.approx(0.5)
    logits = recipe.load_base(settings.task)(data.test.sounds[:5]).logits
    assert logits.shape == (5, 10)
    assert torch.isfinite(logits).all()


@pytest.mark.slow
def test_spoken_digits_are_merged_by_their_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base has no name and no config: the recipe makes it again, and only where that is allowed."""
    monkeypatch.chdir(EXAMPLES.parent)
    run, out = tmp_path / "run", tmp_path / "merged"
    quick = [f"output={run}", "training.max_steps=2", "training.disable_tqdm=true"]
    settings = read("examples/spoken_digits/spoken_digits.yaml", quick)
    train(settings)
    with pytest.raises(UserError, match="--run-recipe-file"):
        merge(run, out)
    merge(run, out, run_recipe_file=True)
    recipe = settings.load_recipe()
    sounds = recipe.load_data(settings.task, 0).test.sounds[:5]  # type: ignore[attr-defined]
    adapted = PeftModel.from_pretrained(recipe.load_base(settings.task), str(run)).eval()
    merged = recipe.load_base(settings.task).eval()
    merged.load_state_dict(load_file(out / "model.safetensors"))
    assert torch.allclose(merged(sounds).logits, adapted(sounds).logits, atol=1e-5)
    assert not torch.allclose(merged(sounds).logits, recipe.load_base(settings.task).eval()(sounds).logits, atol=1e-3)


@pytest.mark.slow
def test_a_cnn_in_a_loop_of_its_own(tmp_path: Path) -> None:
    found = example("cnn_own_loop").main(tmp_path / "cnn", epochs=5)
    assert found["adapted"] > found["base"] + 0.1
    assert found["loaded"] == found["adapted"]
    assert found["merged"] == pytest.approx(found["adapted"], abs=0.01)


@pytest.mark.slow
def test_a_language_model_with_trl(tmp_path: Path) -> None:
    folder = example("llm_with_trl").main(locate("sample:text/llama"), tmp_path / "llm", steps=2)
    assert (folder / ADAPTER).is_file()


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_preferences_from_a_file(packed: bool, tmp_path: Path) -> None:
    if packed:
        pytest.importorskip("bitsandbytes")

    row = {"question": "Name the opposite of hot .", "chosen": "cold", "rejected": "hot", "source": "me"}
    (tmp_path / "pairs.jsonl").write_text((json.dumps(row) + "\n") * 4)
    folder = example("llm_preferences").main(
        tmp_path / "pairs.jsonl",
        locate("sample:text/llama"),
        tmp_path / "preferred",
        columns={"question": "prompt"},
        load_in_4bit=packed,
        steps=2,
    )
    assert (folder / ADAPTER).is_file()


@pytest.mark.slow
def test_experts(tmp_path: Path) -> None:
    losses = example("moe_experts").main(locate("sample:text/moe"), tmp_path / "experts", steps=8)
    assert losses[-1] < losses[0]
    assert (tmp_path / "experts" / ADAPTER).is_file()


@pytest.mark.slow
def test_a_volume_network(tmp_path: Path) -> None:
    found = example("monai_unet").main(tmp_path / "monai", steps=60)
    assert found["adapted to dark balls"] > found["bright balls only"] + 0.1


@pytest.mark.slow
def test_diffusion(tmp_path: Path) -> None:
    file = example("diffusion_unet").main(
        Path(locate("sample:signals/instance")),
        locate("sample:signals/stable-diffusion"),
        output=tmp_path / "diffusion",
        size=32,
        steps=3,
    )
    assert file.is_file()


@pytest.mark.slow
def test_lightning(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    assert (example("lightning_module").main(tmp_path / "lightning", epochs=1) / ADAPTER).is_file()


@pytest.mark.slow
def test_optuna(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    assert set(example("optuna_search").main("digits-tiny", tmp_path / "search", trials=2)) == {"r", "learning_rate"}
