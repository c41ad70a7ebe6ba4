"""``flora merge``: any adapters into a base folder, verified as a whole model too, before the folder appears."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

import flora
from convert_cases import random_adapter
from flora.convert import load, save
from flora.runs import merging
from flora.runs.merging import merge
from flora.storage.checkpoint import Checkpoint
from foreign_models import build, logits
from test_convert_kohya import small_unet
from test_extract import save_model
from test_merge import digest, merged_in_memory, picked

FLORA = {"r": 2, "target_modules": ["c_attn", "c_fc"], "init_weights": False}
LORA = {"r": 2, "target_modules": ["c_attn", "c_fc"], "init_lora_weights": False, "fan_in_fan_out": True}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """GPT-2 in shards, with a tokenizer's file."""
    save_model(build("gpt2"), tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    assert (tmp_path / "base" / "model.safetensors.index.json").is_file()
    return tmp_path / "base"


def adapted(base: Path, folder: Path, config: object) -> nn.Module:
    """GPT-2 with a PEFT adapter that names the base, saved to ``folder``."""
    model = get_peft_model(build("gpt2"), config).eval()
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("config", [flora.FloraConfig(**FLORA, scale=0.3), LoraConfig(**LORA)], ids=["flora", "lora"])
def test_the_merged_model_answers_as_the_unmerged_one(base: Path, tmp_path: Path, config: object) -> None:
    before, out = digest(base), tmp_path / "out"
    model = adapted(base, tmp_path / "adapter", config)
    (tmp_path / "adapter" / "tokenizer.json").write_text('{"of": "the adapter"}')
    done = merge(tmp_path / "adapter", out)
    assert done.difference is not None
    assert done.difference < 1e-5
    assert done.layers.difference < 1e-6
    assert done.layers.changed == 4
    merged = type(build("gpt2")).from_pretrained(out).eval()
    assert torch.allclose(logits(merged, "gpt2"), logits(model, "gpt2"), atol=1e-5)
    assert not torch.allclose(logits(merged, "gpt2"), logits(build("gpt2"), "gpt2"), atol=1e-3)
    assert digest(base) == before, "the source is never written to"
    assert set(digest(out)) == set(before), "the same shards, index and config"
    assert digest(out)["model.safetensors.index.json"] == before["model.safetensors.index.json"]
    assert (out / "tokenizer.json").read_text() == '{"of": "the adapter"}'
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "out"}


def test_a_weighted_set_of_several_formats(base: Path, tmp_path: Path) -> None:
    model = adapted(base, tmp_path / "a", flora.FloraConfig(**FLORA))
    others = [random_adapter(build("gpt2"), picked, 0.02) for _ in range(2)]
    save(others[0], tmp_path / "k.safetensors", format="kohya")
    save(others[1], tmp_path / "d.safetensors", format="dense")
    paths = [tmp_path / name for name in ("a", "k.safetensors", "d.safetensors")]
    done = merge(paths, tmp_path / "out", weights=[0.5, -1.5, 2.0], base=str(base))
    assert done.difference is not None
    assert done.difference < 1e-5
    pairs = [(load(tmp_path / "a"), 0.5), (others[0], -1.5), (others[1], 2.0)]
    expected = logits(merged_in_memory("gpt2", pairs), "gpt2")
    merged = type(build("gpt2")).from_pretrained(tmp_path / "out").eval()
    assert torch.allclose(logits(merged, "gpt2"), expected, atol=1e-5)
    assert not torch.allclose(logits(model, "gpt2"), expected, atol=1e-3)
    with pytest.raises(ValueError, match="2 numbers for 3 adapters; give one for each"):
        merge(paths, tmp_path / "more", weights=[1, 2], base=str(base))


