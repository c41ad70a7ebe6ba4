"""How many kernels one training step of a layer would launch, counted on the meta device."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

FREE = {  # views and allocations
    "view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze",
    "as_strided", "split", "split_with_sizes", "alias", "detach", "lift_fresh",
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided",
}  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts operations that each would be a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in FREE and not func.is_view:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return sum(self.found.values())


def step(module: nn.Module, x: Tensor) -> Counter[str]:
    """Of forward and backward, to the input and to all that is trained."""
    y = module(x)
    grad = torch.empty_like(y)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = None
    x.grad = None
    with Launches() as counted:
        module(x).backward(grad)
    return counted.found
