"""Batch norms: what a model is after training, it is again after loading its adapter, whoever trained it."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import flora
from flora.recipes import Data, load_recipe
from flora.runs.training import make_trainer
from flora.tuner.statistics import _use_running

X = torch.randn(4, 3, 9, 7, generator=torch.Generator().manual_seed(1)) * 3 + 1


class Net(nn.Module):
    """A network as the Trainer takes it, with norms that keep statistics and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)
        self.inner = nn.Sequential(
            nn.Conv2d(5, 7, 3), nn.InstanceNorm2d(7, track_running_stats=True), nn.GroupNorm(1, 7)
        )
        self.norm(torch.randn(8, 5, 3, 3) + 2)  # statistics that are not those of a fresh norm

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        out = self.inner(self.norm(self.conv(x)).relu()).mean((2, 3))
        return {"loss": out.square().mean(), "out": out}


def own_loop(model: PeftModel, tmp_path: Path) -> None:
    model.train()
    step = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.3)
    for _ in range(3):
        model(torch.randn(4, 3, 9, 7) * 3 + 1)["loss"].backward()
        step.step()
        step.zero_grad()


def with_trainer(model: PeftModel, tmp_path: Path) -> None:
    rows = [{"x": torch.randn(3, 9, 7) * 3 + 1, "labels": torch.tensor(0)} for _ in range(8)]
    options = TrainingArguments(
        str(tmp_path / "run"), max_steps=3, per_device_train_batch_size=4, report_to="none", save_strategy="no",
        use_cpu=True, disable_tqdm=True, learning_rate=0.1,
    )  # fmt: skip
    Trainer(model, options, train_dataset=rows).train()


FIELDS: list[dict[str, Any]] = [
    {"target_modules": "all-conv"},
    {"target_modules": ["conv", "norm"]},  # the norm itself adapted
    {"target_modules": ["conv"], "bias": "all"},
    {"target_modules": ["conv"], "modules_to_save": ["norm"]},
]


@pytest.mark.filterwarnings("ignore:the adapter has more parameters than the weight itself")
@pytest.mark.parametrize("train", [own_loop, with_trainer], ids=["own loop", "Trainer"])
@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_loaded_again_it_is_what_was_saved(fields: dict[str, Any], train: Any, tmp_path: Path) -> None:
    base = Net()
    model = get_peft_model(copy.deepcopy(base), flora.FloraConfig(r=2, kernel_r=2, init_weights=False, **fields))
    before = model.eval()(X)["out"].detach()
    train(model, tmp_path)
    after = model.eval()(X)["out"]
    assert not torch.allclose(after, before)

    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(X)["out"], after, rtol=0, atol=1e-6)
    statistics = model.base_model.model.state_dict()
    kept = [key for key in statistics if "running_mean" in key and "modules_to_save" not in key]
    assert all(
        torch.equal(statistics[key], value)
        for key in kept
        for name, value in base.state_dict().items()
        if key.replace(".base_layer", "").replace(".original_module", "") == name
    )


def test_norms_in_modules_to_save_move_their_statistics(tmp_path: Path) -> None:
    model = get_peft_model(Net(), flora.FloraConfig(r=2, target_modules=["conv"], modules_to_save=["norm"]))
    before = model.base_model.model.norm.modules_to_save["default"].running_mean.clone()
    own_loop(model, tmp_path)
    assert not torch.equal(model.base_model.model.norm.modules_to_save["default"].running_mean, before)


