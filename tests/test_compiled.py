"""What a compiler makes of adapted layers: numbers against the dense weight, and kernels counted in generated code."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from flora import FloraConfig
from flora.layers import summed
from flora.tucker.form import Tucker

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the benchmarks are no package of the distribution
compiled = importlib.import_module("benchmarks.compiled")

# ---- W + s dW in the operations that a compiler is given -----------------------------------------------------------

FORMED = {  # shape of the weight, ranks
    "linear": ((13, 11), (5, 3)),
    "1-D": ((13, 11, 5), (5, 3, 2)),
    "2-D": ((13, 11, 5, 3), (7, 3, 2, 2)),
    "2-D, whole kernel": ((13, 11, 2, 3), (7, 5, 2, 3)),
    "2-D, one mode of the kernel whole": ((13, 11, 2, 3), (7, 5, 2, 2)),
    "2-D, outputs whole": ((5, 11, 3, 3), (5, 7, 2, 1)),
    "2-D, inputs whole": ((13, 3, 7, 5), (5, 3, 2, 3)),
    "2-D, only the outputs": ((13, 3, 2, 3), (5, 3, 2, 3)),
    "2-D, all whole": ((5, 3, 2, 3), (5, 3, 2, 3)),
    "2-D, one pixel": ((13, 11, 1, 1), (5, 3, 1, 1)),
    "2-D, depthwise": ((13, 1, 5, 3), (5, 1, 2, 2)),
    "3-D": ((13, 11, 2, 3, 5), (5, 3, 2, 2, 3)),
}


@pytest.mark.parametrize("scale", [1.0, -0.3])
@pytest.mark.parametrize("name", FORMED)
def test_the_sum_of_weight_and_update(name: str, scale: float) -> None:
    """The weight and the gradients of core and factors equal those of the dense update."""
    shape, ranks = FORMED[name]
    weight, grad = torch.randn(2, *shape, dtype=torch.float64)
    core = torch.randn(ranks, dtype=torch.float64, requires_grad=True)
    factors = [
        None if size == rank else torch.randn(size, rank, dtype=torch.float64, requires_grad=True)
        for size, rank in zip(shape, ranks, strict=True)
    ]
    wanted = [core, *(factor for factor in factors if factor is not None)]
    dense = weight + scale * Tucker(core, tuple(factors)).to_dense()
    exact = torch.autograd.grad(dense, wanted, grad)

    found = summed._formed_plain(weight, scale, core, *factors)
    gradients = torch.autograd.grad(found, wanted, grad)

    assert torch.allclose(found, dense, rtol=0, atol=1e-12)
    assert all(torch.allclose(value, other, rtol=0, atol=1e-10) for value, other in zip(gradients, exact, strict=True))


def test_the_sum_in_half_precision_is_rounded_without_bias() -> None:
    """Each entry is one of its two neighbours, many together keep a dW that is far below a step of bfloat16."""
    weight = torch.ones(131, 127, dtype=torch.bfloat16)
    core = torch.full((3, 2), 1e-4, requires_grad=True)
    factors = torch.ones(131, 3, requires_grad=True), torch.ones(127, 2, requires_grad=True)

    found = summed._formed_plain(weight, 0.5, core, *factors)
    found.backward(torch.ones_like(found))

    step = 2**-7
    assert found.dtype == torch.bfloat16
    assert found.shape == weight.shape
    assert set(found.unique().tolist()) == {1.0, 1.0 + step}
    assert (found.float().mean() - 1).item() == pytest.approx(3e-4, rel=0.05)
    assert core.grad is not None
    assert torch.allclose(core.grad, torch.full_like(core, 0.5 * 131 * 127), rtol=1e-6)


HALF_WAYS = {  # the layer, the way
    "summed": (lambda: nn.Linear(13, 17), "summed"),
    "summed, stored the other way": (lambda: Conv1D(17, 13), "summed"),
    "beside": (lambda: nn.Linear(13, 17), "beside"),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", HALF_WAYS)
def test_a_compiled_linear_layer_in_half_precision(name: str, autocast: bool) -> None:
    """Its output and gradients are those without a compiler; those of the adapter are in float32."""
    torch.manual_seed(0)
    torch.compiler.reset()
    build, way = HALF_WAYS[name]
    base = nn.Sequential(build()).to(torch.float32 if autocast else torch.bfloat16)
    config = FloraConfig(r=[5, 3], target_modules=["0"], way=way, scale=-0.7, init_weights=False)
    model = get_peft_model(base, config)  # type: ignore[arg-type]
    x = torch.randn(2, 7, 13, dtype=base[0].weight.dtype, requires_grad=True)

    def step(run: Any) -> list[torch.Tensor]:
        trained = [x, *(value for value in model.parameters() if value.requires_grad)]
        with torch.autocast("cpu", enabled=autocast):
            out = run(x)
        assert out.dtype == torch.bfloat16
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), trained)]

    expected, found = step(model), step(torch.compile(model, backend="aot_eager", fullgraph=True))

    assert {value.dtype for value in found[2:]} == {torch.float32}
    for value, other in zip(found, expected, strict=True):
        assert (value - other).abs().max() <= 0.01 * other.abs().max()


# ---- kernels -------------------------------------------------------------------------------------------------------


def images() -> nn.Module:
    """The convolutions of image networks."""
    depthwise = nn.Conv2d(16, 16, 5, padding=2, groups=16)
    return nn.Sequential(nn.Conv2d(12, 16, 3, padding=1), nn.ReLU(), depthwise, nn.ReLU(), nn.Conv2d(16, 20, 1))


def volumes() -> nn.Module:
    """The convolutions of networks for volumes."""
    return nn.Sequential(nn.Conv3d(12, 16, 3, padding=1), nn.ReLU(), nn.ConvTranspose3d(16, 12, 2, stride=2))


def tokens() -> nn.Module:
    """The layers of a transformer."""
    return nn.Sequential(nn.Linear(24, 32), nn.SiLU(), nn.Linear(32, 24, bias=False))


# The last number is how many kernels LoRA of rank 8 asks for. It leaves out the depthwise and the transposed layer.
SMALL: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str, int]] = {
    "images": (images, (12, 8, 8), "float32", 10),
    "volumes": (volumes, (12, 4, 4, 4), "float32", 3),
    "tokens": (tokens, (16, 24), "float32", 5),
    "tokens in half precision": (tokens, (16, 24), "bfloat16", 5),
}


@pytest.mark.filterwarnings("ignore")  # of the compiler
@pytest.mark.parametrize("name", SMALL)
def test_no_more_kernels_than_lora_on_its_layers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, size, dtype, most = SMALL[name]
    monkeypatch.setitem(compiled.ROWS, name, lambda: (build(), [size]))
    found = compiled.count(name, "flora-same", dtype)
    assert found["kernels"] <= most
    check(found)


def check(found: dict[str, Any]) -> None:
    """One graph for a shape, whole, that a CUDA graph could hold."""
    assert found["graphs"] == 1
    assert found["breaks"] == found["recompiled"] == 0
    assert not found["uncapturable"]


@pytest.mark.filterwarnings("ignore")  # of the compiler
@pytest.mark.parametrize("name", ["images", "tokens in half precision"])
def test_graphs_for_other_batches_and_their_devices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for the first batch, one for all others, and no number of the CPU between those of the device."""
    build, size, dtype, _ = SMALL[name]
    monkeypatch.setitem(compiled.ROWS, name, lambda: (build(), [size]))
    assert compiled.traced(name, "flora", dtype, compiled.BATCHES) == AS_IT_SHOULD


