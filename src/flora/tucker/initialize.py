"""How a new adapter starts: ``INITIALIZERS[name]`` fills core and factors, one of them with zeros, so that dW = 0.

Only what is zero has a gradient at the first step: the core in the authors' variants (paper, section 3), the first
factor in ours. The variants are not interchangeable in learning rate: the size of the random parts sets that of dW.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from flora.tucker.ranks import Role

Initializer = Callable[[Tensor, Sequence[Tensor | None], Sequence[bool]], None]


def zero_first(core: Tensor, factors: Sequence[Tensor | None], over: Sequence[bool]) -> None:
    """Our default, LoRA's start: the first factor (of the outputs) is zero, the rest is random and orthogonal.

    The space of the outputs is then learned from the first step on, where a zero core has to train inside a random one.
    Columns of modes that are summed over have length 1, as LoRA's nearly have; with the others the core is scaled such
    that inputs of rms 1 change the outputs by rms s * sqrt(J1) * rms(first factor) at any width. So the learning rates
    fit that LoRA is used with. If the first mode is whole, the core is zero.
    """
    # dW is linear in each of its parts, so one part that is zero makes dW zero, and that part alone gets a gradient at
    # the first step. The core's unfolding (J1, rest) has orthonormal rows, or columns, times a gain that undoes the
    # spread of the modes that are not summed over.
    if factors[0] is None:
        nn.init.zeros_(core)
    else:
        nn.init.zeros_(factors[0])
        unfolded = core.view(core.shape[0], -1)
        spread = math.prod(rank for rank, is_summed in zip(core.shape[1:], over[1:], strict=True) if not is_summed)
        nn.init.orthogonal_(unfolded, gain=math.sqrt(spread * max(1.0, unfolded.shape[0] / unfolded.shape[1])))

    for factor, is_summed in zip(factors[1:], over[1:], strict=True):
        if factor is not None:
            size, rank = factor.shape
            nn.init.orthogonal_(factor, gain=1.0 if is_summed else math.sqrt(size / rank))


def orthogonal(core: Tensor, factors: Sequence[Tensor | None], over: Sequence[bool]) -> None:
    """A zero core, and orthogonal columns of length ``sqrt(In / Jn)``: rms(dW) = s * rms(core) at any ranks."""
    nn.init.zeros_(core)
    for factor in _given(factors):
        size, rank = factor.shape
        nn.init.orthogonal_(factor, gain=math.sqrt(size / rank))


def _given(factors: Sequence[Tensor | None]) -> list[Tensor]:
    return [factor for factor in factors if factor is not None]


def paper_conv(core: Tensor, factors: Sequence[Tensor | None], over: Sequence[bool]) -> None:
    """The authors' conv code: ``kaiming_normal_(a=sqrt 3)`` on (In, Jn), std = sqrt(1 / (2 Jn)), for a constant s."""
    nn.init.zeros_(core)
    for factor in _given(factors):
        nn.init.kaiming_normal_(factor, a=math.sqrt(3))


def paper_nlu(core: Tensor, factors: Sequence[Tensor | None], over: Sequence[bool]) -> None:
    """The authors' NLU code: factors from N(0, 0.02^2); used with s = alpha / r."""
    nn.init.zeros_(core)
    for factor in _given(factors):
        nn.init.normal_(factor, std=0.02)


def paper_llm(core: Tensor, factors: Sequence[Tensor | None], over: Sequence[bool]) -> None:
    """The authors' LLM code: ``kaiming_uniform_(a=sqrt 5)`` on (In, Jn), bound = 1 / sqrt(Jn), for s = alpha / r."""
    nn.init.zeros_(core)
    for factor in _given(factors):
        nn.init.kaiming_uniform_(factor, a=math.sqrt(5))


INITIALIZERS: dict[str, Initializer] = {
    "zero_first": zero_first,
    "orthogonal": orthogonal,
    "paper_conv": paper_conv,
    "paper_nlu": paper_nlu,
    "paper_llm": paper_llm,
}


def initialize(
    core: Tensor,
    factors: Sequence[Tensor | None],
    name: str,
    roles: Sequence[Role] | None = None,
    *,
    identity: bool = True,
) -> None:
    """Fills ``core`` and ``factors`` in place by the initialiser ``name``.

    Args:
        core: shape ``(J1, ..., JN)``.
        factors: the matrices ``(In, Jn)``, None for the modes that are whole.
        name: a key of :data:`INITIALIZERS`.
        roles: the role of each mode; None is a layer whose first mode is that of the outputs and that sums over the
            others.
        identity: False is for tests: a random core (std 0.05) and orthogonal factors, so that dW is not zero.
    """
    # Loading with low_cpu_mem_usage: the values come from the file.
    if core.is_meta:
        return

    over = [mode > 0 for mode in range(len(factors))]

    if roles is not None:
        over = [role in ("summed", "kernel") for role in roles]

    with torch.no_grad():
        INITIALIZERS[name if identity else "orthogonal"](core, factors, over)

        if not identity:
            nn.init.normal_(core, std=0.05)
