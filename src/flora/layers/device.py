"""The one seam for everything that depends on the device: its rates, and the products that are written per device.

No other file asks on which device a tensor lies. On a CPU caches decide, and a call costs little. On a GPU a step is
priced by its launches, by its passes over activations and by the rate of the tensor cores.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, library

from flora.tucker import form

SUMS_IN_FLOAT32 = hasattr(torch.ops.aten.mm, "dtype")  # a product in half precision may return its float32 sums
HALF = (torch.bfloat16, torch.float16)


class Rates(NamedTuple):
    """What one kind of device does in a second; only the ratios matter.

    Attributes:
        wide: operations of a product of two large matrices, or of a convolution.
        narrow: operations of a product with a side as narrow as a rank.
        bandwidth: bytes read or written once.
        launch: seconds of the shortest operation.
    """

    wide: float
    narrow: float
    bandwidth: float
    launch: float


# Of one core with AVX2, fitted to the step times of a grid of layers. Of an H200: products and passes as measured in
# bfloat16 (full fine-tuning and the narrow products of linear layers over 8,192 tokens).
CPU = Rates(wide=150e9, narrow=80e9, bandwidth=8e9, launch=0.0)
GPU_HALF = Rates(wide=650e12, narrow=100e12, bandwidth=2.5e12, launch=3e-6)
GPU_SINGLE = Rates(wide=45e12, narrow=20e12, bandwidth=2.5e12, launch=3e-6)


def on_cpu(x: Tensor) -> bool:
    """Whether caches decide."""
    return x.device.type == "cpu"


def rates(cpu: bool, element_size: int) -> Rates:
    """The rates of a class of device, for numbers of that many bytes."""
    if cpu:
        return CPU
    if element_size == 2:
        return GPU_HALF
    return GPU_SINGLE


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, which takes the host as long as a launch even where there is nothing to do."""
    if x.dtype == dtype:
        return x
    return x.to(dtype)


