"""Data sets of the hub, by the names of ``SPLIT_NAMES``; their files are opened on demand."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from flora.data.files import regular
from flora.data.splits import SPLIT_NAMES
from flora.errors import UserError, nearest_path


@dataclass(frozen=True)
class HubFile:
    """A file in a column of a hub data set; it is opened as a path is.

    Attributes:
        column: of the data set, alone, with undecoded rows.
        row: of the file.
    """

    column: Any
    row: int

    def source(self) -> Path | io.BytesIO:
        """The file, or its bytes.

        Raises:
            ValueError: the row has no file.
        """
        stored = next(iter(self.column[self.row].values())) or {}
        if stored.get("bytes") is not None:
            return io.BytesIO(stored["bytes"])
        if not stored.get("path"):
            raise UserError("the row has no file")
        return regular(Path(stored["path"]))

    def open(self, mode: Literal["rb"] = "rb") -> IO[bytes]:
        """The file's bytes; raises as :meth:`source`."""
        found = self.source()
        return found.open(mode) if isinstance(found, Path) else found


def hub(where: str, name: str | None = None, revision: str | None = None) -> dict[str, Any]:
    """A data set of the hub, by the splits of ``SPLIT_NAMES`` that it has.

    Args:
        where: its id.
        name: of a configuration of it.
        revision: a branch of its repository, such as the hub's own conversion ``refs/convert/parquet``.

    Raises:
        FileNotFoundError: it cannot be loaded; says why.
        ValueError: it has no training split.
    """
    try:
        from datasets import load_dataset
    except ModuleNotFoundError:
        raise FileNotFoundError(
            f"task.data is {where!r}: no such file or folder here{nearest_path(Path(where))}. To load a data "
            'set of the hub by its id, install datasets: pip install "flora-peft[vision]"'
        ) from None

    try:
        loaded = load_dataset(where, name, revision=revision)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"task.data is {where!r}: no such file or folder here, and the hub has no such data set that you may "
            f"read ({reason}){nearest_path(Path(where))}"
        ) from None

    found = {split: loaded[own] for split, names in SPLIT_NAMES.items() for own in names if own in loaded}
    if "train" not in found:
        raise UserError(f"the data set {where!r} has the splits {', '.join(loaded)}, but no train split")

    return found


def hub_column(dataset: Any, name: str) -> Any:
    """A column of a part of a hub data set, alone.

    Raises:
        ValueError: there is no such column.
    """
    if name not in dataset.column_names:
        raise UserError(f"the data set has no column {name!r}, only {', '.join(dataset.column_names)}")
    return dataset.select_columns(name)


def hub_files(dataset: Any, name: str, undecoded: object) -> list[HubFile]:
    """The files in a column of a part of a hub data set.

    Args:
        dataset: the part.
        name: of the column.
        undecoded: its kind, ``Image(decode=False)`` or ``Audio(decode=False)`` of ``datasets``.

    Raises:
        ValueError: there is no such column.
    """
    column = hub_column(dataset, name).cast_column(name, undecoded)
    return [HubFile(column, row) for row in range(len(column))]


def undecoded(part: Any) -> Any:
    """A data set of the hub whose images are the bytes of their files, not pixels."""
    from datasets import Image

    for column, kind in part.features.items():
        if isinstance(kind, Image):
            part = part.cast_column(column, Image(decode=False))
    return part
