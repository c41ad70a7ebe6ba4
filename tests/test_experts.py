"""Fused experts of transformers: one Tucker form over (expert, out, in), on every implementation of their products."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import NoMatchingPeftModuleError
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import flora
from flora.experts import ExpertStack, Term
from flora.tuner.parameter import ParamWrapper

COMMON = {
    "vocab_size": 37,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "num_experts_per_tok": 2,
}
MODELS: dict[str, Any] = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**COMMON, intermediate_size=40, num_local_experts=5)),
    "qwen3": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**COMMON, intermediate_size=40, moe_intermediate_size=16, num_experts=7, mlp_only_layers=[])
    ),
    "gpt-oss": lambda: GptOssForCausalLM(
        GptOssConfig(**COMMON, intermediate_size=40, num_local_experts=5, layer_types=["full_attention"] * 2)
    ),
}
TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
WAYS = ["eager", "batched_mm", "grouped_mm"]


def build(name: str, way: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]()
    for parameter in model.parameters():  # gpt-oss leaves its experts uninitialised
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=0.2)
    model.config._experts_implementation = way
    return model.eval()


def adapt(name: str, way: str, **fields: Any) -> nn.Module:
    base = build(name, way)
    torch.manual_seed(1)
    config = {"r": [3, 5, 7], "target_modules": [], "target_parameters": TARGETS, "init_weights": False}
    return get_peft_model(base, flora.FloraConfig(**{**config, **fields})).eval()


def ids() -> Tensor:
    torch.manual_seed(2)
    return torch.randint(0, 37, (3, 5))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_adapted_equals_merged_and_gradients_agree(name: str, way: str) -> None:
    model, dense = adapt(name, way), adapt(name, way, path="rebuild")
    out = model(ids()).logits
    assert not torch.allclose(out, build(name, way)(ids()).logits, atol=1e-3)
    assert torch.allclose(out, dense(ids()).logits, atol=1e-5)
    out.square().sum().backward()
    dense(ids()).logits.square().sum().backward()
    pairs = zip(model.named_parameters(), dense.parameters(), strict=True)
    compared = 0
    for (key, value), other in pairs:
        if value.grad is not None:
            assert torch.allclose(value.grad, other.grad, rtol=1e-4, atol=1e-4 * other.grad.abs().max()), key
            compared += 1
    assert compared == 2 * 2 * 4  # layers, parameters, core and three factors
    merged = model.merge_and_unload()
    assert not any(isinstance(module, ParamWrapper) for module in merged.modules())
    assert torch.allclose(merged(ids()).logits, out, atol=1e-5)


def test_the_factors_are_shared_across_experts() -> None:
    model = adapt("mixtral", "eager", r=4)
    named = [(key, tuple(value.shape)) for key, value in model.named_parameters() if "layers.0." in key]
    shapes = {key.rpartition(".")[2]: shape for key, shape in named if "tucker_gate_up_proj" in key}
    assert shapes == {"core": (4, 4, 4), "factor_0": (5, 4), "factor_1": (80, 4), "factor_2": (24, 4)}


def test_a_second_adapter_and_both_active() -> None:
    model = adapt("mixtral", "grouped_mm")
    first = model(ids()).logits
    torch.manual_seed(5)
    fields: dict[str, Any] = {"target_modules": [], "target_parameters": TARGETS, "init_weights": False}
    model.add_adapter("second", flora.FloraConfig(r=[2, 3, 4], **fields))
    model.eval()
    assert torch.equal(model(ids()).logits, first)
    model.base_model.set_adapter(["default", "second"])
    both = model(ids()).logits
    assert not torch.allclose(both, first, atol=1e-4)
    merged = model.merge_and_unload(adapter_names=["default", "second"])
    assert torch.allclose(merged(ids()).logits, both, atol=1e-5)


def test_the_dense_update_is_not_formed() -> None:
    """The operations of a step stay far below those of building (E, out, in), which alone would cost the difference."""
    counts = {}
    for path in ("auto", "rebuild"):
        model = adapt("mixtral", "eager", path=path, r=[2, 2, 2])
        with FlopCounterMode(display=False) as counter:
            model(ids()[:1, :1]).logits.sum().backward()
        counts[path] = counter.get_total_flops()
    stack = 2 * (5 * 80 * 24 + 5 * 24 * 40)  # entries of the two parameters in two layers
    assert counts["rebuild"] - counts["auto"] > 2 * stack


def test_names_of_the_unfused_experts_get_the_remedy() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        remedy = r"target_parameters=\['experts.down_proj', 'experts.gate_up"
        with pytest.raises(NoMatchingPeftModuleError, match=remedy):
            get_peft_model(build("qwen3", "eager"), flora.FloraConfig(target_modules=["gate_prj"]))


def stack(experts: int = 3, m: int = 5, n: int = 7) -> tuple[ExpertStack, Tensor]:
    torch.manual_seed(0)
    term = Term(torch.randn(m, 2), torch.randn(experts, 2, 4), torch.randn(n, 4))
    lazy = ExpertStack(torch.randn(experts, m, n), [term])
    return lazy, lazy.dense()


def test_what_a_stack_understands_and_what_it_forms() -> None:
    lazy, dense = stack()
    x = torch.randn(6, 7)
    chosen = torch.tensor([2, 0, 0, 1, 2, 1])
    pairs = [
        (F.linear(x, lazy[1]), F.linear(x, dense[1])),
        (F.linear(x, lazy[1], torch.ones(5)), F.linear(x, dense[1], torch.ones(5))),
        (x @ lazy[2].mT, x @ dense[2].mT),
        (x @ lazy.transpose(1, 2)[torch.tensor(0)], x @ dense.mT[0]),
        (torch.bmm(lazy[chosen], x.unsqueeze(-1)), torch.bmm(dense[chosen], x.unsqueeze(-1))),
        (torch.bmm(x.unsqueeze(1), lazy.mT[chosen]), torch.bmm(x.unsqueeze(1), dense.mT[chosen])),
        (lazy.sum(), dense.sum()),  # anything else gets the dense tensor
        (torch.cat([lazy, lazy]), torch.cat([dense, dense])),
        (lazy[:, 1:3], dense[:, 1:3]),
        (torch.einsum("emn,bn->ebm", lazy, x), torch.einsum("emn,bn->ebm", dense, x)),
    ]
    assert len(pairs) == 10
    for index, (found, expected) in enumerate(pairs):
        assert torch.allclose(found, expected, atol=1e-5), index
    assert lazy.shape == dense.shape


def test_a_grouped_product() -> None:
    lazy, dense = stack(m=8, n=12)  # the product asks for strides of 16 bytes
    x, offs = torch.randn(6, 12), torch.tensor([2, 2, 6], dtype=torch.int32)
    rows = torch.stack([x[row] @ dense.mT[0 if row < 2 else 2] for row in range(6)])
    assert torch.allclose(F.grouped_mm(x, lazy.mT, offs=offs), rows, atol=1e-5)