def widened(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of a small weight in the dtype of the adapter: one launch, where narrowing what meets it takes two.

    That of a large weight stays as it is, because the copy would take memory and time.
    """
    if grad.dtype == dtype or grad.numel() > SMALL_WEIGHT:
        return grad
    return grad.to(dtype)


# ---- products with a small matrix ----------------------------------------------------------------------------------


def product(left: Tensor, right: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """``scale * left @ right`` of two matrices, in ``dtype`` where the device returns its sums unrounded.

    Elsewhere the result has the dtype of the operands.
    """
    if left.dtype in HALF and dtype == torch.float32 and SUMS_IN_FLOAT32 and left.device.type in ("cuda", "meta"):
        found: Tensor = torch.mm(left, right, out_dtype=dtype)  # type: ignore[call-overload,unused-ignore]

        if scale == 1:
            return found
        return found.mul_(scale)

    if scale == 1:
        return torch.mm(left, right)

    return torch.addmm(left.new_empty(1, 1), left, right, beta=0, alpha=scale)


def project(rows: Tensor, matrix: Tensor) -> Tensor:
    """``rows @ matrix`` onto few columns; on a CPU the transposed product, which is faster at a small rank.

    Args:
        rows: shape (T, C).
        matrix: shape (C, J).
    """
    if on_cpu(rows):
        return torch.mm(matrix.t(), rows.t()).t()
    return torch.mm(rows, matrix)


def outer(rows: Tensor, small: Tensor, dtype: torch.dtype) -> Tensor:
    """``rows.T @ small``, in the faster order; ``dtype`` as in ``product``.

    Args:
        rows: shape (T, C).
        small: shape (T, J).
        dtype: of the result (C, J), where the device gives it.
    """
    if on_cpu(rows):
        return torch.mm(small.t(), rows).t()
    return product(rows.t(), small, dtype)


def widen(hidden: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """``hidden @ matrix.T + bias``, written once.

    Args:
        hidden: shape (T, J).
        matrix: shape (O, J).
        bias: shape (O,).
    """
    if bias is None:
        return torch.mm(hidden, matrix.t())
    if not on_cpu(hidden):
        return torch.addmm(bias, hidden, matrix.t())

    # A CPU would write the bias first and then add; as one more column it costs no pass over the output.
    ones = hidden.new_ones(1, len(hidden))
    with_ones = torch.cat([hidden.t(), ones])

    return torch.mm(with_ones.t(), torch.cat([matrix, bias.unsqueeze(1)], 1).t())


def counts_rows(rows: Tensor) -> bool:
    """Whether the sizes of groups of rows may be read back: on a GPU the host would wait for them."""
    return on_cpu(rows)


def rows_at_a_time(count: int, width: int, x: Tensor) -> int:
    """How many rows several products in turn should share, so that the rows stay in the cache of a CPU.

    Args:
        count: of the rows.
        width: numbers in a row of all operands together.
        x: one of the operands.
    """
    # In half precision the sums of parts would be rounded.
    if not on_cpu(x) or x.dtype in HALF:
        return count
    parts = -(-max(1, count) // max(LEAST_ROWS, CACHED // width))
    if parts <= 1:
        return count
    return BLOCK * -(-count // parts // BLOCK)


def empty_narrow(like: Tensor, rows: int, columns: int) -> Tensor:
    """An empty tensor in the memory layout that ``project`` and ``outer`` leave."""
    if on_cpu(like):
        return like.new_empty(columns, rows).t()
    return like.new_empty(rows, columns)


def kept(x: Tensor, *small: Tensor | None) -> Sequence[Tensor | None]:
    """What to keep of small matrices for backward: a CPU forms them once more, on a GPU that would be a launch each."""
    if on_cpu(x):
        return [None] * len(small)
    return small


def writes_planes(channels: int, x: Tensor) -> bool:
    """Whether so few channels are better written plane by plane and turned around afterwards."""
    return channels < FEW_PLANES and on_cpu(x)


def prefers_volumes_channels_last(x: Tensor) -> bool:
    """Whether the gradient of a kernel over volumes is faster with the channels innermost: on a CPU without AVX-512."""
    return on_cpu(x) and torch.backends.cpu.get_cpu_capability() != "AVX512"


FEW_PLANES = 16  # channels from which on an output is written with all of them at once
CACHED = 2**19  # numbers that the cache of a CPU holds, of all operands together
LEAST_ROWS = 64  # that are worth a product of their own
BLOCK = 16  # rows that products work on at a time; others waste a part of the last block


# ---- W + dW --------------------------------------------------------------------------------------------------------


def add_update(weight: Tensor, factor: Tensor | None, rows: Tensor, scale: float) -> Tensor:
    """``weight + scale * factor @ rows.T`` in the dtype of the weight.

    In half precision W lies on a coarse grid, and rounding W + dW to the nearest number would lose every dW below half
    a step. So the sum is formed in float32 and rounded up or down, by a fixed pattern that differs from entry to entry,
    up the more often the nearer it lies to the upper number. Over many entries the change is right in the mean; where
    dW is zero, W comes out as it was.

    Args:
        weight: shape (I, K).
        factor: shape (I, J), None for the identity.
        rows: shape (K, J).
        scale: of the update.
    """
    if weight.dtype in HALF and factor is not None:
        factor, rows = cast(factor, torch.float32), cast(rows, torch.float32)
        if HAS_TRITON and weight.is_cuda:
            rounded_sum: Tensor = _gpu().add_rounded(weight, factor, rows, scale)
            return rounded_sum

        added: Tensor = torch.ops.flora.add_rounded(weight, factor, rows, scale)
        return added

    if weight.dtype in HALF:
        return dither(weight.float().add_(rows.t(), alpha=scale), weight.dtype)

    rows = cast(rows, weight.dtype)

    if factor is None:
        return torch.add(weight, rows.mT, alpha=scale)
    if scale == 1:
        return torch.addmm(weight, cast(factor, weight.dtype), rows.mT)

    return torch.addmm(weight, cast(factor, weight.dtype), rows.mT, alpha=scale)


def add_updates(weights: Sequence[Tensor], factors: Tensor | None, rows: Tensor, scale: float) -> Tensor:
    """``add_update`` for layers of one shape in a few calls.

    Args:
        weights: of each layer.
        factors: shape (layers, I, J), None for the identity.
        rows: shape (layers, K, J).
        scale: of the update.

    Returns:
        The changed weights, shape (layers, *weight).
    """
    # In the order of the update, also where the weights lie channels last.
    stacked = weights[0].new_empty(len(weights), *weights[0].shape)
    torch.stack(list(weights), out=stacked)
    wide = stacked.float() if stacked.dtype in HALF else stacked

    # shape: (layers, I, K)
    update, total = cast(rows, wide.dtype).mT, wide.view(*rows.shape[:1], -1, rows.shape[1])

    if factors is None:
        total.add_(update, alpha=scale)
    else:
        total.baddbmm_(cast(factors, wide.dtype), update, alpha=scale)

    if wide is stacked:
        return stacked

    # In place, because the float32 copy is the largest tensor here. The pattern is that of each weight alone.
    dropped = _dropped(stacked.dtype)
    wide.view(torch.int32).add_(_noise(wide[0], dropped)).bitwise_and_(-(1 << dropped))

    return wide.to(stacked.dtype)


def dither(total: Tensor, dtype: torch.dtype) -> Tensor:
    """A float32 tensor in a half precision, rounded without bias; numbers of that precision stay as they are."""
    return rounded(total, dtype).to(dtype)


def rounded(total: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers of ``dither``, still in float32.

    The low bits, which the narrower format drops, get a number between zero and one step added, and are then cut off.
    """
    dropped = _dropped(dtype)
    bits = total.contiguous().view(torch.int32) + _noise(total, dropped)
    return (bits & -(1 << dropped)).view(torch.float32)


def _dropped(dtype: torch.dtype) -> int:
    """How many bits a half precision has less."""
    if dtype == torch.bfloat16:
        return 16
    return 13


def _noise(like: Tensor, dropped: int) -> Tensor:
    """A fixed pattern of whole numbers below ``2 ** dropped`` in the shape of a tensor, with a long period."""
    count = like.numel()

    # A compiler computes it on the way.
    if torch.compiler.is_compiling():
        places = torch.arange(count, device=like.device, dtype=torch.int32)
        return _hashed(places & (PERIOD - 1), dropped).view(like.shape)

    key = (like.device, dropped)
    table = _NOISE.get(key)
    if table is None:
        table = _hashed(torch.arange(PERIOD, device=like.device, dtype=torch.int32), dropped)
        # A stand-in of torch's own must not outlive its mode.
        if type(table) is Tensor:
            _NOISE[key] = table

    if count > PERIOD:
        table = table.expand(-(-count // PERIOD), PERIOD).reshape(-1)

    return table[:count].view(like.shape)


def _hashed(places: Tensor, dropped: int) -> Tensor:
    """The numbers below ``2 ** dropped``, each as often, in an order without a pattern; ``gpu.py`` has the same.

    Every step maps the numbers of 16 bits one to one.
    """
    mixed = (places * 0x9E3B) & 0xFFFF
    mixed = ((mixed ^ (mixed >> 7)) * 0x85EB) & 0xFFFF
    return (mixed ^ (mixed >> 8)) >> (16 - dropped)


PERIOD = 2**16  # entries after which the pattern begins again
_NOISE: dict[tuple[torch.device, int], Tensor] = {}


def keeps_sum(weight: Tensor, x: Tensor, rank: int) -> bool:
    """Whether to keep W + dW for backward, instead of forming it once more.

    On a GPU, where it is small, or takes no more memory than LoRA would keep of this layer: the hidden tensor, and in
    half precision the input in float32.
    """
    if on_cpu(x):
        return False
    if weight.numel() <= SMALL_WEIGHT:
        return True
    hidden = rank * (x.numel() // weight.shape[1])
    return weight.numel() <= hidden + (2 * x.numel() if x.dtype in HALF else 0)


def may_be_held(weight: Tensor, x: Tensor) -> bool:
    """Whether a kept W + dW, its gradient and a copy of that may wait for those of other layers.

    They do until the backward has been through all of these layers. By then it has freed their inputs, which took more.
    """
    return weight.numel() <= SMALL_WEIGHT or 4 * weight.numel() <= x.numel()


SMALL_WEIGHT = 2**16  # entries of a weight that may always be kept once more


def _add_rounded(weight: Tensor, factor: Tensor, rows: Tensor, scale: float) -> Tensor:
    return dither(torch.addmm(weight.float(), factor, rows.t(), alpha=scale), weight.dtype)


# ---- the factors of a kernel's modes as one ------------------------------------------------------------------------


def kronecker(factors: Sequence[Tensor]) -> Tensor:
    """The Kronecker product of two or three contiguous matrices (k, r): (prod(k), prod(r))."""
    if on_cpu(factors[0]):
        return _kronecker(*factors)

    if HAS_TRITON and factors[0].is_cuda:
        launched: Tensor = _gpu().kronecker(*factors)
        return launched

    found: Tensor = torch.ops.flora.kronecker(*factors)

    return found


def kronecker_gradients(grad: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of those matrices from that of their Kronecker product."""
    if on_cpu(grad):
        flat = _kronecker_gradients(grad, *factors)
    elif HAS_TRITON and grad.is_cuda:
        flat = _gpu().kronecker_gradients(grad, *factors)
    else:
        flat = torch.ops.flora.kronecker_gradients(grad, *factors)

    parts = flat.split([factor.numel() for factor in factors])

    return [part.view(factor.shape) for part, factor in zip(parts, factors, strict=True)]


def _kronecker(first: Tensor, second: Tensor, third: Tensor | None = None) -> Tensor:
    if third is None:
        factors = [first, second]
    else:
        factors = [first, second, third]

    found = form.kronecker(factors, [factor.shape[1] for factor in factors])
    if found is None:
        raise AssertionError("there are factors")

    return found


def _kronecker_gradients(grad: Tensor, first: Tensor, second: Tensor, third: Tensor | None = None) -> Tensor:
    """The gradients flat, one after the other: each is summed over the indices of the other matrices."""
    (k1, r1), (k2, r2), (k3, r3) = first.shape, second.shape, (1, 1) if third is None else third.shape

    # shape: (k1 r1, k2 r2, k3 r3)
    split = grad.reshape(k1, k2, k3, r1, r2, r3).permute(0, 3, 1, 4, 2, 5).reshape(k1 * r1, k2 * r2, k3 * r3)
    flat_first, flat_second = first.reshape(-1), second.reshape(-1)

    # shape: (k1 r1, k2 r2)
    if third is None:
        of_pair = split[:, :, 0]
    else:
        of_pair = torch.matmul(split, third.reshape(-1))

    found = [torch.mv(of_pair, flat_second), torch.mv(of_pair.t(), flat_first)]

    if third is not None:
        both = torch.outer(flat_first, flat_second).view(1, -1)
        found.append(torch.mm(both, split.view(-1, k3 * r3)).view(-1))

    return torch.cat(found)


# ---- the same as operations of torch: what a device without Triton runs, and what counts as one launch ------------


@functools.cache
def _gpu() -> Any:
    """The file of Triton kernels, which only a machine with Triton can import."""
    from flora.layers import gpu

    return gpu


def _register(name: str, arguments: str, plain: Callable[..., Tensor], shapes: Callable[..., Tensor]) -> None:
    library.define(f"flora::{name}", f"({arguments}) -> Tensor")
    library.impl(f"flora::{name}", "default", plain)
    library.register_fake(f"flora::{name}", shapes)


def _shape_of_sum(weight: Tensor, factor: Tensor, rows: Tensor, scale: float) -> Tensor:
    return weight.new_empty(weight.shape)


def _shape_of_kronecker(first: Tensor, second: Tensor, third: Tensor | None = None) -> Tensor:
    rows, columns = first.shape[0] * second.shape[0], first.shape[1] * second.shape[1]
    if third is not None:
        rows, columns = rows * third.shape[0], columns * third.shape[1]
    return first.new_empty(rows, columns)


def _shape_of_gradients(grad: Tensor, first: Tensor, second: Tensor, third: Tensor | None = None) -> Tensor:
    return first.new_empty(first.numel() + second.numel() + (0 if third is None else third.numel()))


HAS_TRITON = importlib.util.find_spec("triton") is not None
MATRICES = "Tensor first, Tensor second, Tensor? third=None"
_register("add_rounded", "Tensor weight, Tensor factor, Tensor rows, float scale", _add_rounded, _shape_of_sum)
_register("kronecker", MATRICES, _kronecker, _shape_of_kronecker)
_register("kronecker_gradients", f"Tensor grad, {MATRICES}", _kronecker_gradients, _shape_of_gradients)
