"""Models too large for any machine here, on the meta device: what is adapted, and with how many parameters."""

from __future__ import annotations

import time

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

import flora
from flora.tuner.layer import FloraLayer

LLAMA_70B = LlamaConfig(
    hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
)
MIXTRAL_8X7B = MixtralConfig()  # the defaults of transformers are those of Mixtral 8x7B
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def adapted(model_config: LlamaConfig | MixtralConfig, **fields: object) -> PeftModel:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, dtype=torch.bfloat16)
        return get_peft_model(model, flora.FloraConfig(**fields))


def matrix(rows: int, columns: int, rank: int) -> int:
    """Parameters of the Tucker form of a matrix: core and two factors."""
    return rank * rank + rank * (rows + columns)


def flora_layers(model: PeftModel) -> list[FloraLayer]:
    return [module for module in model.modules() if isinstance(module, FloraLayer)]


def test_a_llama_of_70b_on_the_meta_device() -> None:
    model = adapted(LLAMA_70B, r=16, target_modules="all-linear")
    trainable, total = model.get_nb_trainable_parameters()
    attention = 2 * matrix(8192, 8192, 16) + 2 * matrix(1024, 8192, 16)
    feed_forward = 3 * matrix(28672, 8192, 16)
    assert trainable == 80 * (attention + feed_forward) == 207_237_120
    assert total - trainable == 68_976_648_192
    assert len(flora_layers(model)) == 80 * 7
    assert all(value.is_meta for value in model.parameters())


def test_a_mixtral_of_47b_on_the_meta_device() -> None:
    ranks = [4, 16, 16]
    model = adapted(MIXTRAL_8X7B, r=ranks, target_parameters=EXPERTS)
    trainable, total = model.get_nb_trainable_parameters()
    hidden, inner, experts = 4096, 14336, 8
    core, expert_factor = 4 * 16 * 16, experts * 4
    gate_up = core + expert_factor + 16 * (2 * inner + hidden)
    down = core + expert_factor + 16 * (hidden + inner)
    assert trainable == 32 * (gate_up + down)
    assert total - trainable == 46_702_792_704
    assert len(flora_layers(model)) == 32 * 2
    per_expert = 32 * experts * 16 * (2 * inner + hidden + hidden + inner)  # LoRA: two factors for each expert
    assert trainable < per_expert / 7


@pytest.mark.slow
def test_attaching_to_500_layers_takes_less_than_two_seconds() -> None:
    """Of processor time, on models of five kinds of layers; the better of two, because the first also imports."""
    kinds = [(nn.Linear, 2), (nn.Conv1d, 3), (nn.Conv2d, 3), (nn.Conv3d, 3), (nn.ConvTranspose2d, 2)]
    taken = []
    for _ in range(2):
        layers = [kind(16, 32, size) if kind is not nn.Linear else kind(64, 32) for kind, size in 100 * kinds]
        start = time.process_time()
        model = get_peft_model(nn.Sequential(*layers), flora.FloraConfig(r=4, target_modules="all"))
        taken.append(time.process_time() - start)
        assert len(flora_layers(model)) == 500

    assert min(taken) < 2


def test_attention_and_experts_together() -> None:
    pattern = {"experts.gate_up_proj": [4, 16, 16], "experts.down_proj": [4, 16, 16]}
    model = adapted(
        MIXTRAL_8X7B, r=8, target_modules=["q_proj", "v_proj"], target_parameters=EXPERTS, rank_pattern=pattern
    )
    trainable, _ = model.get_nb_trainable_parameters()
    experts, _ = adapted(MIXTRAL_8X7B, r=[4, 16, 16], target_parameters=EXPERTS).get_nb_trainable_parameters()
    attention = 32 * (matrix(4096, 4096, 8) + matrix(1024, 4096, 8))
    assert trainable == experts + attention


def test_a_budget_on_a_70b_model() -> None:
    budget = 40_000_000
    trainable, _ = adapted(LLAMA_70B, target_modules="all-linear", budget=budget).get_nb_trainable_parameters()
    assert 0.99 * budget <= trainable <= budget
