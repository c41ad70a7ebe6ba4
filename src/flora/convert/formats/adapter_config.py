"""``adapter_config.json``, as PEFT writes it: the fields that every format reads, checked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flora.errors import UserError
from flora.storage.tensors import CONFIG, read_object


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_rows(value: object) -> bool:
    """Numbers of rows, for one embedding or by the embedding's name."""
    if isinstance(value, dict):
        return all(isinstance(name, str) and _is_rows(rows) for name, rows in value.items())
    return isinstance(value, list) and all(isinstance(row, int) and not isinstance(row, bool) for row in value)


CHECKS: dict[str, tuple[Callable[[object], bool], str]] = {
    "base_model_name_or_path": (lambda value: isinstance(value, str), "a name"),
    "layout": (lambda value: isinstance(value, dict), "a JSON object"),
    "modules_to_save": (_is_names, "a list of names"),
    "target_parameters": (_is_names, "a list of names"),
    "trainable_token_indices": (_is_rows, "row numbers, or names with row numbers"),
}


def read_config(folder: Path) -> dict[str, Any]:
    """The config of an adapter.

    Raises:
        FileNotFoundError: the folder has none.
        UserError: it is not a JSON object, or a field has a value of another kind than PEFT writes; names it.
    """
    config = read_object(folder / CONFIG)
    for field, (holds, expected) in CHECKS.items():
        value = config.get(field)
        if value is not None and not holds(value):
            raise UserError(f"{folder / CONFIG}: {field} is {str(value)[:80]!r}, expected {expected}; it was edited")
    return config
