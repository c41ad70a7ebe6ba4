"""Semantic segmentation: UperNet and other such models of transformers, on images with label maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
)

from flora.data.files import Item
from flora.data.hub import hub
from flora.data.images import ImageTask, Prepared, Source, crop_and_mirror, hub_images, name_of, read_image
from flora.data.pretrained import head_options, load_pretrained
from flora.data.records import sift
from flora.data.results import class_names as model_classes
from flora.data.results import colours, hex_colours, label_map
from flora.data.samples import locate
from flora.data.shown import FEW, Findings, Shown, overlaid
from flora.data.splits import IMAGES, is_local, split_paths, with_held_out
from flora.errors import UserError
from flora.recipes import Data, Request, Tested

METRIC = "miou"
# The label of pixels that neither the loss nor a metric looks at.
IGNORED = 255
# The least part of each side that a random crop keeps.
CROP = 0.5


@dataclass
class Task(ImageTask):
    """Settings of the data and the base model.

    Args:
        data: a folder, or the id of a hub data set. The folder has ``images`` and ``annotations`` (PNG label maps named
            as their images), each with training, validation and test, or files alone; what is missing is held out.
        model: a folder or hub id of a model for semantic segmentation, with its image processor.
        image_column, label_column: of a hub data set.
        labels: the names of the classes; null: those that the model knows already.
        reduce_labels: whether label 0 is what is no class and label 1 the first class, as in ADE20K.
        augment: whether training images are cropped and mirrored at random.
        bad_data: an image that cannot be used is an "error", or is left out: "skip".
    """

    label_column: str = "label"
    reduce_labels: bool = False


@dataclass(frozen=True)
class Example:
    """An image and its label map."""

    image: Source
    labels: Source


def class_names(task: Task) -> list[str]:
    """The names of the classes, in the order of the model's outputs.

    Raises:
        UserError: there are more than a label map with one byte for each pixel can tell apart.
    """
    if task.labels is not None:
        names = task.labels
    else:
        names = list(load_pretrained(AutoConfig, locate(task.model)).id2label.values())

    most = IGNORED - task.reduce_labels
    if len(names) > most:
        raise UserError(
            f"there are {len(names)} classes, expected at most {most}: a label map has one byte for each pixel, and "
            f"{IGNORED} is the label of pixels that do not count"
        )

    return names


def read_parts(task: Task) -> dict[str, list[Item[Example]]]:
    """The examples of each part, not looked at yet.

    Raises:
        FileNotFoundError, ValueError: there is no such data, or not in this layout.
    """
    where = locate(task.data)
    if is_local(where):
        return local_parts(Path(where))

    found = {}
    for split, dataset in hub(where).items():
        pairs = zip(hub_images(dataset, task.image_column), hub_images(dataset, task.label_column), strict=True)
        found[split] = [Item(f"{where} ({split}), row {row}", Example(*pair)) for row, pair in enumerate(pairs)]

    return found


def local_parts(root: Path) -> dict[str, list[Item[Example]]]:
    """The pairs of a folder laid out as ADE20K is."""
    if root.is_dir() and not (root / "images").is_dir():
        raise UserError(
            f"{root} has no folder `images`; put the images into {root / 'images'}, and a PNG label map of the same "
            f"name for each into {root / 'annotations'}"
        )

    found = {}
    for split, folder in split_paths(root / "images").items():
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGES)
        if not paths:
            raise UserError(f"{folder} has no images ({', '.join(IMAGES)})")

        maps = [(root / "annotations" / path.relative_to(root / "images")).with_suffix(".png") for path in paths]
        found[split] = [Item(str(path), Example(path, labels)) for path, labels in zip(paths, maps, strict=True)]

    return found


def check_example(example: Example, classes: int, reduce: bool) -> None:
    """Decodes both files.

    Raises:
        OSError, ValueError, SyntaxError: a file is missing or corrupt, or the label map does not fit.
    """
    image, labels = read_image(example.image), read_image(example.labels)
    if image.size != labels.size:
        raise UserError(f"the image has {image.size} pixels (width, height), its label map {labels.size}")

    values = np.asarray(labels)
    if values.ndim != 2:
        raise UserError(f"its label map has {values.shape[2]} channels, expected one with the number of each class")

    largest = max((int(value) for value in np.unique(values) if value != IGNORED), default=0)
    if largest >= classes + reduce:
        raise UserError(f"label {largest} is out of range: there are {classes} classes, reduce_labels is {reduce}")


def prepare(example: Example, draw: Random | None, processor: Any) -> dict[str, Tensor]:
    """Image and label map as the model takes them, where there are draws cropped and mirrored first."""
    pair = [read_image(example.image).convert("RGB"), read_image(example.labels)]

    image, labels = pair if draw is None else crop_and_mirror(pair, CROP, draw)

    batch = processor(image, segmentation_maps=np.array(labels), return_tensors="pt")

    return {name: batch[name][0] for name in ("pixel_values", "labels")}


def load_data(task: Task, seed: int) -> Data:
    """The images; the seed draws the augmentation.

    Raises:
        FileNotFoundError, ValueError: there is no such data, or a file of it cannot be used.
    """
    names = class_names(task)
    check = partial(check_example, classes=len(names), reduce=task.reduce_labels)
    parts = read_parts(task).items()
    good = with_held_out({name: sift(items, check, bad=task.bad_data, what=f"{name} images") for name, items in parts})
    options = {"backend": "pil", "do_reduce_labels": task.reduce_labels}
    processor = load_pretrained(AutoImageProcessor, locate(task.model), **options)
    ready = partial(prepare, processor=processor)
    train = Prepared(good["train"], ready, seed if task.augment else None)
    validation, test = (Prepared(good[name], ready) for name in ("validation", "test"))

    return Data(train, validation, test, processor=processor, labels=names)


def load_base(task: Task) -> PreTrainedModel:
    """The model; where its classes are not those of the task, with a new last layer for them."""
    options = head_options(class_names(task))
    return cast("PreTrainedModel", load_pretrained(AutoModelForSemanticSegmentation, locate(task.model), **options))


class Segmentation(Trainer):
    """Keeps, of an evaluation, three counts for each image and class instead of a label for each pixel."""

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """The loss, and of each image and class how many pixels are right and found, and how many there are."""
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        # The argument is prediction_loss_only.
        if logits is None or labels is None:
            return loss, None, None
        logits = torch.nn.functional.interpolate(logits, size=labels.shape[-2:], mode="bilinear")
        return loss, *pixel_counts(logits.argmax(1), labels, logits.shape[1]).split([2, 1], -1)


TRAINER = Segmentation


INPUT_FILES = IMAGES


def predictor(task: Task, model: Any, folder: Path) -> Callable[[Request], dict[str, Any]]:
    """Writes the label map of an image as a PNG, with the numbers of the training maps, and lists the classes."""
    processor = load_pretrained(AutoImageProcessor, str(folder), backend="pil")
    names = model_classes(model.config)

    def answer(request: Request) -> dict[str, Any]:
        found = classes_of(read_image(Path(request.given)).convert("RGB"), model, processor)
        path = request.file(".png")
        label_map(found + task.reduce_labels).save(path)
        shares = np.bincount(found.ravel(), minlength=len(names)) / found.size
        seen = {names[index]: round(float(shares[index]), 4) for index in np.argsort(-shares) if shares[index] > 0}

        return {"file": str(path), "classes": seen}

    return answer


def classes_of(image: Image.Image, model: Any, processor: Any) -> np.ndarray:
    """The class that the model finds for each pixel of an image, shape (height, width)."""
    pixels = processor(image, return_tensors="pt")["pixel_values"].to(model.device)
    sizes = [(image.height, image.width)]
    found = processor.post_process_semantic_segmentation(model(pixel_values=pixels), target_sizes=sizes)[0]
    return cast("np.ndarray", found.cpu().numpy())


def pixel_counts(found: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The pixels of each image and class that are right, found and true: (images, classes, 3), of (images, h, w)."""
    counts = []
    for one, true in zip(found, labels, strict=True):
        one, true = one[true != IGNORED], true[true != IGNORED]
        counts.append([torch.bincount(values, minlength=classes) for values in (true[one == true], one, true)])
    return torch.stack([torch.stack(three, -1) for three in counts])


