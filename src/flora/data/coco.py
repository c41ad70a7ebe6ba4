"""Objects in images, in COCO's format: JSON files beside folders of images, or the rows of a hub data set."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flora.data.files import Item, json_of
from flora.data.hub import hub_column
from flora.data.images import Source, hub_images, read_image
from flora.data.records import Bad, sift
from flora.data.splits import SPLIT_NAMES, split_paths
from flora.errors import UserError

# How many pixels a box may stick out of its image.
SLACK = 2


@dataclass(frozen=True)
class Part:
    """A part of the data as its source has it, not looked at yet: images by id, annotations, names of categories."""

    images: Mapping[Any, Item[Any]]
    annotations: list[Item[dict[str, Any]]]
    categories: dict[int, str]


@dataclass(frozen=True)
class Example:
    """An image and its objects: dicts of ``bbox``, ``category_id`` (an index of the classes), ``area`` and ``iscrowd``.

    A box is left, top, width, height, in pixels.
    """

    image: Source
    objects: list[dict[str, Any]]


def find_files(root: Path) -> dict[str, tuple[Path, Path]]:
    """The JSON file and the folder of the images of each part.

    Raises:
        FileNotFoundError, ValueError: there is no such folder, or a part has not one JSON file.
    """
    found: dict[str, tuple[Path, Path]] = {}
    for path in sorted((root / "annotations").glob("instances_*.json")):
        name = path.stem.removeprefix("instances_")
        folder = next((one for one in (root / name, root / "images" / name) if one.is_dir()), root / "images")
        found |= {split: (path, folder) for split, names in SPLIT_NAMES.items() if re.sub(r"\d", "", name) in names}

    if "train" in found:
        return found

    for split, folder in split_paths(root).items():
        files = sorted(folder.glob("*.json"))
        if len(files) != 1:
            raise UserError(
                f"{folder} has {len(files)} JSON files, expected one with the boxes of its images, in COCO's format; "
                "put it there, or the others elsewhere"
            )

        found[split] = (files[0], folder)

    return found


def read_coco(path: Path, folder: Path) -> Part:
    """A part from a JSON file of COCO's format.

    Raises:
        ValueError: the file is not JSON, or not of this format; names it, with the line.
    """
    try:
        content = json_of(path)
        images = {image["id"]: folder / image["file_name"] for image in content["images"]}
        categories = {category["id"]: category["name"] for category in content["categories"]}
        rows = [Item(f"{path}: annotation {row.get('id', at)}", row) for at, row in enumerate(content["annotations"])]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not in COCO's format: {type(error).__name__} {error}") from None

    return Part({key: Item(str(image), image) for key, image in images.items()}, rows, categories)


def read_rows(place: str, rows: Any, image_column: str, objects_column: str) -> Part:
    """A part of a hub data set, whose objects have ``bbox`` and ``category``.

    Raises:
        ValueError: a column is missing, or the categories have no names.
    """
    images = {at: Item(f"{place}, row {at}", image) for at, image in enumerate(hub_images(rows, image_column))}
    column = hub_column(rows, objects_column)
    names = getattr(getattr(column.features[objects_column]["category"], "feature", None), "names", None)
    if names is None:
        raise UserError(f"{place}: {objects_column}.category has no class names")

    annotations = []
    for at, objects in enumerate(column[objects_column]):
        for box, category in zip(objects["bbox"], objects["category"], strict=True):
            row = {"image_id": at, "bbox": box, "category_id": category}
            annotations.append(Item(f"{place}, row {at}", row))

    return Part(images, annotations, dict(enumerate(names)))


def examples(part: Part, labels: list[str], bad: Bad, what: str) -> list[Item[Example]]:
    """The images of a part, each with its objects.

    Args:
        part: to look at.
        labels: the names of the classes.
        bad: "error", or "skip" for leaving out what cannot be used.
        what: the part is called, in messages.

    Raises:
        ValueError: as :func:`flora.data.records.sift` does.
    """
    sizes: dict[Any, tuple[int, int]] = {}

    def check_image(key: Any) -> None:
        sizes[key] = read_image(part.images[key].value).size

    def check_row(row: dict[str, Any]) -> None:
        check_annotation(row, sizes, part.categories, labels)

    keys = [Item(item.place, key) for key, item in part.images.items()]
    images = sift(keys, check_image, bad=bad, what=f"{what} images")
    rows = sift(part.annotations, check_row, bad=bad, what=f"{what} annotations")
    objects: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for row in (item.value for item in rows):
        one = {"bbox": row["bbox"], "category_id": labels.index(part.categories[row["category_id"]])}
        area, crowd = row["bbox"][2] * row["bbox"][3], row.get("iscrowd", 0)
        objects[row["image_id"]].append(one | {"area": area, "iscrowd": crowd})

    return [Item(item.place, Example(part.images[item.value].value, objects[item.value])) for item in images]


def check_annotation(row: dict[str, Any], sizes: dict[Any, Any], categories: dict[int, str], labels: list[str]) -> None:
    """Checks an annotation.

    Raises:
        ValueError: a key is missing, there is no such image or category, or the box has no size or is outside.
    """
    if missing := [key for key in ("image_id", "category_id", "bbox") if key not in row]:
        raise UserError(f"lacks {', '.join(missing)}")
    if row["image_id"] not in sizes:
        raise UserError(f"there is no image {row['image_id']!r} that can be used")
    if categories.get(row["category_id"]) not in labels:
        raise UserError(f"category {row['category_id']!r} is out of range, not one of {', '.join(labels[:5])} ...")

    box, size = row["bbox"], sizes[row["image_id"]]
    left, top, width, height = box
    if not (all(map(math.isfinite, box)) and width > 0 and height > 0):
        raise UserError(f"the box {box} (left, top, width, height) has no size")
    if min(left, top) < -SLACK or left + width > size[0] + SLACK or top + height > size[1] + SLACK:
        raise UserError(f"the box {box} (left, top, width, height) lies outside its image, which has {size} pixels")
