"""What an axis means: each role in the table against what the layer computes, and the start that follows from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flora import LAYERS, FloraConfig
from flora.layers.axes import KERNELS, ROLES, roles_of
from flora.layers.table import find_layer, parameter
from flora.tucker.fold import parse_fold
from flora.tuner.layer import FloraLayer


@dataclass(frozen=True)
class Probe:
    """A layer, what it is called with, and one number of its output that is as plain as possible."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    number: Callable[[Any], Tensor]
    skipped: tuple[str, ...] = ()  # weights that no single output number tells about


def first(*at: int) -> Callable[[Any], Tensor]:
    return lambda out: out[at]


def rows(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(*shape),)


def attention(**sizes: int) -> nn.MultiheadAttention:
    """With an output projection that mixes nothing, so that an output number belongs to one head."""
    layer = nn.MultiheadAttention(6, 3, **sizes)
    with torch.no_grad():
        layer.out_proj.weight.copy_(torch.eye(6))
    return layer


def projected() -> nn.LSTM:
    return nn.LSTM(5, 7, proj_size=3)


STATE = (torch.randn(1, 2, 7), torch.randn(1, 2, 7))
PROBES: dict[type[nn.Module], list[Probe]] = {
    nn.Linear: [Probe(lambda: nn.Linear(5, 7), rows(2, 5), first(1, 3))],
    Conv1D: [Probe(lambda: Conv1D(7, 5), rows(2, 5), first(1, 3))],
    nn.Conv1d: [Probe(lambda: nn.Conv1d(5, 7, 3), rows(2, 5, 11), first(1, 3, 4))],
    nn.Conv2d: [
        Probe(lambda: nn.Conv2d(5, 7, (3, 2)), rows(2, 5, 11, 9), first(1, 3, 4, 4)),
        Probe(lambda: nn.Conv2d(6, 9, (3, 2), groups=3), rows(2, 6, 11, 9), first(1, 3, 4, 4)),
    ],
    nn.Conv3d: [Probe(lambda: nn.Conv3d(3, 5, (3, 2, 4)), rows(2, 3, 7, 7, 7), first(1, 3, 2, 2, 2))],
    nn.ConvTranspose1d: [Probe(lambda: nn.ConvTranspose1d(5, 7, 3), rows(2, 5, 11), first(1, 3, 5))],
    nn.ConvTranspose2d: [Probe(lambda: nn.ConvTranspose2d(5, 7, (3, 2)), rows(2, 5, 11, 9), first(1, 3, 5, 5))],
    nn.ConvTranspose3d: [Probe(lambda: nn.ConvTranspose3d(3, 5, (3, 2, 4)), rows(2, 3, 7, 7, 7), first(1, 3, 4, 4, 4))],
    nn.Embedding: [Probe(lambda: nn.Embedding(11, 7), lambda: (torch.tensor([3, 5]),), first(1, 3))],
    nn.EmbeddingBag: [Probe(lambda: nn.EmbeddingBag(11, 7), lambda: (torch.tensor([[3], [5]]),), first(1, 3))],
    nn.Bilinear: [Probe(lambda: nn.Bilinear(5, 3, 7), lambda: (torch.randn(2, 5), torch.randn(2, 3)), first(1, 3))],
    nn.MultiheadAttention: [
        Probe(attention, lambda: (torch.randn(3, 2, 6),) * 3, lambda out: out[0][1, 1, 3]),
        Probe(
            lambda: attention(kdim=5, vdim=7),
            lambda: (torch.randn(3, 2, 6), torch.randn(4, 2, 5), torch.randn(4, 2, 7)),
            lambda out: out[0][1, 1, 3],
        ),
    ],
    nn.LSTM: [
        Probe(lambda: nn.LSTM(5, 7), lambda: (torch.randn(1, 2, 5), STATE), lambda out: out[0][0, 1, 3]),
        Probe(
            projected,
            rows(1, 2, 5),
            lambda out: out[0][0, 1, 2],
            ("weight_ih_l0", "weight_hh_l0"),  # the projection mixes every gate into every output
        ),
    ],
    nn.GRU: [Probe(lambda: nn.GRU(5, 7), lambda: (torch.randn(1, 2, 5), STATE[0]), lambda out: out[0][0, 1, 3])],
    nn.RNN: [Probe(lambda: nn.RNN(5, 7), lambda: (torch.randn(1, 2, 5), STATE[0]), lambda out: out[0][0, 1, 3])],
    nn.LSTMCell: [
        Probe(
            lambda: nn.LSTMCell(5, 7),
            lambda: (torch.randn(2, 5), (STATE[0][0], STATE[1][0])),
            lambda out: out[0][1, 3],
        )
    ],
    nn.GRUCell: [Probe(lambda: nn.GRUCell(5, 7), lambda: (torch.randn(2, 5), STATE[0][0]), first(1, 3))],
    nn.RNNCell: [Probe(lambda: nn.RNNCell(5, 7), lambda: (torch.randn(2, 5), STATE[0][0]), first(1, 3))],
    nn.LayerNorm: [Probe(lambda: nn.LayerNorm(7), rows(2, 7), first(1, 3))],
    nn.GroupNorm: [Probe(lambda: nn.GroupNorm(3, 6), rows(2, 6, 5), first(1, 3, 2))],
    nn.RMSNorm: [Probe(lambda: nn.RMSNorm(7), rows(2, 7), first(1, 3))],
    nn.BatchNorm1d: [Probe(lambda: nn.BatchNorm1d(7), rows(3, 7), first(1, 3))],
    nn.BatchNorm2d: [Probe(lambda: nn.BatchNorm2d(7), rows(3, 7, 5, 2), first(1, 3, 2, 1))],
    nn.BatchNorm3d: [Probe(lambda: nn.BatchNorm3d(7), rows(3, 7, 3, 5, 2), first(1, 3, 2, 2, 1))],
}
EACH = [(cls, probe) for cls, probes in PROBES.items() for probe in probes]


