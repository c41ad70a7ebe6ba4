"""How long does attaching take, to a model of a billion parameters and to many layers? What does saving cost?"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from tqdm import trange
from transformers import LlamaConfig, LlamaForCausalLM

import flora
from benchmarks import clock
from benchmarks.results import Options
from flora.comparison import memory

RANK = 8
REPEATS = 7
SIZES = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_key_value_heads": 4}
KINDS: tuple[Callable[[], nn.Module], ...] = (
    lambda: nn.Linear(64, 32),
    lambda: nn.Conv1d(16, 32, 3),
    lambda: nn.Conv2d(16, 32, 3),
    lambda: nn.Conv3d(8, 16, 3),
    lambda: nn.ConvTranspose2d(16, 8, 2),
)
CONFIGS: dict[str, Callable[[], Any]] = {
    "flora": lambda: flora.FloraConfig(r=RANK, target_modules="all-linear"),
    "lora": lambda: LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear"),
}


def measure(options: Options) -> dict[str, Any]:
    """Times of attaching and of saving, by each method in turn on the same model."""
    with clock.threads(options.threads[0]):
        model = llama(layers=2 if options.quick else SIZES["num_hidden_layers"])
        size = sum(parameter.numel() for parameter in model.parameters())
        found: dict[str, Any] = {name: {"attach": [], "save": []} for name in CONFIGS}
        for repeat in trange(2 if options.quick else REPEATS + 1, desc="attach"):
            for name in CONFIGS if repeat % 2 else reversed(CONFIGS):
                attached, saved = once(model, name)
                if repeat:  # the first round is warm-up
                    found[name]["attach"].append(attached)
                    found[name]["save"].append(saved["seconds"])
                found[name].update(parameters=saved["parameters"], bytes=saved["bytes"], growth=saved["growth"])
        for name, result in found.items():
            for what in ("attach", "save"):
                result[f"{what}_ms"] = clock.summary(result.pop(what))
            result["saves_without_base_weights"] = saves_without_base_weights(name)
        many = many_layers(options.quick)
    return {"parameters": size, "dtype": "bfloat16", "rank": RANK, "methods": found, "many": many}


def many_layers(quick: bool) -> dict[str, Any]:
    """Times of attaching FLoRA to many small layers of several kinds."""
    count, times = 50 if quick else 500, []
    for repeat in range(2 if quick else REPEATS + 1):
        model = nn.Sequential(*(KINDS[at % len(KINDS)]() for at in range(count)))
        config = flora.FloraConfig(r=4, target_modules="all")
        taken = clock.seconds(lambda: get_peft_model(model, config))  # noqa: B023
        if repeat:  # the first round is warm-up
            times.append(taken)

    return {"layers": count, "attach_ms": clock.summary(times)}


def llama(layers: int, device: str = "cpu") -> nn.Module:
    """A Llama of about a billion parameters in bfloat16, every page of it written."""
    config = LlamaConfig(vocab_size=32000, num_attention_heads=32, **{**SIZES, "num_hidden_layers": layers})
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    if device == "meta":
        return model
    model = model.to_empty(device=device)
    for parameter in model.parameters():
        parameter.detach().fill_(0.01)
    return model


def once(model: nn.Module, name: str) -> tuple[tuple[float, float], dict[str, Any]]:
    """Attaches, saves, takes off again: the times of attaching, and what saving was."""
    config, made = CONFIGS[name](), []
    taken = clock.seconds(lambda: made.append(get_peft_model(model, config)))
    saved = save(made[0])
    made[0].unload()
    return taken, saved


def save(adapted: PeftModel) -> dict[str, Any]:
    """Times and size of one saved adapter, and how much memory saving took."""
    with tempfile.TemporaryDirectory() as folder:
        taken = clock.seconds(lambda: adapted.save_pretrained(folder))
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        growth = memory.peak_growth(lambda: adapted.save_pretrained(folder))
    count = sum(value.numel() for value in adapted.parameters() if value.requires_grad)
    return {"seconds": taken, "bytes": size, "growth": growth, "parameters": count}


def saves_without_base_weights(name: str) -> bool:
    """Whether an adapter is saved from a model whose base weights do not exist (they are on the meta device)."""
    adapted = get_peft_model(llama(2, "meta"), CONFIGS[name](), low_cpu_mem_usage=False)
    for part, value in list(adapted.named_parameters()):
        if value.requires_grad:
            owner, _, leaf = part.rpartition(".")
            adapted.get_submodule(owner).register_parameter(leaf, nn.Parameter(torch.ones(value.shape)))
    with tempfile.TemporaryDirectory() as folder:
        try:
            adapted.save_pretrained(folder)
        except (NotImplementedError, RuntimeError):
            return False
    return True