@pytest.mark.filterwarnings("ignore")  # of the compiler
@pytest.mark.parametrize("name", [pytest.param("images", marks=pytest.mark.slow), "tokens in half precision"])
def test_a_training_step_is_whole_where_it_is_to_be_captured(name: str) -> None:
    """In the mode that replays CUDA graphs: one graph each way, and nothing in it that cannot be captured."""
    build, size, dtype, _ = SMALL[name]
    model = compiled.under("flora", build().to(getattr(torch, dtype)))
    graphs: list[Any] = []
    torch.compiler.reset()
    run = torch.compile(model, mode="reduce-overhead", fullgraph=True)

    without_caches = torch._inductor.config.patch(force_disable_caches=True)
    with compiled.generated_only(graphs), without_caches, compiled.decisions("flora"):
        compiled.step(run, [size], dtype)

    assert len(graphs) == 2
    assert not any(graph.uncapturable for graph in graphs)


AS_IT_SHOULD = {"graphs_by_batch": [1, 0, 1, 0], "devices": ["meta"]}


# How many kernels more than LoRA's in bfloat16, on LoRA's layers: a convolution's gradient has to be widened.
MORE_IN_HALF = {"ResNet-50, two bottlenecks": 4, "Llama, block": 1}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler
@pytest.mark.parametrize("name", compiled.ROWS)
def test_no_more_kernels_than_lora_in_real_blocks(name: str) -> None:
    """In float32 also where FLoRA adapts more layers; in bfloat16 on LoRA's layers, with the exceptions above."""
    found, lora = (compiled.count(name, method, "float32") for method in ("flora", "lora"))
    assert found["kernels"] <= lora["kernels"]
    check(found)
    assert compiled.traced(name, "flora", "float32", compiled.BATCHES) == AS_IT_SHOULD

    found, lora = (compiled.count(name, method, "bfloat16") for method in ("flora-same", "lora"))
    assert found["kernels"] <= lora["kernels"] + MORE_IN_HALF.get(name, 0)
    check(found)
