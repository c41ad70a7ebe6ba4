"""Images of a data set: files of a folder, or in the rows of a hub data set, decoded on demand."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from flora.data.files import Item, regular
from flora.data.hub import HubFile, hub_files
from flora.data.records import Bad
from flora.data.splits import check_labels

Source = Path | HubFile


@dataclass
class ImageTask:
    """Settings that every recipe on labelled images has.

    Args:
        data: A folder, or the id of a hub data set.
        model: A folder or hub id of a model for the task, with its image processor.
        image_column: The column of a hub data set that holds the images.
        labels: The names of the classes, in the order of the model's outputs.
        augment: Whether training images are changed at random.
        bad_data: "error" stops at an image that cannot be used; "skip" leaves such images out and says how many.
    """

    data: str
    model: str
    image_column: str = "image"
    labels: list[str] | None = None
    augment: bool = True
    bad_data: Bad = "error"

    def __post_init__(self) -> None:
        check_labels(self.labels)


def hub_images(dataset: Any, name: str) -> list[HubFile]:
    """The images in a column of a part of a hub data set.

    Raises:
        ValueError: there is no such column.
    """
    from datasets import Image as Feature

    return hub_files(dataset, name, Feature(decode=False))


def read_image(source: Source) -> Image.Image:
    """Decodes an image.

    Raises:
        OSError, ValueError, SyntaxError: it cannot be decoded.
    """
    if isinstance(source, Path):
        regular(source)

    with source.open("rb") as stream, Image.open(stream) as image:
        image.load()
        copy: Image.Image = image.copy()
    return copy


def name_of(source: Source) -> str:
    """What an image is called beside others: its file, or its row."""
    if isinstance(source, Path):
        return source.name
    return f"row {source.row}"


def crop_and_mirror(images: Sequence[Image.Image], least: float, draw: random.Random) -> list[Image.Image]:
    """The same random crop of images of one size, in half of the cases mirrored.

    Args:
        images: of which the first says the size.
        least: the part of each side that a crop keeps at least.
        draw: where the random numbers come from.
    """
    width, height = images[0].size
    cropped = [max(1, round(side * draw.uniform(least, 1))) for side in (width, height)]
    left, top = draw.randint(0, width - cropped[0]), draw.randint(0, height - cropped[1])
    images = [image.crop((left, top, left + cropped[0], top + cropped[1])) for image in images]

    if draw.random() < 0.5:
        images = [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in images]

    return list(images)


Prepare = Callable[[Any, "random.Random | None"], dict[str, Any]]


class Prepared(Dataset[dict[str, Any]]):
    """Examples, each prepared for the model on demand.

    What is random about a sample depends on seed, epoch and index alone: a run that is resumed draws what the whole
    one would have drawn, with any number of workers and processes.

    Args:
        items: of the examples.
        prepare: makes a sample of an example and, where there is a seed, a source of random numbers.
        seed: of the random numbers; None for none.
    """

    def __init__(self, items: Sequence[Item[Any]], prepare: Prepare, seed: int | None = None) -> None:
        self.examples = [item.value for item in items]
        self.prepare, self.seed, self.epoch = prepare, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        draw = None if self.seed is None else random.Random(f"{self.seed} {self.epoch} {index}")
        return self.prepare(self.examples[index], draw)
