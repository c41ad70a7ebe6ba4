"""YAML that anybody may have written: its value, or a line about what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from flora.errors import UserError

# Characters; the parser takes seconds for this many.
LARGEST = 1_000_000
# What the parser raises about texts: a date that does not exist, a number of thousands of digits, brackets in brackets.
MALFORMED = (
    yaml.YAMLError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


def read_yaml(path: Path) -> Any:
    """The value in a YAML file, made of plain types only.

    Raises:
        OSError: the file cannot be read.
        UserError: it is not UTF-8 text, too long, or not YAML; names the file.
    """
    if path.stat().st_size > 4 * LARGEST:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes, which is too much for a config")

    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid YAML: it is not UTF-8 text ({error.reason})") from None

    return parse_yaml(text, str(path))


def parse_yaml(text: str, about: str) -> Any:
    """The value of a YAML text, made of plain types only.

    Raises:
        UserError: it is too long, or not YAML; begins with ``about``.
    """
    if len(text) > LARGEST:
        raise UserError(f"{about} has {len(text):,} characters, expected a config of at most {LARGEST:,}")

    try:
        return yaml.safe_load(text)
    except MALFORMED as error:
        raise UserError(f"{about} is not valid YAML: {' '.join(str(error).split())}") from None
