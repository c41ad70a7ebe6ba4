"""What a training step costs that needs no clock: its operations, and the bytes that forward keeps for backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import flop_counter

aten = torch.ops.aten


def _added_product(out: Any, left: Any, right: Any, *args: Any, **kwargs: Any) -> int:
    """``out += left @ right``: (..., m, k) and (..., k, n), as shapes."""
    batch = left[0] if len(left) == 3 else 1
    return int(2 * batch * left[-2] * left[-1] * right[-1])


def _grouped_product(left: Any, right: Any, *args: Any, **kwargs: Any) -> int:
    """Products of groups of rows or columns; 2-D sides are split among the groups."""
    groups = left[0] if len(left) == 3 and len(right) == 3 else 1
    return int(2 * groups * left[-2] * left[-1] * right[-1])


# torch counts products out of place only; what is added in place or grouped must not come for free.
UNCOUNTED = {aten.addmm_: _added_product, aten.baddbmm_: _added_product, aten._grouped_mm: _grouped_product}


def flops(step: Callable[[], object]) -> int:
    """Floating point operations of products and convolutions, as torch counts them."""
    counter = flop_counter.FlopCounterMode(display=False, custom_mapping=UNCOUNTED)
    with counter:
        step()
    return counter.get_total_flops()


def kept(forward: Callable[[], object], parameters: Iterable[Tensor]) -> dict[int, int]:
    """What ``forward`` keeps for backward: storage -> bytes, each storage once, those of parameters left out."""
    own = {address(parameter) for parameter in parameters}
    seen: list[Tensor] = []  # held until the end, so that no address is given out twice

    def pack(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    storages = {address(tensor): tensor.untyped_storage().nbytes() for tensor in seen}
    del out
    return {place: size for place, size in storages.items() if place not in own and size}


def address(tensor: Tensor) -> int:
    """Of the storage."""
    return tensor.untyped_storage().data_ptr()
