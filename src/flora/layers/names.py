"""Names of tensors in files: between a key in an adapter file of PEFT and a weight of the base model."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from flora.errors import UserError

GIVE_BASE = "give the base model (base=..., on the command line --base FOLDER)"
PREFIX = "base_model.model."
_ADAPTER_TENSOR = re.compile(
    r"(?P<module>.*?)\.?(?:tucker_[^.]+\.(?:core|factor_\d+)|lora_(?:[AB]\.weight|embedding_[AB]))"
)
# Where a model of transformers has the names of weights that it does not save.
UNSAVED = "_keys_to_ignore_on_save"
# Rows of an embedding that replace those of the base model.
TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"


def unsaved(model: object) -> Collection[str]:
    """The weights that a model of transformers computes itself and leaves out of its files, as Marian its positions.

    Args:
        model: any; only models of transformers have such weights.
    """
    return getattr(model, UNSAVED, None) or ()


def wrapped_modules(keys: Iterable[str]) -> frozenset[str]:
    """The paths in an adapter file at which PEFT put a wrapper: those that have tensors of an adapter just below.

    Args:
        keys: of the file, with or without PEFT's prefix.

    Examples:
        >>> sorted(wrapped_modules(["net.base_layer.0.tucker_weight.core", "head.lora_A.weight"]))
        ['head', 'net.base_layer.0']
    """
    found = (_ADAPTER_TENSOR.fullmatch(key.removeprefix(PREFIX)) for key in keys)
    return frozenset(match["module"] for match in found if match is not None)


def module_of(path: str, wrapped: Collection[str]) -> str:
    """The name in the base model of a module as an adapter file has it: without PEFT's wrappers around it.

    Args:
        path: in the file.
        wrapped: where the file has wrappers (:func:`wrapped_modules`). Anywhere else ``base_layer`` is a name that
            the model itself uses, and stays.

    Examples:
        >>> module_of("net.base_layer.0.base_layer.bias", {"net.base_layer.0"})
        'net.base_layer.0.bias'
    """
    # ``base_layer`` is a wrapper's name only directly below a path that the file shows to be wrapped.
    parts = path.removeprefix(PREFIX).replace(".modules_to_save.", ".").split(".")
    kept = [part for place, part in enumerate(parts) if part != "base_layer" or ".".join(parts[:place]) not in wrapped]
    return ".".join(kept)


def in_file(name: str, wrappers: Mapping[str, int]) -> str:
    """The inverse of :func:`module_of`: the name of something in the base model as an adapter file has it.

    Args:
        name: of a module or a tensor.
        wrappers: the modules that PEFT has put wrappers around, and how many; what is inside such a module is inside
            all of its wrappers.

    Examples:
        >>> in_file("vit.embeddings.projection.bias", {"vit.embeddings": 2, "vit.embeddings.projection": 1})
        'vit.embeddings.base_layer.base_layer.projection.base_layer.bias'
    """
    parts = name.split(".")
    made = parts[:1]
    for end, part in enumerate(parts[1:], start=1):
        made += ["base_layer"] * wrappers.get(".".join(parts[:end]), 0)
        made.append(part)
    return ".".join(made)


def check_prefix(keys: Iterable[str], source: Path) -> None:
    """Raises a ValueError if a key is not one that PEFT writes."""
    foreign = [key for key in keys if not key.startswith(PREFIX)]
    if foreign:
        raise UserError(
            f"{source} has foreign keys: {foreign[0]!r}{f' and {len(foreign) - 1} more' if foreign[1:] else ''} do not "
            f"begin with {PREFIX!r}; it is not an adapter that PEFT saved"
        )


def nested(name: str, places: Mapping[str, int]) -> str:
    """The path of the wrapper of a raw parameter: those of one module are nested, its last parameter outermost.

    Args:
        name: of the parameter.
        places: each wrapped parameter -> its place among the parameters of its module.

    Raises:
        ValueError: two parameters of the module have one place, because the adapter does not record their order.
    """
    # PEFT wraps the parameters of a module in their order, each wrapper around the one before. So the last parameter is
    # the outermost, and each place before it lies one ``base_layer`` deeper.
    module = name.rpartition(".")[0]
    beside = {other: place for other, place in places.items() if other.rpartition(".")[0] == module}
    order = sorted(beside.values())
    if len(set(order)) < len(order):
        raise UserError(
            f"{', '.join(sorted(beside))} are parameters of one module, and the adapter does not record their order; "
            f"{GIVE_BASE}"
        )

    return module + ".base_layer" * (len(order) - 1 - order.index(beside[name]))
