"""Data from a local folder or file, or by hub id, checked before training: what is bad is named, file and line."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Generic, Literal, TypeVar, cast

from tqdm import tqdm

from flora.errors import UserError, nearest_path, printable, user_errors
from flora.storage.progress import hidden_bars

Value = TypeVar("Value")
Bad = Literal["error", "skip"]
# How many bad items a message names.
SHOWN = 3
# A split -> what folders, files and hub data sets call it.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "validation_matched"),
    "test": ("test", "testing", "eval", "test_matched"),
}
# The share of the training data that stands in for a split that is not given.
HELD_OUT = 0.15
SPLIT_SEED = 0
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")


@dataclass(frozen=True)
class Item(Generic[Value]):
    """A piece of data with the place it comes from, as messages name it: a file, or ``file:line``."""

    place: str
    value: Value


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


def class_folders(folder: Path, endings: Sequence[str] = IMAGES) -> tuple[list[Item[Path]], list[str]]:
    """The files of a folder with one sub-folder for each class, and the names of the classes in order.

    Raises:
        ValueError: there is no class folder, or one of them has no file with these endings.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; give a folder that has a sub-folder of files for each class")

    classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes:
        raise UserError(f"{folder} has no sub-folders; put the files of each class into a folder named after it")

    items: list[Item[Path]] = []
    for name in classes:
        files = sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in endings)
        if not files:
            raise UserError(f"the class folder {folder / name} has no files ({', '.join(endings)}); fill or remove it")

        items += [Item(str(path), path) for path in files]

    return items, classes


def check_image(path: Path) -> None:
    """Decodes an image file.

    Raises:
        OSError, ValueError, SyntaxError: it cannot be decoded.
    """
    from PIL import Image

    with Image.open(regular(path)) as image:
        image.load()


def split_paths(root: Path, ending: str = "") -> dict[str, Path]:
    """The parts of a local data set by the names of ``SPLIT_NAMES``: sub-folders, or files with that ending.

    A data set that is a single folder of another layout, or a single file, is its own training part.

    Raises:
        FileNotFoundError: ``root`` does not exist.
    """
    if not root.exists():
        raise FileNotFoundError(
            f"task.data is {str(root)!r}: no such file or folder here{nearest_path(root)}; a hub id is NAME or ORG/NAME"
        )

    found = {}
    for split, names in SPLIT_NAMES.items():
        paths = [root / f"{name}{ending}" for name in names]
        existing = [path for path in paths if path.exists()]
        if existing:
            found[split] = existing[0]

    if "train" in found:
        return found

    return {"train": root}


def split_files(root: Path, endings: Sequence[str]) -> dict[str, Path]:
    """The files of a local data set by the names of ``SPLIT_NAMES``, with the first of the endings that is there.

    Raises:
        FileNotFoundError: ``root`` does not exist.
        ValueError: it is a folder without a training file, or a file with another ending.
    """
    for ending in endings:
        paths = split_paths(root, ending)
        if paths["train"].is_file() and paths["train"].suffix == ending:
            return paths

    kinds = ", ".join(endings)
    raise UserError(
        f"task.data is {str(root)!r}: expected a file ({kinds}), or a folder with train{endings[0]}, or the like"
    )


def is_local(where: str) -> bool:
    """Whether a data set or model is a path of this machine: it exists, or is written as a path."""
    files = (".json", ".jsonl", ".csv", ".tsv")
    return Path(where).exists() or where.startswith((".", "/", "~")) or Path(where).suffix in files


def load_pretrained(kind: Any, where: str, **options: Any) -> Any:
    """``kind.from_pretrained(where)``, of a local folder or hub id.

    Raises:
        FileNotFoundError: there is nothing of this kind; says why.
    """
    try:
        # Only a download shows a progress bar.
        with hidden_bars() if Path(where).is_dir() else nullcontext():
            return kind.from_pretrained(where, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        remedy = ""

        if Path(where).is_dir() and any(word in kind.__name__ for word in ("Processor", "Extractor", "Tokenizer")):
            remedy = (
                f'; the folder needs the files that {kind.__name__}.from_pretrained("ORIGINAL MODEL")'
                f'.save_pretrained("{where}") writes'
            )

        if not Path(where).exists():
            remedy = "; it is not a local folder, and an id ORG/NAME needs access to the hub"

        raise FileNotFoundError(f"task.model is {where!r}: {kind.__name__} cannot load it ({reason}){remedy}") from None


def head_options(labels: Sequence[str]) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that give a model a head for these classes."""
    pairs = {"id2label": dict(enumerate(labels)), "label2id": {name: index for index, name in enumerate(labels)}}
    return {**pairs, "ignore_mismatched_sizes": True}


def check_share(share: float) -> None:
    """Checks ``task.held_out``.

    Raises:
        ValueError: it is no share that leaves something to train on.
    """
    if not 0 < share < 0.5:
        raise UserError(f"task.held_out is {share}, expected a share between 0 and 0.5")


def check_labels(labels: Sequence[str] | None) -> None:
    """Checks names of classes that a config gives.

    Raises:
        ValueError: there are not two or more, or two are the same.
    """
    if labels is not None and not 1 < len(labels) == len(set(labels)):
        raise UserError(f"task.labels is {labels}, expected two or more different names")


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
        parts = {split: _undecoded(part) for split, part in hub(where, name).items()}
        return {key: [Item(f"{where}: {key}[{at}]", row) for at, row in enumerate(part)] for key, part in parts.items()}

    files = split_files(Path(where), endings)

    return {
        split: table_rows(path, columns) if path.suffix in (".csv", ".tsv") else json_entries(path)
        for split, path in files.items()
    }


def _undecoded(part: Any) -> Any:
    """A data set of the hub whose images are the bytes of their files, not pixels."""
    from datasets import Image

    for column, kind in part.features.items():
        if isinstance(kind, Image):
            part = part.cast_column(column, Image(decode=False))
    return part


def drawn(rows: Sequence[Value], size: int | None, seed: int, what: str) -> list[Value]:
    """The rows to train on: ``size`` of them, drawn by the seed; None takes all.

    Args:
        rows: To draw from.
        size: What ``task.train_size`` says.
        seed: Of the draw.
        what: The rows are, in the plural.

    Raises:
        UserError: There are fewer rows than that, or none is asked for.
    """
    if size is None:
        return list(rows)
    if not 1 <= size <= len(rows):
        raise UserError(f"task.train_size is {size}, expected 1 to {len(rows)}, the number of training {what}")

    return random.Random(seed).sample(rows, size)


def with_held_out(parts: dict[str, list[Value]], share: float = HELD_OUT) -> dict[str, list[Value]]:
    """Train, validation and test; what is missing is a share of the training part, always the same items.

    Raises:
        ValueError: there are too few items to hold some out.
    """
    parts = dict(parts)
    for split in ("validation", "test"):
        if parts.get(split):
            continue

        train = list(parts["train"])
        count = max(1, round(share * len(train)))
        if count >= len(train):
            raise UserError(f"task.data has no {split} part, and its {len(train)} items are too few to hold some out")

        random.Random(SPLIT_SEED).shuffle(train)
        parts[split], parts["train"] = train[:count], train[count:]

    return {split: parts[split] for split in SPLIT_NAMES}