def test_a_new_head_makes_a_model_of_its_class(base: Path, tmp_path: Path) -> None:
    """The files of the base are a language model's; the adapter was trained on a classifier made of it."""
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**settings, "pad_token_id": 0}))
    classifier = GPT2ForSequenceClassification.from_pretrained(base).eval()
    config = flora.FloraConfig(**FLORA, task_type="SEQ_CLS", modules_to_save=["score"])
    model = get_peft_model(classifier, config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "modules_to_save" in name:
                value.add_(torch.randn(value.shape))
    model.save_pretrained(tmp_path / "adapter")
    done = merge(tmp_path / "adapter", tmp_path / "out")
    assert done.difference is not None
    merged = GPT2ForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    ids = torch.randint(1, 41, (1, 7))
    assert torch.allclose(merged(ids).logits, model(ids).logits, atol=1e-5)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "out"}


def test_a_model_of_diffusers(tmp_path: Path) -> None:
    """Its folder is streamed too, with its own names of files."""
    unet = small_unet()
    unet.save_pretrained(tmp_path / "unet")
    trained = small_unet()
    trained.load_state_dict(unet.state_dict())
    config = flora.FloraConfig(r=3, target_modules=["to_q", "conv1"], init_weights=False)
    model = get_peft_model(trained, config).eval()
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "unet")
    model.save_pretrained(tmp_path / "adapter")
    done = merge(tmp_path / "adapter", tmp_path / "out")
    assert done.layers.difference < 1e-6
    merged = UNet2DConditionModel.from_pretrained(tmp_path / "out").eval()
    sample, context = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 12)
    with torch.no_grad():
        answer, expected = (net(sample, 1, context).sample for net in (merged, model))
    assert torch.allclose(answer, expected, atol=1e-5)


class OwnConfig(PretrainedConfig):
    model_type = "own"


class Own(PreTrainedModel):
    """A model of the user's, in a file of theirs: transformers knows no such class."""

    config_class = OwnConfig
    main_input_name = "pixel_values"

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.conv = nn.Conv2d(3, 5, 7, stride=4)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.conv(pixel_values),)


def test_a_class_of_the_users_own(tmp_path: Path) -> None:
    Own(OwnConfig()).save_pretrained(tmp_path / "base")
    model = get_peft_model(
        Own.from_pretrained(tmp_path / "base"), flora.FloraConfig(r=2, target_modules=["conv"], init_weights=False)
    )
    model.save_pretrained(tmp_path / "adapter")
    done = merge(tmp_path / "adapter", tmp_path / "out")
    assert done.difference is not None, done.reason
    assert done.difference < 1e-4


def test_weights_that_are_no_safetensors(base: Path, tmp_path: Path) -> None:
    model = adapted(base, tmp_path / "adapter", flora.FloraConfig(**FLORA))
    for path in [*base.glob("*.safetensors"), base / "model.safetensors.index.json"]:
        path.unlink()
    torch.save(build("gpt2").state_dict(), base / "pytorch_model.bin")
    merge(tmp_path / "adapter", tmp_path / "out")
    merged = type(build("gpt2")).from_pretrained(tmp_path / "out").eval()
    assert torch.allclose(logits(merged, "gpt2"), logits(model, "gpt2"), atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("indices", [[3, 5], {"embed_tokens": [3, 5]}])
@pytest.mark.parametrize("kind", ["flora", "lora"])
def test_trained_token_rows_are_merged(tmp_path: Path, kind: str, indices: object, tied: bool) -> None:
    config = LlamaConfig(
        vocab_size=41,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    fields = {"r": 2, "target_modules": ["v_proj"], "trainable_token_indices": indices}
    chosen = (
        flora.FloraConfig(**fields, init_weights=False)
        if kind == "flora"
        else LoraConfig(**fields, init_lora_weights=False)
    )
    model = get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "base"), chosen).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "trainable_tokens_delta" in name:
                value.add_(torch.randn(value.shape))
    model.save_pretrained(tmp_path / "adapter")
    done = merge(tmp_path / "adapter", tmp_path / "out")
    assert done.layers.changed == 2
    ids = torch.tensor([[1, 3, 5, 7, 3]])
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.allclose(merged(ids).logits, model(ids).logits, atol=1e-5)
    adapter = load(tmp_path / "adapter")
    save(adapter, tmp_path / "again")
    again = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "again").eval()
    assert torch.allclose(again(ids).logits, model(ids).logits, atol=1e-5)
    for to, target in (("lora", "lora"), ("kohya", "k.safetensors"), ("dense", "d.safetensors")):
        with pytest.raises(ValueError, match=r"token.*flora merge.*--drop-extras"):
            save(adapter, tmp_path / target, format=to)
        save(adapter, tmp_path / target, format=to, drop_extras=True)
    with pytest.raises(ValueError, match="token rows replace those of the base model.*with weight 1"):
        merge(tmp_path / "adapter", tmp_path / "half", weights=[0.5])
    both = merge([tmp_path / "k.safetensors", tmp_path / "adapter"], tmp_path / "both", base=str(tmp_path / "base"))
    assert both.difference is not None


