"""What is known of a base model without its weights: the shape and the layout of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flora.errors import UserError
from flora.layers.layout import Layout, of_module
from flora.storage.tensors import check_exists, read_json


@dataclass(frozen=True)
class Base:
    """A base model, as far as conversion needs it.

    Attributes:
        shapes: the full name of a parameter -> its shape; those of a quantised or sharded weight are left out.
        layouts: the same -> what its dimensions mean.
        model: the model itself, on the meta device unless it was given.
    """

    shapes: Mapping[str, tuple[int, ...]]
    layouts: Mapping[str, Layout]
    model: nn.Module


def open_base(base: nn.Module | str | Path) -> Base:
    """Reads a base model: a module (the meta device will do), or a folder of transformers or diffusers.

    Args:
        base: a folder is built from its ``config.json`` on the meta device, so no weight is read.

    Raises:
        FileNotFoundError: the folder or its config does not exist.
        ValueError: the config names no class that is installed.
    """
    model = base if isinstance(base, nn.Module) else _build(check_exists(Path(base), "base model"))
    shapes = {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.is_floating_point() or parameter.is_complex()
    }
    return Base(shapes, of_module(model), model)


def _build(path: Path) -> nn.Module:
    config = read_json(path / "config.json")
    with torch.device("meta"):
        if "_class_name" in config:
            return _from_diffusers(config)
        return _from_transformers(path, config)


def _from_diffusers(config: Mapping[str, Any]) -> nn.Module:
    try:
        import diffusers
    except ImportError:
        raise UserError(f"the base is a diffusers {config['_class_name']}: pip install diffusers") from None
    found = getattr(diffusers, str(config["_class_name"]), None)
    if found is None:
        raise UserError(
            f"diffusers {diffusers.__version__} has no class {config['_class_name']!r}; install a newer one"
        )
    return found.from_config(dict(config))  # type: ignore[no-any-return]


def _from_transformers(path: Path, config: Mapping[str, Any]) -> nn.Module:
    import transformers

    names = config.get("architectures") or []
    found = getattr(transformers, names[0], None) if names else None
    if found is None:
        raise UserError(
            f"{path / 'config.json'} names no installed architecture (architectures: {names}); pass the model "
            "itself as base in Python"
        )
    return found(transformers.AutoConfig.from_pretrained(path))  # type: ignore[no-any-return]