def test_it_is_said_once_and_only_to_who_trains(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model = get_peft_model(Net(), flora.FloraConfig(r=2, target_modules="all-conv"))
        model.add_adapter("second", flora.FloraConfig(r=2, target_modules=["conv"]))
    said = [record.getMessage() for record in caplog.records if "running statistics" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("2 batch norms keep the running statistics of the base model, in train mode too")

    caplog.clear()
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        PeftModel.from_pretrained(Net(), tmp_path)
    assert not caplog.records


def test_the_switch_lets_them_move_and_says_what_that_costs(tmp_path: Path) -> None:
    config = flora.FloraConfig(r=2, target_modules="all-conv", freeze_batch_norm=False)
    with pytest.warns(UserWarning, match="running statistics of 2 norms move in training and are not saved"):
        model = get_peft_model(Net(), config)
    before = model.base_model.model.norm.running_mean.clone()
    own_loop(model, tmp_path)
    assert not torch.equal(model.base_model.model.norm.running_mean, before)


@pytest.mark.parametrize("method", ["flora, left to move", "lora", "lora, norm trained", "all trained"])
def test_a_trainer_holds_the_norms_that_are_not_trained(method: str, tmp_path: Path) -> None:
    base, moves = Net(), method != "lora"

    if method == "flora, left to move":
        with pytest.warns(UserWarning, match="running statistics"):
            model = get_peft_model(base, flora.FloraConfig(r=2, target_modules=["conv"], freeze_batch_norm=False))
    elif method == "all trained":
        model = base
    else:
        saved = ["norm"] if method == "lora, norm trained" else None
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["conv"], modules_to_save=saved))

    rows = [{"x": x, "labels": torch.tensor(0)} for x in X]
    options = TrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=True, report_to="none")
    make_trainer(model, load_recipe("digits"), Data(rows, rows, rows), options)
    before = {name: value.clone() for name, value in model.named_buffers() if name.endswith("running_mean")}
    model.train()(X)
    after = dict(model.named_buffers())
    assert any(not torch.equal(after[name], value) for name, value in before.items()) == moves


def test_unloading_leaves_the_norms_as_they_were() -> None:
    base = get_peft_model(Net(), flora.FloraConfig(r=2, target_modules="all-conv")).unload()
    assert not [module for module in base.modules() if _use_running in module._forward_pre_hooks.values()]
    before = base.norm.running_mean.clone()
    base.train()(X)
    assert not torch.equal(base.norm.running_mean, before)


def test_a_later_adapter_may_train_a_norm(tmp_path: Path) -> None:
    model = get_peft_model(Net(), flora.FloraConfig(r=2, target_modules=["conv"]))
    model.add_adapter("second", flora.FloraConfig(r=2, target_modules=["conv"], modules_to_save=["norm"]))
    model.set_adapter("second")
    before = model.base_model.model.norm.modules_to_save["second"].running_mean.clone()
    own_loop(model, tmp_path)
    assert not torch.equal(model.base_model.model.norm.modules_to_save["second"].running_mean, before)


class Codebook(nn.Module):
    """What it holds follows the data in training, as the codebooks of vector-quantize-pytorch do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("entries", torch.randn(7, 5))
        self.register_buffer("seen", torch.zeros(7), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        nearest = torch.cdist(x.detach(), self.entries).argmin(-1)
        if self.training:
            self.entries.data.index_copy_(0, nearest, 0.9 * self.entries[nearest] + 0.1 * x.detach())
            self.seen[nearest] += 1
        return x + self.entries[nearest].sin()


def quantised() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(13, 5), nn.Sequential(Codebook()))


def test_buffers_that_move_in_training_are_named() -> None:
    model = get_peft_model(quantised(), flora.FloraConfig(r=2, target_modules="all"))
    x = torch.randn(11, 13)
    with torch.no_grad():
        model.train()(x)
    model.eval()(x)
    with pytest.warns(UserWarning, match=r"changes buffers in training, .* \(1\.0\.entries\)"):
        model.train()(x)
    model(x)  # warnings are errors: it is said once


def test_buffers_of_modules_to_save_move_and_are_saved(tmp_path: Path) -> None:
    config = flora.FloraConfig(r=2, target_modules="all", modules_to_save=["1"])
    model = get_peft_model(quantised(), config)
    x = torch.randn(11, 13)
    for _ in range(2):
        model.train()(x)
    model.save_pretrained(tmp_path)
    out = model.eval()(x)
    assert torch.equal(PeftModel.from_pretrained(quantised(), tmp_path).eval()(x), out)


class Shift(nn.Module):
    """A buffer that stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(5))

    def forward(self, x: Tensor) -> Any:
        return x + self.shift


def test_buffers_without_values_are_not_compared() -> None:
    config = flora.FloraConfig(r=2, target_modules="all")

    # As accelerate leaves what it has offloaded, and as a model is counted.
    with torch.device("meta"):
        model, x = get_peft_model(quantised(), config), torch.empty(11, 13)
    model.train()(x)

    # A batched buffer has no values that could be read back.
    model = get_peft_model(nn.Sequential(nn.Linear(13, 5), Shift()), config).train()
    x, shifts = torch.randn(3, 11, 13), torch.randn(3, 5)

    def run(each: Tensor, shift: Tensor) -> Any:
        return torch.func.functional_call(model, {"base_model.model.1.shift": shift}, (each,))

    assert torch.func.vmap(run)(x, shifts).shape == (3, 11, 5)
