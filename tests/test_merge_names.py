"""Merging where the files of a model do not have its weights under their own names, or not in one piece."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers import (
    BertConfig,
    BertForMaskedLM,
    HubertConfig,
    HubertForCTC,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
    Speech2TextConfig,
    Speech2TextForConditionalGeneration,
    VitDetConfig,
    VitDetModel,
    Wav2Vec2BertConfig,
    Wav2Vec2BertForCTC,
)

import flora
from flora.convert import load
from flora.convert.base_model import Base
from flora.convert.streaming import stream_merged
from flora.layers.layout import of_module
from flora.runs import merging
from flora.runs.merging import merge


def randomised(model: nn.Module) -> nn.Module:
    """With weights so large that every layer matters."""
    torch.manual_seed(3)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn(value.shape) / max(1, value[0].numel()) ** 0.5)
    return model.eval()


def llava() -> nn.Module:
    """Its files have ``language_model.lm_head.weight`` for ``lm_head.weight``."""
    text = {"model_type": "llama", "vocab_size": 43, "hidden_size": 12, "intermediate_size": 20}
    text |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    vision = {"model_type": "clip_vision_model", "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 14, "patch_size": 7, "projection_dim": 6}
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=4, tie_word_embeddings=False)
    return LlavaForConditionalGeneration(config)


def hubert() -> nn.Module:
    """Its positional convolution is stored as direction and length of a weight norm."""
    config = HubertConfig(
        vocab_size=29,
        hidden_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=20,
        conv_dim=(7, 7),
        conv_stride=(2, 3),
        conv_kernel=(5, 3),
        num_conv_pos_embeddings=6,
        num_conv_pos_embedding_groups=2,
        num_feat_extract_layers=2,
        apply_spec_augment=False,
    )
    return HubertForCTC(config)


def bert() -> nn.Module:
    """Old files of it have ``LayerNorm.gamma`` and ``LayerNorm.beta``."""
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
    return BertForMaskedLM(BertConfig(vocab_size=41, max_position_embeddings=16, **sizes))


IDS = {"input_ids": torch.tensor([[7, 11, 5, 23], [5, 6, 17, 41]]) % 40 + 1}
SOUND = {"input_values": torch.randn(2, 401, generator=torch.Generator().manual_seed(1))}
RENAMED = {
    "llava": (llava, IDS, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "llava-bias": (llava, IDS, {"target_modules": ["q_proj", "out_proj"], "bias": "all"}),
    "llava-rows": (llava, IDS, {"target_modules": ["q_proj"], "trainable_token_indices": [5, 11]}),
    "hubert": (hubert, SOUND, {"target_modules": "all", "exclude_modules": ["lm_head"]}),
    "bert": (bert, IDS, {"target_modules": ["query"], "modules_to_save": ["LayerNorm"], "bias": "all"}),
}


def adapt(base: Path, build: Callable[[], nn.Module], folder: Path, **fields: object) -> nn.Module:
    """An adapter on the model, saved, with everything that is trained moved away from where it starts."""
    config = flora.FloraConfig(r=2, init_weights=False, **fields)
    model = get_peft_model(type(build()).from_pretrained(base), config).eval()
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.1 * torch.randn(value.shape))
    model.save_pretrained(folder)
    return model


def answer(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("case", RENAMED)
def test_everything_that_was_trained_is_merged_under_its_name_in_the_files(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the model is larger than memory, so that nobody compares the whole of it."""
    build, inputs, fields = RENAMED[case]
    randomised(build()).save_pretrained(tmp_path / "base")
    model = adapt(tmp_path / "base", build, tmp_path / "adapter", **fields)
    expected = answer(model, inputs)

    done = merge(tmp_path / "adapter", tmp_path / "out", base=str(tmp_path / "base"))
    assert done.difference is not None, done.reason
    monkeypatch.setattr(merging, "get_max_memory", lambda: {"cpu": 1000})
    merge(tmp_path / "adapter", tmp_path / "large", base=str(tmp_path / "base"))

    names = set(load_file(tmp_path / "base/model.safetensors"))
    for folder in ("out", "large"):
        merged = type(model.base_model.model).from_pretrained(tmp_path / folder).eval()
        assert torch.allclose(answer(merged, inputs), expected, atol=1e-4, rtol=1e-4)
        assert set(load_file(tmp_path / folder / "model.safetensors")) == names, "no tensor beside the old one"
    plain = type(model.base_model.model).from_pretrained(tmp_path / "base").eval()
    assert not torch.allclose(answer(plain, inputs), expected, atol=1e-2)


OLD_NAMES = {
    "hubert": (hubert, SOUND, {"target_modules": ["conv"]}),
    "bert": RENAMED["bert"],
}


