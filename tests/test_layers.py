"""Every case of every kind, on every path it has, in float32 and bfloat16, against the dense oracle."""

from __future__ import annotations

import copy
import threading
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from cases import CASES, Case
from conformance import (
    adapted,
    base_model,
    close,
    config_of,
    flora_layers,
    gradients,
    inputs_of,
    oracle,
    seeded,
)
from flora.layers.table import LAYERS

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")  # torch says it once for each such network

ROWS = [
    pytest.param(name, path, id=f"{name}-{path}")
    for name, row in CASES.items()
    for path in (("summed", "beside") if row.factored else ("summed",))
]
each_row = pytest.mark.parametrize(("name", "path"), ROWS)
DTYPES = [torch.float32, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])


def test_the_number_of_cases_and_that_every_row_of_the_table_has_one() -> None:
    kinds = {type(row.build()) for row in CASES.values()} | {
        cls for row in CASES.values() for cls in type(row.build()).__mro__
    }
    assert set(LAYERS) <= kinds
    assert len(CASES) == 58
    assert len(ROWS) == 90


@each_row
@each_dtype
def test_output_equals_the_oracle(name: str, path: str, dtype: torch.dtype) -> None:
    row = CASES[name]
    model = adapted(row, path, dtype)
    inputs = inputs_of(row, dtype)
    out = model(*inputs, **row.kwargs)
    exact = oracle(row, model)(*inputs_of(row), **row.kwargs)
    plain = base_model(row)(*inputs_of(row), **row.kwargs)
    assert out.dtype == dtype
    assert close(out, exact, dtype)
    assert (exact - plain).abs().max() > 1e-3  # the update does something


@each_row
@each_dtype
def test_gradients_of_core_and_factors_equal_the_oracles(name: str, path: str, dtype: torch.dtype) -> None:
    row = CASES[name]
    model = adapted(row, path, dtype)
    model(*inputs_of(row, dtype), **row.kwargs).float().square().sum().backward()
    expected = gradients(row, model)
    found = {
        f"{weight}.{tensor}": value.grad
        for layer in flora_layers(model)
        for weight in layer.attributes
        for tensor, value in layer.deltas(weight)["default"].named_parameters()
    }
    assert found.keys() == expected.keys()
    assert len(found) >= 1
    for key, value in found.items():  # rounding adds up over the steps of an LSTM, and is magnified by a deviation
        assert close(value, expected[key], dtype, slack=4 if "lstm" in name or "standardised" in name else 1), key


@each_row
@each_dtype
def test_a_zero_core_leaves_the_output_bit_for_bit(name: str, path: str, dtype: torch.dtype) -> None:
    row = CASES[name]
    plain = base_model(row, dtype)(*inputs_of(row, dtype), **row.kwargs)
    for init in ("zero_first", "orthogonal"):
        model = adapted(row, path, dtype, init_weights=True, init=init)
        assert torch.equal(model(*inputs_of(row, dtype), **row.kwargs), plain)


@each_row
@each_dtype
def test_merge_then_unmerge(name: str, path: str, dtype: torch.dtype) -> None:
    row = CASES[name]
    model = adapted(row, path, dtype)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    out = model(*inputs_of(row, dtype), **row.kwargs)
    for safe in (True, False):
        model.merge_adapter(safe_merge=safe)
        assert close(copy.deepcopy(model)(*inputs_of(row, dtype), **row.kwargs), out, dtype)
        model.unmerge_adapter()
        after = model.state_dict()
        assert after.keys() == before.keys()
        for key, value in before.items():
            if safe and "parametrizations" not in key:
                assert torch.equal(after[key], value), key
            assert torch.allclose(
                after[key], value, atol=1e-6 if dtype == torch.float32 else 2e-2 * value.abs().max().item()
            ), key
    merged = model.merge_and_unload()
    assert type(merged.layer) is type(base_model(row, dtype).layer) or "Parametrized" in type(merged.layer).__name__
    assert close(merged(*inputs_of(row, dtype), **row.kwargs), out, dtype)


@torch.no_grad()  # attention has another kernel without gradients
@each_row
@each_dtype
def test_saved_and_loaded_under_another_name(name: str, path: str, dtype: torch.dtype, tmp_path: Path) -> None:
    row = CASES[name]
    model = adapted(row, path, dtype)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_model(row, dtype), tmp_path, adapter_name="other").eval()
    assert torch.equal(again(*inputs_of(row, dtype), **row.kwargs), model(*inputs_of(row, dtype), **row.kwargs))


@each_row
def test_mode_ranks_of_the_update(name: str, path: str) -> None:
    deltas = [
        layer.deltas(weight)["default"]
        for layer in flora_layers(adapted(CASES[name], path))
        for weight in layer.attributes
    ]
    assert deltas
    for delta in deltas:
        dense = delta.form.to_dense().double()
        for mode, rank in enumerate(delta.form.ranks):
            unfolded = dense.movedim(mode, 0).reshape(dense.shape[mode], -1)
            assert torch.linalg.matrix_rank(unfolded, rtol=1e-5) <= rank


