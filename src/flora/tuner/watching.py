"""The first step with gradients is watched: layers that it does not reach do not train, and are named."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from flora.tuner.layer import FloraLayer


def watch(model: nn.Module) -> None:
    """Has the first forward with gradients watched, unless it is already."""
    if warn_if_unreached not in model._forward_hooks.values():
        model.register_forward_hook(warn_if_unreached)


def stop_watching(model: nn.Module) -> None:
    """Takes the hook ``warn_if_unreached`` off again."""
    for key, hook in list(model._forward_hooks.items()):
        if hook is warn_if_unreached:
            del model._forward_hooks[key]


def warn_if_unreached(model: nn.Module, args: Any, output: Any) -> None:
    """A forward hook on the base model: after its first forward with gradients, names layers that it did not reach."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return

    layers = {name: module for name, module in model.named_modules() if isinstance(module, FloraLayer)}
    if not any(layer.in_force() for layer in layers.values()):
        return

    stop_watching(model)
    silent = [name for name, layer in layers.items() if not layer.reached]
    if silent:
        shown = ", ".join(silent[:5])
        if len(silent) > 5:
            shown += f" and {len(silent) - 5} more"

        warnings.warn(
            f"{len(silent)} of {len(layers)} adapted layers were neither called nor read in the first step with "
            f"gradients, so they do not train: {shown}. This input did not reach them, or their parent goes round "
            "them",
            stacklevel=2,
        )
