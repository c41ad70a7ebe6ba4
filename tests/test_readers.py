"""What we write, read by the programs that it is for: their numbers against a model with the changes written in.

Each test needs its reader, and skips without it; docs/serve.md lists which ones have been run.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from convert_cases import random_adapter
from flora import FloraConfig
from flora.convert import Adapter, convert, save
from flora_cli import main

# What other packages warn of is theirs.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
PLUGINS = Path(__file__).resolve().parents[1] / "examples" / "plugins"
TARGETS = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "up_proj.weight", "down_proj.weight")
SIZES = LlamaConfig(
    vocab_size=71, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=3,
    num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=False, initializer_range=0.2,
)  # fmt: skip
TOKENS = [1, 17, 5, 60, 33, 8]


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(SIZES).eval()


def llama_adapter() -> Adapter:
    torch.manual_seed(3)
    return random_adapter(llama(), lambda name, value: name.endswith(TARGETS), 0.1)


def written_in(adapter: Adapter) -> LlamaForCausalLM:
    """A copy of the base with ``W + s dW`` in the place of W, by the definition."""
    model = llama()
    with torch.no_grad():
        for name, entry in adapter.weights.items():
            model.get_parameter(name).add_(entry.dense())
    return model


def expected(model: LlamaForCausalLM) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0, -1].log_softmax(-1)


# ---- llama.cpp -----------------------------------------------------------------------------------------------------

PARTS = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
HEADS = {"attn_q": 3, "attn_k": 1}


def gguf_name(name: str) -> str:
    """``model.layers.1.mlp.up_proj`` -> ``blk.1.ffn_up``."""
    if name in PARTS:
        return PARTS[name]
    number, _, inner = name.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{PARTS[inner]}"


def as_gguf_rows(name: str, value: Tensor) -> np.ndarray[Any, Any]:
    """llama.cpp turns pairs of neighbouring numbers, transformers the two halves of a head: the rows change places."""
    heads = HEADS.get(name.rpartition(".")[2])
    if heads is not None:
        value = value.view(heads, 2, -1, value.shape[1]).transpose(1, 2).reshape(value.shape)
    return value.float().contiguous().numpy()


def write_gguf_base(model: LlamaForCausalLM, path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(48)
    writer.add_block_count(2)
    writer.add_feed_forward_length(80)
    writer.add_head_count(3)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(SIZES.rms_norm_eps)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(71)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"word{number}" for number in range(3, 71))])
    writer.add_token_scores([0.0] * 71)
    writer.add_token_types([2, 3, 3, *([1] * 68)])

    for key, value in model.state_dict().items():
        name = gguf_name(key.removesuffix(".weight"))
        writer.add_tensor(f"{name}.weight", as_gguf_rows(name, value) if value.ndim == 2 else value.numpy())

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gguf_adapter(folder: Path, path: Path) -> None:
    """What llama.cpp's converter does with a LoRA folder, by the ``gguf`` package."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    tensors = load_file(folder / "adapter_model.safetensors")
    ranks = {value.shape[0] for key, value in tensors.items() if key.endswith("lora_A.weight")}
    assert len(ranks) == 1, "one rank for all layers"

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(ranks.pop()))

    for key, value in tensors.items():
        module, _, part = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        name = gguf_name(module)
        rows = value.numpy() if part == "lora_A" else as_gguf_rows(name, value)
        writer.add_tensor(f"{name}.weight.{part.lower()}", rows)

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def convert_with_llama_cpp(folder: Path, base: Path, path: Path) -> None:
    """llama.cpp's own ``convert_lora_to_gguf.py``, of the sources that ``LLAMA_CPP`` names."""
    sources = os.environ.get("LLAMA_CPP")
    if not sources:
        pytest.skip("LLAMA_CPP does not name the sources of llama.cpp, for convert_lora_to_gguf.py")

    command = [sys.executable, f"{sources}/convert_lora_to_gguf.py", "--base", str(base), "--outtype", "f32"]
    done = subprocess.run([*command, "--outfile", str(path), str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def log_probabilities(base: Path, adapter: Path | None) -> Tensor:
    """Of the next token, by llama.cpp."""
    engine = pytest.importorskip("xllamacpp", reason="xllamacpp, llama.cpp as a wheel, is not installed")
    params = engine.CommonParams()
    params.model.path = str(base)
    params.n_ctx, params.n_gpu_layers, params.warmup = 64, 0, False

    if adapter is not None:
        loaded = engine.CommonAdapterLoraInfo()
        loaded.path, loaded.scale = str(adapter), 1.0
        params.lora_adapters = [loaded]

    request = {"prompt": TOKENS, "n_predict": 1, "n_probs": 71, "temperature": 0.0, "cache_prompt": False}
    answer = engine.Server(params).handle_completions(request)
    found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    values = torch.full((71,), float("nan"))
    for one in found:
        values[one["id"]] = one["logprob"]

    return values


@pytest.mark.parametrize("converter", ["gguf", "llama.cpp"])
def test_llama_cpp_computes_what_the_adapter_says(converter: str, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="xllamacpp, llama.cpp as a wheel, is not installed")
    adapter = llama_adapter()
    llama().save_pretrained(tmp_path / "base-model")
    save(adapter, tmp_path / "my-adapter")
    convert(tmp_path / "my-adapter", tmp_path / "lora", to="lora", drop_extras=True)
    write_gguf_base(llama(), tmp_path / "base.gguf")

    if converter == "gguf":
        write_gguf_adapter(tmp_path / "lora", tmp_path / "lora.gguf")
    else:
        convert_with_llama_cpp(tmp_path / "lora", tmp_path / "base-model", tmp_path / "lora.gguf")

    plain, adapted = expected(llama()), expected(written_in(adapter))
    assert (plain - adapted).abs().max() > 0.5, "the change has to be seen"
    # llama.cpp keeps keys and values in 16 bits.
    torch.testing.assert_close(log_probabilities(tmp_path / "base.gguf", None), plain, rtol=0, atol=0.01)
    found = log_probabilities(tmp_path / "base.gguf", tmp_path / "lora.gguf")
    torch.testing.assert_close(found, adapted, rtol=0, atol=0.01)


# ---- merged models -------------------------------------------------------------------------------------------------


def test_onnxruntime_computes_what_the_merged_network_does(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 14, 3), nn.GELU(), nn.Conv2d(14, 14, 5, groups=7), nn.Flatten(), nn.LazyLinear(5)
    )
    x = torch.randn(2, 3, 13, 11)
    network(x)
    model: Any = get_peft_model(network, FloraConfig(r=3, target_modules="all", init_weights=False)).eval()
    said = model(x).detach()
    path = tmp_path / "model.onnx"
    torch.onnx.export(model.merge_and_unload(), (x,), str(path), dynamo=True)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    torch.testing.assert_close(found, said, rtol=1e-4, atol=1e-5)


def test_mlx_reads_the_merged_model(tmp_path: Path) -> None:
    pytest.importorskip("mlx.core", reason="mlx is not installed")
    utils = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed")
    mx = pytest.importorskip("mlx.core")
    adapter = llama_adapter()
    llama().save_pretrained(tmp_path / "base")
    save(adapter, tmp_path / "adapter")
    argv = ["merge", str(tmp_path / "adapter"), "--base", str(tmp_path / "base"), "--out", str(tmp_path / "merged")]
    assert main(argv) == 0
    model = utils.load_model(tmp_path / "merged")[0]
    found = torch.from_numpy(np.array(model(mx.array([TOKENS])))[0, -1]).log_softmax(-1)
    torch.testing.assert_close(found, expected(written_in(adapter)), rtol=0, atol=2e-3)


# ---- trainers ------------------------------------------------------------------------------------------------------


def test_ms_swift_trains_it_as_a_tuner(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plugin = pytest.importorskip("swift.tuner_plugin", reason="ms-swift is not installed")
    monkeypatch.syspath_prepend(str(PLUGINS))
    __import__("swift_flora")
    tuner = plugin.tuners_map["flora"]
    model = tuner.prepare_model(SimpleNamespace(lora_rank=4), llama())
    assert model.peft_config["default"].peft_type == "TUCKER"
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "tucker_" in name:
                value.normal_(std=0.2)
    tuner.save_pretrained(model, str(tmp_path / "saved"))
    again = tuner.from_pretrained(llama(), str(tmp_path / "saved")).eval()
    assert torch.equal(again(torch.tensor([TOKENS])).logits, model.eval()(torch.tensor([TOKENS])).logits)


def test_axolotl_loads_it_as_an_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    base = pytest.importorskip("axolotl.integrations.base", reason="axolotl is not installed")
    monkeypatch.syspath_prepend(str(PLUGINS))
    plugin = __import__("axolotl_flora").FloraPlugin()
    assert isinstance(plugin, base.BasePlugin)
    assert [one.name for one in plugin.get_adapter_capabilities()] == ["flora"]
    cfg = SimpleNamespace(adapter="flora", lora_r=4, lora_model_dir=None)
    model, config = plugin.load_adapter(llama(), cfg)
    assert config.r == 4
    assert model.peft_config["default"].peft_type == "TUCKER"
    assert plugin.load_adapter(None, cfg, config_only=True)[0] is None
    assert plugin.load_adapter(None, SimpleNamespace(adapter="lora")) is None