@torch.no_grad()
@each_row
@each_dtype
def test_two_adapters(name: str, path: str, dtype: torch.dtype) -> None:
    row = CASES[name]
    model = adapted(row, path, dtype)
    first = model(*inputs_of(row, dtype), **row.kwargs)
    seeded(3)
    model.add_adapter("second", config_of(row, path))
    model.eval()
    assert torch.equal(model(*inputs_of(row, dtype), **row.kwargs), first)
    model.set_adapter("second")
    second = model(*inputs_of(row, dtype), **row.kwargs)
    assert close(second, oracle(row, model, ("second",))(*inputs_of(row), **row.kwargs), dtype)
    assert not torch.equal(first, second)
    model.base_model.set_adapter(["default", "second"])
    both = model(*inputs_of(row, dtype), **row.kwargs)
    assert close(both, oracle(row, model, ("default", "second"))(*inputs_of(row), **row.kwargs), dtype)
    with model.disable_adapter():
        assert close(
            model(*inputs_of(row, dtype), **row.kwargs), base_model(row, dtype)(*inputs_of(row, dtype), **row.kwargs)
        )
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(model(*inputs_of(row, dtype), **row.kwargs), first)


@torch.no_grad()
@each_row
def test_threads_compute_what_one_thread_does(name: str, path: str) -> None:
    row = CASES[name]
    model, inputs = adapted(row, path), inputs_of(row)
    expected = model(*inputs, **row.kwargs)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    wrong: list[object] = []

    def run() -> None:
        # A thread has its own number of OpenMP threads, by which torch splits a sum, and its own switch for gradients.
        torch.set_num_threads(1)
        with torch.no_grad():
            for _ in range(4):
                try:
                    torch.testing.assert_close(model(*inputs, **row.kwargs), expected, rtol=0, atol=0)
                except Exception as error:
                    wrong.append(error)

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in after.items())


@each_row
def test_parameters_are_what_the_optimiser_sees(name: str, path: str) -> None:
    model = adapted(CASES[name], path)
    trainable = sum(value.numel() for value in model.parameters() if value.requires_grad)
    forms = [layer.deltas(weight)["default"].form for layer in flora_layers(model) for weight in layer.attributes]
    assert trainable == sum(form.num_params for form in forms) > 0


@each_row
def test_copies_and_keyword_calls(name: str, path: str) -> None:
    row = CASES[name]
    model = adapted(row, path)
    out = model(*inputs_of(row), **row.kwargs)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(*inputs_of(row), **row.kwargs), out)


@pytest.mark.parametrize("name", ["linear", "conv2d", "embedding", "transposed conv2d"])
def test_a_layer_called_by_keyword(name: str) -> None:
    row = CASES[name]
    model = adapted(row, "beside")
    (value,) = inputs_of(row)
    assert torch.equal(model(input=value), model(value))


@pytest.mark.parametrize("name", ["linear", "gpt-2 conv1d", "conv2d", "transposed conv2d", "bilinear"])
@pytest.mark.parametrize("path", ["rebuild", "factored"])
def test_the_output_may_be_changed_in_place(name: str, path: str) -> None:
    row = CASES[name]
    grads = []
    for change in (torch.Tensor.mul_, torch.Tensor.mul):
        model = adapted(row, path)
        change(model(*inputs_of(row), **row.kwargs), 3).sum().backward()
        grads.append([value.grad for value in model.parameters() if value.grad is not None])
    assert len(grads[0]) > 1
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


COMPILED = [
    (name, path) for name, path in (param.values for param in ROWS) if not name.startswith(("lstm", "gru", "rnn"))
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it where its graph breaks
@pytest.mark.parametrize(("name", "path"), COMPILED)
@each_dtype
def test_compiled_gives_the_same(name: str, path: str, dtype: torch.dtype) -> None:
    row = CASES[name]
    torch.compiler.reset()
    model = adapted(row, path, dtype)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=name.startswith(("linear", "conv", "gpt-2")))
    out = compiled(*inputs_of(row, dtype), **row.kwargs)
    assert close(out, model(*inputs_of(row, dtype), **row.kwargs), dtype)


@pytest.mark.parametrize(
    ("name", "path"), [("linear", "beside"), ("conv2d, groups", "beside"), ("conv2d, depthwise", "summed")]
)
def test_compiled_whole_graph(name: str, path: str) -> None:
    row = CASES[name]
    torch.compiler.reset()
    model = adapted(row, path)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    out = compiled(*inputs_of(row), **row.kwargs)
    assert close(out, model(*inputs_of(row), **row.kwargs))
    assert isinstance(model.base_model.model, Case)
