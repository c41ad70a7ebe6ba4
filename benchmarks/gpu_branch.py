"""A GPU's branch on a machine without one: the library takes every decision as it would on a GPU, on CPU tensors.

Triton kernels cannot run there. A plain operation of torch computes what the kernel would, without being timed as
such: what its launch would cost the host is stood for by ``LAUNCHES`` small products, because Triton's launcher goes
through Python and takes about four times as long as torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from flora.layers import device

LAUNCHES = 4


@contextmanager
def taken(with_stand_ins: bool = False) -> Iterator[None]:
    """Within, a tensor on the CPU counts as one on a GPU.

    Args:
        with_stand_ins: whether Triton kernels are replaced by launches that compute nothing. The numbers are then
            wrong, and only the time of the host is of use.
    """
    changed: dict[str, Any] = {"on_cpu": lambda x: False}

    if with_stand_ins:
        changed |= {
            "add_update": _add_update(device.add_update),
            "kronecker": _kronecker,
            "kronecker_gradients": _kronecker_gradients,
            "product": _product(device.product),
        }

    before = {name: getattr(device, name) for name in changed}
    for name, stand_in in changed.items():
        setattr(device, name, stand_in)

    try:
        yield
    finally:
        for name, own in before.items():
            setattr(device, name, own)


def _launch() -> None:
    for _ in range(LAUNCHES):
        torch.mm(_SMALL, _SMALL)


def _add_update(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def add_update(weight: Tensor, factor: Tensor | None, rows: Tensor, scale: float) -> Tensor:
        if weight.dtype not in device.HALF or factor is None:
            return own(weight, factor, rows, scale)
        device.cast(factor, torch.float32), device.cast(rows, torch.float32)
        _launch()
        return torch.empty_like(weight)

    return add_update


def _product(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A product in half precision returns float32 there; here one of torch's own does, with a tensor of that dtype."""

    def product(left: Tensor, right: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        found = own(left, right, dtype, scale)
        if left.dtype not in device.HALF or dtype != torch.float32:
            return found
        return found.new_empty(found.shape, dtype=dtype)

    return product


def _kronecker(factors: Sequence[Tensor]) -> Tensor:
    rows, columns = 1, 1
    for factor in factors:
        rows, columns = rows * factor.shape[0], columns * factor.shape[1]
    _launch()
    return factors[0].new_empty(rows, columns)


def _kronecker_gradients(grad: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
    _launch()
    sizes = [factor.numel() for factor in factors]
    parts = grad.new_empty(sum(sizes)).split(sizes)
    return [part.view(factor.shape) for part, factor in zip(parts, factors, strict=True)]


_SMALL = torch.zeros(2, 2)
