"""What a config leaves out, saves whole or names: modules to save, embeddings, raw parameters inside saved modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from flora import FloraConfig
from flora.tuner.layer import FloraLayer

pytestmark = pytest.mark.filterwarnings("ignore:the adapter has more parameters than the weight itself")


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=53, hidden_size=12, intermediate_size=20, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=1, tie_word_embeddings=False,
        )
    )  # fmt: skip


TARGETS: list[dict[str, Any]] = [
    {"target_modules": "all"},  # 22 modules: long enough to be shortened to ends of names
    {"target_modules": ["embed_tokens", "q_proj"]},
    {"target_modules": ["lm_head"]},
    {"target_modules": r".*(embed_tokens|lm_head|layers\.1\..*_proj)"},
]


@pytest.mark.parametrize("fields", TARGETS, ids=str)
def test_the_file_of_an_adapter_on_an_embedding_holds_the_adapter(fields: dict[str, Any], tmp_path: Path) -> None:
    model = get_peft_model(llama(), FloraConfig(r=2, init_weights=False, task_type="CAUSAL_LM", **fields)).eval()
    adapted = {name for name, module in model.named_modules() if isinstance(module, FloraLayer)}
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert all(".tucker_" in key for key in tensors)

    ids = torch.arange(10).reshape(2, 5)
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert {name for name, module in loaded.named_modules() if isinstance(module, FloraLayer)} == adapted
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)

    loaded.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "adapter_model.safetensors").keys() == tensors.keys()


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 5, 7))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w.sum(0).mT


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body, self.experts, self.head = nn.Linear(3, 7), nn.Sequential(Experts()), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.experts(self.body(x)))


def test_a_module_to_save_that_the_model_lacks_is_refused_with_the_nearest_names() -> None:
    base = Net()
    config = FloraConfig(r=2, target_modules=["body"], modules_to_save=["haed"])
    with pytest.raises(ValueError, match=r"modules_to_save \['haed'\] match no module of Net; did you mean 'head'\?"):
        get_peft_model(base, config)
    assert not any(isinstance(module, FloraLayer) for module in base.modules())
    assert all(value.requires_grad for value in base.parameters())


def test_an_adapter_file_with_such_a_name_still_loads(tmp_path: Path) -> None:
    get_peft_model(Net(), FloraConfig(r=2, target_modules=["body"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace('"modules_to_save": null', '"modules_to_save": ["classifyer"]'))
    with pytest.warns(UserWarning, match=r"modules_to_save \['classifyer'\] match no module of Net"):
        PeftModel.from_pretrained(Net(), tmp_path)


def test_a_raw_parameter_inside_a_saved_module_is_trained_in_full(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"target_modules": ["body"], "target_parameters": ["0.w"], "modules_to_save": ["experts"]}
    with pytest.warns(UserWarning, match=r"experts\.0\.w of target_parameters is inside modules_to_save"):
        model = get_peft_model(Net(), FloraConfig(r=2, init_weights=False, **fields))
    assert [name for name, module in model.named_modules() if isinstance(module, FloraLayer)] == [
        "base_model.model.body"
    ]
    with torch.no_grad():
        model.base_model.model.experts.modules_to_save["default"][0].w.add_(1)
    model.save_pretrained(tmp_path)

    x = torch.randn(4, 3)
    with pytest.warns(UserWarning, match="is inside modules_to_save"):
        loaded = PeftModel.from_pretrained(Net(), tmp_path)
    assert torch.equal(loaded(x), model(x))
    merged = model.merge_and_unload()
    assert merged.state_dict().keys() == Net().state_dict().keys()
    torch.testing.assert_close(merged(x), loaded(x))


class Asking(nn.Module):
    """It looks at the class of what it runs, as GPSConv of PyTorch Geometric and Parakeet's subsampling do."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2)
        self.steps = nn.ModuleList([nn.Linear(6, 7), nn.Tanh(), nn.Bilinear(7, 7, 5)])

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.attention, nn.MultiheadAttention):
            x, _ = self.attention(x, x, x)
        return self.run(x)

    def run(self, x: Tensor) -> Tensor:
        for step in self.steps:
            if isinstance(step, (nn.Bilinear, nn.LSTM)):
                x = step(x, x)
            else:
                x = step(x)
        return x


