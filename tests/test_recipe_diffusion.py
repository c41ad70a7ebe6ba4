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
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, EvalPrediction

import flora_cli
from flora.data.diffusion_pipeline import add_noise
from flora.data.samples import locate
from flora.recipes.diffusion import Task, compute_metrics, load_base, load_data, read_picture
from flora.runs.evaluating import evaluate
from flora.runs.merging import merge
from flora.runs.predicting import predict
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
    with pytest.raises(ValueError, match="the data set has no column 'photo', only image"):
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


# ---- captions, Stable Diffusion XL and 3 -----------------------------------------------------------------------------


def test_captions_beside_the_pictures(rings: Path) -> None:
    (rings / "1.txt").write_text("a ring\n on grass")
    data = load_data(task(rings), 0).train
    told = [data[index]["encoder_hidden_states"] for index in range(5)]
    assert all(torch.equal(told[0], told[index]) for index in (2, 3, 4))
    assert not torch.equal(told[0], told[1])
    (rings / "1.txt").write_text(" ")
    with pytest.raises(ValueError, match=r"1\.txt is empty; write a caption"):
        load_data(task(rings), 0)


def test_captions_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (20, 30), (9, 9, 9)).save(stream, "JPEG")
    pictures = [{"bytes": stream.getvalue(), "path": None}] * 3
    rows = datasets.Dataset.from_dict({"image": pictures, "text": ["a ring", None, "a dog"]})
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **kwargs: {"train": rows.cast_column("image", datasets.Image())}
    )
    data = load_data(task("org/rings", caption_column="text", prompt="a dog"), 0).train
    told = [data[index]["encoder_hidden_states"] for index in range(3)]
    assert torch.equal(told[1], told[2])
    assert not torch.equal(told[0], told[1])
    with pytest.raises(ValueError, match="the data set has no column 'caption', only image, text"):
        load_data(task("org/rings", caption_column="caption"), 0)


def text_encoder(kind: type, width: int) -> Any:
    config = CLIPTextConfig(
        vocab_size=514, hidden_size=width, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, projection_dim=width, bos_token_id=512, eos_token_id=513, pad_token_id=513,
    )  # fmt: skip
    return kind(config)


def autoencoder(channels: int) -> Any:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8), norm_num_groups=2, latent_channels=channels, sample_size=16,
        shift_factor=0.1 if channels > 4 else None,
    )  # fmt: skip


def write_xl(folder: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(locate(MODEL), subfolder="tokenizer")
    unet = UNet2DConditionModel(
        sample_size=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(8, 12), layers_per_block=1,
        attention_head_dim=(2, 3), transformer_layers_per_block=(1, 1), use_linear_projection=True, norm_num_groups=4,
        cross_attention_dim=8 + 12, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 12,
    )  # fmt: skip
    StableDiffusionXLPipeline(
        vae=autoencoder(4), unet=unet, tokenizer=tokenizer, tokenizer_2=tokenizer, scheduler=EulerDiscreteScheduler(),
        text_encoder=text_encoder(CLIPTextModel, 8), text_encoder_2=text_encoder(CLIPTextModelWithProjection, 12),
    ).save_pretrained(folder)  # fmt: skip


def write_3(folder: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(locate(MODEL), subfolder="tokenizer")
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=6, out_channels=6, num_layers=2, attention_head_dim=4,
        num_attention_heads=3, joint_attention_dim=32, caption_projection_dim=12, pooled_projection_dim=8 + 12,
        pos_embed_max_size=8,
    )  # fmt: skip
    StableDiffusion3Pipeline(
        vae=autoencoder(6), transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        tokenizer=tokenizer, tokenizer_2=tokenizer, tokenizer_3=None, text_encoder_3=None,
        text_encoder=text_encoder(CLIPTextModelWithProjection, 8),
        text_encoder_2=text_encoder(CLIPTextModelWithProjection, 12),
    ).save_pretrained(folder)  # fmt: skip


# numpy's word on a tensor that diffusers' own sampler hands to it.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(("config", "write"), [("diffusion-xl", write_xl), ("diffusion-3", write_3)])
def test_newer_pipelines_train_measure_paint_and_merge(config: str, write: Any, rings: Path, tmp_path: Path) -> None:
    torch.manual_seed(4)
    write(tmp_path / "model")
    (rings / "2.txt").write_text("a small ring")
    changes = {
        "output": tmp_path / "run", "task.model": tmp_path / "model", "task.data": rings, "task.resolution": 16,
        "adapter.r": 2, "training.max_steps": 2, "training.disable_tqdm": "true", "training.bf16": "false",
        "task.draws": 4, "training.learning_rate": 0.01, "training.per_device_eval_batch_size": 64,
        "training.eval_steps": 0.5, "training.save_steps": 0.5,
    }  # fmt: skip
    settings = read(config, [f"{key}={value}" for key, value in changes.items()])
    metrics = train(settings)
    found, same, _ = evaluate(tmp_path / "run")
    assert same is True
    assert found == pytest.approx(metrics["test"], rel=1e-6)

    (result,) = predict(tmp_path / "run", ["a photo of sks ring"])
    with Image.open(result["file"]) as picture:
        assert picture.size == (16, 16)

    base = load_base(settings.task)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    after = load_adapter(base, tmp_path / "run").merge_and_unload().state_dict()
    assert merge(tmp_path / "run", tmp_path / "merged").difference is not None
    stored = type(base).from_pretrained(tmp_path / "merged").state_dict()
    assert any(not torch.equal(before[key], after[key]) for key in before)
    for key, value in after.items():
        torch.testing.assert_close(stored[key], value, atol=1e-6, rtol=1e-5)


def test_the_noise_of_flow_matching() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    clean, random = torch.randn(1, 3, 5, 7), np.random.default_rng(5)
    for _ in range(4):
        noisy = add_noise(clean, scheduler, random)
        share = noisy.time / 1000
        torch.testing.assert_close(noisy.picture, clean + share * noisy.target)
        assert 0 < float(share) < 1


def test_another_pipeline_is_named(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ValueError, match="is a FluxPipeline, expected one of StableDiffusionPipeline"):
        load_base(task(tmp_path, model=str(tmp_path)))
