"""Object detection: RT-DETR, DETR and other such models of transformers, on data in COCO's format."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from random import Random
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoImageProcessor, AutoModelForObjectDetection, EvalPrediction, PreTrainedModel, Trainer

from flora.data.coco import Example, Part, examples, find_files, read_coco, read_rows
from flora.data.hub import hub
from flora.data.images import ImageTask, Prepared, name_of, read_image
from flora.data.pretrained import head_options, load_pretrained
from flora.data.results import class_names, with_boxes
from flora.data.samples import locate
from flora.data.shown import FEW, Findings, Shown
from flora.data.splits import IMAGES, is_local, with_held_out
from flora.recipes import Data, Request, Tested

METRIC = "map"
# Fills the tensors of boxes of a batch, whose images have different numbers of boxes.
PADDING = -100
# The boxes of an image that COCO counts.
DETECTIONS = 100


@dataclass
class Task(ImageTask):
    """Settings of the data and the base model.

    Args:
        data: a folder, or the id of a hub data set. The folder lies as COCO does, ``annotations/instances_train.json``
            for the images in ``train`` and so on, or has train, validation and test, each with images and one JSON
            file; what is missing is held out of the training images.
        model: a folder or hub id of a model for object detection, with its image processor.
        image_column, objects_column: of a hub data set; objects have ``bbox`` (left, top, width, height), ``category``.
        labels: the names of the classes in the order of the model's outputs; null: the categories of the training data.
        augment: whether training images are mirrored at random.
        bad_data: an image or annotation that cannot be used is an "error", or is left out: "skip".
    """

    objects_column: str = "objects"


def read_parts(task: Task) -> dict[str, Part]:
    """The parts of the data.

    Raises:
        FileNotFoundError, ValueError: there is no such data, or not in this layout; a JSON file cannot be read.
    """
    where = locate(task.data)
    if is_local(where):
        return {split: read_coco(*paths) for split, paths in find_files(Path(where)).items()}
    columns = (task.image_column, task.objects_column)
    return {split: read_rows(f"{where} ({split})", rows, *columns) for split, rows in hub(where).items()}


def prepare(example: Example, draw: Random | None) -> dict[str, Any]:
    """The image and its objects, in half of the draws mirrored."""
    image, objects = read_image(example.image).convert("RGB"), example.objects
    if draw is not None and draw.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        boxes = [[image.width - left - width, top, width, height] for left, top, width, height in map(_box, objects)]
        objects = [one | {"bbox": box} for one, box in zip(objects, boxes, strict=True)]
    return {"pixel_values": image, "labels": objects}


def _box(one: dict[str, Any]) -> list[float]:
    return cast("list[float]", one["bbox"])


def collate(samples: list[dict[str, Any]], processor: Any) -> dict[str, Any]:
    """A batch; its labels have under ``truth`` what COCO's evaluation needs: (objects, 6), box, category and crowd."""
    images, objects = ([sample[key] for sample in samples] for key in ("pixel_values", "labels"))
    given = [{"image_id": at, "annotations": rows} for at, rows in enumerate(objects)]
    batch = dict(processor(images=images, annotations=given, return_tensors="pt"))
    truth = [[[*_box(one), one["category_id"], one["iscrowd"]] for one in rows] for rows in objects]
    rows = [torch.tensor(one, dtype=torch.float32).reshape(-1, 6) for one in truth]
    return batch | {"labels": [{**label, "truth": row} for label, row in zip(batch["labels"], rows, strict=True)]}


def load_data(task: Task, seed: int) -> Data:
    """The images with their objects; the seed draws the augmentation.

    Raises:
        FileNotFoundError, ValueError: there is no such data, or an image, annotation or file of it cannot be used.
    """
    parts = read_parts(task)
    labels = task.labels or list(parts["train"].categories.values())
    good = with_held_out({name: examples(part, labels, task.bad_data, name) for name, part in parts.items()})
    processor = load_pretrained(AutoImageProcessor, locate(task.model), backend="pil")
    train = Prepared(good["train"], prepare, seed if task.augment else None)
    validation, test = (Prepared(good[name], prepare) for name in ("validation", "test"))

    return Data(train, validation, test, partial(collate, processor=processor), processor, labels)


def load_base(task: Task) -> PreTrainedModel:
    """The model with a head for the classes of the data."""
    labels = task.labels or list(read_parts(task)["train"].categories.values())
    options = head_options(labels)
    return cast("PreTrainedModel", load_pretrained(AutoModelForObjectDetection, locate(task.model), **options))


