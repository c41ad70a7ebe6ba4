"""Files of data, each piece with the place it comes from: what cannot be read is named, file and line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from flora.errors import UserError, user_errors

Value = TypeVar("Value")


@dataclass(frozen=True)
class Item(Generic[Value]):
    """A piece of data with the place it comes from, as messages name it: a file, or ``file:line``."""

    place: str
    value: Value


def regular(path: Path) -> Path:
    """The path of a file that may be opened: a device never ends, and a pipe is waited for.

    Raises:
        UserError: it is there and is no regular file.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path.name} is not a regular file")
    return path


def text_of(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        ValueError: it is not UTF-8; names file and line.
    """
    data = regular(path).read_bytes()

    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 text ({error.reason}); convert the file to UTF-8") from None


def json_lines(path: Path) -> list[Item[str]]:
    """The lines of a JSONL file that are not blank, unparsed: give :func:`parsed` to ``sift``."""
    # Not splitlines: JSON strings may hold other line separators.
    lines = text_of(path).split("\n")
    return [Item(f"{path}:{at}", line) for at, line in enumerate(lines, start=1) if line.strip()]


def json_of(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        UserError: it cannot be parsed; names the line.
    """
    text = text_of(path)

    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        # A number of thousands of digits, or brackets in brackets.
        raise UserError(f"{path}: not valid JSON ({error})") from None


def json_entries(path: Path) -> list[Item[Any]]:
    """The entries of a ``.json`` file that is one list, or the lines of a ``.jsonl`` file; for :func:`parsed`.

    Raises:
        ValueError: the ``.json`` file cannot be parsed, or is not a list.
    """
    if path.suffix != ".json":
        return cast("list[Item[Any]]", json_lines(path))

    entries = json_of(path)
    if not isinstance(entries, list):
        raise UserError(f"{path} must be one list of entries, got {type(entries).__name__}")

    return [Item(f"{path}: entry {at}", entry) for at, entry in enumerate(entries, start=1)]


def table_rows(path: Path, columns: Sequence[str]) -> list[Item[Any]]:
    """The rows of a .csv file, or of a .tsv file without quoting, by column; without a header those of ``columns``."""
    dialect: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
    text = text_of(path)

    # A field may be larger than Python's reader takes.
    with user_errors(csv.Error, about=str(path)):
        header = next(csv.reader([text.partition("\n")[0].rstrip("\r")], **dialect), [])
        names = None if set(columns) & set(header) else columns

        reader = csv.DictReader(io.StringIO(text, newline=""), names, **dialect)

        # Fields beyond the header lie under None.
        return [
            Item(f"{path}:{reader.line_num}", {key: field for key, field in row.items() if field is not None})
            for row in reader
        ]


def parsed(entry: object, required: Sequence[str] = ()) -> dict[str, Any]:
    """A line of a JSONL file, or an entry that was parsed before, as a dict.

    Raises:
        ValueError: it is not a JSON object, or lacks a required key.
    """
    try:
        value = json.loads(entry) if isinstance(entry, str) else entry
    except json.JSONDecodeError as error:
        raise UserError(f"not valid JSON ({error.msg} at column {error.colno})") from None

    if not isinstance(value, dict):
        raise UserError(f"expected a JSON object, got {type(value).__name__}")
    if missing := [key for key in required if key not in value]:
        raise UserError(f"lacks {', '.join(map(repr, missing))}; it has {', '.join(map(repr, value))}")
    if None in value:
        raise UserError(f"has {len(value[None])} more fields than there are columns")

    return value


def check_image(path: Path) -> None:
    """Decodes an image file.

    Raises:
        OSError, ValueError, SyntaxError: it cannot be decoded.
    """
    from PIL import Image

    with Image.open(regular(path)) as image:
        image.load()
