"""Merging into the base folder, streamed; sums of adapters."""

from __future__ import annotations

import errno
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, MarianConfig, MarianMTModel

from convert_cases import conv_adapter, difference, random_adapter, random_form
from flora import FloraConfig
from flora.convert import Adapter, Entry, Layout, load, save
from flora.convert import streaming as module
from flora.convert.arithmetic import add, scale
from flora.convert.streaming import stream_merged
from flora.runs.merging import merge
from foreign_models import build, logits
from test_extract import save_model

NAMES = ["mixed", "gpt2", "mixtral"]


def picked(name: str, value: Tensor) -> bool:
    return value.ndim > 1 and "wpe" not in name


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def merged_in_memory(name: str, pairs: list[tuple[Adapter, float]]) -> nn.Module:
    model = build(name)
    with torch.no_grad():
        for adapter, weight in pairs:
            for key, entry in adapter.weights.items():
                model.get_parameter(key).add_(weight * entry.dense())
    return model


def reload(name: str, folder: Path) -> nn.Module:
    if (folder / "config.json").exists():
        return type(build(name)).from_pretrained(folder).eval()
    model = build(name)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model


@pytest.mark.parametrize("name", NAMES)
def test_merged_is_base_plus_the_weighted_sum(name: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_model(build(name), base)
    (base / "tokenizer.json").write_text("{}")
    before = digest(base)
    pairs = [(random_adapter(build(name), picked, 0.02), 0.7), (random_adapter(build(name), picked, 0.03), -1.3)]
    result = stream_merged(base, pairs, tmp_path / "out")
    expected = merged_in_memory(name, pairs)
    assert torch.allclose(logits(reload(name, tmp_path / "out"), name), logits(expected, name), atol=1e-5)
    assert not torch.allclose(logits(expected, name), logits(build(name), name), atol=1e-3)
    assert result.difference < 1e-6
    assert digest(base) == before, "the source is never written to"
    assert set(digest(tmp_path / "out")) == set(before), "config, tokenizer and index go along, and nothing else"
    index = base / "model.safetensors.index.json"
    if index.exists():
        assert json.loads(index.read_text()) == json.loads((tmp_path / "out" / index.name).read_text())
    assert result.folder == tmp_path / "out"


@pytest.mark.parametrize("form", ["flora", "lora", "kohya", "dense"])
def test_an_adapter_of_any_format_merges_alike(form: str, tmp_path: Path) -> None:
    save_model(build("gpt2"), tmp_path / "base")
    adapter = random_adapter(build("gpt2"), picked, 0.02)
    target = tmp_path / ("a" if form in ("flora", "lora") else "a.safetensors")
    save(adapter, target, format=form)
    stream_merged(tmp_path / "base", load(target), tmp_path / "out")
    expected = merged_in_memory("gpt2", [(adapter, 1.0)])
    assert torch.allclose(logits(reload("gpt2", tmp_path / "out"), "gpt2"), logits(expected, "gpt2"), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_of_the_base_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    weight = torch.randn(7, 5, 3, 2).to(dtype)
    save_file({"net.conv.weight": weight, "steps": torch.tensor(3)}, tmp_path / "base/model.safetensors", {"a": "b"})
    adapter = conv_adapter((7, 5, 3, 2), (3, 2, 2, 2), scale=0.1)
    stream_merged(tmp_path / "base", adapter, tmp_path / "out")
    written = load_file(tmp_path / "out/model.safetensors")
    expected = (weight.double() + adapter.weights["net.conv.weight"].dense().double()).to(dtype)
    assert written["net.conv.weight"].dtype == dtype
    assert torch.allclose(written["net.conv.weight"].double(), expected.double(), rtol=1e-2, atol=1e-6)
    assert written["steps"] == 3
    with safe_open(tmp_path / "out/model.safetensors", "pt") as handle:
        assert handle.metadata() == {"a": "b"}


def test_whole_tensors_replace_and_new_ones_are_added(tmp_path: Path) -> None:
    save_model(build("gpt2"), tmp_path / "base")
    adapter = random_adapter(build("gpt2"), lambda name, value: name.endswith("c_fc.weight"))
    adapter.extras = {"lm_head.weight": torch.randn(41, 12), "score.weight": torch.randn(3, 12)}
    stream_merged(tmp_path / "base", adapter, tmp_path / "out")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"]
    for name, value in adapter.extras.items():
        assert torch.equal(load_file(tmp_path / "out" / index[name])[name], value)
    with pytest.raises(ValueError, match="stored in full.*from one adapter only, with weight 1"):
        stream_merged(tmp_path / "base", [(adapter, 0.5)], tmp_path / "half")
    adapter.extras = {"lm_head.weight": torch.randn(5, 12)}
    with pytest.raises(ValueError, match=r"lm_head.weight has shape \(41, 12\) in .* and \(5, 12\) in the adapter"):
        stream_merged(tmp_path / "base", adapter, tmp_path / "other-head")


def test_the_base_models_own_tensor_beside_its_change_is_not_a_replacement(tmp_path: Path) -> None:
    """PEFT saves the frozen embedding beside a LoRA on it."""
    base = build("gpt2")
    save_model(base, tmp_path / "base")
    name = "transformer.wte.weight"
    adapter = random_adapter(base, lambda key, value: key == name)
    own = base.state_dict()[name]
    adapter.extras = {name: own.clone()}
    stream_merged(tmp_path / "base", adapter, tmp_path / "out")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"]
    merged = load_file(tmp_path / "out" / index[name])[name]
    assert torch.allclose(merged, own + adapter.weights[name].dense(), atol=1e-6)
    adapter.extras = {name: own + 1}
    with pytest.raises(ValueError, match="both changed by an adapter and replaced by another tensor"):
        stream_merged(tmp_path / "base", adapter, tmp_path / "other")


def test_bad_input_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    save_model(build("gpt2"), base)
    good = random_adapter(build("gpt2"), picked, 0.02)
    name = "transformer.h.0.mlp.c_fc.weight"
    layout = good.weights[name].layout

    def with_form(shape: tuple[int, int], key: str = name, factor: float = 1.0) -> Adapter:
        return Adapter({key: Entry(random_form(shape, (2, 2)), factor, layout)})

    cases = [
        (base, with_form((12, 7)), ValueError, r"has shape \(12, 48\) in .* and \(12, 7\) in the adapter"),
        (
            base,
            with_form((12, 48), "h.0.mlp.c_fc.weight"),
            ValueError,
            "has no weight.*it has 'transformer.h.0.mlp.c_fc",
        ),
        (
            base,
            with_form((12, 48), factor=1e39),
            ValueError,
            f"{name} would have NaN .* too large for float32: lower",
        ),
        (tmp_path / "none", good, FileNotFoundError, "model not found"),
    ]
    for source, adapter, error, message in cases:
        with pytest.raises(error, match=message):
            stream_merged(source, adapter, out)
        assert [path.name for path in tmp_path.iterdir()] == ["base"]
    with pytest.raises(ValueError, match="in the base model's own folder"):
        stream_merged(base, good, base / "merged")
    out.mkdir()
    with pytest.raises(FileExistsError, match="exists; choose another output"):
        stream_merged(base, good, out)
    out.rmdir()

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "stream_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        stream_merged(base, good, out)
    monkeypatch.undo()

    def refuse(folder: Path) -> None:
        assert (folder / "config.json").exists()
        raise ValueError("the caller's own check")

    with pytest.raises(ValueError, match="own check"):
        stream_merged(base, good, out, check=refuse)
    add_up = module._add
    monkeypatch.setattr(module, "_add", lambda weight, changes: 1.001 * add_up(weight, changes) - 0.001 * weight)
    with pytest.raises(ValueError, match="the merged layer differs .* nothing was written; run the command again"):
        stream_merged(base, good, out)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_tied_and_quantised_weights_are_refused(tmp_path: Path) -> None:
    tied = GPT2LMHeadModel(GPT2Config(vocab_size=41, n_embd=12, n_layer=1, n_head=2))
    tied.save_pretrained(tmp_path / "tied")
    head = Entry(random_form((41, 12), (2, 2)), 1.0, Layout("linear", ("out", "in")))
    with pytest.raises(ValueError, match="'lm_head.weight'; it is tied to another weight"):
        stream_merged(tmp_path / "tied", Adapter({"lm_head.weight": head}), tmp_path / "out")
    (tmp_path / "base").mkdir()
    save_file({"net.conv.weight": torch.ones(7, 5, 3, 2, dtype=torch.int8)}, tmp_path / "base/model.safetensors")
    with pytest.raises(ValueError, match="is stored as I8; merge into the unquantised model"):
        stream_merged(tmp_path / "base", conv_adapter((7, 5, 3, 2), (3, 2, 2, 2)), tmp_path / "out")


def marian() -> MarianMTModel:
    torch.manual_seed(0)
    sizes = {"d_model": 12, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 14, "decoder_ffn_dim": 10}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 3, "max_position_embeddings": 17}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "forced_eos_token_id": None}
    return MarianMTModel(MarianConfig(vocab_size=31, **sizes, **heads, **ids)).eval()


