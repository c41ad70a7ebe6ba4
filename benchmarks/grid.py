"""The layer grid: which single layers are measured, on which inputs, at which ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

BATCH = 8  # of every convolution


class Experts(nn.Module):
    """The fused experts of Mixtral under the name that ``target_parameters`` finds."""

    def __init__(self, hidden: int, intermediate: int, experts: int, way: str) -> None:
        super().__init__()
        config = MixtralConfig(hidden_size=hidden, intermediate_size=intermediate, num_local_experts=experts)
        config._experts_implementation = way
        self.experts = MixtralExperts(config)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """x: (tokens, hidden); index and weights: (tokens, chosen experts)."""
        return self.experts(x, index, weights)


@dataclass(frozen=True)
class Case:
    """One row of the grid.

    Attributes:
        name: as printed.
        group: "linear", "conv", "other" or "moe"; the first two are the grids of the targets.
        build: makes the layer, inside a module, with random weights.
        shape: of the input.
        rank: of the channel modes, and of the other methods at equal rank.
        kernel_rank: of each kernel mode.
        size: the input in words.
        experts: how many experts an input row chooses from; 0 for plain layers.
    """

    name: str
    group: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    rank: int
    size: str
    kernel_rank: int = 2
    experts: int = 0

    @property
    def targets(self) -> dict[str, list[str]]:
        """The PEFT config fields that name what is adapted."""
        if self.experts:
            return {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
        return {"target_modules": ["0"]}

    def inputs(self, seed: int = 0) -> tuple[Tensor, ...]:
        """The arguments of the forward; the first one takes a gradient."""
        draw = torch.Generator().manual_seed(seed)
        x = torch.randn(self.shape, generator=draw).requires_grad_()
        if not self.experts:
            return (x,)
        weights, index = torch.rand(self.shape[0], self.experts, generator=draw).topk(2)
        return x, index, weights / weights.sum(-1, keepdim=True)

    def smaller(self) -> Case:
        """The same layer on a small input, for a smoke run."""
        few = max(1, self.shape[0] // 32)
        return replace(self, shape=(few, *self.shape[1:]), size=f"{few} of the first dimension (smoke run)")


def linear(inner: int, out: int, tokens: int, rank: int) -> Case:
    """A linear layer with bias."""
    build = partial(_wrapped, nn.Linear, inner, out)
    return Case(f"Linear {inner} -> {out}", "linear", build, (tokens, inner), rank, f"{tokens:,} tokens")


def conv(channels: int, side: int, kernel: int = 3, depthwise: bool = False, batch: int = BATCH) -> Case:
    """A convolution that keeps channels and size."""
    groups = channels if depthwise else 1
    build = partial(_wrapped, nn.Conv2d, channels, channels, kernel, padding=kernel // 2, groups=groups)
    name = f"{'Depthwise' if depthwise else 'Conv2d'} {kernel}x{kernel}, {channels} @ {side}"
    group = "other" if depthwise else "conv"
    return Case(name, group, build, (batch, channels, side, side), 16, f"batch {batch}")


def conv3d() -> Case:
    """A volume."""
    build = partial(_wrapped, nn.Conv3d, 32, 64, 3, padding=1)
    return Case("Conv3d 3x3x3, 32 -> 64 @ 16", "other", build, (BATCH, 32, 16, 16, 16), 16, f"batch {BATCH}")


def conv_transpose() -> Case:
    """The upsampling layer of a U-Net."""
    build = partial(_wrapped, nn.ConvTranspose2d, 128, 64, 2, stride=2)
    return Case("ConvTranspose2d 2x2, 128 -> 64 @ 28", "other", build, (BATCH, 128, 28, 28), 16, f"batch {BATCH}")


def moe(way: str) -> Case:
    """Eight experts, two for each token, in one of the ways transformers computes them."""
    build = partial(Experts, 512, 1024, 8, way)
    size = "1,024 tokens, 2 of 8 experts"
    return Case(f"MoE 8 x (512 -> 1024 -> 512), {way}", "moe", build, (1024, 512), 8, size, experts=8)


def _wrapped(layer: Callable[..., nn.Module], *args: object, **kwargs: object) -> nn.Module:
    return nn.Sequential(layer(*args, **kwargs))


CASES = [
    linear(768, 768, 2048, 8),
    linear(768, 3072, 2048, 8),
    linear(3072, 768, 2048, 8),
    linear(1024, 4096, 1024, 32),
    conv(64, 56),
    conv(128, 28),
    conv(256, 14),
    conv(512, 7),
    conv(384, 14, kernel=7, depthwise=True),
    conv3d(),
    conv_transpose(),
    moe("eager"),
    moe("grouped_mm"),
]
