"""The names PEFT gives to tensors and patterns: between a key in an adapter file and a weight of the base model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from flora.errors import UserError

GIVE_BASE = "give the base model (base=..., on the command line --base FOLDER)"
PREFIX = "base_model.model."
TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"  # rows of an embedding that replace those of the base model


def module_of(path: str) -> str:
    """The name in the base model of a module as an adapter file has it: without PEFT's wrappers around it."""
    return path.removeprefix(PREFIX).replace(".base_layer", "").replace(".modules_to_save.", ".")


def check_prefix(keys: Iterable[str], source: Path) -> None:
    """Raises a ValueError if a key is not one that PEFT writes."""
    foreign = [key for key in keys if not key.startswith(PREFIX)]
    if foreign:
        raise UserError(
            f"{source} has foreign keys: {foreign[0]!r}{f' and {len(foreign) - 1} more' if foreign[1:] else ''} do not "
            f"begin with {PREFIX!r}; it is not an adapter that PEFT saved"
        )


def match_pattern(patterns: Iterable[str], name: str) -> str | None:
    """The first key of ``rank_pattern`` and the like that holds for a module, as PEFT matches them."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", name)), None)


def exact_pattern(name: str) -> str:
    """A pattern that holds for this name and no other."""
    return f"^{re.escape(name)}"


def nested(name: str, places: Mapping[str, int]) -> str:
    """The path of the wrapper of a raw parameter: those of one module are nested, its last parameter outermost.

    Args:
        name: of the parameter.
        places: each wrapped parameter -> its place among the parameters of its module.

    Raises:
        ValueError: two parameters of the module have one place, because the adapter does not record their order.
    """
    module = name.rpartition(".")[0]
    beside = {other: place for other, place in places.items() if other.rpartition(".")[0] == module}
    order = sorted(beside.values())
    if len(set(order)) < len(order):
        raise UserError(
            f"{', '.join(sorted(beside))} are parameters of one module, and the adapter does not record their order; "
            f"{GIVE_BASE}"
        )
    return module + ".base_layer" * (len(order) - 1 - order.index(beside[name]))