@pytest.mark.parametrize("case", OLD_NAMES)
def test_files_with_names_of_old_versions(case: str, tmp_path: Path) -> None:
    build, inputs, fields = OLD_NAMES[case]
    randomised(build()).save_pretrained(tmp_path / "base")
    path = tmp_path / "base/model.safetensors"
    old = {}
    for name, value in load_file(path).items():
        name = name.replace("parametrizations.weight.original0", "weight_g")
        name = name.replace("parametrizations.weight.original1", "weight_v")
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        old[name] = value
    assert old.keys() != load_file(path).keys()
    save_file(old, path, {"format": "pt"})

    model = adapt(tmp_path / "base", build, tmp_path / "adapter", **fields)
    merge(tmp_path / "adapter", tmp_path / "out", base=str(tmp_path / "base"))
    assert load_file(tmp_path / "out/model.safetensors").keys() == old.keys()
    merged = type(model.base_model.model).from_pretrained(tmp_path / "out").eval()
    assert torch.allclose(answer(merged, inputs), answer(model, inputs), atol=1e-4, rtol=1e-4)


class Parametrised(nn.Module):
    """A layer whose weight is computed from what is stored."""

    def __init__(self, how: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.layer = how(nn.Linear(7, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize(
    "how", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal]
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_parametrization_makes_the_merged_weight_or_is_refused(
    how: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    base = Parametrised(how).eval()
    (tmp_path / "base").mkdir()
    save_file({k: v.contiguous() for k, v in base.state_dict().items()}, tmp_path / "base/model.safetensors")
    shapes = {name: tuple(value.shape) for name, value in base.named_parameters()}
    known = Base(shapes, of_module(base), base)
    form = flora.Tucker(torch.randn(2, 3), (torch.randn(5, 2), torch.randn(7, 3)))
    adapter = flora.Adapter({"layer.weight": flora.convert.Entry(form, 0.5, known.layouts.get("layer.weight"))})

    if how is not parametrizations.weight_norm:
        with pytest.raises(ValueError, match="which cannot make the merged weight; remove it"):
            stream_merged(tmp_path / "base", adapter, tmp_path / "out", known=known)
        assert not (tmp_path / "out").exists()
        return
    stream_merged(tmp_path / "base", adapter, tmp_path / "out", known=known)
    merged = Parametrised(how).eval()
    merged.load_state_dict(load_file(tmp_path / "out/model.safetensors"))
    assert torch.allclose(merged.layer.weight, base.layer.weight + adapter.weights["layer.weight"].dense(), atol=1e-5)


def test_without_the_class_a_name_that_could_be_another_is_refused(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    weight = {"net.weight": torch.ones(3, 5), "language_model.head.weight": torch.ones(2, 3)}
    save_file(weight, tmp_path / "base/model.safetensors")
    form = flora.Tucker(torch.ones(3, 5), (None, None))
    adapter = flora.Adapter({"net.weight": flora.convert.Entry(form)}, {"head.weight": torch.ones(2, 3)})
    with pytest.raises(ValueError, match="has no tensor 'head.weight' and may have it as 'language_model.head.weight'"):
        stream_merged(tmp_path / "base", adapter, tmp_path / "out")


def speech2text() -> nn.Module:
    sizes = {"d_model": 12, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "input_feat_per_channel": 6}
    sizes |= {"encoder_ffn_dim": 20, "decoder_ffn_dim": 20, "encoder_layers": 1, "decoder_layers": 1}
    sizes |= {"conv_channels": 6, "max_source_positions": 64, "max_target_positions": 32}
    return Speech2TextForConditionalGeneration(Speech2TextConfig(vocab_size=29, **sizes))


def wav2vec2_bert() -> nn.Module:
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
    sizes |= {"feature_projection_input_dim": 7, "conv_depthwise_kernel_size": 5}
    sizes |= {"left_max_position_embeddings": 8, "right_max_position_embeddings": 4}
    return Wav2Vec2BertForCTC(Wav2Vec2BertConfig(vocab_size=29, apply_spec_augment=False, **sizes))


class FeaturesConfig(PretrainedConfig):
    model_type = "features"


class Features(PreTrainedModel):
    """Takes sound features, and its config says nothing of their size."""

    config_class = FeaturesConfig
    main_input_name = "input_features"

    def __init__(self, config: FeaturesConfig) -> None:
        super().__init__(config)
        self.proj = nn.Linear(7, 5)
        self.post_init()

    def forward(self, input_features: Tensor) -> tuple[Tensor]:
        return (self.proj(input_features),)


def features() -> nn.Module:
    return Features(FeaturesConfig())


@pytest.mark.parametrize(
    ("build", "targets", "reason"),
    [
        (speech2text, "all-linear", ""),
        (wav2vec2_bert, "all-linear", ""),
        (features, ["proj"], "does not say how large 'input_features' is"),
    ],
)
def test_models_with_sound_features(
    build: Callable[[], nn.Module], targets: object, reason: str, tmp_path: Path
) -> None:
    randomised(build()).save_pretrained(tmp_path / "base")
    adapt(tmp_path / "base", build, tmp_path / "adapter", target_modules=targets)
    done = merge(tmp_path / "adapter", tmp_path / "out", base=str(tmp_path / "base"))
    assert reason in done.reason
    assert (done.difference is None) == bool(reason)


def test_a_base_in_float64_merges_exactly(tmp_path: Path) -> None:
    randomised(hubert()).double().save_pretrained(tmp_path / "base")
    adapt(tmp_path / "base", hubert, tmp_path / "adapter", target_modules="all")
    adapter = load(tmp_path / "adapter")
    done = merge(tmp_path / "adapter", tmp_path / "out", base=str(tmp_path / "base"))
    assert done.difference is not None, done.reason
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "out"))
    name = "hubert.encoder.layers.0.attention.k_proj.weight"
    form = adapter.weights[name].form
    dense = form.factors[0].double() @ form.core.double() @ form.factors[1].double().T
    assert after[name].dtype == torch.float64
    assert torch.allclose(after[name], before[name] + adapter.weights[name].scale * dense, atol=1e-14)


def test_a_base_whose_files_do_not_fit_its_class_is_named(tmp_path: Path) -> None:
    randomised(bert()).save_pretrained(tmp_path / "base")
    adapt(tmp_path / "base", bert, tmp_path / "adapter", target_modules=["query"])
    path = tmp_path / "base/model.safetensors"
    save_file({**load_file(path), "bert.embeddings.LayerNorm.bias": torch.ones(1, 12)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match="the files in .*base cannot be loaded as a BertForMaskedLM"):
        merge(tmp_path / "adapter", tmp_path / "out", base=str(tmp_path / "base"))
    assert not (tmp_path / "out").exists()


def test_a_base_whose_config_is_not_taken_back_is_named(tmp_path: Path) -> None:
    """transformers writes configs that it refuses itself, with a stage that the model has not, for example."""
    fields = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}

    def build() -> nn.Module:
        return VitDetModel(VitDetConfig(**fields))

    randomised(build()).save_pretrained(tmp_path / "base")
    adapt(tmp_path / "base", build, tmp_path / "adapter", target_modules=["qkv"])
    path = tmp_path / "base/config.json"
    path.write_text(path.read_text().replace('"stage1"\n', '"stage12"\n'))
    with pytest.raises(ValueError, match="cannot be loaded as a VitDetModel: out_features must be a subset"):
        merge(tmp_path / "adapter", tmp_path / "out", base=str(tmp_path / "base"))
    assert not (tmp_path / "out").exists()


def test_a_link_out_of_the_folder_is_not_copied(tmp_path: Path) -> None:
    randomised(bert()).save_pretrained(tmp_path / "base")
    (tmp_path / "private.txt").write_text("the reader's own")
    (tmp_path / "base/vocab.txt").symlink_to(tmp_path / "private.txt")
    (tmp_path / "base/notes.txt").write_text("inside")
    (tmp_path / "base/linked.txt").symlink_to("notes.txt")
    adapt(tmp_path / "base", bert, tmp_path / "adapter", target_modules=["query"])
    (tmp_path / "adapter/tokenizer.json").symlink_to(tmp_path / "private.txt")
    with pytest.warns(UserWarning, match=r"links to a file outside .* and is not copied"):
        merge(tmp_path / "adapter", tmp_path / "out", base=str(tmp_path / "base"))
    assert not (tmp_path / "out/vocab.txt").exists()
    assert not (tmp_path / "out/tokenizer.json").exists()
    assert (tmp_path / "out/linked.txt").read_text() == "inside"


def test_the_files_of_an_adapter_are_read_once_by_us_and_once_by_peft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flora.convert.formats import native

    randomised(bert()).save_pretrained(tmp_path / "base")
    adapt(tmp_path / "base", bert, tmp_path / "adapter", target_modules=["query"])
    read: list[str] = []
    ours, theirs = native.read_tensors, PeftModel.from_pretrained
    monkeypatch.setattr(native, "read_tensors", lambda path: read.append("ours") or ours(path))
    monkeypatch.setattr(PeftModel, "from_pretrained", lambda *args: read.append("theirs") or theirs(*args))
    merge(tmp_path / "adapter", tmp_path / "out", base=str(tmp_path / "base"))
    assert read == ["ours", "theirs"]
