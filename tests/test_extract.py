"""Extraction of adapters from full fine-tunes: errors, budgets, resuming, memory, what is reported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    HubertConfig,
    HubertForCTC,
    MambaConfig,
    MambaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from convert_cases import random_adapter
from flora.convert import load, save
from flora.convert.extraction import finetune as module
from flora.convert.extraction.finetune import Extracted, extract
from flora.layers.axes import roles_of
from flora.layers.layout import from_shape
from flora.tucker.allocation import Choice, choices, is_cut, spend
from flora.tucker.decomposition import decompose
from flora.tucker.form import count_params
from flora.tucker.ranks import Weight, resolve, solve_budget
from foreign_models import build, logits

NAMES = ["mixed", "gpt2", "mixtral"]


def save_model(model: nn.Module, folder: Path) -> None:
    """As transformers does, in small shards, or as a plain state dict."""
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder, max_shard_size="6KB")
    else:
        folder.mkdir()
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "model.safetensors")


def tuned(name: str, *, noise: float = 0.0) -> nn.Module:
    """The model plus a Tucker form on every weight of two dimensions, plus noise of different size per layer."""
    model = build(name)
    torch.manual_seed(7)
    adapter = random_adapter(model, lambda key, value: value.ndim > 1 and "wpe" not in key, scale=0.01)
    with torch.no_grad():
        for place, (key, entry) in enumerate(adapter.weights.items()):
            change = entry.dense() * (1 + place % 5)
            model.get_parameter(key).add_(change + noise * change.std() * torch.randn(change.shape))
    return model


@pytest.fixture(params=NAMES)
def models(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, Path]:
    save_model(build(request.param), tmp_path / "base")
    save_model(tuned(request.param), tmp_path / "tuned")
    return request.param, tmp_path / "base", tmp_path / "tuned"


def test_what_is_a_tucker_form_is_recovered_and_loads_into_peft(models: tuple[str, Path, Path], tmp_path: Path) -> None:
    name, base, fine = models
    found = extract(base, fine, rank=4)
    assert found.error < 1e-5
    assert all(row.error < 1e-5 for row in found.rows)
    assert not found.whole
    save(found, tmp_path / "adapter")
    model = PeftModel.from_pretrained(build(name), tmp_path / "adapter").eval()
    assert torch.allclose(logits(model, name), logits(tuned(name), name), atol=1e-4)


@pytest.mark.parametrize("name", [*NAMES, "resnet", "volumes"])
@pytest.mark.parametrize("fraction", [0.15, 0.4])
def test_a_budget_beats_uniform_ranks(name: str, fraction: float, tmp_path: Path) -> None:
    save_model(build(name), tmp_path / "base")
    save_model(tuned(name, noise=0.5), tmp_path / "tuned")
    everything = extract(tmp_path / "base", tmp_path / "tuned", energy=1.0)
    shapes = {row.name: Weight(row.shape, roles_of(from_shape(row.name, row.shape).axes)) for row in everything.rows}
    budget = int(fraction * sum(torch.Size(weight.shape).numel() for weight in shapes.values()))
    rank = max(r for r in range(1, 60) if uniform_cost(shapes, r) <= budget)
    uniform = extract(tmp_path / "base", tmp_path / "tuned", rank=rank)
    best = extract(tmp_path / "base", tmp_path / "tuned", budget=budget)
    assert uniform.num_params <= budget
    assert best.num_params <= budget
    assert best.error < uniform.error


def uniform_cost(weights: dict[str, Weight], rank: int) -> int:
    return sum(count_params(w.shape, resolve(w.shape, rank, None, roles=w.roles)) for w in weights.values())


def test_a_budget_beats_the_uniform_solver_of_the_tuner_too() -> None:
    tensors = {f"{n}.weight": (1 + n) * torch.randn(11 + 2 * n, 7, 3, 2) for n in range(4)}
    axes = ("out", "in", "kh", "kw")
    ranks = solve_budget(
        {name: Weight(tuple(t.shape), roles_of(axes)) for name, t in tensors.items()}, 900, kernel_r=None
    )
    spent = spend({name: choices(tensor) for name, tensor in tensors.items()}, 900)
    assert sum(choice.params for choice in spent.values()) <= 900
    uniform = sum((decompose(t, ranks[n]).error * float(t.norm())) ** 2 for n, t in tensors.items())
    assert sum(choice.error for choice in spent.values()) < uniform


def test_a_budget_below_the_first_choices_is_refused() -> None:
    listed = [Choice((1, 1), 24, 5.0), Choice((2, 2), 50, 1.0)]
    with pytest.raises(ValueError, match="budget of 47 parameters is below 48, what the smallest ranks of 2 weights"):
        spend({"a": listed, "b": listed}, 47)
    assert [choice.params for choice in spend({"a": listed, "b": listed}, 48).values()] == [24, 24]


def test_large_ranks_are_tried_where_the_small_ones_do_not_do(tmp_path: Path) -> None:
    """One change has 100 directions that count, the other two: no cut at the ranks that are tried first."""
    torch.manual_seed(5)
    changes = {
        "wide.weight": torch.randn(430, 100) @ torch.randn(100, 370),
        "narrow.weight": torch.randn(430, 2) @ torch.randn(2, 370),
    }
    for folder in ("base", "tuned"):
        (tmp_path / folder).mkdir()
        tensors = {name: float(folder == "tuned") * change for name, change in changes.items()}
        save_file(tensors, tmp_path / folder / "model.safetensors")
    expected = {"wide.weight": (100, 100), "narrow.weight": (2, 2)}
    budget = sum(count_params((430, 370), ranks) for ranks in expected.values())
    for request in ({"budget": budget}, {"energy": 1 - 1e-9}):
        found = extract(tmp_path / "base", tmp_path / "tuned", **request)
        assert {row.name: row.ranks for row in found.rows} == expected
        assert found.error < 1e-4


def test_few_ranks_of_a_large_matrix_are_judged_as_by_all_its_singular_values() -> None:
    dense = torch.randn(700, 540) + torch.randn(700, 5) @ torch.randn(5, 540)
    few, every = choices(dense, most=40), choices(dense)
    assert [choice.ranks for choice in few] == [choice.ranks for choice in every[:41]]
    for found, exact in zip(few, every[:41], strict=True):
        assert exact.error * (1 - 1e-6) <= found.error <= 1.01 * exact.error
    assert is_cut(few[-1], (700, 540), 40)
    assert not is_cut(few[-2], (700, 540), 40)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_the_energy_is_kept(models: tuple[str, Path, Path], energy: float) -> None:
    _, base, fine = models
    found = extract(base, fine, energy=energy)
    assert all(1 - row.error**2 >= energy - 1e-6 for row in found.rows)
    assert found.num_params < extract(base, fine, energy=1.0).num_params


def test_biases_and_norms_are_reported_and_carried(tmp_path: Path) -> None:
    model = tuned("gpt2")
    with torch.no_grad():
        model.transformer.h[0].ln_1.bias.add_(0.5)
        model.transformer.h[1].mlp.c_fc.bias.add_(0.5)
    save_model(build("gpt2"), tmp_path / "base")
    save_model(model, tmp_path / "tuned")
    found = extract(tmp_path / "base", tmp_path / "tuned", rank=3)
    assert set(found.whole) == {"transformer.h.0.ln_1.bias", "transformer.h.1.mlp.c_fc.bias"}
    assert not found.extras
    assert "NOT in the adapter" in found.table()
    carried = extract(tmp_path / "base", tmp_path / "tuned", rank=3, carry=True)
    assert set(carried.extras) == {*found.whole, "transformer.h.0.ln_1.weight"}, "a module is carried whole"
    save(carried, tmp_path / "adapter")
    again = PeftModel.from_pretrained(build("gpt2"), tmp_path / "adapter").eval()
    assert torch.allclose(logits(again, "gpt2"), logits(model, "gpt2"), atol=1e-4)


def vit() -> nn.Module:
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
    return ViTForImageClassification(ViTConfig(image_size=14, patch_size=7, num_labels=3, **sizes))


def convnext() -> nn.Module:
    return ConvNextForImageClassification(
        ConvNextConfig(num_stages=2, hidden_sizes=[6, 10], depths=[1, 2], image_size=32, num_labels=3)
    )


def mamba() -> nn.Module:
    sizes = {"hidden_size": 12, "state_size": 5, "num_hidden_layers": 1}
    return MambaForCausalLM(MambaConfig(vocab_size=41, tie_word_embeddings=False, use_cache=False, **sizes))


def hubert() -> nn.Module:
    convolutions = {"conv_dim": (7, 7), "conv_stride": (2, 3), "conv_kernel": (5, 3), "num_feat_extract_layers": 2}
    convolutions |= {"num_conv_pos_embeddings": 6, "num_conv_pos_embedding_groups": 2}
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
    return HubertForCTC(HubertConfig(vocab_size=29, apply_spec_augment=False, **convolutions, **sizes))


IMAGES = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))}
CARRIED = {
    "vit": (vit, {"pixel_values": IMAGES["pixel_values"][..., :14, :14]}),
    "convnext": (convnext, IMAGES),
    "mamba": (mamba, {"input_ids": torch.tensor([[5, 9, 14, 2], [7, 30, 21, 3]])}),
    "hubert": (hubert, {"input_values": torch.randn(2, 401, generator=torch.Generator().manual_seed(1))}),
}


@pytest.mark.parametrize("name", CARRIED)
def test_a_fine_tune_of_everything_is_carried_and_loads_into_peft(name: str, tmp_path: Path) -> None:
    """Bare parameters too, beside adapted layers: class tokens, layer scales, state matrices; and weight norms."""
    build, inputs = CARRIED[name]
    torch.manual_seed(2)
    base = build().eval()
    base.save_pretrained(tmp_path / "base")
    tuned_model = build().eval()
    with torch.no_grad():
        for (key, value), start in zip(tuned_model.named_parameters(), base.parameters(), strict=True):
            value.copy_(start + 0.1 * torch.randn(value.shape) / max(1, value[0].numel()) ** 0.5)
            assert not torch.equal(value, start), key
    tuned_model.save_pretrained(tmp_path / "tuned")

    found = extract(tmp_path / "base", tmp_path / "tuned", rank=100, carry=True)
    save(found, tmp_path / "adapter")
    model = PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    with torch.no_grad():
        expected, plain = tuned_model(**inputs).logits, base(**inputs).logits
        assert torch.allclose(model(**inputs).logits, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(plain, expected, atol=1e-2)
    again = load(tmp_path / "adapter", base=base)
    assert again.weights.keys() == found.weights.keys()
    assert again.extras.keys() == found.extras.keys()


def test_numbers_of_eight_bits_are_compared_too(tmp_path: Path) -> None:
    scales = torch.tensor([1.0, 2.0, 4.0])
    for folder, number, kind in (("base", 1.0, torch.float32), ("tuned", 2.0, torch.float8_e4m3fn)):
        (tmp_path / folder).mkdir()
        tensors = {"net.weight": torch.ones(3, 5) * number, "net.scales": scales.to(kind)}
        save_file(tensors, tmp_path / folder / "model.safetensors")
    assert extract(tmp_path / "base", tmp_path / "tuned", rank=2).whole == []


def test_what_no_adapter_can_carry_is_named(tmp_path: Path) -> None:
    for folder, number in (("base", 1.0), ("tuned", 2.0)):
        (tmp_path / folder).mkdir()
        tensors = {"net.weight": torch.ones(3, 5) * number, "logit_scale": torch.tensor(number)}
        save_file(tensors, tmp_path / folder / "model.safetensors")
    with pytest.raises(ValueError, match="logit_scale differs, and no adapter can carry it"):
        extract(tmp_path / "base", tmp_path / "tuned", rank=2, carry=True)
    assert extract(tmp_path / "base", tmp_path / "tuned", rank=2).whole == ["logit_scale"]


@pytest.mark.parametrize("request_", [{"rank": 2}, {"budget": 700}])
def test_a_killed_extraction_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request_: dict[str, int]) -> None:
    save_model(build("gpt2"), tmp_path / "base")
    save_model(tuned("gpt2"), tmp_path / "tuned")
    pair = (tmp_path / "base", tmp_path / "tuned")
    expected = extract(*pair, **request_)
    calls: list[int] = []

    def dies(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return decompose(*args, **kwargs)

    monkeypatch.setattr(module, "decompose", dies)
    with pytest.raises(KeyboardInterrupt):
        extract(*pair, work=tmp_path / "work", **request_)
    resumed = extract(*pair, work=tmp_path / "work", **request_)
    fitted = sum(1 for row in expected.rows if row.params)
    assert len(calls) == fitted + 1, "only the layer that was cut short is done again"
    assert resumed.rows == expected.rows
    assert all(torch.equal(resumed.weights[n].form.core, e.form.core) for n, e in expected.weights.items())
    with pytest.raises(ValueError, match="layers of another extraction"):
        extract(*pair, rank=4, work=tmp_path / "work")


def test_bad_requests_and_models(tmp_path: Path) -> None:
    base, fine = tmp_path / "base", tmp_path / "tuned"
    save_model(build("gpt2"), base)
    save_model(tuned("gpt2"), fine)
    with pytest.raises(ValueError, match="exactly one of rank, energy and budget .*, got none"):
        extract(base, fine)
    with pytest.raises(ValueError, match="got rank and budget"):
        extract(base, fine, rank=2, budget=9)
    with pytest.raises(ValueError, match="above 0 and at most 1, got 1.5"):
        extract(base, fine, energy=1.5)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        extract(base, fine, budget=0)
    with pytest.raises(FileNotFoundError, match="model not found"):
        extract(tmp_path / "none", fine, rank=2)
    with pytest.raises(ValueError, match="nothing to extract"):
        extract(base, base, rank=2)
    shard = next(path for path in sorted(fine.glob("*.safetensors")))
    tensors = load_file(shard)
    name = next(key for key, value in tensors.items() if value.ndim == 2)
    save_file({**tensors, name: torch.full_like(tensors[name], torch.nan)}, shard)
    with pytest.raises(ValueError, match=f"{name} has NaN"):
        extract(base, fine, rank=2)
    save_file({**tensors, name: torch.ones(3, 2)}, shard)
    with pytest.raises(ValueError, match=r"it is not a fine-tune of that model"):
        extract(base, fine, rank=2)
    save_file({key: value for key, value in tensors.items() if key != name}, shard)
    with pytest.raises(ValueError, match="which lacks it; copy or download it again"):
        extract(base, fine, rank=2)
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(ValueError, match="truncated or corrupt"):
        extract(base, fine, rank=2)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks 1 of .* shards .*first: {shard.name}"):
        extract(base, fine, rank=2)


def test_the_result_is_an_adapter_like_any_other(models: tuple[str, Path, Path], tmp_path: Path) -> None:
    _, base, fine = models
    found = extract(base, fine, rank=2)
    assert isinstance(found, Extracted)
    report = save(found, tmp_path / "out.safetensors", format="dense")
    assert report.weights == len(load(tmp_path / "out.safetensors").weights)


MEMORY = """
import re, sys
from pathlib import Path
from flora.convert.finetune import extract
# not getrusage: its peak is inherited from the process that starts this one
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
before = peak()
found = extract(sys.argv[1], sys.argv[2], rank=8)
print(before, peak(), len(found.rows), found.error)
"""


@pytest.mark.slow
def test_memory_stays_below_2_gb_on_a_checkpoint_of_1_5_gb(tmp_path: Path) -> None:
    index: dict[str, dict[str, str]] = {}
    for folder in ("base", "tuned"):
        (tmp_path / folder).mkdir()
        weight_map = index.setdefault(folder, {})
        for shard in range(6):
            torch.manual_seed(shard)
            tensors = {f"layers.{shard}.{n}.weight": torch.randn(4096, 2048) for n in range(8)}
            if folder == "tuned":
                tensors = {k: v + 0.01 * torch.randn(4096, 4) @ torch.randn(4, 2048) for k, v in tensors.items()}
            file = f"model-{shard}.safetensors"
            save_file(tensors, tmp_path / folder / file)
            weight_map.update(dict.fromkeys(tensors, file))
        (tmp_path / folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    size = sum(path.stat().st_size for path in (tmp_path / "base").glob("*.safetensors"))
    assert size > 1.5e9
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "base"), str(tmp_path / "tuned")],
        capture_output=True,
        text=True,
        check=True,
    )
    before, after, rows, error = done.stdout.split()
    print(f"peak {int(after) / 1e9:.2f} GB, of which {int(before) / 1e9:.2f} GB before the first layer")
    assert int(after) < 2e9
    assert int(rows) == 48
    assert float(error) < 1e-4
