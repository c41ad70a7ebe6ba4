"""Adapters that version 0.1.0 saved still load, with the outputs and the merged weights they had then."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

import flora
from flora.convert import convert
from saved_adapters import BOTH, CASES, EXPECTED, FOLDER, SECOND, Saved, weights_of

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}
COUNT = 94
PLACES = [(name, place) for name, case in CASES.items() for place in case.adapters(FOLDER / name)]

each_case = pytest.mark.parametrize("name", CASES)
each_adapter = pytest.mark.parametrize(
    ("name", "place"), PLACES, ids=[str(place.relative_to(FOLDER)) for _, place in PLACES]
)
pytestmark = pytest.mark.filterwarnings("ignore:the adapter has more parameters than the weight itself")


def check_same(found: dict[str, Tensor], expected: dict[str, Tensor], case: Saved) -> None:
    assert found.keys() == expected.keys()
    tolerance = TOLERANCE[case.dtype]
    for key, value in expected.items():
        message = partial("{}: {}".format, key)
        torch.testing.assert_close(found[key], value, rtol=tolerance, atol=tolerance, msg=message)


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def check_model(model: PeftModel, case: Saved, expected: dict[str, Tensor]) -> None:
    """Compares the output, then that of the merged model and every one of its weights."""
    outputs = {key: value for key, value in expected.items() if key.startswith("output.")}
    merged = {**weights_of(case.base()), **part(expected, "merged.")}
    check_same(case.run(model.eval()), outputs, case)
    plain = model.merge_and_unload()
    check_same(case.run(plain), outputs, case)
    check_same(weights_of(plain), merged, case)


def test_all_are_there() -> None:
    assert len(CASES) == COUNT
    assert len(PLACES) == COUNT + 1
    assert {folder.name for folder in FOLDER.iterdir()} == set(CASES)
    for _, place in PLACES:
        files = {file.name for file in place.iterdir() if file.is_file()} - {BOTH}
        assert files == {"adapter_config.json", "adapter_model.safetensors", EXPECTED}


@each_case
def test_the_adapter_matters(name: str) -> None:
    case, expected = CASES[name], load_file(FOLDER / name / EXPECTED)
    before, weights = case.run(case.base()), weights_of(case.base())
    assert before
    assert all((before[key] - expected[key]).abs().max() > 1e-3 for key in before)
    assert all((weights[key] - value).abs().max() > 1e-3 for key, value in part(expected, "merged.").items())


@each_adapter
def test_loads_as_it_was(name: str, place: Path) -> None:
    case = CASES[name]
    model = PeftModel.from_pretrained(case.base(), place, adapter_name="other")
    check_model(model, case, load_file(place / EXPECTED))


# Layers whose weights are folded by default, and others that no format but ours has words for.
THERE_AND_BACK = ["attention", "attention_kdim_vdim", "lstm", "lstm_bidirectional_projected", "gru_cell", "experts"]


@pytest.mark.parametrize("name", THERE_AND_BACK)
def test_what_came_back_from_another_format_is_loaded(name: str, tmp_path: Path) -> None:
    """A form comes back without the fold that it had; its layer must not be folded for it."""
    case = CASES[name]
    convert(FOLDER / name, tmp_path / "dense.safetensors", to="dense")
    convert(tmp_path / "dense.safetensors", tmp_path / "back", to="flora")
    model = PeftModel.from_pretrained(case.base(), tmp_path / "back", adapter_name="other")
    check_model(model, case, load_file(FOLDER / name / EXPECTED))


def test_two_adapters_together() -> None:
    case, place = CASES["two_adapters"], FOLDER / "two_adapters"
    model = PeftModel.from_pretrained(case.base(), place, adapter_name="other")
    model.load_adapter(place / SECOND, adapter_name="another")
    check_same(case.run(model.eval()), outputs_of(place), case)
    model.set_adapter("another")
    check_same(case.run(model.eval()), outputs_of(place / SECOND), case)
    model.base_model.set_adapter(["other", "another"])
    check_model(model, case, load_file(place / BOTH))


def outputs_of(place: Path) -> dict[str, Tensor]:
    return {key: value for key, value in load_file(place / EXPECTED).items() if key.startswith("output.")}


@each_adapter
def test_dense_updates_from_the_file(name: str, place: Path) -> None:
    """``flora.load`` alone gives every change: of adapted weights, of token rows, and of what is saved whole."""
    case = CASES[name]
    before, merged = weights_of(case.base()), part(load_file(place / EXPECTED), "merged.")
    adapter = flora.load(place)
    assert adapter.weights.keys() <= merged.keys()
    expected = {key: value - before[key] for key, value in merged.items()}
    found = {key: entry.dense().to(case.dtype) for key, entry in adapter.weights.items()}
    for key, (rows, values) in adapter.token_rows.items():
        found[key] = torch.zeros_like(before[key])
        found[key][rows] = values - before[key][rows]
    found.update({key: value - before[key] for key, value in adapter.extras.items() if key in before})
    # Of a module that is saved whole, what training left as it was is no change.
    check_same({key: value for key, value in found.items() if key in expected or value.any()}, expected, case)
