"""Adapters that somebody edited, cut or mixed up: refused by name wherever they are read, and never half understood."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import flora
from flora.convert import Adapter, Entry, Layout, convert, save
from flora.convert.arithmetic import add
from flora.convert.formats.adapter_config import FIELDS
from flora.convert.streaming import stream_merged
from flora.errors import UserError
from flora.storage.tensors import WEIGHTS, write_tensors

Tensors = dict[str, Tensor]
FC, CONV = "base_model.model.fc.tucker_weight", "base_model.model.conv.tucker_weight"
PAIR, KEY = "base_model.model.fc", "lycoris_fc"


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = {"conv": nn.Conv2d(5, 13, (2, 3)), "fc": nn.Linear(11, 19), "head": nn.Linear(19, 7)}
    return nn.Sequential(OrderedDict(layers))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same adapter in every form, and its base."""
    root = tmp_path_factory.mktemp("sound")
    config = flora.FloraConfig(r=3, target_modules=["conv", "fc"], init_weights=False)
    get_peft_model(net(), config).save_pretrained(root / "flora")

    adapter = flora.load(root / "flora")
    save(adapter, root / "lora", format="lora")
    save(adapter, root / "kohya.safetensors", format="kohya")
    save(adapter, root / "dense.safetensors", format="dense")

    (root / "base").mkdir()
    write_tensors(root / "base" / "model.safetensors", net().state_dict())

    return root


