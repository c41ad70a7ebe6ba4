"""Tiny random models of the families that PEFT tests on, in place of those it takes from the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

SIZES: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 1000, "n_positions": 128}
OPT = {
    "vocab_size": 1000,
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "word_embed_proj_dim": 32,
    "max_position_embeddings": 128,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 1000}
BART = {
    "vocab_size": 1000,
    "d_model": 32,
    "max_position_embeddings": 128,
    **{f"{side}_{part}": size for side in ("encoder", "decoder") for part, size in
       (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))},
}  # fmt: skip

MODELS: dict[str, tuple[str, dict[str, Any]]] = {  # model class -> config class, its sizes
    "LlamaForCausalLM": ("LlamaConfig", GROUPED),
    "Qwen2ForCausalLM": ("Qwen2Config", GROUPED),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", {**GROUPED, "head_dim": 8}),
    "GPT2LMHeadModel": ("GPT2Config", GPT),
    "GPTJForCausalLM": ("GPTJConfig", {**GPT, "rotary_dim": 4}),
    "OPTForCausalLM": ("OPTConfig", OPT),
    "T5ForConditionalGeneration": ("T5Config", {**T5, "decoder_start_token_id": 0}),
    "BartForConditionalGeneration": ("BartConfig", BART),
    "BertModel": ("BertConfig", SIZES),
    "RobertaModel": ("RobertaConfig", SIZES),
    "DebertaModel": ("DebertaConfig", SIZES),
    "DebertaV2Model": ("DebertaV2Config", SIZES),
    "BertForSequenceClassification": ("BertConfig", SIZES),
    "RobertaForSequenceClassification": ("RobertaConfig", SIZES),
    "LlamaForSequenceClassification": ("LlamaConfig", {**GROUPED, "pad_token_id": 0}),
}


def write_model(name: str, folder: Path) -> Path:
    """Writes a random model of this class into ``folder / name``; returns that path."""
    config, sizes = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**sizes))
    model.save_pretrained(folder / name)
    return folder / name
