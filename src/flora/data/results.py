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

READABLE = 320  # pixels of the longer side of a picture on which a label can be read
INK = {"lime": "black"}  # of a label on that colour; white on any other


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
    """The image with boxes drawn: each has ``box`` (left, top, right, bottom) and ``label``.

    A small image is enlarged, so that its labels can be read.
    """
    factor = max(1, READABLE // max(image.size))
    drawn = image.convert("RGB").resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(drawn)
    width = max(2, max(drawn.size) // 250)

    for found in boxes:
        box = [factor * edge for edge in found["box"]]
        pen.rectangle(box, outline=colour, width=width)
        _write_label(pen, drawn, box, found["label"], colour)

    return drawn


def _write_label(pen: ImageDraw.ImageDraw, drawn: Image.Image, box: Sequence[float], label: str, colour: str) -> None:
    """A label on a plate above its box, moved to where it fits into the picture."""
    size = max(10, max(drawn.size) // 40)
    *_, right, bottom = pen.textbbox((2, 1), label, font_size=size)
    left = max(0, min(box[0], drawn.width - right - 2))
    top = max(0, box[1] - bottom - 2)

    pen.rectangle((left, top, left + right + 2, top + bottom + 2), fill=colour)
    pen.text((left + 2, top + 1), label, fill=INK.get(colour, "white"), font_size=size)