def summed_over(layer: nn.Module, probe: Probe, name: str) -> list[bool]:
    """By autograd: a number of the output depends on every index of an axis that the layer sums over.

    Of any other axis it depends on some indices only: its own row, its head, its gates, the token that was asked for.
    """
    weight = parameter(layer, name)
    (gradient,) = torch.autograd.grad(probe.number(layer(*probe.inputs())), weight)
    touched = gradient != 0
    return [
        bool(touched.transpose(0, axis).flatten(1).any(dim=1).all()) if weight.ndim > 1 else bool(touched.all())
        for axis in range(weight.ndim)
    ]


def test_every_row_of_the_table_has_a_probe() -> None:
    assert set(PROBES) == set(LAYERS)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(("cls", "probe"), EACH, ids=lambda value: getattr(value, "__name__", "probe"))
def test_every_axis_has_the_role_that_the_layer_gives_it(cls: type[nn.Module], probe: Probe) -> None:
    layer = probe.build()
    found = find_layer(layer)
    assert found is not None
    folds = found[1].folds(layer)

    for name, axes in found[1].weights(layer).items():
        if name in probe.skipped:
            continue
        truth = summed_over(layer, probe, name)
        assert [role in ("summed", "kernel") for role in roles_of(axes)] == truth, (name, axes)
        assert set(axes) <= set(ROLES), (name, axes)

        if name in folds:
            fold = parse_fold(folds[name], tuple(parameter(layer, name).shape))
            folded = [truth[stored] for stored, group in enumerate(fold.groups) for _ in group]
            assert [role in ("summed", "kernel") for role in roles_of(axes, fold)] == folded, folds[name]


class Stack(nn.Module):
    """A raw stack of matrices, stored as (expert, out, in) or, as some models have it, as (expert, in, out)."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.weight = nn.Parameter(torch.randn((3, 5, 7)))

    def forward(self, x: Tensor) -> Tensor:
        matrix = self.weight[1]
        return x @ matrix if self.is_transposed else x @ matrix.mT


@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_stack_of_experts_starts_by_the_axis_it_sums_over(is_transposed: bool) -> None:
    layer = Stack(is_transposed)
    summed = summed_over(layer, Probe(lambda: layer, rows(2, 5 if is_transposed else 7), first(1, 3)), "weight")
    assert summed == [False, is_transposed, not is_transposed]

    config = FloraConfig(r=2, target_parameters=["0.weight"])
    model = get_peft_model(nn.Sequential(layer), config)
    wrapper = model.base_model.model[0]
    assert isinstance(wrapper, FloraLayer)
    for size, factor, is_summed in zip((3, 5, 7), wrapper.delta("default").form.factors, summed, strict=True):
        if factor is not None and torch.count_nonzero(factor):
            assert factor.norm(dim=0).allclose(torch.tensor(1.0 if is_summed else math.sqrt(size / factor.shape[1])))


# ---- folds ---------------------------------------------------------------------------------------------------------

LINEAR, CONV = ("out", "in"), ("out", "in", "kh", "kw")
FOLDED = [
    (LINEAR, (12, 7), "(heads dim) in, heads=3", ("output", "output", "summed")),
    (LINEAR, (12, 7), "(heads dim) features, heads=3", ("output", "output", "summed")),
    (LINEAR, (12, 7), "(in hidden) kw, in=3", ("output", "output", "kernel")),
    (LINEAR, (7, 12), "vocab (channels kh kw), kh=2 kw=2", ("output", "summed", "kernel", "kernel")),
    (("in", "out"), (7, 12), "input (heads dim), heads=3", ("summed", "output", "output")),
    (CONV, (6, 5, 3, 4), "(a b) in kh (c d), a=2 c=2", ("output", "output", "summed", "kernel", "summed", "summed")),
    (("vocab", "dim"), (12, 7), "(a b) in, a=3", ("stack", "stack", "output")),
    (("gates", "hidden"), (12, 3), "(gates hidden) input, gates=4", ("output", "output", "summed")),
]


@pytest.mark.parametrize(("axes", "shape", "fold", "roles"), FOLDED)
def test_a_folded_axis_has_the_role_of_the_stored_axis(
    axes: tuple[str, ...], shape: tuple[int, ...], fold: str, roles: tuple[str, ...]
) -> None:
    assert roles_of(axes, parse_fold(fold, shape)) == roles


def test_the_spelling_of_a_fold_does_not_change_the_start() -> None:
    starts = []
    for fold in ("(heads dim) in, heads=3", "(heads dim) features, heads=3"):
        torch.manual_seed(5)
        model = get_peft_model(
            nn.Sequential(nn.Linear(7, 12)), FloraConfig(r=2, target_modules=["0"], fold={"0": fold})
        )
        starts.append([value.clone() for value in model.base_model.model[0].delta("default").parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*starts, strict=True))


def test_an_axis_without_a_known_name_is_taken_for_an_output() -> None:
    assert roles_of(("d0", "d1")) == ("output", "output")


def test_the_kernel_axes_are_those_of_the_table() -> None:
    assert {axis for axes in KERNELS.values() for axis in axes} == {a for a, role in ROLES.items() if role == "kernel"}
