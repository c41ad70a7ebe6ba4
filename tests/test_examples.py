"""Every script of examples/ runs, with a tiny model."""

from __future__ import annotations

import gzip
import importlib.util
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from flora.data.samples import locate
from flora.data.volume_files import batch_of
from flora.recipes.volume_segment import dice_of
from flora.runs.settings import read

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


def test_the_hippocampus_of_make_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small, parts without a volume in common, and a base that has to be adapted but is no random network."""
    monkeypatch.chdir(EXAMPLES.parent)
    folder = EXAMPLES / "hippocampus"
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 1.2e6

    settings = read(str(folder / "hippocampus.yaml"))
    recipe = settings.load_recipe()
    data: Any = recipe.load_data(settings.task, 0)
    parts = (data.train, data.validation, data.test)
    assert [len(part) for part in parts] == [8, 12, 36]
    images = [{gzip.decompress(pair.image.read_bytes()) for pair in part.pairs} for part in parts]
    assert not (images[0] & images[1] | images[0] & images[2] | images[1] & images[2])

    model = recipe.load_base(settings.task).eval()
    batch = batch_of([data.validation[index] for index in range(len(data.validation))])
    with torch.no_grad():
        logits = model(pixel_values=batch["pixel_values"]).logits
        turned_back = model(pixel_values=1 - batch["pixel_values"].sqrt()).logits
    assert logits.shape == (12, 3, 24, 48, 24)
    scores = [float(dice_of(found, batch["labels"]).nanmean()) for found in (logits, turned_back)]
    assert scores[0] < 0.5 < scores[1]


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
