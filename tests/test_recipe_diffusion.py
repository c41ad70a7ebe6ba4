"""The recipe diffusion: pictures, draws of noise, bad data, and the file for ComfyUI of a run of two steps."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import EvalPrediction

import flora_cli
from flora.data.samples import locate
from flora.recipes.diffusion import Task, compute_metrics, load_base, load_data, read_picture
from flora.runs.reloading import load_adapter
from flora.runs.settings import read
from flora.runs.training import train

MODEL = "sample:signals/stable-diffusion"


@pytest.fixture
def rings(tmp_path: Path) -> Path:
    return Path(shutil.copytree(locate("sample:signals/instance"), tmp_path / "rings"))


def task(data: Path | str, **changes: Any) -> Task:
    return Task(**{"model": MODEL, "data": str(data), "resolution": 16, "draws": 2, **changes})


@pytest.mark.parametrize(("width", "height"), [(1, 1), (7, 300), (16, 16), (53, 37)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1"])
def test_every_picture_becomes_a_square(tmp_path: Path, width: int, height: int, mode: str) -> None:
    path = tmp_path / "picture.png"
    Image.new("RGB", (width, height), (255, 255, 255)).convert(mode).save(path)
    picture = read_picture(lambda: path, 24)
    assert picture.shape == (3, 24, 24)
    torch.testing.assert_close(picture, torch.ones(3, 24, 24))


def test_a_draw_depends_on_its_number_and_the_seed_alone(rings: Path) -> None:
    first, other = load_data(task(rings), 0), load_data(task(rings), 1)
    assert len(first.train) == 10  # type: ignore[arg-type]
    assert len(first.test) == 5 * 64  # type: ignore[arg-type]
    again = first.train[7]
    torch.randn(3)
    assert all(torch.equal(value, first.train[7][key]) for key, value in again.items())
    assert again["sample"].shape == again["labels"].shape == (4, 8, 8)
    assert again["encoder_hidden_states"].shape == (16, 32)
    assert not torch.equal(again["labels"], other.train[7]["labels"])
    assert torch.equal(first.test[7]["labels"], other.test[7]["labels"])
    assert not torch.equal(first.test[7]["labels"], first.validation[7]["labels"])


def test_a_sample_is_the_picture_with_as_much_noise_as_its_timestep_says(rings: Path) -> None:
    data = load_data(task(rings), 0).train
    for index in range(5):
        item, share = data[index], data.scheduler.alphas_cumprod[data[index]["timestep"]]  # type: ignore[attr-defined]
        expected = share.sqrt() * data.latents[index] + (1 - share).sqrt() * item["labels"]  # type: ignore[attr-defined]
        torch.testing.assert_close(item["sample"], expected)


def test_parts_that_are_there_are_used(rings: Path) -> None:
    (rings / "train").mkdir()
    (rings / "test").mkdir()
    for path in sorted(rings.glob("*.png")):
        path.rename(rings / ("test" if path.stem == "0" else "train") / path.name)
    data = load_data(task(rings), 0)
    assert [len(data.split(name).latents) for name in ("train", "validation", "test")] == [4, 4, 1]  # type: ignore[attr-defined]


def test_a_corrupt_picture(rings: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (rings / "3.png").read_bytes()
    (rings / "3.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"1 of 5 pictures cannot be used: .*3\.png: "):
        load_data(task(rings), 0)
    assert len(load_data(task(rings, bad_data="skip"), 0).train) == 8  # type: ignore[arg-type]
    assert "left out: 1 of 5 pictures" in capsys.readouterr().out


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no pictures"):
        load_data(task(tmp_path), 0)


def test_a_pipeline_that_is_not_there(rings: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"task.model is .*UNet2DConditionModel cannot load it"):
        load_base(task(rings, model=str(tmp_path)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": " "}, "task.prompt is empty"),
        ({"resolution": 500}, "task.resolution is 500, expected a multiple of 8"),
        ({"draws": 0}, "task.draws is 0, expected 1 or more"),
    ],
)
def test_settings_are_checked(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Task(**wrong)


def test_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (20, 30), (9, 9, 9)).save(stream, "JPEG")
    rows = datasets.Dataset.from_dict({"image": [{"bytes": stream.getvalue(), "path": None}] * 3})
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **kwargs: {"train": rows.cast_column("image", datasets.Image())}
    )
    assert len(load_data(task("org/dog"), 0).train) == 6  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="org/dog has no column 'photo', only image"):
        load_data(task("org/dog", image_column="photo"), 0)


def test_explained() -> None:
    truth = np.array([[1.0, -1.0], [1.0, -1.0]])
    assert compute_metrics(EvalPrediction(truth, truth)) == {"explained": 1.0}
    assert compute_metrics(EvalPrediction(0 * truth, truth)) == {"explained": 0.0}
    assert compute_metrics(EvalPrediction(truth / 2, truth)) == {"explained": 0.75}


def comfy_delta(file: dict[str, torch.Tensor], stem: str) -> torch.Tensor:
    """What a reader of Kohya files makes of one layer: (alpha / rank) * up x mid x down, by the file alone."""
    up, down = file[f"{stem}.lora_up.weight"].double(), file[f"{stem}.lora_down.weight"].double()
    scale = float(file[f"{stem}.alpha"]) / down.shape[0]
    if f"{stem}.lora_mid.weight" in file:
        mid = file[f"{stem}.lora_mid.weight"].double()
        return scale * torch.einsum("op,pqhw,qi->oihw", up.flatten(1), mid, down.flatten(1))
    return scale * (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def test_the_exported_file_has_the_names_of_the_unet_and_the_same_change(tmp_path: Path) -> None:
    settings = read(
        "diffusion-tiny", [f"output={tmp_path / 'run'}", "training.max_steps=2", "training.disable_tqdm=true"]
    )
    train(settings)
    target = tmp_path / "ring.safetensors"
    command = ["convert", str(tmp_path / "run"), "--to", "kohya", "--prefix", "lora_unet", "--out", str(target)]
    assert flora_cli.main(command) == 0
    base = load_base(settings.task)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    after = load_adapter(base, tmp_path / "run").merge_and_unload().state_dict()
    file, stems = load_file(target), set()
    for name in before:
        stem = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        if not name.endswith(".weight") or f"{stem}.alpha" not in file:
            assert torch.equal(before[name], after[name])
            continue
        stems.add(stem)
        change = comfy_delta(file, stem).reshape(before[name].shape)
        assert change.abs().max() > 0
        torch.testing.assert_close(change, after[name].double() - before[name].double(), atol=1e-6, rtol=0)
    assert stems == {key.partition(".")[0] for key in file}
    assert len(stems) == 83
