"""What one layer would cost, for people: ``print(flora.plan(shape, ranks))`` shows each way and the chosen one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flora.errors import UserError
from flora.layers.planning import KINDS, Work, choose, costs
from flora.tucker.form import count_params
from flora.tucker.ranks import Ranks, Role, check_request, check_shape, resolve


@dataclass(frozen=True)
class Plan:
    """What one adapted layer costs, by way, and the way that is chosen. ``print(plan)`` explains.

    Attributes:
        shape, ranks: of the weight and of the core.
        num_params: trainable parameters of the form.
        positions: output positions per step (tokens, or batch times output pixels) that the figures hold for.
        device: "cpu" or "gpu".
        flops: way -> floating point operations per training step beyond the frozen layer's.
        kept: way -> bytes kept for backward beyond the frozen layer's weights.
        seconds: way -> time estimate per step; the ratio is what counts.
        way: "summed" or "beside", the faster by that estimate.
    """

    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    num_params: int
    positions: int
    device: str
    flops: dict[str, int]
    kept: dict[str, int]
    seconds: dict[str, float]
    way: str

    def __str__(self) -> str:
        chosen = [way for way in self.flops if way.partition(",")[0] == self.way]
        fastest = min(chosen, key=self.seconds.__getitem__)
        dense = math.prod(self.shape)
        lines = [
            f"weight {self.shape}, ranks {self.ranks}: {self.num_params:,} parameters "
            f"({self.num_params / dense:.2%} of {dense:,})",
            f"per training step on a {self.device.upper()} at {self.positions:,} output positions, "
            "beyond the frozen layer:",
        ]

        for way, flops in self.flops.items():
            mark = "->" if way == fastest else "  "

            lines.append(
                f"{mark} {way:<14} {flops / 1e6:>12,.1f} MFLOP {self.kept[way] / 2**20:>10,.2f} MiB kept"
                f" {1e3 * self.seconds[way]:>10,.3f} ms"
            )

        lines.append(f"way: {self.way}, the faster by operations and bytes moved")

        return "\n".join(lines)


def plan(
    shape: Sequence[int],
    ranks: Ranks,
    *,
    kind: str | None = None,
    positions: int = 4096,
    stride: int = 1,
    groups: int = 1,
    element_size: int = 4,
    device: str = "cpu",
) -> Plan:
    """The cost of each way through a layer whose weight has this shape, and the choice.

    Args:
        shape: of the weight: (out, in) for a linear, (out, in / groups, *kernel) for a convolution, (vocab, dim) for an
            embedding.
        ranks: one per dimension; a rank equal to its size keeps the mode whole. Or one int, as ``r`` of FloraConfig
            with its ``kernel_r`` of 2.
        kind: "linear", "conv" or "embedding"; by default linear for 2-D shapes and conv above.
        positions: output positions per step: tokens, or batch times output pixels.
        stride: input positions per output position of a convolution (the product of its strides).
        groups: of a convolution.
        element_size: bytes per activation.
        device: "cpu" or "gpu".

    Raises:
        ValueError: ranks and shape do not fit, or the kind or the device is unknown.

    Examples:
        >>> plan((768, 3072), (8, 8)).way
        'summed'
        >>> plan((768, 3072), (8, 8), positions=77).way
        'beside'
    """
    shape = check_shape(shape)
    check_request(ranks, "ranks")
    kind = kind or ("linear" if len(shape) == 2 else "conv")
    if kind not in KINDS:
        raise UserError(f"unknown kind {kind!r}, expected one of {', '.join(KINDS)}")
    if device not in ("cpu", "gpu"):
        raise UserError(f"unknown device {device!r}, expected 'cpu' or 'gpu'")
    if isinstance(ranks, int):
        kernel: list[Role] = ["kernel"] * (len(shape) - 2)
        ranks = resolve(shape, ranks, roles=["output", "summed", *kernel] if kind == "conv" else None)

    ranks = tuple(ranks)

    if len(shape) < 2 or len(ranks) != len(shape):
        raise UserError(f"ranks {ranks} and shape {shape} do not fit; give one rank per dimension, at least two")

    for mode, (rank, size) in enumerate(zip(ranks, shape, strict=True)):
        if rank > size:
            raise UserError(
                f"rank {rank} of mode {mode} is above its size {size} in shape {shape}; give at most {size}"
            )

    cpu = device == "cpu"
    work = Work(kind, shape, ranks, positions * stride, positions, groups, cpu=cpu, element_size=element_size)
    priced = {str(choice): cost for choice, cost in costs(work)}

    return Plan(
        shape,
        ranks,
        count_params(shape, ranks),
        positions,
        device,
        {way: cost.flops for way, cost in priced.items()},
        {way: cost.kept for way, cost in priced.items()},
        {way: cost.seconds for way, cost in priced.items()},
        choose(work).way,
    )
