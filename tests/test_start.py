"""The start from the gradient: the first change, the ranks it asks for, and that nothing else is touched."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import flora
from flora.tucker.allocation import choices_of_energy
from flora.tucker.form import count_params
from flora.tuner.gradient import forms
from flora.tuner.gradient import sketch as sketches
from flora.tuner.gradient import start as starting
from flora.tuner.gradient.allocate import MOST, allocate
from flora.tuner.gradient.collect import Batches
from flora.tuner.gradient.start import adapt_and_tell, smallest_good_step
from flora.tuner.layer import FloraLayer, named_layers


class Several(nn.Module):
    """Layers of many kinds, each on an input of its own; the output is one number per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(5, 7, 3, padding=1)
        self.wide = nn.Linear(7, 11)
        self.up = nn.ConvTranspose1d(11, 13, 2, stride=2)
        self.grouped = nn.Conv1d(13, 26, 3, groups=13)
        self.norm = nn.BatchNorm1d(26)
        self.drop = nn.Dropout(0.5)
        self.rnn = nn.GRU(26, 6, batch_first=True)
        self.table = nn.Embedding(17, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.stack = nn.Parameter(torch.randn(3, 6, 4) / 3)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        x = self.conv(x).relu().mean(2)
        x = self.wide(x.transpose(1, 2)).relu().transpose(1, 2)
        x = self.drop(self.norm(self.grouped(self.up(x))))
        x, _ = self.rnn(x.transpose(1, 2))
        x = x + self.table(ids)[:, None]
        x, _ = self.attention(x, x, x, need_weights=False)
        x = torch.einsum("bti,eio->beto", x, self.stack).mean((1, 2))
        return self.head(x)


class Stack(nn.Module):
    """A raw parameter of three dimensions in a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Holder()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 6, 5) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eio->bo", x, self.experts)


def several_batches(count: int = 6) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(4, 5, 3, 4, generator=generator),
            torch.randint(17, (4,), generator=generator),
            torch.randint(2, (4,), generator=generator),
        )
        for _ in range(count)
    ]


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(*batch[:2]), batch[2])


def squares(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return (model(x) - y).square().mean()


def pairs(layer: nn.Module, *size: int, count: int = 5) -> list[tuple[Tensor, Tensor]]:
    """Targets that another weight would give, so that a step along the gradient helps."""
    generator = torch.Generator().manual_seed(2)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        for value in other.parameters():
            value.add_(torch.randn(value.shape, generator=generator) * value.std())
    inputs = [torch.randn(*size, generator=generator) for _ in range(count)]
    return [(x, other(x).detach()) for x in inputs]


def projected_gradient(layer: nn.Module, weight: Tensor, batches: Any, ranks: tuple[int, ...]) -> Tensor:
    """By full SVDs of unfoldings: the mean gradient on the leading vectors of each mode, the first mode last."""
    gradients = []
    for batch in batches:
        (gradient,) = torch.autograd.grad(squares(layer, batch), weight)
        gradients.append(gradient.double())
    stack = torch.stack(gradients)
    found = stack.mean(0)
    for mode in range(1, weight.ndim):
        vectors = torch.linalg.svd(stack.movedim(mode + 1, 0).flatten(1))[0][:, : ranks[mode]]
        found = torch.tensordot(found, vectors @ vectors.T, ([mode], [0])).movedim(-1, mode)
    left = torch.linalg.svd(found.flatten(1))[0][:, : ranks[0]]
    return torch.tensordot(left @ left.T, found, ([1], [0]))


LAYERS: list[tuple[str, Callable[[], nn.Module], tuple[int, ...], list[int]]] = [
    ("linear", lambda: nn.Linear(7, 11, bias=False), (13, 7), [3, 2]),
    ("whole first mode", lambda: nn.Linear(7, 11, bias=False), (13, 7), [11, 2]),
    ("whole second mode", lambda: nn.Linear(7, 11, bias=False), (13, 7), [2, 7]),
    ("conv", lambda: nn.Conv2d(5, 7, 3, bias=False), (3, 5, 6, 7), [3, 2, 2, 3]),
    ("grouped", lambda: nn.Conv2d(6, 10, 3, groups=2, bias=False), (3, 6, 5, 7), [4, 2, 2, 1]),
    ("transposed", lambda: nn.ConvTranspose2d(5, 7, 2, bias=False), (3, 5, 4, 3), [2, 3, 2, 1]),
    ("conv3d", lambda: nn.Conv3d(3, 5, 2, bias=False), (2, 3, 4, 5, 3), [3, 2, 1, 2, 2]),
]


@pytest.mark.parametrize(("layer", "size", "ranks"), [row[1:] for row in LAYERS], ids=[row[0] for row in LAYERS])
def test_the_first_change_is_the_projected_gradient(
    layer: Callable[[], nn.Module], size: tuple[int, ...], ranks: list[int]
) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(layer())
    weight = base[0].weight.detach().clone()
    batches = pairs(base, *size)
    expected = projected_gradient(base, base[0].weight, batches[:-1], tuple(ranks))
    model = get_peft_model(base, flora.FloraConfig(r=ranks, scale=1.7, target_modules=["0"]))
    begun = flora.start(model, batches, loss=squares)
    assert begun.step > 0
    assert begun.losses[begun.step] < begun.losses[0.0]
    change = model.base_model.model[0].get_delta_weight("default").double()
    size_of_step = begun.step * float(weight.norm())
    assert torch.allclose(change, -size_of_step * expected / expected.norm(), rtol=1e-3, atol=1e-4 * size_of_step)
    assert torch.equal(model.base_model.model[0].base_layer.weight, weight)


@pytest.mark.parametrize("ranks", [[3, 2], [13, 2]], ids=["factored", "whole first mode"])
def test_a_step_of_the_optimiser_does_not_change_the_outputs_much_more(
    ranks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(97, 13, bias=False))
    inputs = [8 * torch.ones(5, 97) + torch.randn(5, 97) for _ in range(5)]  # most of it is in one direction
    batches = [(x, torch.randn(5, 13)) for x in inputs]
    config = flora.FloraConfig(r=ranks, target_modules=["0"])

    def let_through(model: Any) -> float:
        """How large what meets the moving tensor is, for these inputs."""
        form = model.base_model.model[0].delta("default", "weight").form
        inner = torch.cat(inputs) @ form.factors[1]
        if form.factors[0] is not None:
            inner = inner @ form.core.T
        return float(inner.detach().norm())

    usual = sum(let_through(get_peft_model(copy.deepcopy(base), config)) ** 2 for _ in range(20)) / 20
    found = {}
    for most in (2.0, math.inf):
        monkeypatch.setattr(forms, "MOST_GAIN", most)
        model = get_peft_model(copy.deepcopy(base), config)
        assert flora.start(model, batches, loss=squares).step > 0
        found[most] = let_through(model) / math.sqrt(usual)

    assert 1.5 < found[2.0] < 2.6
    assert found[math.inf] > 4


def test_a_wide_mode_is_found_in_two_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(41, 37, bias=False))
    batches = pairs(base, 3, 41)
    expected = projected_gradient(base, base[0].weight, batches[:-1], (2, 2))
    monkeypatch.setattr(sketches, "NARROW", 32)  # gradients of rank 3 in 4 batches: a range of 16 holds all of them
    model = get_peft_model(base, flora.FloraConfig(r=[2, 2], target_modules=["0"]))
    assert flora.start(model, batches, loss=squares).step > 0
    change = model.base_model.model[0].get_delta_weight("default").detach().double()
    size = float(change.norm())
    assert torch.allclose(change, -size * expected / expected.norm(), rtol=1e-2, atol=1e-3 * size)


def test_all_kinds_of_layers_and_nothing_else_changes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Several().eval()
    base.wide.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    twin = copy.deepcopy(base)
    config = flora.FloraConfig(target_modules="all", exclude_modules=["head"], budget=600, modules_to_save=["head"])
    adapted = adapt_and_tell(base, config, several_batches(), loss=cross_entropy, choose_ranks=True)
    model = adapted.model
    assert adapted.start.batches == (5, 1)
    assert adapted.start.step > 0
    assert config.budget == 600

    trained = sum(value.numel() for name, value in model.named_parameters() if "tucker_" in name)
    assert 0.9 * 600 < trained <= 600
    merged = copy.deepcopy(model).merge_and_unload()
    changed = {name for name, value in merged.state_dict().items() if not torch.equal(value, before[name])}
    layers = {name for name, module in model.named_modules() if isinstance(module, FloraLayer)}
    assert changed
    assert all(any(name.startswith(layer.removeprefix("base_model.model.")) for layer in layers) for name in changed)
    assert not any("running" in name or "norm" in name for name in changed)
    assert all(value.grad is None for value in model.parameters())

    again = flora.adapt(copy.deepcopy(twin), config, several_batches(), loss=cross_entropy, choose_ranks=True)
    for (name, one), (other, two) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert name == other
        assert one.shape == two.shape

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(twin), tmp_path).eval()
    x, ids, _ = several_batches(1)[0]
    assert torch.allclose(model.eval()(x, ids), loaded(x, ids), atol=1e-6)


def test_the_ranks_are_those_of_the_config_unless_they_are_to_be_chosen() -> None:
    torch.manual_seed(0)
    base, config = Several(), flora.FloraConfig(target_modules="all-conv", budget=300)
    usual = get_peft_model(copy.deepcopy(base), copy.deepcopy(config))
    ranks = {name: value.shape for name, value in usual.named_parameters()}
    model = flora.adapt(copy.deepcopy(base), config, several_batches(), loss=cross_entropy)
    assert {name: value.shape for name, value in model.named_parameters()} == ranks

    chosen = flora.adapt(copy.deepcopy(base), config, several_batches(), loss=cross_entropy, choose_ranks=True)
    assert {name: value.shape for name, value in chosen.named_parameters()} != ranks


def test_a_repeat_gives_the_same_tensors() -> None:
    torch.manual_seed(0)
    base, states = Several(), []
    for _ in range(2):
        torch.manual_seed(3)
        config = flora.FloraConfig(target_modules="all-conv", budget=300)
        model = flora.adapt(copy.deepcopy(base), config, several_batches(), loss=cross_entropy, choose_ranks=True)
        states.append({name: value for name, value in model.state_dict().items() if "tucker_" in name})
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_raw_parameters_of_three_dimensions() -> None:
    torch.manual_seed(0)
    base = Stack()
    batches = pairs(base, 7, 6)
    expected = projected_gradient(base, base.inner.experts, batches[:-1], (2, 3, 2))
    config = flora.FloraConfig(target_parameters=["inner.experts"], r=[2, 3, 2])
    model = flora.adapt(base, config, batches, loss=squares)
    change = model.base_model.model.inner.get_delta_weight("default", "experts").detach().double()
    assert change.norm() > 0
    assert torch.allclose(change / change.norm(), -expected / expected.norm(), atol=1e-4)


class Uphill(nn.Module):
    """A loss whose gradient points the wrong way: no step lowers it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(11, 13, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return (2 * y.detach() - y).square().mean()


@pytest.mark.parametrize("kind", ["uphill", "nan", "flat"])
def test_where_nothing_helps_it_begins_as_configured(kind: str) -> None:
    torch.manual_seed(0)
    base = Uphill()
    scale = {"uphill": 1.0, "nan": math.nan, "flat": 0.0}[kind]
    data = [torch.randn(7, 11) for _ in range(4)]
    config = flora.FloraConfig(r=2, target_modules=["layer"])
    torch.manual_seed(1)
    usual = get_peft_model(copy.deepcopy(base), config)
    torch.manual_seed(1)
    adapted = adapt_and_tell(base, config, data, loss=lambda model, x: scale * model(x))
    assert adapted.start.step == 0
    reason = {"uphill": "no step lowers the loss of ", "nan": "zero or not finite", "flat": "zero or not finite"}[kind]
    assert reason in str(adapted.start)
    assert "begins as configured" in str(adapted.start)
    assert "nan" not in str(adapted.start)
    for one, two in zip(usual.parameters(), adapted.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_an_error_leaves_the_model_as_it_was() -> None:
    torch.manual_seed(0)
    base = Several()
    base.table.requires_grad_(False)
    before = {name: (value.clone(), value.requires_grad) for name, value in base.named_parameters()}
    kinds = {name: type(module) for name, module in base.named_modules()}
    calls = []

    def fails(model: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 6:  # in the search for the step
            raise RuntimeError("no")
        return cross_entropy(model, batch)

    for budget in (None, 500):
        calls.clear()
        config = flora.FloraConfig(r=2, target_modules="all-conv", budget=budget)
        with pytest.raises(RuntimeError, match="no"):
            flora.adapt(base, config, several_batches(), loss=fails, choose_ranks=budget is not None)
        assert len(calls) == 6
        assert {name: type(module) for name, module in base.named_modules()} == kinds
        for name, value in base.named_parameters():
            assert torch.equal(value, before[name][0])
            assert value.requires_grad == before[name][1]
            assert value.grad is None
    assert base.training


def test_gradients_and_random_numbers_of_the_caller_are_kept() -> None:
    """A gradient that is accumulated already is neither added to nor heard; models also ask numpy and random."""

    def noisy(model: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(model, batch) * (1 + random.random() + np.random.rand())  # noqa: NPY002

    begun = []
    for accumulated in (False, True):
        torch.manual_seed(0)
        base = Several()
        for value in base.parameters() if accumulated else ():
            value.grad = torch.full_like(value, 3)
        model = get_peft_model(base, flora.FloraConfig(r=2, target_modules="all"))
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        start = flora.start(model, several_batches(), loss=noisy)
        assert (random.random(), np.random.rand()) == (0.13436424411240122, 0.417022004702574)  # noqa: NPY002
        begun.append((start.losses, [value.detach() for name, value in model.named_parameters() if "tucker" in name]))
        kept = [value.grad for name, value in model.named_parameters() if "tucker" not in name]
        assert all((value == 3).all() if accumulated else value is None for value in kept)

    assert begun[0][0] == begun[1][0]
    assert all(torch.equal(one, other) for one, other in zip(begun[0][1], begun[1][1], strict=True))


def test_what_it_refuses() -> None:
    layer = nn.Sequential(nn.Linear(11, 13))
    data = pairs(layer, 7, 11)
    with pytest.raises(ValueError, match="no FLoRA adapter"):
        flora.start(copy.deepcopy(layer), data, loss=squares)
    model = get_peft_model(layer, flora.FloraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match="two batches"):
        flora.start(model, data[:1], loss=squares)
    for count, said in (
        (1, "count is 1, expected 2 or more"),
        (-3, "count is -3"),
        (2.5, "whole number"),
        (True, "True"),
    ):
        with pytest.raises(ValueError, match=said):
            flora.start(model, data, loss=squares, count=count)
    with pytest.raises(ValueError, match="without a loss"):
        flora.start(model, [x for x, _ in data])
    with pytest.raises(ValueError, match="does not depend"):
        flora.start(model, data, loss=lambda model, batch: squares(model, batch).detach())
    flora.start(model, data, loss=squares)
    with pytest.raises(ValueError, match="has not been trained"):
        flora.start(model, data, loss=squares)


def test_a_module_of_the_models_own_named_base_layer() -> None:
    """DLA's backbones have one; PEFT calls so what is inside its wrappers."""
    torch.manual_seed(0)
    base = nn.ModuleDict({"base_layer": nn.Sequential(nn.Linear(11, 13), nn.Linear(13, 7)), "out": nn.Linear(7, 5)})
    names = [name for name, _ in base.named_modules()]

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        return (inner["out"](inner["base_layer"](x).tanh()) - 1).square().mean()

    data = [torch.randn(6, 11) for _ in range(4)]
    config = flora.FloraConfig(budget=150, target_modules="all-linear")
    model = flora.adapt(base, config, data, loss=loss, choose_ranks=True)
    assert {layer.name for layer in named_layers(model)} <= {"base_layer.0", "base_layer.1", "out"}
    assert sum(value.numel() for name, value in model.named_parameters() if "tucker_" in name) <= 150

    before = loss(model, data[0])
    merged = model.merge_and_unload()
    torch.testing.assert_close(loss(merged, data[0]), before)
    assert [name for name, _ in merged.named_modules()] == names


def test_the_step_is_the_smallest_that_gains_most() -> None:
    assert smallest_good_step({0.0: 1.0, 0.003: 0.9, 0.01: 0.55, 0.03: 0.5, 0.1: 2.0}) == 0.01
    assert smallest_good_step({0.0: 1.0, 0.01: math.nan, 0.03: 0.9}) == 0.03
    assert smallest_good_step({0.0: 1.0, 0.01: 1.0, 0.03: 1.1}) == 0
    assert smallest_good_step({0.0: math.nan, 0.01: 0.5}) == 0
    assert smallest_good_step({}) == 0


def test_ranks_that_cannot_be_used_are_no_choice() -> None:
    energy = torch.ones(5, 4, 3)
    for choice in choices_of_energy(energy, (5, 4, 3), 60.0)[1:]:
        product = math.prod(choice.ranks)
        assert all(rank == size or rank * rank <= product for rank, size in zip(choice.ranks, (5, 4, 3), strict=True))
    dearest = choices_of_energy(energy, (5, 4, 3), 60.0)[-1]
    assert dearest.ranks == (5, 4, 3)
    assert dearest.params == 60
    assert dearest.error == 0


def test_a_layer_without_gradient_gets_no_rank_and_is_left_out_by_its_whole_name() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"conv": nn.Linear(9, 9), "a": nn.ModuleDict({"conv": nn.Linear(9, 9)})})

    def loss(model: nn.Module, batch: Any) -> Tensor:
        inner = model.base_model.model if hasattr(model, "base_model") else model
        x = inner["a"]["conv"](batch)
        return (x + 1e-9 * inner["conv"](batch[:1] * 1e-9) - 3).square().mean()

    data = [torch.randn(5, 9) for _ in range(4)]
    config = flora.FloraConfig(target_modules=["conv"], budget=60)
    adapted = flora.adapt(model, config, data, loss=loss, choose_ranks=True)
    names = [name for name, module in adapted.named_modules() if isinstance(module, FloraLayer)]
    assert "base_model.model.a.conv" in names


@pytest.mark.parametrize(("others", "budget"), [("beside", 120), ("alone", 100)])
def test_raw_parameters_stay_where_a_layer_gets_no_rank(others: str, budget: int) -> None:
    """The gradient of one layer has no leading direction, so that its first ranks are worth the least."""
    torch.manual_seed(0)
    stack = nn.Module()
    stack.register_parameter("experts", nn.Parameter(torch.randn(3, 7, 5)))
    parts = {"stack": stack, "flat": nn.Linear(40, 40)}
    if others == "beside":
        parts["last"] = nn.Linear(7, 7)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        rows, wide = batch
        found = torch.einsum("bi,eoi->bo", rows, inner["stack"].experts)
        if "last" in inner:
            found = inner["last"](found)
        return found.square().mean() + (inner["flat"](wide) * wide.roll(1, 0)).mean()

    data = [(torch.randn(6, 5), torch.randn(400, 40)) for _ in range(4)]
    config = flora.FloraConfig(budget=budget, target_modules="all-linear", target_parameters=["stack.experts"])
    adapted = flora.adapt(nn.ModuleDict(parts), config, data, loss=loss, choose_ranks=True)
    kept = {layer.name for layer in named_layers(adapted)}
    assert kept == {"stack", *parts} - {"flat"}
    assert sum(value.numel() for value in adapted.parameters() if value.requires_grad) <= budget


@pytest.mark.parametrize("second", [math.nan, math.inf, 1.0, 1.25], ids=str)
def test_no_larger_step_is_tried_after_one_that_does_not_lower_the_loss(
    second: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = iter([1.0, second])
    monkeypatch.setattr(starting, "mean_loss", lambda *_: next(told))
    losses = starting._try_steps(nn.Identity(), [], Batches([], []), lambda model, batch: torch.zeros(()))
    assert list(losses) == list(starting.STEPS[:2])
    assert smallest_good_step(losses) == 0


def test_a_weight_gets_at_most_a_few_times_its_share() -> None:
    """A gradient that is spread over all directions would take what a weight with one direction leaves over."""
    shape, equal = (29, 31), (2, 2)
    energies = {"flat": torch.eye(29), "sharp": torch.diag((torch.arange(29) == 0).float())}
    found = {name: sketches.Directions([], energy, float(energy.sum()), energy) for name, energy in energies.items()}
    layer = SimpleNamespace(attributes={"weight": "tucker_weight"})
    places: list[Any] = [SimpleNamespace(name=name, shape=shape, layer=layer) for name in found]

    ranks = allocate(places, found, dict.fromkeys(found, equal), budget=29 * 31).ranks
    share = count_params(shape, equal)
    assert 3 * share < count_params(shape, ranks["flat"]) <= MOST * share
    assert ranks["sharp"][0] == 1


def test_a_sketch_without_gradients_takes_part_in_what_the_processes_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the others would wait for it; the slow tests have two processes."""
    said: list[tuple[str, tuple[int, ...]]] = []

    def record(what: str, value: Tensor) -> Tensor:
        said.append((what, tuple(value.shape)))
        return value

    monkeypatch.setattr(sketches, "is_distributed", lambda: True)
    monkeypatch.setattr(sketches, "process_number", lambda: 0)
    for name in ("add_up", "of_first_process", "gather"):
        monkeypatch.setattr(sketches, name, partial(record, name))

    # What the other process has is added to the zeros of this one.
    monkeypatch.setattr(sketches, "add_up", lambda value: record("add_up", value.add_(torch.eye(*value.shape))))
    exchanged = []
    for count in (2, 0):
        sketch = sketches.Sketch((211, 7), 3, batches=2, seed=5, device=torch.device("cpu"))
        said.clear()
        for batch in range(count):
            sketch.add_to_ranges(torch.randn(211, 7), batch)
        sketch.close_ranges()
        for batch in range(count):
            sketch.add(torch.randn(211, 7), batch)
        assert (sketch.directions() is None) == (count == 0)
        exchanged.append(list(said))

    assert exchanged[0] == exchanged[1]
    assert [what for what, _ in exchanged[0]] == ["add_up", "of_first_process", "gather", "gather"]
