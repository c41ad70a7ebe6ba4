"""Whole models of many architectures: what is adapted trains, computes what the merged model does, and reloads."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ModelMixin
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

import flora
from architectures import ARCHITECTURES, FAST, Architecture
from flora.layers.table import find_layer, parameter
from flora.tuner.layer import FloraLayer
from flora_cli import main

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries; ours are looked at where they matter
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
EACH = [
    pytest.param(name, marks=[] if name in FAST else pytest.mark.slow, id=name.replace(" ", "-"))
    for name in ARCHITECTURES
]


def test_the_number_of_architectures() -> None:
    assert len(ARCHITECTURES) >= 90
    assert set(FAST) <= set(ARCHITECTURES)
    assert len(FAST) == 7


def base_model(row: Architecture) -> nn.Module:
    """With random weights so large that every layer matters, in float64 where the model runs in it."""
    torch.manual_seed(0)
    model = row.build().eval()
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim > 1 and value.is_floating_point():
                value.copy_(torch.randn(value.shape) / value[0].numel() ** 0.5)
    wide = copy.deepcopy(model).double()
    try:
        with torch.no_grad():
            run(wide, row)
    except (RuntimeError, TypeError, ValueError, NotImplementedError):  # it makes float32 tensors on its way
        return model
    return wide


def inputs_of(row: Architecture, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    torch.manual_seed(1)
    dtype = next(value.dtype for value in model.parameters() if value.is_floating_point())
    given = row.inputs()
    cast = {key: _cast(value, dtype) for key, value in given.items()}
    return cast.pop("args", ()), cast


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, tuple):
        return tuple(_cast(each, dtype) for each in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def run(model: nn.Module, row: Architecture) -> list[Tensor]:
    """Every tensor of the output, the dropped entries the same in each run."""
    args, kwargs = inputs_of(row, model)
    torch.manual_seed(2)
    out = model(*args, **kwargs)
    return [value for value in tensors_in(out) if value.is_floating_point()]


def tensors_in(out: Any) -> Iterator[Tensor]:
    """The tensors of an output of transformers, diffusers or MONAI; caches are left aside."""
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, dict):
        for key, value in out.items():
            if "cache" not in key and "key_values" not in key:
                yield from tensors_in(value)
    elif isinstance(out, (list, tuple)):
        for value in out:
            yield from tensors_in(value)
    elif hasattr(out, "latent_dist"):
        yield out.latent_dist.mean


def far(first: list[Tensor], second: list[Tensor]) -> float:
    assert len(first) == len(second) > 0
    return max(
        float((one - other).abs().max() / other.abs().max().clamp_min(1e-6))
        for one, other in zip(first, second, strict=True)
        if one.numel()
    )


def experts_of(model: nn.Module) -> list[str]:
    """The stacks of experts in a model, as ``target_parameters`` names them."""
    return [
        f"{name}.{leaf}"
        for name, module in model.named_modules()
        for leaf, value in module.named_parameters(recurse=False)
        if "expert" in name and value.ndim == 3 and find_layer(module) is None
    ]


def adapt(base: nn.Module) -> PeftModel:
    torch.manual_seed(3)
    config = flora.FloraConfig(
        r=2, target_modules="all", target_parameters=experts_of(base) or None, init_weights=False, scale=0.5
    )
    return get_peft_model(base, config)


@pytest.mark.parametrize("name", EACH)
def test_an_architecture(name: str, tmp_path: Path) -> None:
    row = ARCHITECTURES[name]
    base = base_model(row)
    fresh = copy.deepcopy(base)
    with torch.no_grad():
        plain = run(copy.deepcopy(base), row)
    model = adapt(base)
    tolerance = TOLERANCE[plain[0].dtype]
    layers = [layer for layer in model.modules() if isinstance(layer, FloraLayer)]
    assert layers

    merged = copy.deepcopy(model).merge_and_unload()
    assert not any(isinstance(module, FloraLayer) for module in merged.modules())
    for training in (True, False):
        for module in merged.train(training).modules():
            if isinstance(module, BATCH_NORMS):  # they are frozen in an adapted model
                module.eval()
        check_training(name, model.train(training), merged, row, tolerance)

    with torch.no_grad():
        out = run(model, row)
        assert far(out, run(merged, row)) <= tolerance
        assert far(out, plain) > 100 * tolerance  # the adapters do something
        if row.generates:
            check_generation(model, merged, row, tolerance)

        model.save_pretrained(tmp_path / "adapter")
        if isinstance(fresh, (PreTrainedModel, ModelMixin)):
            check_command(fresh, merged, tmp_path, tolerance)
        again = PeftModel.from_pretrained(fresh, tmp_path / "adapter", adapter_name="other").eval()
        assert far(run(again, row), out) == 0


def check_command(base: Any, merged: nn.Module, folder: Path, tolerance: float) -> None:
    """``flora inspect`` and ``flora merge`` on the saved adapter, whose merged weights are those of the live model."""
    base.save_pretrained(folder / "base")
    adapter, out = str(folder / "adapter"), folder / "merged"
    assert main(["inspect", adapter]) == 0
    assert main(["merge", adapter, "--base", str(folder / "base"), "--out", str(out)]) == 0
    written = type(base).from_pretrained(out, dtype=base.dtype).state_dict()
    expected = merged.state_dict()
    assert written.keys() == expected.keys()
    for key, value in written.items():
        if value.is_floating_point() and value.numel():
            assert float((value - expected[key]).abs().max()) <= tolerance * float(expected[key].abs().max() + 1e-6), (
                key
            )


def check_training(name: str, model: PeftModel, merged: nn.Module, row: Architecture, tolerance: float) -> None:
    """One step: the output is that of the merged model, and a gradient arrives wherever one does in that."""
    merged.requires_grad_(True)
    for each in (model, merged):
        each.zero_grad()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        out = run(model, row)
    dense = run(merged, row)
    assert far(out, dense) <= tolerance, f"{name}: unmerged and merged differ"
    for outputs in (out, dense):
        sum(value.square().mean() for value in tree_leaves(outputs) if value.requires_grad).backward()

    unreached = any("neither called nor read" in str(each.message) for each in seen)
    for path, layer in model.base_model.model.named_modules():
        if not isinstance(layer, FloraLayer):
            continue
        owner = merged.get_submodule(path.replace(".base_layer", ""))
        for weight in layer.attributes:
            missing = [key for key, value in layer.deltas(weight).named_parameters() if value.grad is None]
            trains = parameter(owner, weight).grad is not None
            assert not (missing and trains), f"{name}: no gradient reaches {path}.{weight}"
            assert layer.reached or unreached or not missing or not model.training


def check_generation(model: PeftModel, merged: nn.Module, row: Architecture, tolerance: float) -> None:
    """Decoding with a cache: the logits of every step."""
    _, given = inputs_of(row, model)
    for key in ("decoder_input_ids", "use_cache"):
        given.pop(key, None)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "use_cache": True}
    options |= {"output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}
    found = [each.generate(**given, **options) for each in (model, merged)]
    assert len(found[0].logits) >= 3
    assert far(list(found[0].logits), list(found[1].logits)) <= tolerance
