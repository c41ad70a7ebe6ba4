"""Which way through a layer is cheaper, decided from shapes alone and printable.

Two ways: *rebuild* forms the dense update and runs the layer once with W + dW; its extra cost is that of the gradient
of a full weight. *factored* adds two skinny products (linear) or 1x1 -> core -> 1x1 (convolution) beside the frozen
layer. Figures are those of one training step beyond the frozen layer's own forward and backward to its input.

The choice goes by time, not by operations alone: skinny products do few operations for each number they read. So the
cost of a path is ``flops / rate + bytes moved / bandwidth``, with the rates of one CPU core below. They were fitted to
the step times of a grid of layers; only their ratios matter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flora.errors import UserError
from flora.tucker.form import count_params
from flora.tucker.ranks import check_rank

KINDS = ("linear", "conv", "embedding")
WIDE_RATE = 150e9  # operations per second of a product of two large matrices, or of a convolution
SKINNY_RATE = 80e9  # of one with a side as narrow as a rank
BANDWIDTH = 8e9  # bytes per second, read or written once
SUM_PAYS_FROM = 1.5  # activations per weight from which a layer of one group runs with W + dW in either path
BUILD_PASSES = 20  # how often the dense update is read or written while it is built, added and differentiated


@dataclass(frozen=True)
class Plan:
    """What one adapted layer costs, by path, and the path that is chosen. ``print(plan)`` explains.

    Attributes:
        shape, ranks: of the weight and of the core.
        num_params: trainable parameters of the form.
        positions: output positions per step (tokens, or batch times output pixels) that the figures hold for.
        flops: path -> floating point operations per training step beyond the frozen layer's.
        kept: path -> bytes kept for backward beyond the frozen layer's weights.
        seconds: path -> time estimate per step on one CPU core; the ratio is what counts.
        path: "rebuild" or "factored", the faster by that estimate.
    """

    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    num_params: int
    positions: int
    flops: dict[str, int]
    kept: dict[str, int]
    seconds: dict[str, float]
    path: str

    def __str__(self) -> str:
        lines = [
            f"weight {self.shape}, ranks {self.ranks}: {self.num_params:,} parameters "
            f"({self.num_params / math.prod(self.shape):.2%} of {math.prod(self.shape):,})",
            f"per training step at {self.positions:,} output positions, beyond the frozen layer:",
        ]
        for path in self.flops:
            mark = "->" if path == self.path else "  "
            lines.append(
                f"{mark} {path:<9} {self.flops[path] / 1e6:>12,.1f} MFLOP {self.kept[path] / 2**20:>10,.2f} MiB kept"
                f" {1e3 * self.seconds[path]:>10,.2f} ms"
            )
        lines.append(f"path: {self.path}, the faster by operations and bytes moved")
        return "\n".join(lines)


def plan(
    shape: Sequence[int],
    ranks: Sequence[int],
    *,
    kind: str | None = None,
    positions: int = 4096,
    stride: int = 1,
    groups: int = 1,
    element_size: int = 4,
) -> Plan:
    """The cost of each way through a layer whose weight has this shape, and the choice.

    Args:
        shape: of the weight: (out, in) for a linear, (out, in / groups, *kernel) for a convolution, (vocab, dim) for an
            embedding.
        ranks: one per dimension; a rank equal to its size keeps the mode whole.
        kind: "linear", "conv" or "embedding"; by default linear for 2-D shapes and conv above.
        positions: output positions per step: tokens, or batch times output pixels.
        stride: input positions per output position of a convolution (the product of its strides).
        groups: of a convolution.
        element_size: bytes per activation.

    Raises:
        ValueError: ranks and shape do not fit, or the kind is unknown.

    Example:
        >>> plan((768, 3072), (8, 8)).path
        'factored'
        >>> plan((96, 1, 7, 7), (4, 1, 2, 2), groups=96).path
        'rebuild'
    """
    shape, ranks = tuple(shape), tuple(ranks)
    kind = kind or ("linear" if len(shape) == 2 else "conv")
    if kind not in KINDS:
        raise UserError(f"unknown kind {kind!r}, expected one of {', '.join(KINDS)}")
    if len(shape) < 2 or len(ranks) != len(shape):
        raise UserError(f"ranks {ranks} and shape {shape} do not fit; give one rank per dimension, at least two")
    for mode, (rank, size) in enumerate(zip(ranks, shape, strict=True)):
        check_rank(rank, f"ranks[{mode}]")
        if rank > size:
            raise UserError(f"rank {rank} of mode {mode} is above its size {size} in shape {shape}")
    dense = math.prod(shape)
    build = 3 * _build_flops(shape, ranks)  # forward, and backward to the core and to the factors
    factored = _factored_flops(kind, shape, ranks, positions, positions * stride, groups)
    rebuild = build + (dense if kind == "embedding" else 2 * positions * dense)
    inputs = 0 if kind == "embedding" else positions * stride * shape[1] * groups
    outputs = positions * shape[1 if kind == "embedding" else 0]
    flops = {"rebuild": rebuild, "factored": factored}
    sums = kind != "embedding" and groups == 1 and element_size >= 4 and inputs + outputs > SUM_PAYS_FROM * dense
    hidden = 0 if sums else _hidden_per_position(kind, shape, ranks, stride, groups)
    kept = {"rebuild": element_size * (inputs + dense), "factored": element_size * (inputs + positions * hidden)}
    # Rebuild reads input and gradient once more; where patches do not overlap, torch computes the gradient of a kernel
    # at half the rate. Factored reads or writes them four times, a convolution the input five. Where the layer runs
    # with W + dW nothing is added into output and gradient: four products of six are left, and both are read twice, by
    # a linear layer once, some rows at a time.
    patches = kind == "conv" and groups == 1 and stride == math.prod(shape[2:]) > 1
    rebuilt = element_size * (inputs + outputs + BUILD_PASSES * dense)
    skinny, passes = float(factored), 4 * inputs + 4 * outputs
    if kind == "conv":
        passes += inputs + 4 * positions * hidden
    if sums:
        reads = 1 if kind == "linear" else 2
        skinny, passes = factored * 2 / 3, reads * (inputs + outputs) + BUILD_PASSES * dense
    beside = element_size * passes
    seconds = {
        "rebuild": (2 if patches else 1) * rebuild / WIDE_RATE + rebuilt / BANDWIDTH,
        "factored": skinny / SKINNY_RATE + beside / BANDWIDTH,
    }
    path = min(seconds, key=seconds.__getitem__)
    return Plan(shape, ranks, count_params(shape, ranks), positions, flops, kept, seconds, path)


def _build_flops(shape: Sequence[int], ranks: Sequence[int]) -> int:
    """Of ``Tucker.to_dense``: a product per mode, the last mode first."""
    total, current = 0, math.prod(ranks)
    for size, rank in reversed(list(zip(shape, ranks, strict=True))):
        if rank != size:
            total += 2 * current * size
            current = current // rank * size
    return total


def _factored_flops(
    kind: str, shape: Sequence[int], ranks: Sequence[int], positions: int, inputs: int, groups: int
) -> int:
    """Forward, backward to the input and to the form: three times the forward's products."""
    if kind == "embedding":
        return 3 * 2 * positions * ranks[0] * shape[1]
    inner = min(ranks)
    if kind == "linear":
        return 3 * 2 * positions * (inner * sum(shape) if inner not in shape else math.prod(shape))
    down = inputs * shape[1] * ranks[1] * groups if ranks[1] != shape[1] else 0
    core = positions * ranks[0] * ranks[1] * math.prod(shape[2:]) * (groups if ranks[0] != shape[0] else 1)
    up = positions * ranks[0] * shape[0] if ranks[0] != shape[0] else 0
    return 3 * 2 * (down + core + up)


def _hidden_per_position(kind: str, shape: Sequence[int], ranks: Sequence[int], stride: int, groups: int) -> int:
    """Activations kept per output position besides the input; a convolution of one group computes its own once more."""
    if kind != "conv":
        return min(ranks)
    if groups == 1:
        return 0
    down = stride * ranks[1] * groups if ranks[1] != shape[1] else 0
    return down + (ranks[0] * groups if ranks[0] != shape[0] else 0)
