"""Awkward modules of every kind, with inputs: sizes are distinct primes and ranks differ per mode.

A case is a function that builds the module, so that each test starts from a fresh one, with what it is called with and
the ranks to adapt it with. ``config`` holds further fields of ``FloraConfig``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.pytorch_utils import Conv1D


class Case(nn.Module):
    """One layer under the name ``layer``, between nothing: what every case's model looks like."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        out = self.layer(*args, **kwargs)
        return out[0] if isinstance(out, tuple) else out


@dataclass(frozen=True)
class Row:
    """A layer to adapt: how it is built, called and adapted."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    ranks: Any
    config: dict[str, Any] = field(default_factory=dict)
    kwargs: dict[str, Any] = field(default_factory=dict)
    factored: bool = True


def x(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(*shape),)


def ids(high: int, *shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randint(0, high, shape),)


def sequence(embed: int, kdim: int | None = None, vdim: int | None = None) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(3, 5, embed), torch.randn(3, 7, kdim or embed), torch.randn(3, 7, vdim or embed))


class Experts(nn.Module):
    """Fused experts as transformers stores them, (E, out, in) then (E, in, out), run expert by expert."""

    def __init__(self, experts: int = 5, hidden: int = 11, inner: int = 7) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(experts, inner, hidden) / 4)
        self.down = nn.Parameter(torch.randn(experts, inner, hidden) / 4)
        self.how = "loop"

    def forward(self, hidden: Tensor, expert: Tensor) -> Tensor:
        if self.how == "batched":
            middle = torch.bmm(self.up[expert], hidden.unsqueeze(-1)).squeeze(-1).tanh()
            return torch.bmm(middle.unsqueeze(1), self.down[expert]).squeeze(1)
        out = torch.zeros_like(hidden)
        for index in range(self.up.shape[0]):
            rows = torch.where(expert == index)[0]
            middle = nn.functional.linear(hidden[rows], self.up[index]).tanh()
            out = out.index_add(0, rows, middle @ self.down[index])
        return out


class Volume(nn.Module):
    """A raw parameter of four dimensions, contracted with its input."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(3, 5, 7, 2) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensordot(x, self.kernel, dims=([1, 2], [1, 2]))