def findings(tested: Tested) -> Findings:
    """The overlap of each class, and the images that the model does worst on."""
    names = cast("list[str]", tested.data.labels)
    # shape: (images, classes)
    right, found = np.moveaxis(tested.predictions, -1, 0)
    union = found + tested.labels[..., 0] - right
    whole = {
        name: float(right[:, index].sum() / union[:, index].sum())
        for index, name in enumerate(names)
        if union[:, index].any()
    }

    # The mean over the classes that occur in an image.
    overlaps = (right / np.maximum(union, 1)).sum(1) / np.maximum((union > 0).sum(1), 1)
    worst = np.argsort(overlaps)[:FEW].tolist()
    given = cast("Prepared", tested.data.test).examples
    examples = [] if tested.model is None else [_shown(tested, given[index], names) for index in worst]
    heading = f"The {len(examples)} of {len(given):,} test images with the least overlap"

    return Findings(
        heading,
        examples,
        scores=whole,
        score="intersection over union",
        colours=dict(zip(names, hex_colours(len(names) + 1)[1:], strict=True)),
        wide=True,
    )


def _shown(tested: Tested, one: Example, names: list[str]) -> Shown:
    """An image, with the classes found and the true ones over it; pixels that no metric looks at stay as they are."""
    image = read_image(one.image).convert("RGB")
    found = classes_of(image, tested.model, tested.data.processor)
    true = np.asarray(read_image(one.labels)).astype(int) - tested.task.reduce_labels
    true = np.where((true < 0) | (true >= len(names)), -1, true)
    palette = colours(len(names) + 1)

    pictures = [
        ("image", image),
        ("found", overlaid(image, np.where(true < 0, -1, found) + 1, palette)),
        ("true", overlaid(image, true + 1, palette)),
    ]

    return Shown(name_of(one.image), pictures)


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Mean intersection over union and mean accuracy of the classes that occur, and the accuracy of all pixels."""
    right, found = cast("np.ndarray", prediction.predictions).sum(0).T
    true = cast("np.ndarray", prediction.label_ids).sum(0)[:, 0]
    union = found + true - right

    return {
        "miou": float((right[union > 0] / union[union > 0]).mean()),
        "macc": float((right[true > 0] / true[true > 0]).mean()),
        "pixel_accuracy": float(right.sum() / true.sum()),
    }
