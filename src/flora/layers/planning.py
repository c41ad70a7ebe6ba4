"""How an adapted layer runs: one function decides, from shapes and facts alone; ``print(plan)`` shows the figures.

* **summed**: the layer's own function once, with ``W + s dW`` in place of W. Its gradient is taken through the whole
  weight ("dense": what full fine-tuning computes, projected onto core and factors), or through narrow products that
  never form the gradient of W ("narrow").
* **beside**: the frozen layer, and two narrow products (linear) or convolutions of few channels beside it.
* **called**: the module itself with ``W + s dW`` as its parameters, where its output is not a plain function of W.

A way costs ``operations / rate + bytes moved / bandwidth + launches``, with the rates of the class of device in
``layers/device.py``. Operations alone would mislead: narrow products do few of them for each number that they read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from flora.layers import device

# The kinds whose ways have a cost; others run beside where they can.
KINDS = ("linear", "conv", "embedding")
# Activations per weight from which a layer of one group runs summed on a CPU.
SUM_PAYS_FROM = 1.5
# How often a CPU reads or writes dW while it is formed, added and differentiated.
BUILD_PASSES = 20
# The share of a product's rate that a convolution reaches on a GPU.
GPU_CONV = 0.6
# The share of a narrow product's rate that a convolution of few channels reaches.
GPU_NARROW_CONV = 0.2


class Choice(NamedTuple):
    """How a layer runs.

    Attributes:
        way: "summed", "beside" or "called".
        gradient: "dense" or "narrow".
    """

    way: str
    gradient: str

    def __str__(self) -> str:
        if self == SUMMED_NARROW:
            return f"{self.way}, narrow"
        return self.way


SUMMED = Choice("summed", "dense")
SUMMED_NARROW = Choice("summed", "narrow")
BESIDE = Choice("beside", "narrow")
CALLED = Choice("called", "dense")


class Work(NamedTuple):
    """What one training step asks of a layer.

    Attributes:
        kind: "linear", "conv" or "embedding" for the kinds with a cost; any other kind of the table.
        shape: of the weight as it is stored: (out, in) or (in, out), (out, in / groups, *kernel), (vocab, dim).
        ranks: of the core over those dimensions.
        inputs: positions of the input: tokens, or batch times pixels.
        outputs: positions of the output.
        groups: of a convolution.
        transposed: whether the input's channels come first in the shape.
        cpu: whether it runs on a CPU.
        element_size: bytes for each activation.
        compiled: whether a compiler traces it.
    """

    kind: str
    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    inputs: int
    outputs: int
    groups: int = 1
    transposed: bool = False
    cpu: bool = True
    element_size: int = 4
    compiled: bool = False


class Cost(NamedTuple):
    """What a way costs beyond the frozen layer's own step.

    Attributes:
        flops: floating point operations.
        moved: bytes read or written.
        kept: bytes kept for backward, the input among them.
        seconds: an estimate; only the ratio of two of them counts.
    """

    flops: int
    moved: int
    kept: int
    seconds: float


# ---- the decision --------------------------------------------------------------------------------------------------


def choose(
    work: Work,
    wanted: str = "auto",
    *,
    is_function: bool = True,
    can_sum: bool = True,
    can_add: bool = True,
    readable: bool = True,
    dropping: bool = False,
) -> Choice:
    """How a layer runs. The first line that fits decides; "-" stands for either.

    ===========  =======  =======  ========  ========  ========  =========================================
    is_function  can_sum  can_add  readable  dropping  wanted    runs
    ===========  =======  =======  ========  ========  ========  =========================================
    no           -        -        -         -         -         called
    yes          no       no       -         -         -         called
    yes          -        yes      no        -         -         beside
    yes          -        yes      -         yes       -         beside
    yes          -        yes      -         -         beside    beside
    yes          no       yes      yes       no        summed    called
    yes          no       yes      yes       no        auto      beside
    yes          yes      -        yes       -         summed    summed
    yes          yes      yes      yes       no        auto      summed, a convolution on a GPU or compiled
    yes          yes      yes      yes       no        auto      else the cheapest by ``costs``
    ===========  =======  =======  ========  ========  ========  =========================================

    Args:
        work: shapes, device and dtype.
        wanted: ``way`` of the config: "auto", "summed" or "beside".
        is_function: whether the output is what the row of the table computes from the weight: the forward is the listed
            type's own, and nothing changes the weight on the way.
        can_sum: whether the row has that function.
        can_add: whether the row has the change of the output by dW alone.
        readable: whether the weight is an ordinary tensor in its place: not quantised, sharded, offloaded or behind a
            hook, where the layer has to be called as a module.
        dropping: whether the adapter drops some of its inputs now.

    Examples:
        >>> choose(Work("linear", (768, 3072), (8, 8), 4096, 4096)).way
        'summed'
        >>> choose(Work("linear", (768, 3072), (8, 8), 4096, 4096), readable=False).way
        'beside'
    """
    # What the layer rules out, in the order of the table above.
    if not is_function or not (can_sum or can_add):
        return CALLED
    if can_add and (not readable or dropping or wanted == "beside"):
        return BESIDE

    if not can_sum:
        if wanted == "summed":
            return CALLED
        return BESIDE

    # On a GPU one large convolution is faster than a small one between two products. The function that runs those two
    # beside the layer is not made for a compiler.
    if work.kind == "conv" and (work.compiled or not work.cpu):
        return SUMMED

    # What is left is a matter of time. Kinds without figures keep the default.
    only_sums = wanted == "summed" or not can_add
    best, least = (SUMMED if only_sums else BESIDE), math.inf
    for choice, cost in costs(work):
        if cost.seconds < least and not (only_sums and choice.way == "beside"):
            best, least = choice, cost.seconds

    return best


def choose_narrow(work: Work) -> Choice:
    """The cheaper of the ways with a narrow gradient, for a product with one expert's matrix."""
    best, least = BESIDE, math.inf
    for choice, cost in costs(work):
        if cost.seconds < least and choice.gradient == "narrow":
            best, least = choice, cost.seconds
    return best