def translated(model: Any) -> Tensor:
    ids = torch.tensor([[4, 7, 9, 2, 5]])
    with torch.no_grad():
        return model.eval()(input_ids=ids, decoder_input_ids=ids[:, :3]).logits  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:.*the weight is tied")
def test_positions_that_a_model_computes_are_left_out_of_all(tmp_path: Path) -> None:
    base = marian()
    base.save_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match=r"leaves out .*embed_positions: the model computes the weight itself"):
        model = get_peft_model(base, FloraConfig(r=2, target_modules="all", init_weights=False, scale=3))
    model.save_pretrained(tmp_path / "adapter")
    done = merge(tmp_path / "adapter", tmp_path / "merged", base=str(tmp_path / "base"))
    assert done.difference is not None, done.reason

    merged = MarianMTModel.from_pretrained(tmp_path / "merged")
    assert torch.allclose(translated(merged), translated(model), atol=1e-6)
    assert not torch.allclose(translated(merged), translated(marian()), atol=1e-3)


def test_positions_that_a_model_computes_are_saved_once_they_are_merged(tmp_path: Path) -> None:
    base = marian()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, FloraConfig(r=2, target_modules=["embed_positions"], init_weights=False, scale=3))
    out = translated(model)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"'model.decoder.embed_positions.weight'; MarianMTModel computes it"):
        stream_merged(tmp_path / "base", load(tmp_path / "adapter"), tmp_path / "merged")

    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert torch.allclose(translated(MarianMTModel.from_pretrained(tmp_path / "merged")), out, atol=1e-6)
    assert not torch.allclose(out, translated(marian()), atol=1e-4)


