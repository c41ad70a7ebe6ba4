"""Weights that accelerate keeps elsewhere between calls: read while its hook has brought them back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch import nn


def hooked(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Those of the modules that carry a hook of accelerate, which may hold their weights."""
    return [module for module in modules if "_hf_hook" in vars(module)]


@contextmanager
def in_memory(modules: Iterable[nn.Module]) -> Iterator[None]:
    """The weights of the modules are on the device of their hooks within; tensors that were read there stay valid."""
    with ExitStack() as stack:
        for module in hooked(modules):
            hook = vars(module)["_hf_hook"]
            hook.pre_forward(module)
            stack.callback(hook.post_forward, module, None)
        yield
