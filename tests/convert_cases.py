"""Adapters to convert: random forms with uneven ranks on every weight of a model, or on a single one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from flora import Tucker
from flora.convert import Adapter, Entry, Layout
from flora.layers.layout import of_module

CONV_AXES = {1: ("out", "in", "kw"), 2: ("out", "in", "kh", "kw"), 3: ("out", "in", "kd", "kh", "kw")}


def random_form(shape: Sequence[int], ranks: Sequence[int]) -> Tucker:
    """A form with entries of about unit size; a rank equal to its size has no factor."""
    pairs = list(zip(shape, ranks, strict=True))
    return Tucker(torch.randn(*ranks), tuple(None if rank == size else torch.randn(size, rank) for size, rank in pairs))


def random_adapter(model: nn.Module, pick: Callable[[str, Tensor], bool], scale: float = 0.03) -> Adapter:
    """An adapter on the picked weights, with ranks 2, 3, 4, 2, ... over the modes."""
    layouts = of_module(model)
    weights = {}
    for name, parameter in model.named_parameters():
        if pick(name, parameter):
            ranks = [min(size, 2 + mode % 3) for mode, size in enumerate(parameter.shape)]
            weights[name] = Entry(random_form(parameter.shape, ranks), scale, layouts[name])
    assert weights
    return Adapter(weights)


def conv_adapter(shape: Sequence[int], ranks: Sequence[int], groups: int = 1, scale: float = 0.7) -> Adapter:
    """An adapter on one convolution, ``net.conv.weight``."""
    layout = Layout("conv", CONV_AXES[len(shape) - 2], groups)
    return Adapter({"net.conv.weight": Entry(random_form(shape, ranks), scale, layout)})


def difference(first: Adapter, second: Adapter) -> float:
    """The largest difference of any entry of any change, relative to the largest entry of that change."""
    assert first.weights.keys() == second.weights.keys()
    worst = 0.0
    for name, entry in first.weights.items():
        expected = entry.dense().double()
        error = (second.weights[name].dense().double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
        worst = max(worst, float(error))
    return worst
