"""Records of a data set, local or of the hub, checked before training: what is bad is named, file and line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from tqdm import tqdm

from flora.data.files import Item, json_entries, table_rows
from flora.data.hub import hub, undecoded
from flora.data.splits import is_local, split_files
from flora.errors import UserError, printable

Value = TypeVar("Value")
Bad = Literal["error", "skip"]
# How many bad items a message names.
SHOWN = 3


def sift(items: Iterable[Item[Value]], check: Callable[[Value], object], *, bad: Bad, what: str) -> list[Item[Value]]:
    """The items that pass a check.

    Args:
        items: to look at.
        check: raises ValueError or OSError, with the reason, for an item that cannot be used.
        bad: "error" raises if there is a bad item; "skip" leaves bad items out and prints how many.
        what: the items are, in the plural, for messages.

    Raises:
        ValueError: there are bad items and ``bad`` is "error", or no item is left. Names the first, with the reason.
    """
    if bad not in ("error", "skip"):
        raise UserError(f"task.bad_data is {bad!r}, expected error or skip")

    items, good, reasons = list(items), [], []
    for item in tqdm(items, desc=f"checking {what}", delay=2, leave=False):
        reason = _reason(item.value, check)
        if reason is None:
            good.append(item)
        else:
            reasons.append(f"{item.place}: {reason}")

    if reasons:
        more = f" (and {len(reasons) - SHOWN} more)" if len(reasons) > SHOWN else ""

        told = f"{len(reasons)} of {len(items)} {what} cannot be used: {'; '.join(reasons[:SHOWN])}{more}"

        if bad == "error":
            raise UserError(f"{told}. Repair or remove them, or set task.bad_data=skip")

        print(f"left out: {printable(told)}", flush=True)

    if not good:
        raise UserError(f"there are no {what} to use; check task.data")

    return good


def _reason(value: Value, check: Callable[[Value], object]) -> str | None:
    """Why the check refuses a value."""
    try:
        check(value)
    except Exception as error:
        # A decoder raises whatever it likes about a broken, or a hostile, file.
        return " ".join(str(error).split()) or type(error).__name__

    return None


def records(
    where: str, endings: Sequence[str], columns: Sequence[str] = (), name: str | None = None
) -> dict[str, list[Item[Any]]]:
    """The records of each split of a local data set or one of the hub, unchecked: for :func:`parsed` and ``sift``.

    An image of the hub is a dict with the ``bytes`` of its file.

    Args:
        where: a file, a folder with a file for each split, or a hub id.
        endings: of such files; the first that is there counts.
        columns: of a table without a header.
        name: of a configuration of the hub's data set.

    Raises:
        FileNotFoundError, ValueError: there is no such data set, or it has no training part.
    """
    if not is_local(where):
        parts = {split: undecoded(part) for split, part in hub(where, name).items()}
        return {key: [Item(f"{where}: {key}[{at}]", row) for at, row in enumerate(part)] for key, part in parts.items()}

    files = split_files(Path(where), endings)

    return {
        split: table_rows(path, columns) if path.suffix in (".csv", ".tsv") else json_entries(path)
        for split, path in files.items()
    }
