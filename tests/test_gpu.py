"""On a CUDA device: every case, eager and compiled, against the dense oracle on the CPU; what is kept, graphs, streams.

Left out of the default suite: ``pytest -m gpu`` where there is a device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import CASES, Row
from conformance import TOLERANCE, adapted, flora_layers, gradients, inputs_of, oracle
from flora.tuner.layer import FloraLayer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:LSTM with projections"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch's own compiler
    pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk"),
]
ROWS = [
    pytest.param(name, path, id=f"{name}-{path}")
    for name, row in CASES.items()
    for path in (("summed", "beside") if row.factored else ("summed",))
]
each_row = pytest.mark.parametrize(("name", "path"), ROWS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@pytest.fixture(autouse=True)
def _plain_float32() -> Iterator[None]:
    """No TF32, which keeps ten bits of the inputs of products."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def on_device(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.cuda() for value in values)


def near(first: Tensor, second: Tensor, dtype: torch.dtype, slack: float) -> bool:
    """Whether they differ by no more than the rounding of ``dtype``, as of the largest entry."""
    difference = (first.detach().cpu().float() - second.detach().float()).abs().max().item()
    return difference <= slack * TOLERANCE[dtype] * max(second.abs().max().item(), 1e-3)


def pair(name: str, path: str, dtype: torch.dtype) -> tuple[Row, Any, Any]:
    """The case, its model in float32 on the CPU, whose adapter the oracle reads, and the same one on the device."""
    row = CASES[name]
    model = adapted(row, path, dtype).cuda()
    if any(isinstance(part, nn.RNNBase) for part in model.modules()):
        model.train()  # cuDNN has no backward of them in evaluation
    return row, adapted(row, path), model


@each_row
@each_dtype
def test_output_and_gradients_equal_the_oracle(name: str, path: str, dtype: torch.dtype) -> None:
    row, exact, model = pair(name, path, dtype)
    check(row, exact, model, model, dtype, slack=4 if name.startswith(("lstm", "gru", "rnn")) else 1)


def check(row: Row, exact: Any, model: Any, run: Any, dtype: torch.dtype, slack: float) -> None:
    """Output, and gradients of the input, of core and factors."""
    inputs, plain = on_device(inputs_of(row, dtype)), inputs_of(row)
    leaf, plain_leaf = inputs[0], plain[0]
    if leaf.is_floating_point():
        leaf.requires_grad_(True)
        plain_leaf.requires_grad_(True)
    out, wanted = run(*inputs, **row.kwargs), oracle(row, exact)(*plain, **row.kwargs)
    assert out.dtype == dtype
    assert near(out, wanted, dtype, slack)
    out.float().square().sum().backward()
    wanted.square().sum().backward()
    vanishes = any(layer.row.kind == "norm" for layer in flora_layers(model))  # a norm's output has a fixed length
    if leaf.is_floating_point() and not vanishes:
        assert near(leaf.grad, plain_leaf.grad, dtype, slack)
    if getattr(row.build(), "mode", None) == "max" and dtype == torch.bfloat16:
        return  # rounding changes which entry is the largest
    expected = gradients(row, exact)
    for key, value in trained(model).items():
        assert near(value.grad, expected[key], dtype, slack), key


def trained(model: Any) -> dict[str, Tensor]:
    return {
        f"{weight}.{tensor}": value
        for layer in flora_layers(model)
        for weight in layer.attributes
        for tensor, value in layer.deltas(weight)["default"].named_parameters()
    }


COMPILED = ["linear", "linear, out whole", "linear, folded heads", "conv1d", "conv2d", "conv2d, depthwise", "conv3d"]


@pytest.mark.parametrize("path", ["summed", "beside"])
@pytest.mark.parametrize("name", COMPILED)
@each_dtype
def test_compiled_equals_the_oracle(name: str, path: str, dtype: torch.dtype) -> None:
    torch.compiler.reset()
    row, exact, model = pair(name, path, dtype)
    check(row, exact, model, torch.compile(model, fullgraph=True), dtype, slack=1)


@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_a_captured_graph_gives_the_same(name: str) -> None:
    row, _, model = pair(name, "beside", torch.bfloat16)
    inputs = on_device(inputs_of(row, torch.bfloat16))
    run = torch.compile(model, mode="reduce-overhead")
    with torch.no_grad():
        expected = model(*inputs).clone()
        for _ in range(4):  # warm-up, capture, replays
            out = run(*inputs).clone()
    assert near(out, expected.cpu(), torch.bfloat16, 1)


def test_merging_on_the_device() -> None:
    row, exact, model = pair("conv2d", "summed", torch.float32)
    inputs = inputs_of(row)
    merged = model.merge_and_unload()
    assert not any(isinstance(module, FloraLayer) for module in merged.modules())
    assert near(merged(*on_device(inputs)), oracle(row, exact)(*inputs), torch.float32, 1)