def test_a_layer_whose_parent_asks_for_its_class_is_left_out() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(Asking()).eval()
    x = torch.randn(3, 2, 6)
    expected = base(x)
    with pytest.warns(
        UserWarning, match="Asking asks whether it is of the class (MultiheadAttention|Bilinear)"
    ) as seen:
        model = get_peft_model(base, FloraConfig(r=2, target_modules="all"))
    assert len(seen) == 2
    assert [name for name, module in model.named_modules() if isinstance(module, FloraLayer)] == [
        "base_model.model.0.steps.0"
    ]
    assert torch.equal(model(x), expected)

    with pytest.warns(UserWarning, match="Target 0.steps.2: the forward of Asking asks"):
        get_peft_model(nn.Sequential(Asking()), FloraConfig(r=2, target_modules=["steps.2"]))


class Held(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tensor = nn.Parameter(torch.randn(5, 7))

    def __getitem__(self, index: Any) -> Tensor:
        return self.tensor[index]


def test_a_parameter_whose_module_is_indexed_is_refused_by_name() -> None:
    model = get_peft_model(nn.Sequential(Held()), FloraConfig(r=2, target_parameters=["0.tensor"]))
    with pytest.raises(ValueError, match=r"^0\.tensor of target_parameters is held by a Held, which its owner indexes"):
        model.base_model.model[0][1:]


class WithSettings(Net):
    """Its state holds its settings beside the tensors, as that of neuraloperator's networks does."""

    def get_extra_state(self) -> dict[str, int]:
        return {"modes": 4}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"modes": 4}


def test_a_model_whose_state_is_more_than_tensors_loads_its_adapter(tmp_path: Path) -> None:
    model = get_peft_model(WithSettings(), FloraConfig(r=2, target_modules=["body"], init_weights=False))
    model.save_pretrained(tmp_path)
    x = torch.randn(4, 3)
    assert torch.equal(PeftModel.from_pretrained(WithSettings(), tmp_path)(x), model(x))


def test_a_model_without_a_layer_of_the_table_is_told_what_it_can_name() -> None:
    with pytest.raises(ValueError, match=r"matches nothing: .* \(0\.w\); name those to adapt in target_parameters$"):
        get_peft_model(nn.Sequential(Experts()), FloraConfig(r=2, target_modules="all"))
    with pytest.raises(ValueError, match=r"Experts is not in the table.*; name its parameters \(w\) in target_param"):
        get_peft_model(nn.Sequential(Experts()), FloraConfig(r=2, target_modules=["0"]))


def test_resolving_changes_the_config_by_exact_names_only() -> None:
    """Defaults are not written, patterns stay as the user wrote them, and a second model takes the same config."""
    config = FloraConfig(r=2, target_modules=["body", "head"], scale_pattern={"he.*": 3.0}, rank_pattern={"body": 3})
    for _ in range(2):
        get_peft_model(Net(), config)
        assert config.scale_pattern == {"he.*": 3.0, r"^head\.weight": 3.0}
        assert config.rank_pattern == {"body": 3, r"^body\.weight": 3}
        assert config.fold == {}
        assert config.target_modules == {"body", "head"}


def test_a_model_that_cannot_name_its_embeddings_is_saved(tmp_path: Path) -> None:
    """PEFT asks for them where the vocabulary is not the stored base's; speech models have none to give."""
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    config = Wav2Vec2Config(
        vocab_size=31,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        conv_dim=(8,),
        conv_stride=(2,),
        conv_kernel=(5,),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        num_feat_extract_layers=1,
    )
    Wav2Vec2ForCTC(config).save_pretrained(tmp_path / "base")
    base = Wav2Vec2ForCTC.from_pretrained(tmp_path / "base", vocab_size=37, ignore_mismatched_sizes=True)
    model = get_peft_model(base, FloraConfig(r=3, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with pytest.warns(UserWarning, match="resized"):
        model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any("lm_head" in key for key in saved)
    assert any("tucker_weight" in key for key in saved)
