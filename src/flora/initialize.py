"""How a new adapter starts: ``INITIALIZERS[name]`` fills a zero core and random factors, so dW = 0 at the start.

With a zero core only the core has a gradient at the first step (paper, section 3). The variants are not
interchangeable in learning rate, because the size of the factors sets the size of dW for a given core.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Initializer = Callable[[Tensor, Sequence[Tensor]], None]


def orthogonal(core: Tensor, factors: Sequence[Tensor]) -> None:
    """Our default: orthogonal columns of length ``sqrt(In / Jn)``, so rms(dW) = s * rms(core) at any ranks."""
    nn.init.zeros_(core)
    for factor in factors:
        size, rank = factor.shape
        nn.init.orthogonal_(factor, gain=math.sqrt(size / rank))


def paper_conv(core: Tensor, factors: Sequence[Tensor]) -> None:
    """The authors' conv code: ``kaiming_normal_(a=sqrt 3)`` on (In, Jn), std = sqrt(1 / (2 Jn)), for a constant s."""
    nn.init.zeros_(core)
    for factor in factors:
        nn.init.kaiming_normal_(factor, a=math.sqrt(3))


def paper_nlu(core: Tensor, factors: Sequence[Tensor]) -> None:
    """The authors' NLU code: factors from N(0, 0.02^2); used with s = alpha / r."""
    nn.init.zeros_(core)
    for factor in factors:
        nn.init.normal_(factor, std=0.02)


def paper_llm(core: Tensor, factors: Sequence[Tensor]) -> None:
    """The authors' LLM code: ``kaiming_uniform_(a=sqrt 5)`` on (In, Jn), bound = 1 / sqrt(Jn), for s = alpha / r."""
    nn.init.zeros_(core)
    for factor in factors:
        nn.init.kaiming_uniform_(factor, a=math.sqrt(5))


INITIALIZERS: dict[str, Initializer] = {
    "orthogonal": orthogonal,
    "paper_conv": paper_conv,
    "paper_nlu": paper_nlu,
    "paper_llm": paper_llm,
}


def initialize(core: Tensor, factors: Sequence[Tensor], name: str, *, identity: bool = True) -> None:
    """Fills ``core`` and ``factors`` in place by the initialiser ``name``.

    Args:
        core: shape ``(J1, ..., JN)``.
        factors: the matrices ``(In, Jn)`` of the modes that have one.
        name: a key of :data:`INITIALIZERS`.
        identity: False adds a random core (std 0.05), so that dW is not zero: for tests.
    """
    if core.is_meta:  # loading with low_cpu_mem_usage: the values come from the file
        return
    with torch.no_grad():
        INITIALIZERS[name](core, factors)
        if not identity:
            nn.init.normal_(core, std=0.05)
