"""The authors' scheme, written from its description: dW is formed at every forward, and a second full-size run adds it.

Their own code takes plain convolutions and linear layers only; here the same scheme runs on groups and transposed
convolutions too, so that every row of a benchmark has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class AuthorsScheme(nn.Module):
    """``base(x) + op(x, scale * G x1 A1 ... xN AN)`` with a dense second run.

    Args:
        base: the frozen layer.
        ranks: one per dimension of its weight; every mode has a factor, also where the rank equals the size.
        scale: the constant of the paper.
        zero: start from a zero core, as the authors do; else from a random one.
    """

    def __init__(self, base: nn.Module, ranks: Sequence[int], scale: float = 1.0, *, zero: bool = False) -> None:
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), scale
        weight = cast("Tensor", base.weight)

        core = torch.zeros(*ranks) if zero else torch.randn(*ranks)

        self.core = nn.Parameter(core.to(weight))
        self.factors = nn.ParameterList(
            (torch.randn(size, rank) * (2 * rank) ** -0.5).to(weight)
            for size, rank in zip(weight.shape, ranks, strict=True)
        )

    def __getattr__(self, name: str) -> Any:
        """Other attributes of the layer: models ask for ``weight.dtype`` and the like."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
            return getattr(self.base, name)

    def dense(self) -> Tensor:
        """The update, by one mode product after the other; in the shape of the weight."""
        update: Tensor = self.core
        for mode, factor in enumerate(self.factors):
            update = torch.tensordot(factor, update, dims=([1], [mode])).movedim(0, mode)
        return self.scale * update

    def forward(self, x: Tensor) -> Tensor:
        """The frozen layer's output plus that of the same layer with the update as its weight."""
        y: Tensor = self.base(x) + run_with(self.base, self.dense(), x)
        return y


def run_with(base: Any, weight: Tensor, x: Tensor) -> Tensor:
    """What the layer computes with another weight and no bias."""
    if isinstance(base, nn.Linear):
        return F.linear(x, weight)

    if isinstance(base, nn.ConvTranspose2d):
        geometry: Any = (base.stride, base.padding, base.output_padding, base.groups, base.dilation)
        return F.conv_transpose2d(x, weight, None, *geometry)

    y: Tensor = base._conv_forward(x, weight, None)

    return y
