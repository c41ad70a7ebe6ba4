"""The names PEFT gives to tensors and patterns: between a key in an adapter file and a weight of the base model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

PREFIX = "base_model.model."


def module_of(path: str) -> str:
    """The name in the base model of a module as an adapter file has it: without PEFT's wrappers around it."""
    return path.removeprefix(PREFIX).replace(".base_layer", "").replace(".modules_to_save.", ".")


def check_prefix(keys: Iterable[str], source: Path) -> None:
    """Raises a ValueError if a key is not one that PEFT writes."""
    foreign = [key for key in keys if not key.startswith(PREFIX)]
    if foreign:
        raise ValueError(
            f"{source} has foreign keys: {foreign[0]!r}{f' and {len(foreign) - 1} more' if foreign[1:] else ''} do not "
            f"begin with {PREFIX!r}; it is not an adapter that PEFT saved"
        )


def match_pattern(patterns: Iterable[str], name: str) -> str | None:
    """The first key of ``rank_pattern`` and the like that holds for a module, as PEFT matches them."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", name)), None)


def exact_pattern(name: str) -> str:
    """A pattern that holds for this name and no other."""
    return f"^{re.escape(name)}"