class ScaledEmbedding(nn.Embedding):
    """An embedding whose forward is its own, as Gemma's."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3.0


class StandardisedConv(nn.Conv2d):
    """A convolution that standardises its weight: not linear in it."""

    def forward(self, input: Tensor) -> Tensor:
        mean, std = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        return self._conv_forward(input, (self.weight - mean) / std, self.bias)


class OwnLinear(nn.Module):
    """A linear layer that is no ``nn.Linear`` and calls its sizes channels, as that of PyTorch Geometric."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels) / 3)
        self.bias = nn.Parameter(torch.randn(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return 3.0 * nn.functional.linear(x, self.weight, self.bias)


class Gate(nn.Module):
    """It states as many outputs as inputs and holds one factor for each of them."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.in_features = self.out_features = features
        self.weight = nn.Parameter(torch.randn(1, features, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


def renormed() -> nn.Module:
    layer = nn.Embedding(23, 7, max_norm=1.0)
    layer(torch.arange(23))  # its forward shrinks the rows in place, once
    return layer


def weight_normed() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Conv1d(7, 11, 5, padding=2))


CASES: dict[str, Row] = {
    "linear": Row(lambda: nn.Linear(13, 7), x(3, 5, 13), [2, 3]),
    "linear, no bias, wide ranks": Row(lambda: nn.Linear(11, 17, bias=False), x(5, 11), [7, 3]),
    "linear, out whole": Row(lambda: nn.Linear(13, 5), x(3, 13), [5, 3]),
    "linear, in whole": Row(lambda: nn.Linear(3, 13), x(5, 3), [2, 3]),
    "linear, folded heads": Row(
        lambda: nn.Linear(11, 30), x(3, 11), [2, 3, 2, 5], {"fold": {"layer": "(qkv heads dim) in, qkv=3 heads=5"}}
    ),
    "gpt-2 conv1d": Row(lambda: Conv1D(17, 11), x(3, 5, 11), [2, 3]),
    "conv1d": Row(lambda: nn.Conv1d(7, 11, 5, stride=2, padding=3, dilation=2), x(3, 7, 29), [3, 2, 4]),
    "conv1d, in blocks": Row(
        lambda: nn.Conv1d(10, 21, 5, padding=2),
        x(3, 10, 13),
        [3, 2, 2, 4, 5],
        {"fold": {"layer": "(a b) (c d) kw, a=3 c=2"}},
    ),
    "transposed 2d, in blocks": Row(
        lambda: nn.ConvTranspose2d(21, 10, 3, stride=2),
        x(2, 21, 5, 7),
        [3, 4, 2, 2, 3, 3],
        {"fold": {"layer": "(a b) (c d) kh kw, a=3 c=2"}},
    ),
    "conv1d, circular": Row(lambda: nn.Conv1d(7, 11, 5, padding=2, padding_mode="circular"), x(3, 7, 13), [3, 2, 2]),
    "conv1d, weight norm": Row(weight_normed, x(3, 7, 13), [3, 2, 2]),
    "conv2d": Row(lambda: nn.Conv2d(7, 11, (3, 5), stride=(2, 3), padding=(1, 2)), x(2, 7, 13, 17), [5, 3, 2, 4]),
    "conv2d, reflect": Row(lambda: nn.Conv2d(5, 7, 3, padding=2, padding_mode="reflect"), x(2, 5, 11, 7), [3, 2, 2, 3]),
    "conv2d, same, dilated": Row(
        lambda: nn.Conv2d(5, 7, (3, 5), padding="same", dilation=2), x(2, 5, 11, 7), [3, 2, 3, 2]
    ),
    "conv2d, groups": Row(lambda: nn.Conv2d(15, 21, 3, groups=3, padding=1), x(2, 15, 7, 5), [4, 3, 2, 2]),
    "conv2d, groups, in whole": Row(lambda: nn.Conv2d(6, 15, 3, groups=3), x(2, 6, 7, 5), [4, 2, 2, 3]),
    "conv2d, depthwise": Row(lambda: nn.Conv2d(13, 13, 7, groups=13, padding=3), x(2, 13, 11, 7), [5, 1, 2, 3]),
    "conv2d, depthwise multiplier": Row(lambda: nn.Conv2d(5, 15, (3, 2), groups=5), x(2, 5, 7, 6), [4, 1, 2, 2]),
    "conv2d, 1x1": Row(lambda: nn.Conv2d(11, 7, 1, stride=2), x(2, 11, 7, 5), [3, 2, 1, 1]),
    "conv2d, unbatched": Row(lambda: nn.Conv2d(7, 11, 3), x(7, 13, 11), [5, 3, 2, 2]),
    "conv2d, standardised": Row(lambda: StandardisedConv(5, 7, 3), x(2, 5, 7, 11), [3, 2, 2, 2], factored=False),
    "conv3d": Row(lambda: nn.Conv3d(5, 7, (1, 3, 2), stride=(1, 2, 1)), x(2, 5, 3, 7, 5), [3, 2, 1, 2, 2]),
    "conv3d, groups": Row(lambda: nn.Conv3d(6, 10, 3, groups=2, padding=1), x(2, 6, 3, 5, 7), [3, 2, 2, 1, 3]),
    "transposed conv1d": Row(
        lambda: nn.ConvTranspose1d(7, 11, 5, stride=3, padding=1, output_padding=2, dilation=2), x(2, 7, 13), [3, 2, 4]
    ),
    "transposed conv2d": Row(lambda: nn.ConvTranspose2d(7, 5, (3, 2), stride=2), x(2, 7, 5, 3), [3, 2, 2, 1]),
    "transposed conv2d, groups": Row(
        lambda: nn.ConvTranspose2d(15, 21, 3, groups=3, stride=2, padding=1, output_padding=1),
        x(2, 15, 5, 3),
        [4, 3, 2, 2],
    ),
    "transposed conv2d, output size": Row(
        lambda: nn.ConvTranspose2d(7, 5, 3, stride=2), x(2, 7, 5, 3), [3, 2, 2, 2], kwargs={"output_size": [12, 7]}
    ),
    "transposed conv3d": Row(lambda: nn.ConvTranspose3d(5, 7, 2, stride=2), x(2, 5, 2, 3, 5), [3, 2, 2, 1, 2]),
    "embedding": Row(lambda: nn.Embedding(23, 7), ids(23, 3, 5), [5, 3]),
    "embedding, padding": Row(lambda: nn.Embedding(23, 7, padding_idx=2), ids(23, 3, 5), [5, 3]),
    "embedding, max norm": Row(renormed, ids(23, 3, 5), [5, 3], factored=False),
    "embedding, scaled": Row(lambda: ScaledEmbedding(23, 7), ids(23, 3, 5), [5, 3], factored=False),
    "embedding bag": Row(lambda: nn.EmbeddingBag(23, 7, mode="mean"), ids(23, 3, 5), [5, 3]),
    "embedding bag, max": Row(lambda: nn.EmbeddingBag(23, 7, mode="max"), ids(23, 3, 5), [5, 3], factored=False),
    "bilinear": Row(lambda: nn.Bilinear(7, 5, 11), lambda: (torch.randn(3, 7), torch.randn(3, 5)), [3, 2, 4]),
    "attention": Row(lambda: nn.MultiheadAttention(15, 5, batch_first=True), sequence(15), 3, factored=False),
    "attention, sequence first": Row(
        lambda: nn.MultiheadAttention(14, 2),
        lambda: (torch.randn(5, 3, 14), torch.randn(7, 3, 14), torch.randn(7, 3, 14)),
        4,
        kwargs={"need_weights": False},
        factored=False,
    ),
    "attention, kdim and vdim": Row(
        lambda: nn.MultiheadAttention(15, 3, kdim=7, vdim=11, batch_first=True), sequence(15, 7, 11), 3, factored=False
    ),
    "lstm": Row(lambda: nn.LSTM(7, 11, num_layers=2, batch_first=True), x(3, 5, 7), 3, factored=False),
    "lstm, bidirectional, projected": Row(
        lambda: nn.LSTM(7, 11, bidirectional=True, proj_size=5), x(5, 3, 7), 2, factored=False
    ),
    "gru": Row(lambda: nn.GRU(7, 11), x(5, 3, 7), 3, factored=False),
    "rnn": Row(lambda: nn.RNN(7, 11), x(5, 3, 7), 3, factored=False),
    "lstm cell": Row(lambda: nn.LSTMCell(7, 11), x(3, 7), 3, factored=False),
    "gru cell": Row(lambda: nn.GRUCell(7, 11), x(3, 7), 3, factored=False),
    "rnn cell": Row(lambda: nn.RNNCell(7, 11), x(3, 7), 3, factored=False),
    "group norm": Row(lambda: nn.GroupNorm(3, 15), x(2, 15, 5), [15], factored=False),
    "rms norm": Row(lambda: nn.RMSNorm(11), x(3, 11), [11], factored=False),
    "batch norm 1d": Row(lambda: nn.BatchNorm1d(7), x(5, 7, 3), [7], factored=False),
    "batch norm 3d": Row(lambda: nn.BatchNorm3d(5), x(2, 5, 3, 2, 7), [5], factored=False),
    "layer norm": Row(lambda: nn.LayerNorm(11), x(3, 11), [11], factored=False),
    "layer norm, two dimensions": Row(lambda: nn.LayerNorm((5, 7)), x(3, 5, 7), [3, 2], factored=False),
    "batch norm": Row(lambda: nn.BatchNorm2d(7), x(5, 7, 3, 2), [7], factored=False),
    "instance norm": Row(lambda: nn.InstanceNorm2d(7, affine=True), x(5, 7, 3, 2), [7], factored=False),
    "a norm of the model's own": Row(lambda: GemmaRMSNorm(11), x(3, 11), [11], factored=False),
    "a linear layer of the model's own": Row(lambda: OwnLinear(13, 7), x(3, 5, 13), [2, 3], factored=False),
    "raw parameter, a gate of stated size": Row(
        lambda: Gate(7),
        x(3, 7, 7, 7),
        [1, 7, 1, 1],
        {"target_modules": None, "target_parameters": ["layer.weight"]},
        factored=False,
    ),
    "experts": Row(
        Experts,
        lambda: (torch.randn(13, 11), torch.arange(13) % 5),
        [3, 4, 5],
        {"target_modules": None, "target_parameters": ["layer.up", "layer.down"]},
    ),
    "raw parameter, 4-D": Row(
        Volume,
        x(3, 5, 7),
        [2, 3, 4, 2],
        {"target_modules": None, "target_parameters": ["layer.kernel"]},
        factored=False,
    ),
}
