"""The first step with gradients is watched, and what would go wrong silently is named.

Layers that it does not reach do not train. Buffers that it changes, such as a codebook that follows the data, are in no
adapter file.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from flora.layers.gate import is_plain_eager
from flora.tuner.layer import FloraLayer

# Where the model keeps its buffers while it is watched.
BUFFERS = "_buffers_before_the_first_step"


def watch(model: nn.Module) -> None:
    """Has the first forward with gradients watched, unless it is already."""
    if warn_if_unreached not in model._forward_hooks.values():
        model.register_forward_hook(warn_if_unreached)
    if warn_of_moved not in model._forward_hooks.values():
        model.register_forward_pre_hook(remember_buffers)
        model.register_forward_hook(warn_of_moved)


def stop_watching(model: nn.Module) -> None:
    """Takes all hooks of ``watch`` off again."""
    _take_off(model, warn_if_unreached, warn_of_moved, remember_buffers)


def _take_off(model: nn.Module, *functions: Callable[..., None]) -> None:
    for hooks in (model._forward_hooks, model._forward_pre_hooks):
        for key, hook in list(hooks.items()):
            if hook in functions:
                del hooks[key]


def remember_buffers(model: nn.Module, args: Any) -> None:
    """A forward pre-hook on the base model: keeps its buffers until the end of a forward that trains."""
    if model.training and torch.is_grad_enabled() and is_plain_eager():
        vars(model)[BUFFERS] = {name: value.clone() for name, value in _kept_buffers(model)}


def warn_of_moved(model: nn.Module, args: Any, output: Any) -> None:
    """A forward hook on the base model: after its first forward that trains, names the buffers that it changed."""
    if torch.compiler.is_compiling() or BUFFERS not in vars(model):
        return

    _take_off(model, warn_of_moved, remember_buffers)
    before = vars(model).pop(BUFFERS)
    moved = [
        name.replace("base_layer.", "")
        for name, value in _kept_buffers(model)
        if name in before and not torch.equal(value.nan_to_num(), before[name].nan_to_num())
    ]

    if moved:
        warnings.warn(
            f"the model changes buffers in training, which are not saved with the adapter ({_shortened(moved)}): after "
            "loading, it will give other outputs; put their modules into modules_to_save, or into eval mode after "
            "every train()",
            stacklevel=2,
        )


def _kept_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that a checkpoint of the base model holds and that have values now.

    Those that ``modules_to_save`` or norms look after are left out.
    """
    saved = tuple(f"{name}." for name, each in model.named_modules() if isinstance(each, AuxiliaryTrainingWrapper))
    for prefix, module in model.named_modules(prefix=""):
        if isinstance(module, _NormBase) or f"{prefix}.".startswith(saved):
            continue

        for leaf, value in module._buffers.items():
            # An offloaded buffer is on the meta device outside its module's forward.
            if type(value) is not Tensor or value.is_meta or leaf in module._non_persistent_buffers_set:
                continue
            if value.is_floating_point():
                yield f"{prefix}.{leaf}".lstrip("."), value


def _shortened(names: list[str]) -> str:
    if len(names) <= 5:
        return ", ".join(names)
    return f"{', '.join(names[:5])} and {len(names) - 5} more"


def warn_if_unreached(model: nn.Module, args: Any, output: Any) -> None:
    """A forward hook on the base model: after its first forward with gradients, names layers that it did not reach."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return

    layers = {name: module for name, module in model.named_modules() if isinstance(module, FloraLayer)}
    if not any(layer.in_force() for layer in layers.values()):
        return

    _take_off(model, warn_if_unreached)
    silent = [name for name, layer in layers.items() if not layer.reached]
    if silent:
        warnings.warn(
            f"{len(silent)} of {len(layers)} adapted layers were neither called nor read in the first step with "
            f"gradients, so they do not train: {_shortened(silent)}. This input did not reach them, or their parent "
            "goes round them",
            stacklevel=2,
        )