def costs(work: Work) -> list[tuple[Choice, Cost]]:
    """The ways that a layer of this kind can be run in, and what each costs; none for kinds without figures."""
    if work.kind not in KINDS or len(work.shape) < 2:
        return []

    found = [(SUMMED, _summed(work)), (BESIDE, _beside(work))]

    if work.kind == "embedding" or work.compiled:
        return found

    # A narrow gradient with W + dW: on a GPU it is for linear layers alone, since convolutions are summed there.
    narrow = (SUMMED_NARROW, _summed_narrow(work))

    if not work.cpu:
        if work.kind == "linear":
            return [*found, narrow]
        return found

    # On a CPU the narrow ways differ in one thing, which the activations decide.
    in_place = work.groups == 1 and work.element_size >= 4
    if in_place and _activations(work) > SUM_PAYS_FROM * math.prod(work.shape):
        return [found[0], narrow]

    return found


# ---- what each way costs -------------------------------------------------------------------------------------------


def _summed(work: Work) -> Cost:
    """Form dW, then the gradient of the whole weight, projected back."""
    dense, size = math.prod(work.shape), work.element_size
    inputs, outputs = _numbers(work)

    # The gradient of a weight is a product over all positions: two operations for each entry and position. Rows of an
    # embedding are only added up.
    if work.kind == "embedding":
        gradient = dense
    else:
        gradient = 2 * min(work.inputs, work.outputs) * dense

    if work.kind == "conv" and not work.transposed:
        gradient = 2 * work.outputs * dense

    # dW is formed in the forward and again in the backward, and projecting its gradient back takes as many operations.
    flops = 3 * _build_flops(work.shape, work.ranks) + gradient
    kept = size * (inputs + dense)

    rates = device.rates(work.cpu, size)

    if work.cpu:
        # The input and the output's gradient are read once more. Where patches do not overlap, torch computes the
        # gradient of a kernel at half the rate.
        stride = work.inputs / max(1, work.outputs)
        apart = work.kind == "conv" and work.groups == 1 and stride == math.prod(work.shape[2:]) > 1
        moved = size * (inputs + outputs + BUILD_PASSES * dense)
        return Cost(flops, moved, kept, (2 if apart else 1) * flops / rates.wide + moved / rates.bandwidth)

    # W + dW is formed twice; its gradient is written once and read twice.
    moved = 7 * size * dense
    wide = rates.wide * (GPU_CONV if work.kind == "conv" else 1)

    return Cost(flops, moved, size * inputs, flops / wide + moved / rates.bandwidth + 10 * rates.launch)