@pytest.mark.parametrize(
    ("first", "second"), [((3, 2, 2, 2), (4, 3, 1, 2)), ((7, 2, 3, 2), (2, 5, 3, 1)), ((6, 4, 2, 2), (5, 3, 2, 1))]
)
def test_sums_are_exact(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    a, b = conv_adapter((7, 5, 3, 2), first), conv_adapter((7, 5, 3, 2), second, scale=-0.3)
    c = Adapter({"other.weight": Entry(random_form((5, 3), (2, 2)), 2.0, Layout("linear", ("out", "in")))})
    total = add([(a, 0.5), (b, -2.0), (c, 3.0)])
    expected = 0.5 * a.weights["net.conv.weight"].dense() - 2 * b.weights["net.conv.weight"].dense()
    assert torch.allclose(total.weights["net.conv.weight"].dense(), expected, atol=1e-5)
    assert torch.allclose(total.weights["other.weight"].dense(), 3 * c.weights["other.weight"].dense(), atol=1e-6)
    sums = [x + y for x, y in zip(first, second, strict=True)]
    assert total.weights["net.conv.weight"].ranks == tuple(map(min, sums, (7, 5, 3, 2)))
    assert difference(scale(a, -0.25), add([(a, -0.25)])) == 0


def test_a_difference_with_itself_is_zero() -> None:
    a = conv_adapter((7, 5, 3, 2), (2, 2, 2, 2))
    nothing = add([(a, 1.0), (a, -1.0)])
    assert float(nothing.weights["net.conv.weight"].dense().abs().max()) < 1e-6


def test_sums_that_make_no_sense_are_refused() -> None:
    a, b = conv_adapter((7, 5, 3, 2), (2, 2, 2, 2)), conv_adapter((7, 3, 3, 2), (2, 2, 2, 2))
    with pytest.raises(ValueError, match="net.conv.weight has shape"):
        add([(a, 1.0), (b, 1.0)])
    with pytest.raises(ValueError, match="at least one"):
        add([])
    a.extras["x.bias"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"x.bias is stored in full.* cannot be scaled"):
        scale(a, 2.0)
    other = conv_adapter((7, 5, 3, 2), (2, 2, 2, 2))
    other.extras["x.bias"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"x.bias is stored in full and differs"):
        add([(a, 1.0), (other, 1.0)])
