"""What a trained model found, as plain values and pictures: classes with scores, boxes, label maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from colorsys import hsv_to_rgb
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from transformers import EvalPrediction

# How many classes a result lists.
SHOWN = 5


def ranked(logits: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """The most probable class with its probability, and those that follow.

    Args:
        logits: Of one example, shape (classes,).
        names: Of the classes.
    """
    scores = torch.softmax(logits.float().flatten(), 0)
    best = scores.argsort(descending=True, stable=True)[:SHOWN].tolist()

    return {
        "class": names[best[0]],
        "score": round(float(scores[best[0]]), 4),
        "scores": {names[index]: round(float(scores[index]), 4) for index in best},
    }


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """The share of the right classes, as ``compute_metrics`` of a recipe; the predictions are logits."""
    found = np.asarray(prediction.predictions).argmax(-1)
    return {"accuracy": float((found == prediction.label_ids).mean())}


def class_names(config: Any) -> list[str]:
    """The names of a model's classes, in the order of its outputs."""
    return [str(config.id2label[index]) for index in range(len(config.id2label))]


def colours(count: int) -> list[int]:
    """A palette of so many colours for an image of mode P; the first is black, neighbours differ."""
    palette = [0, 0, 0]
    for index in range(1, count):
        # The golden ratio puts each hue far from those just before it.
        red, green, blue = hsv_to_rgb(index * 0.618034 % 1, 0.8, 0.9)
        palette += [round(255 * red), round(255 * green), round(255 * blue)]
    return palette


def hex_colours(count: int) -> list[str]:
    """The same palette as a page writes colours.

    Examples:
        >>> hex_colours(2)[0]
        '#000000'
    """
    palette = colours(count)
    return ["#" + bytes(palette[3 * index : 3 * index + 3]).hex() for index in range(count)]


def label_map(classes: np.ndarray) -> Image.Image:
    """A picture whose pixel values are the numbers of the classes, shown in colours.

    Args:
        classes: Numbers from 0 to 255, shape (height, width).
    """
    picture = Image.fromarray(classes.astype(np.uint8), "P")
    picture.putpalette(colours(256))
    return picture


def with_boxes(image: Image.Image, boxes: Sequence[Mapping[str, Any]], colour: str = "red") -> Image.Image:
    """The image with boxes drawn: each has ``box`` (left, top, right, bottom) and ``label``."""
    drawn = image.convert("RGB")
    pen = ImageDraw.Draw(drawn)
    for found in boxes:
        left, top, *_ = found["box"]
        pen.rectangle(found["box"], outline=colour, width=2)
        pen.text((left + 3, top + 2), found["label"], fill=colour)

    return drawn
