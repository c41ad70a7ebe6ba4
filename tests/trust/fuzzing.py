"""Inputs that are broken on purpose: a mutation for every kind of file that flora reads, drawn by number."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 65, 2**31, 2**63, -(2**70), 0.5, -0.0, 1e308, float("nan"), float("inf"), "", " ",
    "x", "x" * 300, "\x00", "é", "../../x", "/dev/zero", "(a+)+b", "[", ".*", "all", "null", "1", [], [1], [[]],
    [None], [1, 2, 3, 4], ["x", 1], {}, {"": 1}, {"x": {"y": []}}, {"a": None}, {".*": 2, "x": "y"},
]  # fmt: skip
LINES = ["[" * 3000, "{", "&a [*a]", "9" * 5000, "\t", '"', "a: b: c", "!!python/name:os.system"]
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "C64", "X"]
SHAPES: list[Any] = [[], [0], [1], [-1], [2**40], [3, 0], [1] * 65, [1] * 26, ["x"], None, [1.5]]


def mutate(path: Path, draw: random.Random) -> None:
    """Changes one file, in a way that its kind suggests or byte by byte."""
    ways = [_bytes]
    if path.suffix == ".json":
        ways += [_json] * 5
    if path.suffix == ".safetensors":
        ways += [_header] * 5
    if path.suffix in (".yaml", ".jsonl", ".csv"):
        ways += [_text] * 3
    draw.choice(ways)(path, draw)


def _bytes(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(draw.choice([1, 1, 2, 8])):
        at = draw.randrange(len(data) + 1) if draw.random() < 0.5 else min(len(data), draw.randrange(200))
        way = draw.randrange(5)
        if way == 0 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif way == 1:
            del data[at:]
        elif way == 2:
            data[at:at] = draw.randbytes(draw.choice([1, 4, 100]))
        elif way == 3:
            data[at : at + draw.choice([1, 8, 64])] = bytes(8)
        else:
            del data[at : at + draw.choice([1, 8, 64])]
    path.write_bytes(bytes(data))


def _text(path: Path, draw: random.Random) -> None:
    lines = path.read_text(errors="replace").split("\n")
    at = draw.randrange(len(lines))
    value = draw.choice(VALUES)
    way = draw.randrange(5)
    if way == 0:
        lines[at] = lines[at].partition(":")[0] + f": {json.dumps(value)}"
    elif way == 1:
        lines.insert(
            at, draw.choice(["[" * 3000, "{", "&a [*a]", "9" * 5000, "\t", '"', "a: b: c", "!!python/name:os.system"])
        )
    elif way == 2:
        del lines[at]
    elif way == 3:
        lines[at] = lines[at].partition(":")[0] + ": " + "9" * 5000
    else:
        lines[at] += draw.choice([",", ":", "'", "\x00", "\ufffe", "x" * 3000])
    path.write_text("\n".join(lines), errors="replace")


def _json(path: Path, draw: random.Random) -> None:
    value = _parsed(path.read_bytes())
    for _ in range(draw.choice([1, 1, 2, 5])):
        value = _changed(value, draw)
    text = json.dumps(value)
    if draw.random() < 0.05:
        text = text.replace("1", "9" * 5000, 1)
    if draw.random() < 0.05:
        text = text.replace("null", "[" * 5000 + "]" * 5000, 1)
    path.write_text(text)


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # it was changed before
        return {"x": []}


def _changed(value: Any, draw: random.Random) -> Any:
    """The value with one of its parts replaced, removed or renamed."""
    if not isinstance(value, (dict, list)) or not value or draw.random() < 0.15:
        return draw.choice(VALUES)
    if isinstance(value, list):
        at = draw.randrange(len(value))
        return [*value[:at], _changed(value[at], draw), *value[at + 1 :]]

    key = draw.choice(list(value))
    changed = dict(value)
    way = draw.random()
    if way < 0.15:
        del changed[key]
    elif way < 0.25:
        changed[str(draw.choice(VALUES))] = changed.pop(key)
    else:
        changed[key] = _changed(value[key], draw)
    return changed


def _header(path: Path, draw: random.Random) -> None:
    """A tensor file whose header says something else than its bytes."""
    data = path.read_bytes().ljust(8, b"\0")
    size = struct.unpack("<Q", data[:8])[0]
    header = _parsed(data[8 : 8 + size])
    for _ in range(draw.choice([1, 1, 1, 3])):
        header = _changed_header(header if isinstance(header, dict) and header else {"x": []}, draw)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def _changed_header(header: dict[str, Any], draw: random.Random) -> Any:
    key = draw.choice(list(header))
    entry = header[key]
    way = draw.randrange(7)
    if way == 0 or not isinstance(entry, dict):
        return _changed(header, draw)
    if way == 1:
        entry["dtype"] = draw.choice(DTYPES)
    elif way == 2:
        entry["shape"] = draw.choice(SHAPES)
    elif way == 3:
        header[key + draw.choice([".x", "0", "é", "." * 3, "x" * 300])] = header.pop(key)
    elif way == 4:
        _retyped(entry, draw)
    elif way == 5:
        name = draw.choice(["flora", "flora_dense", "format", "x"])
        header["__metadata__"] = {name: json.dumps(draw.choice(VALUES))}
    else:
        header.pop(key)
    return header


def _retyped(entry: dict[str, Any], draw: random.Random) -> None:
    """Another type or shape that takes the same number of bytes, so that the file is valid."""
    if entry.get("dtype") == "F32" and isinstance(entry.get("shape"), list):
        entry["dtype"] = draw.choice(["I32", "U32", "F32"])
        if draw.random() < 0.5:
            entry["shape"] = [*entry["shape"], *([1] * draw.choice([1, 2, 30, 62]))]