def edited(sound: Path, form: str, place: Path, change: Callable[[Tensors], object], **config: Any) -> Path:
    """A copy with other tensors, or with other values in its config."""
    source, target = sound / form, place / form
    if source.is_dir():
        shutil.copytree(source, target)
        path = target / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    else:
        shutil.copy(source, target)

    file = target / WEIGHTS if target.is_dir() else target
    with safe_open(file, "pt") as opened:
        tensors = {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118
        metadata = opened.metadata()

    change(tensors)
    save_file(tensors, file, metadata)

    return target


def same(tensors: Tensors) -> None:
    """Nothing is changed."""


def without(*keys: str) -> Callable[[Tensors], object]:
    return lambda tensors: [tensors.pop(key) for key in keys]


def put(key: str, value: Tensor) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({key: value})


def put_two(one: str, other: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({one: torch.ones(7), other: torch.zeros(7)})


def named_as_in_a_model(tensors: Tensors) -> None:
    """With the adapter's name in the keys."""
    renamed = {key.replace("weight.", "weight.default."): value for key, value in tensors.items()}
    tensors.clear()
    tensors.update(renamed)


def each(of: Callable[[Tensor], Tensor]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({key: of(value).contiguous() for key, value in tensors.items()})


def at(key: str, of: Callable[[Tensor], Tensor]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({key: of(tensors[key]).contiguous()})


def wide(value: Tensor) -> Tensor:
    """A matrix as a convolution of 2 x 2."""
    return value[..., None, None].expand(*value.shape, 2, 2)


ODD: dict[str, tuple[str, Callable[[Tensors], object], dict[str, Any], str]] = {
    "no core": ("flora", without(f"{FC}.core"), {}, "has factors but no core"),
    "no factor": ("flora", without(f"{FC}.factor_1"), {}, r"the ranks \(3, 3\) in .* would have the ranks \(19, 3\)"),
    "a part of a newer version": ("flora", put(f"{FC}.magnitude", torch.ones(19)), {}, "magnitude is no part.*update"),
    "another factor": ("flora", put(f"{FC}.factor_2", torch.ones(5, 3)), {}, "has factor_2 but a core of 2.*copy it"),
    "a factor turned": ("flora", at(f"{FC}.factor_0", lambda value: value.T), {}, "factor 0 has shape"),
    "rank of the config": ("flora", same, {"r": 2}, r"by adapter_config.json it would have the ranks \(2, 2, 2, 2\)"),
    "ranks of a pattern": ("flora", same, {"rank_pattern": {"fc": [2, 3]}}, r"would have the ranks \(2, 3\)"),
    "rank of an alpha": ("flora", same, {"r": 4, "alpha": 4}, r"would have the ranks \(4, 4, 2, 2\)"),
    "kernel rank": ("flora", same, {"kernel_r": 1}, r"conv.weight has .* would have the ranks \(3, 3, 1, 1\)"),
    "kernel rank as text": ("flora", same, {"kernel_r": "2"}, "adapter_config.json: kernel_r must be an int"),
    "rank 0": ("flora", same, {"r": 0}, "adapter_config.json: r must be at least 1"),
    "scale and alpha": ("flora", same, {"scale": 2.0, "alpha": 3.0}, "adapter_config.json: scale=2.0 and alpha=3.0"),
    "a scale of 400 digits": ("flora", same, {"scale": 10**400}, "adapter_config.json: scale must be a finite number"),
    "a fold": ("flora", same, {"fold": {"fc": "(a b) in, a=19"}}, "has 3 dimensions, and the core has 2"),
    "half a fold": ("flora", same, {"fold": {"conv": "(a b) in kh"}}, "conv.weight: the fold|conv.weight: fold"),
    "whole numbers": ("flora", each(lambda value: value.long()), {}, "numbers of type torch.int64, expected float32"),
    "complex NaN": ("flora", each(lambda value: value * complex("nan")), {}, "NaN or infinite"),
    "names of a live model": (
        "flora",
        named_as_in_a_model,
        {},
        "save the adapter with model.save_pretrained",
    ),
    "a head twice": (
        "flora",
        put_two("base_model.model.head.bias", "base_model.model.head.modules_to_save.bias"),
        {},
        "stands there twice",
    ),
    "lora_B with a kernel": ("lora", at(f"{PAIR}.lora_B.weight", wide), {}, "do not fit; the file is mixed up"),
    "lora_alpha as text": ("lora", same, {"lora_alpha": "x"}, "adapter_config.json: lora_alpha must be a number"),
    "lora_up with a kernel": ("kohya.safetensors", at(f"{KEY}.lora_up.weight", wide), {}, "do not fit each other"),
    "lora_mid and a kernel": (
        "kohya.safetensors",
        lambda tensors: tensors.update(
            {f"{KEY}.lora_mid.weight": torch.ones(3, 3, 1, 1), f"{KEY}.lora_down.weight": torch.ones(3, 11, 2, 1)}
        ),
        {},
        "do not fit each other",
    ),
    "diff and lora_up": ("kohya.safetensors", put(f"{KEY}.diff", torch.ones(19, 11)), {}, "has diff and lora_down"),
    "complex alpha": ("kohya.safetensors", put(f"{KEY}.alpha", torch.tensor(1 + 2j)), {}, "expected one real number"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_it_is_refused_by_name(name: str, sound: Path, tmp_path: Path) -> None:
    form, change, config, message = ODD[name]
    place = edited(sound, form, tmp_path, change, **config)
    with pytest.raises(UserError, match=message):
        flora.load(place)
    with pytest.raises(UserError, match=message):
        convert(place, tmp_path / "out", to="flora")
    assert not (tmp_path / "out").exists()


def test_a_fold_of_no_size_is_refused() -> None:
    with pytest.raises(UserError, match="a=0' of fc.weight is not a list of the stored dimensions and sizes"):
        get_peft_model(net(), flora.FloraConfig(target_modules=["fc"], fold={"fc": "(a b) in, a=0"}))


def test_a_folder_that_is_nearly_an_adapter_is_told(sound: Path, tmp_path: Path) -> None:
    shutil.copytree(sound / "flora", tmp_path / "run" / "second")
    with pytest.raises(FileNotFoundError, match="has no adapter_config.json; did you mean .*run/second'"):
        flora.load(tmp_path / "run")

    (tmp_path / "run" / "second" / WEIGHTS).rename(tmp_path / "run" / "second" / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="has adapter_model.bin, as PEFT once saved.*save it again"):
        flora.load(tmp_path / "run" / "second")


@pytest.mark.parametrize("weight", [float("nan"), "2", True])
def test_adapters_are_weighted_by_numbers(weight: Any, sound: Path, tmp_path: Path) -> None:
    adapter = flora.load(sound / "flora")
    with pytest.raises(UserError, match="the weight of an adapter must be a"):
        stream_merged(sound / "base", [(adapter, weight)], tmp_path / "out")
    with pytest.raises(UserError, match="the factor of an adapter must be a"):
        add([(adapter, weight)])


# What PEFT would put into the model without a word.
LOADED: dict[str, tuple[Callable[[Tensors], object], dict[str, Any], str]] = {
    "no core": (without(f"{FC}.core"), {}, "lacks .*fc.tucker_weight.other.core; it is incomplete"),
    "no factor": (without(f"{CONV}.factor_3"), {"init_weights": True}, "lacks .*conv.tucker_weight.other.factor_3"),
    "a whole weight": (without(f"{FC}.core", f"{FC}.factor_0", f"{FC}.factor_1"), {}, "lacks .*fc"),
    "NaN": (at(f"{FC}.core", lambda value: value / 0), {}, "has NaN or infinite entries"),
    "whole numbers": (each(lambda value: value.long()), {}, "has numbers of type torch.int64"),
    "complex": (each(lambda value: value + 1j), {}, "as torch.complex64 in the file, but the base model needs"),
}


@pytest.mark.parametrize("name", LOADED)
def test_peft_does_not_load_it(name: str, sound: Path, tmp_path: Path) -> None:
    change, config, message = LOADED[name]
    place = edited(sound, "flora", tmp_path, change, **config)
    base = net()
    before = {key: value.clone() for key, value in base.state_dict().items()}
    with pytest.raises(UserError, match=message):
        PeftModel.from_pretrained(base, place, adapter_name="other")
    assert base.state_dict().keys() == before.keys()

    model = PeftModel.from_pretrained(base, sound / "flora")
    with pytest.raises(UserError, match=message):
        model.load_adapter(place, adapter_name="other")
    assert list(model.peft_config) == ["default"]


def test_a_weight_that_starts_from_no_change_may_be_left_out(sound: Path, tmp_path: Path) -> None:
    change = without(f"{FC}.core", f"{FC}.factor_0", f"{FC}.factor_1")
    place = edited(sound, "flora", tmp_path, change, init_weights=True)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        merged = PeftModel.from_pretrained(net(), place).merge_and_unload()
    assert torch.equal(merged.fc.weight, net().fc.weight)
    assert not torch.equal(merged.conv.weight, net().conv.weight)


@pytest.mark.parametrize("form", ["flora", "lora"])
def test_fields_of_a_newer_version_are_named(form: str, sound: Path, tmp_path: Path) -> None:
    place = edited(sound, form, tmp_path, same, newer_scale=2.0, other_thing=None)
    with pytest.warns(UserWarning, match="has newer_scale, which this version does not know") as warned:
        convert(place, tmp_path / "out", to="flora")
    assert len(warned) == 1


@pytest.mark.parametrize("form", ["flora", "lora"])
def test_a_head_that_the_file_lacks_is_named(form: str, sound: Path, tmp_path: Path) -> None:
    place = edited(sound, form, tmp_path, same, modules_to_save=["head"])
    with pytest.warns(UserWarning, match="names head in modules_to_save, and the file of weights has none"):
        flora.load(place)


def test_every_field_of_a_config_is_known() -> None:
    for peft_type, config in (("TUCKER", flora.FloraConfig), ("LORA", LoraConfig)):
        fields = {field.name for field in dataclasses.fields(config)}
        assert fields <= set(FIELDS[peft_type]), peft_type


# ---- whole tensors ---------------------------------------------------------------------------------------------------

HEADS: dict[str, tuple[str, Tensor, str]] = {
    "complex": ("head.bias", torch.ones(7) * 1j, "torch.float32 in the base model, which cannot hold"),
    "too large": ("head.bias", torch.full((7,), 1e60, dtype=torch.float64), "which cannot hold the numbers"),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_whole_tensor_that_the_base_cannot_hold(name: str, sound: Path, tmp_path: Path) -> None:
    key, value, message = HEADS[name]
    place = edited(sound, "dense.safetensors", tmp_path, put(f"whole.{key}", value))
    with pytest.raises(UserError, match=message):
        stream_merged(sound / "base", flora.load(place), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_new_buffer_of_whole_numbers_is_merged(sound: Path, tmp_path: Path) -> None:
    place = edited(sound, "dense.safetensors", tmp_path, put("whole.norm.num_batches_tracked", torch.tensor(3)))
    stream_merged(sound / "base", flora.load(place), tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as written:
        assert torch.equal(written.get_tensor("norm.num_batches_tracked"), torch.tensor(3))


# ---- what a type of numbers cannot hold ------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["lora", "kohya", "dense"])
@pytest.mark.parametrize(
    ("scale", "message"), [(1e6, "too large for torch.float16"), (1e-9, "too small for torch.float")]
)
def test_a_scale_that_half_precision_cannot_hold(
    to: Any, scale: float, message: str, sound: Path, tmp_path: Path
) -> None:
    place = edited(sound, "flora", tmp_path, each(lambda value: value.half()), scale=scale)
    out = tmp_path / ("out" if to == "lora" else "out.safetensors")
    with pytest.raises(UserError, match=message):
        convert(place, out, to=to)
    assert not out.exists()


def test_a_high_rank_in_half_precision_keeps_its_scale(tmp_path: Path) -> None:
    """A rank of 257, as alpha, is no number of bfloat16."""
    form = flora.Tucker(torch.randn(257, 257).bfloat16(), (torch.randn(269, 257).bfloat16(), None))
    entry = Entry(form, 1.0, Layout("linear", ("out", "in")))
    save(Adapter({"fc.weight": entry}), tmp_path / "a.safetensors", format="kohya")
    assert flora.load(tmp_path / "a.safetensors").weights["fc.weight"].scale == 1.0