class Detection(Trainer):
    """Evaluates on boxes in pixels of the images as they are stored."""

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """The loss; the boxes found, (images, boxes, 6): box, category and score; and the true ones, with crowd."""
        inputs = self._prepare_inputs(inputs)

        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)

        sizes = torch.stack([label["orig_size"] for label in inputs["labels"]])
        processor = cast("Any", self.processing_class)
        found = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)
        rows = []
        for one in found:
            best = one["scores"].argsort(descending=True, stable=True)[:DETECTIONS]
            corners, rest = one["boxes"][best], torch.stack([one["labels"], one["scores"]], -1)[best]
            rows.append(torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2], rest], -1).float())

        truth = [label["truth"] for label in inputs["labels"]]

        return loss.detach(), *(pad_sequence(boxes, batch_first=True, padding_value=PADDING) for boxes in (rows, truth))


TRAINER = Detection


INPUT_FILES = IMAGES
# Pixels of the longer side of an image with boxes on the page of a run.
DRAWN = 480
# The least score of a box that a prediction lists.
CONFIDENT = 0.3


def predictor(task: Task, model: Any, folder: Path) -> Callable[[Request], dict[str, Any]]:
    """Lists the boxes in an image with class and score, and writes the image with the boxes drawn."""
    processor = load_pretrained(AutoImageProcessor, str(folder), backend="pil")
    names = class_names(model.config)

    def answer(request: Request) -> dict[str, Any]:
        image = read_image(Path(request.given)).convert("RGB")
        inputs = processor(image, return_tensors="pt").to(model.device)
        sizes = [(image.height, image.width)]
        found = processor.post_process_object_detection(model(**inputs), threshold=CONFIDENT, target_sizes=sizes)[0]
        boxes = [
            {
                "class": names[int(label)],
                "score": round(float(score), 4),
                "box": [round(side, 1) for side in corners.tolist()],
            }
            for label, score, corners in zip(found["labels"], found["scores"], found["boxes"], strict=True)
        ]
        path = request.file(".png")
        labelled = [{**box, "label": f"{box['class']} {box['score']:.2f}"} for box in boxes]
        with_boxes(image, labelled).save(path)

        return {"boxes": boxes, "file": str(path)}

    return answer


def findings(tested: Tested) -> Findings:
    """The first images with the boxes found, beside those that are true."""
    names, images = cast("list[str]", tested.data.labels), cast("Prepared", tested.data.test).examples[:FEW]
    examples = []
    for number, one in enumerate(images):
        picture = read_image(one.image).convert("RGB")
        width = picture.width
        picture.thumbnail((DRAWN, DRAWN))
        scale = picture.width / width
        found = [row for row in tested.predictions[number] if row[4] != PADDING and row[5] >= CONFIDENT]
        true = [row for row in tested.labels[number] if row[4] != PADDING]
        boxes = [
            [_drawn(row, names, scale, f" {row[5]:.2f}") for row in found],
            [_drawn(row, names, scale) for row in true],
        ]
        pictures = [("found", with_boxes(picture, boxes[0])), ("true", with_boxes(picture, boxes[1], "lime"))]
        examples.append(Shown(name_of(one.image), pictures))

    heading = f"The first {len(examples)} images of the test set, with boxes of a score of {CONFIDENT} and above"

    return Findings(heading, examples, wide=True)


def _drawn(row: np.ndarray, names: list[str], scale: float, score: str = "") -> dict[str, Any]:
    """A box as it is drawn, of one that lies as COCO's do: (left, top, width, height, category, ...)."""
    left, top, width, height = (float(side) * scale for side in row[:4])
    return {"box": [left, top, left + width, top + height], "label": f"{names[int(row[4])]}{score}"}


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """COCO's average precision over overlaps of 0.5 to 0.95, and at 0.5 and 0.75."""
    found, truth = (_numbered(cast("np.ndarray", rows)) for rows in (prediction.predictions, prediction.label_ids))
    coco, names = COCO(), ("bbox", "area", "image_id", "category_id", "iscrowd")
    rows = [([*row[1:5]], row[3] * row[4], *map(int, (row[0], row[5], row[6]))) for row in truth]
    coco.dataset = {
        "images": [{"id": at} for at in range(len(prediction.predictions))],
        "categories": [{"id": int(one)} for one in np.unique(truth[:, 5])],
        "annotations": [{"id": at, **dict(zip(names, row, strict=True))} for at, row in enumerate(rows, start=1)],
    }

    if not len(found):
        return dict.fromkeys(("map", "map_50", "map_75"), 0.0)

    # It prints its table.
    with redirect_stdout(StringIO()):
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(found[:, [0, 1, 2, 3, 4, 6, 5]]), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()

    return dict(zip(("map", "map_50", "map_75"), map(float, evaluation.stats), strict=False))


def _numbered(rows: np.ndarray) -> np.ndarray:
    """The rows of all images without the padding, the number of its image before each."""
    image, at = np.nonzero(rows[..., 4] != PADDING)
    return np.concatenate([image[:, None], rows[image, at]], 1)
