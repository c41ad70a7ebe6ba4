"""Parents that ask what class a layer is before they run it: an adapted layer is of another class.

``isinstance(self.attn, nn.MultiheadAttention)`` is False once the attention is adapted, so the parent takes another
way through its code, silently.
"""

from __future__ import annotations

import dis
from collections.abc import Iterator
from functools import cache
from types import CodeType, FunctionType
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from flora.tuner.adapted import AdaptedLayer

# What only holds others; the one that runs them is further out.
HOLDERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def question_about(name: str, module: nn.Module, model: nn.Module) -> str | None:
    """Why the parent of a module would run it otherwise once it is adapted, or None.

    Args:
        name: of the module in the model.
        module: the layer, without adapters.
        model: that holds it.
    """
    parent = model
    while name and (type(parent) in HOLDERS or parent is model):
        name = name.rpartition(".")[0]
        parent = model.get_submodule(name)

    if isinstance(parent, BaseTunerLayer):
        parent = parent.get_base_layer()

    for asked in _classes_asked_for(type(parent)):  # type: ignore[arg-type]
        if isinstance(module, asked) and not issubclass(AdaptedLayer, asked):
            return (
                f"the forward of {type(parent).__name__} asks whether it is of the class {asked.__name__}, which an "
                "adapted layer is not, and may leave it out or call it otherwise"
            )

    return None


@cache
def _classes_asked_for(cls: type[nn.Module]) -> tuple[type, ...]:
    """The classes that a module's forward, and the methods it calls, ask for with ``isinstance``."""
    found: dict[type, None] = {}
    waiting, seen = ["forward"], {"forward"}

    while waiting:
        function = getattr(cls, waiting.pop(), None)
        if not isinstance(function, FunctionType) or function.__module__.partition(".")[0] == "torch":
            continue

        for code in _codes(function.__code__):
            found.update(dict.fromkeys(_asked_in(code, function.__globals__)))
            called = set(code.co_names) - seen
            seen |= called
            waiting += called

    return tuple(found)


def _codes(code: CodeType) -> Iterator[CodeType]:
    """The code of a function and of those inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _asked_in(code: CodeType, names: dict[str, Any]) -> Iterator[type]:
    """The classes between an ``isinstance`` and the call of it, followed from the names of the module."""
    if "isinstance" not in code.co_names:
        return

    asking, value = False, None
    for step in dis.get_instructions(code):
        if step.opname == "LOAD_GLOBAL":
            asking = asking or step.argval == "isinstance"
            value = names.get(step.argval)
        elif step.opname == "LOAD_ATTR" and value is not None:
            value = getattr(value, step.argval, None)
        else:
            asking = asking and not step.opname.startswith(("CALL", "POP_JUMP", "STORE"))
            value = None

        if asking and isinstance(value, type) and issubclass(value, nn.Module):
            yield value
