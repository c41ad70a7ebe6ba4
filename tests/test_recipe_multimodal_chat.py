"""The recipe multimodal_chat: entries and images one by one, what is learnt of a conversation, the projector's rate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from flora import FloraConfig
from flora.recipes import multimodal_chat
from flora.recipes.multimodal_chat import Task, load_data, messages_of
from flora.runs.evaluating import evaluate
from flora.runs.settings import read
from flora.runs.training import make_trainer, train, training_arguments

TALK = [{"from": "human", "value": "<image>\nWhat colour is it ?"}, {"from": "gpt", "value": "It is red ."}]
MORE = [{"from": "human", "value": "Say it twice ."}, {"from": "gpt", "value": "red red"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with three good images, and a file that only looks like one."""
    modes = {"a.png": "RGB", "b.png": "RGBA", "c.png": "L"}
    for at, (name, mode) in enumerate(modes.items()):
        Image.new(mode, (17 + 6 * at, 29 - 4 * at), 120 if mode == "L" else None).save(tmp_path / name)
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "broken.png").write_bytes(whole[: len(whole) // 2])
    return tmp_path


def entry(image: Any = "a.png", talk: Any = None) -> dict[str, Any]:
    return {"id": "0", "image": image, "conversations": TALK if talk is None else talk}


def write(folder: Path, entries: list[Any]) -> Path:
    path = folder / "train.jsonl"
    path.write_text("".join((item if isinstance(item, str) else json.dumps(item)) + "\n" for item in entries))
    return path


def task(data: Path, **settings: Any) -> Task:
    return Task(model="sample:text/llava", data=str(data), **settings)


BAD = [
    ('{"conversations": [', "not valid JSON"),
    ({"id": "7", "image": "a.png"}, "lacks 'conversations'"),
    (entry("nowhere.png"), "No such file or directory"),
    (entry("broken.png"), ""),
    (entry(5), "'image' must be the name of a file, got int"),
    (entry(["a.png", "b.png"]), "has 2 images but <image> 1 times"),
    (entry(None), "has 0 images but <image> 1 times"),
    (entry(talk=TALK + MORE[:1]), "must be a list in which human and gpt take turns"),
    (entry(talk=TALK[::-1]), "turn 1 is from 'gpt', expected 'human'"),
    (entry(talk=[TALK[0], {"from": "gpt", "value": " "}]), "turn 2 has an empty text or none: ' '"),
    (entry(talk=[{"from": "human", "value": "<image>\n"}, TALK[1]]), "turn 1 has an empty text or none"),
    (entry(talk=[TALK[0], {"from": "gpt", "value": "see <image>"}]), "turn 2 is an answer with <image>"),
    (entry(talk=[TALK[0], {"from": "gpt"}]), "lacks 'value'"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD)
def test_a_bad_entry_is_named(bad: Any, reason: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(folder, [*[entry()] * 6, bad, *[entry("b.png")] * 6])
    with pytest.raises(ValueError, match="1 of 13 train entries cannot be used") as raised:
        load_data(task(path), 0)
    assert f"{path}:7: " in str(raised.value)
    assert reason in str(raised.value)
    data = load_data(task(path, bad_data="skip"), 0)
    assert sum(map(len, (data.train, data.validation, data.test))) == 12  # type: ignore[arg-type]
    assert f"{path}:7: " in capsys.readouterr().out


def test_images_lie_where_the_task_says(folder: Path) -> None:
    (folder / "texts").mkdir()
    path = write(folder / "texts", [entry()] * 4)
    with pytest.raises(ValueError, match="texts/a.png"):
        load_data(task(path), 0)
    assert len(load_data(task(path, images=str(folder)), 0).train) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "message"), [({"max_length": 0}, "task.max_length is 0"), ({"held_out": 0.5}, "task.held_out is 0.5")]
)
def test_settings_of_the_task_are_checked(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Task(**wrong)


def test_images_have_their_place_in_the_text() -> None:
    question = {"from": "human", "value": "Is <image> as red as <image> ?"}
    kinds = [part.get("text", "IMAGE") for part in messages_of([question, TALK[1]], 2)[0]["content"]]
    assert kinds == ["Is", "IMAGE", "as red as", "IMAGE", "?"]
    assert messages_of(TALK, 1)[0]["content"] == [{"type": "image"}, {"type": "text", "text": "What colour is it ?"}]


@pytest.mark.parametrize(
    "rows",
    [
        [entry("a.png"), entry("b.png", TALK + MORE), entry("c.png")],
        [entry("a.png"), entry(None, MORE), entry("c.png")],
        [entry(None, MORE)] * 3,
    ],
    ids=["sizes and modes", "some without an image", "all without"],
)
def test_only_answers_are_learnt(rows: list[Any], folder: Path) -> None:
    data = load_data(task(write(folder, rows * 3)), 0)
    everything = [dict(row) for part in (data.train, data.validation, data.test) for row in part]
    assert data.collate is not None
    batch = data.collate(everything)
    images = sum(len(row["images"]) for row in everything)
    assert ("pixel_values" in batch) == (images > 0)
    if images:
        assert batch["pixel_values"].shape == (images, 3, 24, 24)
        assert (batch["input_ids"] == data.processor.image_token_id).sum() == 9 * images
    learnt = sorted(data.processor.tokenizer.decode(row[row != -100]) for row in batch["labels"])
    expected = [
        " ".join(f"{turn['value']} </s>" for turn in row["conversations"] if turn["from"] == "gpt") for row in rows * 3
    ]
    assert learnt == sorted(expected)


def trainer_of(*overrides: str) -> Any:
    settings = read("multimodal_chat-tiny", ["training.disable_tqdm=true", *overrides])
    data = multimodal_chat.load_data(settings.task, 0)
    torch.manual_seed(0)
    model = get_peft_model(multimodal_chat.load_base(settings.task), FloraConfig(**settings.adapter))
    arguments = training_arguments(settings, settings.output)
    return make_trainer(model, multimodal_chat, data, arguments)  # type: ignore[arg-type]


def test_the_projector_has_a_rate_of_its_own(tmp_path: Path) -> None:
    trainer = trainer_of(f"output={tmp_path / 'run'}")
    groups = trainer.create_optimizer().param_groups
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    rates = {names[id(parameter)]: group["lr"] for group in groups for parameter in group["params"]}
    assert set(rates) == {name for name, value in trainer.model.named_parameters() if value.requires_grad}
    projector = {name: rate for name, rate in rates.items() if "multi_modal_projector" in name}
    assert len(projector) == 4  # two layers, weight and bias
    assert set(projector.values()) == {0.005}
    assert {rate for name, rate in rates.items() if name not in projector} == {0.02}
    plain = trainer_of(f"output={tmp_path / 'run'}", "training.projector_learning_rate=null")
    assert {group["lr"] for group in plain.create_optimizer().param_groups} == {0.02}


def test_it_looks_at_the_image(tmp_path: Path) -> None:
    """The answers depend on the colour alone; and measured again they are the same."""
    settings = read("multimodal_chat-tiny", [f"output={tmp_path / 'run'}", "training.disable_tqdm=true"])
    metrics = train(settings)
    assert metrics["test"]["token_accuracy"] > 0.9
    assert evaluate(tmp_path / "run")[1] is True
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert any("patch_embedding.tucker_weight.core" in name and value.ndim == 4 for name, value in saved.items())
    assert (tmp_path / "run" / "chat_template.jinja").is_file()


def llava_7b() -> nn.Module:
    """LLaVA-1.5-7B: its language model is Vicuna, of LLaMA-7B's sizes with a longer vocabulary."""
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(vocab_size=32064))
    with torch.device("meta"):
        return LlavaForConditionalGeneration(config)


def test_parameters_of_llava_7b() -> None:
    adapter = read("multimodal_chat").adapter
    model = get_peft_model(llava_7b(), FloraConfig(**adapter), low_cpu_mem_usage=True)
    r = adapter["r"]
    assert len(model.base_model.targeted_module_names) == 5 * 32
    spent = sum(value.numel() for name, value in model.named_parameters() if ".tucker_" in name)
    assert spent == 32 * (3 * 2 * 4096 + 2 * (4096 + 11008)) * r + 160 * r**2
    whole = {
        **adapter,
        "target_modules": r".*(language_model.*\.(q|k|v|up|down)_proj|patch_embedding|vision.*\.fc[12])",
    }
    wider = get_peft_model(llava_7b(), FloraConfig(**whole), low_cpu_mem_usage=True)
    assert len(wider.base_model.targeted_module_names) == 5 * 32 + 1 + 2 * 24
