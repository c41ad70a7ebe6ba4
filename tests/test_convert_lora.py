"""To and from PEFT LoRA: the real PEFT in a process without flora, and checkers of what the servers ask for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import flora
from convert_cases import conv_adapter, difference, random_adapter, random_form
from flora.convert import Adapter, Entry, Layout, convert, load, save
from foreign_models import build, logits

TARGETS = {
    "mixed": {"target_modules": "all", "exclude_modules": ["plane.0"]},
    "gpt2": {"target_modules": ["wte", "c_attn", "c_proj", "c_fc"]},
    "mixtral": {
        "target_modules": ["q_proj", "o_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    },
}
FRESH = """
import sys
import torch
from peft import PeftModel
from foreign_models import build, logits
for name in sys.argv[2:]:
    model = PeftModel.from_pretrained(build(name), f"{sys.argv[1]}/{name}-lora").eval()
    torch.save(logits(model, name), f"{sys.argv[1]}/{name}.pt")
assert not any(name == "flora" or name.startswith("flora.") for name in sys.modules)
"""


def test_the_real_peft_without_flora_gives_the_same_logits(tmp_path: Path) -> None:
    expected = {}
    for name, targets in TARGETS.items():
        torch.manual_seed(3)
        config = flora.FloraConfig(r=3, kernel_r=2, scale=1.7, init_weights=False, **targets)
        model = get_peft_model(build(name), config).eval()
        model.save_pretrained(tmp_path / name)
        expected[name] = logits(model, name)
        assert not torch.allclose(expected[name], logits(build(name), name), atol=1e-3), "the adapter does something"
        convert(tmp_path / name, tmp_path / f"{name}-lora", to="lora", base=build(name))
        assert json.loads((tmp_path / f"{name}-lora/adapter_config.json").read_text())["r"] <= 3
    fresh = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path), *TARGETS],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    assert fresh.returncode == 0, fresh.stderr
    for name, answer in expected.items():
        assert torch.allclose(torch.load(tmp_path / f"{name}.pt"), answer, atol=1e-5), name


def portable() -> Adapter:
    return random_adapter(build("mixtral"), lambda name, value: "q_proj" in name or "o_proj" in name)


def test_fields_that_the_servers_read(tmp_path: Path) -> None:
    """vLLM, SGLang, TGI and LoRAX: one scale of 1, nothing beyond plain LoRA."""
    save(portable(), tmp_path / "lora", format="lora")
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == config["lora_alpha"]
    assert config["bias"] == "none"
    assert config["modules_to_save"] is None
    assert not config["use_rslora"]
    assert not config["use_dora"]
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert isinstance(config["target_modules"], list)
    assert isinstance(config["r"], int)


def test_names_that_llama_cpp_accepts(tmp_path: Path) -> None:
    adapter = random_adapter(build("mixtral"), lambda name, value: "proj" in name or "embed_tokens" in name)
    adapter.weights = {name: entry for name, entry in adapter.weights.items() if "experts" not in name}
    save(adapter, tmp_path / "lora", format="lora")
    accepted = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
    tensors = load_file(tmp_path / "lora/adapter_model.safetensors")
    assert len(tensors) == 2 * len(adapter.weights) == 18
    assert all(key.startswith("base_model.model.") and key.endswith(accepted) for key in tensors)
    rank = json.loads((tmp_path / "lora/adapter_config.json").read_text())["r"]
    # llama.cpp's own scale is alpha over the rank of the tensor itself, so every tensor must have the rank r
    assert {value.shape[0] for key, value in tensors.items() if key.endswith("_A.weight")} == {rank}


def test_the_rank_is_the_smaller_one_and_there_is_no_svd(tmp_path: Path) -> None:
    layout = Layout("linear", ("out", "in"))
    adapter = Adapter({"a.weight": Entry(random_form((17, 13), (5, 3)), 0.4, layout)})
    save(adapter, tmp_path / "lora", format="lora")
    tensors = load_file(tmp_path / "lora/adapter_model.safetensors")
    assert tensors["base_model.model.a.lora_A.weight"].shape == (3, 13)
    assert torch.equal(  # the factor itself, not a singular vector of anything
        tensors["base_model.model.a.lora_A.weight"], adapter.weights["a.weight"].form.factors[1].T
    )


@pytest.mark.parametrize("rslora", [False, True])
def test_any_peft_lora_is_read(tmp_path: Path, rslora: bool) -> None:
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["embed", "line", "plane.0", "plane.2", "space", "head"],
        rank_pattern={"line": 2},
        alpha_pattern={"plane.0": 7},
        use_rslora=rslora,
        init_lora_weights=False,
    )
    model = get_peft_model(build("mixed"), config).eval()
    model.save_pretrained(tmp_path)
    adapter = load(tmp_path)
    assert len(adapter.weights) == 6
    for name, entry in adapter.weights.items():
        expected = model.base_model.model.get_submodule(name.removesuffix(".weight")).get_delta_weight("default")
        assert torch.allclose(entry.dense(), expected, atol=1e-6), name
    round_trip = tmp_path / "flora"
    save(adapter, round_trip, format="flora")
    assert difference(adapter, load(round_trip)) < 1e-6


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora", "gaussian", True])
def test_a_start_that_changes_the_base_is_refused(tmp_path: Path, start: str | bool) -> None:
    """PEFT takes such a start out of the base weight again when it loads: the pair alone is not the change."""
    base = build("mixed")
    before = base.head.weight.detach().clone()
    config = LoraConfig(r=2, target_modules=["head"], init_lora_weights=start)
    model = get_peft_model(base, config).eval()
    layer = model.base_model.model.head
    with torch.no_grad():
        layer.lora_B["default"].weight.add_(0.1)
    model.save_pretrained(tmp_path)
    if isinstance(start, str) and start != "gaussian":
        with pytest.raises(ValueError, match=f"init_lora_weights='{start}'.*path_initial_model_for_weight_conversion"):
            load(tmp_path)
        return
    merged = layer.base_layer.weight + layer.get_delta_weight("default")
    assert torch.allclose(before + load(tmp_path).weights["head.weight"].dense(), merged, atol=1e-6)


DAMAGED = [
    ({"r": "3"}, {}, "r must be a number, got '3'"),
    ({"r": 0}, {}, "r has the rank 0, expected a whole number from 1"),
    ({"lora_alpha": None}, {}, "lora_alpha must be a number, got None"),
    ({"rank_pattern": [3]}, {}, "rank_pattern is .3., expected names and numbers"),
    ({"rank_pattern": {"head": True}}, {}, "head must be a number, got True"),
    ({"init_lora_weights": []}, {}, "has init_lora_weights=..: when PEFT loads"),
    ({"r": 4}, {}, r"head.weight: lora_A .2, 3. has the rank 2, and adapter_config.json says 4"),
    ({}, {"B": torch.ones(17)}, r"lora_A .2, 3. and lora_B .17,. do not fit"),
    ({}, {"A": torch.ones(0, 3)}, "head has the shape .0, 3."),
]


@pytest.mark.parametrize(("fields", "tensors", "message"), DAMAGED)
def test_damaged_files_are_refused_by_name(
    fields: dict[str, object], tensors: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    get_peft_model(build("mixed"), LoraConfig(r=2, target_modules=["head"])).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    file = tmp_path / "adapter_model.safetensors"
    parts = {f"base_model.model.head.lora_{part}.weight": value for part, value in tensors.items()}
    save_file({**load_file(file), **parts}, file)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("kind", ["flora", "lora"])
def test_a_module_of_the_models_own_called_base_layer(tmp_path: Path, kind: str) -> None:
    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 11))

    fields = {"r": 2, "target_modules": ["base_layer.0", "base_layer.1"]}
    config = (
        flora.FloraConfig(**fields, init_weights=False, bias="all")
        if kind == "flora"
        else LoraConfig(**fields, init_lora_weights=False, bias="all")
    )
    get_peft_model(Backbone(), config).save_pretrained(tmp_path / "a")
    adapter = load(tmp_path / "a")
    assert set(adapter.weights) | set(adapter.extras) == {name for name, _ in Backbone().named_parameters()}


# PEFT says so of patterns for raw parameters, and uses them.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
def test_a_peft_lora_of_experts_needs_the_base_and_is_read_with_it(tmp_path: Path) -> None:
    config = LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=[],
        target_parameters=["experts.down_proj", "experts.gate_up_proj"],
        rank_pattern={"experts.down_proj": 4},
        alpha_pattern={"experts.gate_up_proj": 7},
        init_lora_weights=False,
    )
    model = get_peft_model(build("mixtral"), config).eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="give the base model"):
        load(tmp_path)
    adapter = load(tmp_path, base=build("mixtral"))
    merged, before = model.merge_and_unload(), build("mixtral")
    assert len(adapter.weights) == 4
    for name, entry in adapter.weights.items():
        expected = merged.get_parameter(name) - before.get_parameter(name)
        assert torch.allclose(entry.dense(), expected, atol=1e-6), name


def test_a_head_goes_along_and_the_report_says_who_reads_it(tmp_path: Path) -> None:
    adapter = random_adapter(build("mixed"), lambda name, value: name == "line.weight")
    adapter.extras = {"head.weight": torch.randn(17, 3), "head.bias": torch.randn(17)}
    report = save(adapter, tmp_path / "lora", format="lora")
    assert "PEFT only" in str(report)
    back = load(tmp_path / "lora")
    assert back.config["modules_to_save"] == ["head"]
    assert torch.equal(back.extras["head.bias"], adapter.extras["head.bias"])
    save(adapter, tmp_path / "bare", format="lora", drop_extras=True)
    assert not load(tmp_path / "bare").extras


REFUSED = [
    (conv_adapter((6, 2, 3, 5), (4, 2, 2, 3), groups=3), "3 groups"),
    (
        Adapter({"t.weight": Entry(random_form((7, 5, 3), (2, 2, 3)), 1.0, Layout("conv", ("in", "out", "kw")))}),
        "transposed conv",
    ),
    (Adapter({"n.weight": Entry(random_form((7,), (7,)), 1.0, Layout("norm", ("channels",)))}), "kind 'norm'"),
    (
        Adapter({"m.out_proj.weight": Entry(random_form((7, 7), (2, 2)), 1.0, Layout("attention", ("out", "in")))}),
        "MultiheadAttention",
    ),
]


@pytest.mark.parametrize(("adapter", "reason"), REFUSED)
def test_what_lora_cannot_hold_is_refused_with_reason_and_remedy(tmp_path: Path, adapter: Adapter, reason: str) -> None:
    with pytest.raises(ValueError, match=f"{reason}.*flora merge.*--to kohya"):
        save(adapter, tmp_path / "lora", format="lora")
    assert not list(tmp_path.iterdir())


def test_an_unknown_layout_is_refused(tmp_path: Path) -> None:
    adapter = Adapter({"wte.weight": Entry(random_form((31, 7), (3, 3)))})
    with pytest.raises(ValueError, match=r"wte.weight of shape \(31, 7\) could be .* Embedding.*--base"):
        save(adapter, tmp_path / "lora", format="lora")
