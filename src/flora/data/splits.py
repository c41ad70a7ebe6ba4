"""The parts of a data set: how folders and files call them, and what is held out where one is missing."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from flora.data.files import Item
from flora.errors import UserError, nearest_path

Value = TypeVar("Value")
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


def is_local(where: str) -> bool:
    """Whether a data set or model is a path of this machine: it exists, or is written as a path."""
    files = (".json", ".jsonl", ".csv", ".tsv")
    return Path(where).exists() or where.startswith((".", "/", "~")) or Path(where).suffix in files


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