def test_token_rows_that_do_not_fit(tmp_path: Path) -> None:
    adapter = random_adapter(build("mixtral"), lambda name, value: "q_proj" in name)
    adapter.extras = {"model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 24)}
    save_model(build("mixtral"), tmp_path / "base")
    for numbers, message in (([3], "holds 2 rows, and trainable_token"), ([3, 99], "trained its rows .3, 99. of")):
        adapter.config = {"peft_type": "TUCKER", "trainable_token_indices": numbers}
        with pytest.raises(ValueError, match=message):
            flora_merge(adapter, tmp_path)
    assert not (tmp_path / "out").exists()


def flora_merge(adapter: object, tmp_path: Path) -> None:
    from flora.convert.streaming import stream_merged

    stream_merged(tmp_path / "base", adapter, tmp_path / "out")


def test_models_that_cannot_be_compared_as_a_whole_say_why(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted(base, tmp_path / "adapter", flora.FloraConfig(**FLORA))
    monkeypatch.setattr(merging, "get_max_memory", lambda: {"cpu": 1000})
    done = merge(tmp_path / "adapter", tmp_path / "out")
    assert done.difference is None
    assert "whole models not compared: 0 GB of weights do not fit into memory" in str(done)
    assert "merged and unmerged layers agree on random inputs" in str(done)
    monkeypatch.undo()
    save_model(build("mixed"), tmp_path / "plain")
    save(random_adapter(build("mixed"), picked, 0.02), tmp_path / "mixed")
    done = merge(tmp_path / "mixed", tmp_path / "out2", base=str(tmp_path / "plain"))
    assert "says which inputs it takes" in done.reason
    assert done.layers.changed == 6


def test_a_whole_model_that_computes_something_else_is_not_written(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted(base, tmp_path / "adapter", flora.FloraConfig(**FLORA))
    monkeypatch.setattr(merging, "attach", lambda model, folder: model)
    with pytest.raises(ValueError, match="the merged model differs from the unmerged one by .* base in float32"):
        merge(tmp_path / "adapter", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_one_weight_at_a_time(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streaming reads each tensor of the base once to write it, and each changed one once more to compare."""
    adapted(base, tmp_path / "adapter", flora.FloraConfig(**FLORA))
    monkeypatch.setattr(merging, "get_max_memory", lambda: {"cpu": 1000})
    read: list[str] = []
    get = Checkpoint.get
    monkeypatch.setattr(Checkpoint, "get", lambda self, name: read.append(name) or get(self, name))
    merge(tmp_path / "adapter", tmp_path / "out")
    weight_map = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(read) == set(weight_map)
    assert len(read) == len(weight_map) + 2 * 4


def test_a_missing_base_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    save(random_adapter(build("gpt2"), picked, 0.02), tmp_path / "adapter")
    with pytest.raises(ValueError, match="names no base model; give it with --base"):
        merge(tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(
        FileNotFoundError, match=r"the base model '.*gone' is not a local folder .*; give its folder with --base"
    ):
        merge(tmp_path / "adapter", tmp_path / "out", base=str(tmp_path / "gone"))
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="has no weight"):
        merge(tmp_path / "adapter", tmp_path / "out", base=str(tmp_path / "other.safetensors"))
    assert load_file(tmp_path / "other.safetensors")["a.weight"].shape == (2, 2)
    assert not (tmp_path / "out").exists()
