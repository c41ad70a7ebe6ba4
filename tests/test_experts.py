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
from flora.layers import device
from flora.layers.experts.stack import ExpertStack, Term
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


OPERATORS: dict[str, Any] = {
    "1 - w": lambda w: 1 - w, "w - 1": lambda w: w - 1, "w * 2": lambda w: w * 2, "w / 2": lambda w: w / 2,
    "2 / w": lambda w: 2 / w, "-w": lambda w: -w, "w ** 2": lambda w: w**2, "abs": abs, "w > 0": lambda w: w > 0,
    "w == w": lambda w: w == w, "w + w": lambda w: w + w, "w @ x": lambda w: w @ torch.ones(7),
    "list": lambda w: torch.stack(list(w)), "%": lambda w: w % 2, "in": lambda w: torch.tensor(0.0 in w),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_a_stack_answers_operators_as_a_tensor(name: str) -> None:
    lazy, dense = stack()
    assert torch.allclose(OPERATORS[name](lazy).float(), OPERATORS[name](dense).float(), atol=1e-5)


def test_a_stack_passes_for_a_tensor() -> None:
    lazy, dense = stack()
    assert isinstance(lazy, Tensor)
    assert len(lazy) == 3
    assert (lazy.dtype, lazy.shape, lazy.is_floating_point()) == (dense.dtype, dense.shape, True)
    assert lazy.dense() is lazy.dense()


@pytest.mark.parametrize("sizes", [(70, 0, 131), (3, 5, 0), (66, 64, 65)], ids=str)
@pytest.mark.parametrize("whole", ["neither", "left", "right", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("on_cpu", [True, False])
def test_gradients_of_a_grouped_product(
    sizes: tuple[int, ...], whole: str, dtype: torch.dtype, on_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many rows an expert and few, an expert without any, factors and none, a GPU's way; autocast changes nothing."""
    monkeypatch.setattr(device, "on_cpu", lambda x: on_cpu)
    m, n, p, q = 24, 40, 3, 5
    p, q = m if whole in ("left", "both") else p, n if whole in ("right", "both") else q
    torch.manual_seed(0)
    left = None if p == m else torch.randn(m, p, requires_grad=True)
    right = None if q == n else torch.randn(n, q, requires_grad=True)
    middle = torch.randn(len(sizes), p, q, requires_grad=True)
    weight, offs = torch.randn(len(sizes), m, n).to(dtype), torch.tensor(sizes).cumsum(0).to(torch.int32)
    x = torch.randn(sum(sizes), m).to(dtype).requires_grad_()
    term, grad = Term(left, middle, right), torch.randn(sum(sizes), n).to(dtype)
    wanted = [value for value in (x, left, middle, right) if value is not None]
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        out = F.grouped_mm(x, ExpertStack(weight, [term]), offs=offs)
    assert out.dtype == dtype
    dense = weight.float() + term.dense()
    oracle = torch.cat([rows @ own for rows, own in zip(x.float().split(sizes), dense, strict=True)])
    close = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 3e-2, "rtol": 3e-2}
    found, expected = torch.autograd.grad(out, wanted, grad), torch.autograd.grad(oracle, wanted, grad.float())
    for ours, right_one in zip((out, *found), (oracle, *expected), strict=True):
        largest = right_one.detach().abs().max()
        assert torch.allclose(ours.float() / largest, right_one.float() / largest, **close)


def test_rows_past_the_last_expert_change_no_gradient() -> None:
    lazy, _ = stack(m=8, n=12)
    offs = torch.tensor([100, 150, 200], dtype=torch.int32)
    found = []
    for rows in (200, 220):
        torch.manual_seed(1)
        x = torch.randn(220, 12)[:rows].requires_grad_()
        term = Term(*(value.detach().clone().requires_grad_() for value in vars(lazy.terms[0]).values()))
        out = F.grouped_mm(x, ExpertStack(lazy.weight, [term]).mT, offs=offs)
        found.append(torch.autograd.grad(out[:200].square().sum(), [x, *vars(term).values()]))
    for few, many in zip(*found, strict=True):
        assert torch.allclose(few, many[: len(few)], atol=1e-3, rtol=1e-4)


def test_gradient_of_a_gradient_of_a_grouped_product() -> None:
    lazy, dense = stack(m=8, n=12)
    x, offs = torch.randn(6, 12, requires_grad=True), torch.tensor([2, 2, 6], dtype=torch.int32)
    second = []
    for weight in (lazy, dense):
        out = F.grouped_mm(x, weight.mT, offs=offs)
        (first,) = torch.autograd.grad(out.square().sum(), [x], create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), [x])[0])
    assert torch.allclose(*second, rtol=1e-4, atol=1e-2)


def test_a_grouped_product() -> None:
    lazy, dense = stack(m=8, n=12)  # the product asks for strides of 16 bytes
    x, offs = torch.randn(6, 12), torch.tensor([2, 2, 6], dtype=torch.int32)
    rows = torch.stack([x[row] @ dense.mT[0 if row < 2 else 2] for row in range(6)])
    assert torch.allclose(F.grouped_mm(x, lazy.mT, offs=offs), rows, atol=1e-5)
