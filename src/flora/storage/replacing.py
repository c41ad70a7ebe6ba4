"""What may be replaced: only a file or folder that flora has written, recognised by its mark and the names in it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from flora.errors import UserError

# One of these keys is in the metadata of every single file that flora writes.
NOTES = ("flora", "flora_dense")
PAGE_MARK = "<!-- written by flora inspect -->\n"


class Kind(NamedTuple):
    """How one kind of output is known.

    Attributes:
        what: it is, for messages: "an adapter".
        is_ours: tells by a mark inside whether flora has written the file or folder.
        names: patterns of everything that such a folder holds at its top; empty for a file.
    """

    what: str
    is_ours: Callable[[Path], bool]
    names: tuple[str, ...] = ()


def check_replaceable(place: Path, target: Path, kind: Kind, also: Collection[str] = ()) -> None:
    """Checks that nothing is lost but what flora has written.

    Args:
        place: the file or folder that would be replaced.
        target: what the user calls it, for messages.
        kind: of what is written.
        also: names besides those of the kind.

    Raises:
        UserError: it is something else, or holds something else; names that.
    """
    remedy = "it is left as it is; give another output, or move it away"

    if place.is_dir() != bool(kind.names):
        found = "a folder" if place.is_dir() else "a file"

        raise UserError(f"{target} exists and is {found}, not {kind.what} that flora has written; {remedy}")

    if kind.names:
        names = sorted(path.name for path in place.iterdir())
        foreign = [name for name in names if not _is_known(name, kind.names) and name not in also]
        if foreign:
            raise UserError(f"{target} holds {foreign[0]!r}, which is not part of {kind.what}; {remedy}")

    if not kind.is_ours(place):
        raise UserError(f"{target} exists and is not {kind.what} that flora has written; {remedy}")


def _is_known(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def is_our_tensor_file(path: Path) -> bool:
    """Whether a tensor file says in its metadata that flora wrote it."""
    # A pipe would wait for somebody who writes into it.
    if not path.is_file():
        return False

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError):
        return False
    return any(key in metadata for key in NOTES)


def is_our_page(path: Path) -> bool:
    """Whether a page ends with the mark of ``flora inspect``."""
    return path.is_file() and path.read_bytes().endswith(PAGE_MARK.encode())


def is_adapter(folder: Path) -> bool:
    """Whether a folder is an adapter's."""
    return (folder / "adapter_config.json").is_file()


def has_tensors(folder: Path) -> bool:
    """Whether a folder has tensor files at all."""
    return any(folder.glob("*.safetensors"))


ADAPTER = Kind(
    "an adapter",
    is_adapter,
    ("adapter_config.json", "adapter_model.safetensors", "README.md"),
)
PAGE = Kind("a page", is_our_page)
TENSORS = Kind("a tensor file", is_our_tensor_file)
# What a model's folder holds beside its weights is copied from the base, whose own names a merge adds to these.
MODEL = Kind(
    "a merged model",
    has_tensors,
    (
        "*.safetensors",
        "*.safetensors.index.json",
        "config.json",
        "generation_config.json",
        "README.md",
        "*token*",
        "*processor_config.json",
        "chat_template*",
        "vocab*",
        "merges.txt",
    ),
)