def _summed_narrow(work: Work) -> Cost:
    """Form dW; then four narrow products of the six beside, since nothing is added into output and gradient."""
    dense, size = math.prod(work.shape), work.element_size
    inputs, outputs = _numbers(work)
    flops = _narrow_flops(work) * 2 // 3
    rates = device.rates(work.cpu, size)

    if work.cpu:
        # A linear layer reads input and gradient once, some rows at a time.
        reads = 1 if work.kind == "linear" else 2

        moved = size * (reads * (inputs + outputs) + BUILD_PASSES * dense)
    else:
        moved = size * (2 * (inputs + outputs) + 4 * dense)

    seconds = flops / rates.narrow + moved / rates.bandwidth + 11 * rates.launch

    return Cost(flops, moved, size * inputs, seconds)


def _beside(work: Work) -> Cost:
    """Six narrow products that read or write input, output and their gradients four times, a convolution five."""
    # Few operations, but each of them reads or writes activations. So the passes over them decide.
    size, hidden = work.element_size, _hidden(work)
    inputs, outputs = _numbers(work)
    flops = _narrow_flops(work)
    passes = 4 * inputs + 4 * outputs

    if work.kind == "conv":
        passes += inputs + 4 * hidden

    moved, kept = size * passes, size * (inputs + hidden)

    rates = device.rates(work.cpu, size)
    narrow, launches = rates.narrow, 11

    if work.kind == "conv" and not work.cpu:
        narrow, launches = narrow * GPU_NARROW_CONV, 24

    return Cost(flops, moved, kept, flops / narrow + moved / rates.bandwidth + launches * rates.launch)


def _numbers(work: Work) -> tuple[int, int]:
    """Numbers of the input and of the output."""
    if work.kind == "embedding":
        return 0, work.outputs * work.shape[1]

    # A weight is (out, in / groups, *kernel), or transposed (in, out / groups, *kernel): its second dimension is that
    # of one group.
    out, inner = (1, 0) if work.transposed else (0, 1)

    in_groups = inner == 1
    inputs = work.inputs * work.shape[inner] * (work.groups if in_groups else 1)

    return inputs, work.outputs * work.shape[out] * (1 if in_groups else work.groups)


def _activations(work: Work) -> int:
    """Numbers of input and output as if the output had the input's positions."""
    return work.inputs * sum(work.shape[:2])


def _build_flops(shape: Sequence[int], ranks: Sequence[int]) -> int:
    """Of forming dW: a product for each mode, the last mode first."""
    # ``current`` is the size of the tensor so far: the core, with one mode after the other at its full size.
    total, current = 0, math.prod(ranks)
    for size, rank in reversed(list(zip(shape, ranks, strict=True))):
        if rank != size:
            total += 2 * current * size
            current = current // rank * size
    return total


def _narrow_flops(work: Work) -> int:
    """Forward, backward to the input and to the form: three times the forward's products."""
    shape, ranks = work.shape, work.ranks

    if work.kind == "embedding":
        return 3 * 2 * work.outputs * ranks[0] * shape[1]

    if work.kind == "linear":
        inner = min(ranks)
        return 3 * 2 * work.outputs * (inner * sum(shape) if inner not in shape else math.prod(shape))

    out, inner = (1, 0) if work.transposed else (0, 1)

    # The chain of a convolution beside the layer: a product down to the inner rank, the core over the kernel, a product
    # up from the outer rank. A mode kept whole has no product. Each group has its own activations, and all share the
    # form.
    whole_out, whole_inner = ranks[out] == shape[out], ranks[inner] == shape[inner]
    if whole_inner:
        down = 0
    else:
        down = work.inputs * shape[inner] * ranks[inner] * work.groups

    up = 0 if whole_out else work.outputs * ranks[out] * shape[out]

    core = min(work.inputs, work.outputs) if work.transposed else work.outputs

    core *= ranks[out] * ranks[inner] * math.prod(shape[2:]) * (1 if whole_out else work.groups)

    return 3 * 2 * (down + core + up)


def _hidden(work: Work) -> int:
    """Activations kept besides the input; a convolution of one group keeps none."""
    if work.kind != "conv":
        return work.outputs * min(work.ranks)
    if work.groups == 1:
        return 0

    # Each group keeps what comes out of the product down, at the input's positions, and what goes into the product up,
    # at the output's. A mode kept whole has no product.
    out, inner = (1, 0) if work.transposed else (0, 1)
    kept = 0

    if work.ranks[inner] != work.shape[inner]:
        kept += work.inputs * work.ranks[inner] * work.groups
    if work.ranks[out] != work.shape[out]:
        kept += work.outputs * work.ranks[out] * work.groups

    return kept
