"""Image classification: any such model of transformers, on folders of images or a data set of the hub.

The model gets a new head for the classes of the data; list it in ``adapter.modules_to_save``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

from flora.data.files import Item
from flora.data.hub import hub, hub_column
from flora.data.images import ImageTask, Prepared, Source, crop_and_mirror, hub_images, name_of, read_image
from flora.data.pretrained import head_options, load_pretrained
from flora.data.records import sift
from flora.data.results import accuracy, class_names, ranked
from flora.data.samples import locate
from flora.data.shown import Findings, Shown, classified
from flora.data.splits import IMAGES, class_folders, is_local, split_paths, with_held_out
from flora.errors import UserError
from flora.recipes import Data, Request, Tested

METRIC = "accuracy"
# The least part of each side that a random crop keeps.
CROP = 0.7


@dataclass
class Task(ImageTask):
    """Settings of the data and the base model.

    Args:
        data: a folder, or the id of a hub data set. The folder has a sub-folder of images for each class, or first
            train, validation and test with these in them; what is missing is held out of the training images.
        model: a folder or hub id of a model for image classification, with its image processor.
        image_column, label_column: The columns of a hub data set.
        labels: The names of the classes in the order of the model's outputs; null takes those of the training data.
        augment: Whether training images are cropped and mirrored at random.
        bad_data: "error" stops at an image that cannot be used; "skip" leaves such images out and says how many.
    """

    label_column: str = "label"


@dataclass(frozen=True)
class Example:
    """An image and the name of its class."""

    image: Source
    name: str


def read_parts(task: Task) -> tuple[dict[str, list[Item[Example]]], list[str]]:
    """The examples of each part, not looked at yet, and the classes of the training part.

    Raises:
        FileNotFoundError, ValueError: there is no such data, or not in this layout.
    """
    where = locate(task.data)
    parts: dict[str, list[Item[Example]]] = {}
    names: dict[str, list[str]] = {}

    if is_local(where):
        for split, folder in split_paths(Path(where)).items():
            files, names[split] = class_folders(folder)
            parts[split] = [
                Item(file.place, Example(file.value, file.value.relative_to(folder).parts[0])) for file in files
            ]
    else:
        for split, dataset in hub(where).items():
            images, column = hub_images(dataset, task.image_column), hub_column(dataset, task.label_column)
            given = column[task.label_column]
            names[split] = getattr(column.features[task.label_column], "names", None) or []
            labels = [_class_name(value, names[split]) for value in given]
            names[split] = names[split] or sorted(set(labels))
            parts[split] = [
                Item(f"{where} ({split}), row {row}", Example(image, label))
                for row, (image, label) in enumerate(zip(images, labels, strict=True))
            ]

    return parts, names["train"]


def _class_name(label: int | str | None, names: list[str]) -> str:
    """The class that a label of the hub means; what is no class stays as it is, to be named in a message."""
    if isinstance(label, int) and 0 <= label < len(names):
        return names[label]
    return str(label)


def prepare(example: Example, draw: Random | None, labels: list[str], processor: Any) -> dict[str, Tensor]:
    """The image as the model takes it, where there are draws cropped and mirrored first."""
    image = read_image(example.image).convert("RGB")

    if draw is not None:
        image = crop_and_mirror([image], CROP, draw)[0]

    pixels = processor(image, return_tensors="pt")["pixel_values"][0]

    return {"pixel_values": pixels, "labels": torch.tensor(labels.index(example.name))}


def load_data(task: Task, seed: int) -> Data:
    """The images; the seed draws the augmentation.

    Raises:
        FileNotFoundError, ValueError: there is no such data, an image cannot be decoded, or a class is not one of the
            training data.
    """
    parts, found = read_parts(task)
    labels = task.labels or found

    def check(example: Example) -> None:
        if example.name not in labels:
            raise UserError(
                f"its class {example.name!r} is not one of the {len(labels)} known: {', '.join(labels[:5])} ..."
            )
        read_image(example.image)

    good = {name: sift(items, check, bad=task.bad_data, what=f"{name} images") for name, items in parts.items()}
    good = with_held_out(good)
    processor = load_pretrained(AutoImageProcessor, locate(task.model), backend="pil")
    ready = partial(prepare, labels=labels, processor=processor)
    train = Prepared(good["train"], ready, seed if task.augment else None)
    validation, test = (Prepared(good[name], ready) for name in ("validation", "test"))

    return Data(train, validation, test, processor=processor, labels=labels)


def load_base(task: Task) -> PreTrainedModel:
    """The model with a head for the classes of the data."""
    labels = task.labels or read_parts(task)[1]
    model = load_pretrained(AutoModelForImageClassification, locate(task.model), **head_options(labels))
    return cast("PreTrainedModel", model)


INPUT_FILES = IMAGES


def predictor(task: Task, model: Any, folder: Path) -> Callable[[Request], dict[str, Any]]:
    """Gives the class of an image and its score."""
    processor = load_pretrained(AutoImageProcessor, str(folder), backend="pil")
    names = class_names(model.config)

    def answer(request: Request) -> dict[str, Any]:
        image = read_image(Path(request.given)).convert("RGB")
        inputs = processor(image, return_tensors="pt").to(model.device)
        return ranked(model(pixel_values=inputs["pixel_values"]).logits[0], names)

    return answer


def findings(tested: Tested) -> Findings:
    """Which classes are taken for which, and the worst errors."""
    examples = cast("Prepared", tested.data.test).examples

    def show(index: int) -> Shown:
        source = examples[index].image
        return Shown(pictures=[(name_of(source), read_image(source))])

    return classified(tested.predictions, tested.labels, cast("list[str]", tested.data.labels), show)


compute_metrics = accuracy
