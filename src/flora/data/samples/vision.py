"""Coloured shapes: as images in class folders, with label maps, with boxes; and small untrained models for each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageDraw
from transformers import (
    ConvNextConfig,
    ConvNextImageProcessorPil,
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    PreTrainedModel,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrImageProcessorPil,
    RTDetrResNetConfig,
    SegformerImageProcessorPil,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

SHAPES = {"circle": (220, 90, 60), "square": (60, 200, 90), "triangle": (90, 90, 220)}
NAMES = list(SHAPES)
PARTS = {"train": 48, "validation": 18, "test": 18}
Box = tuple[int, int, int, int]


def background(random: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Noise in one dark colour."""
    tint = random.integers(0, 90, 3)
    return Image.fromarray((tint + random.integers(0, 60, (*size, 3))).astype(np.uint8))


def place(random: np.random.Generator, size: tuple[int, int]) -> Box:
    """A square box inside an image of this (height, width): left, top, right, bottom."""
    side = int(random.integers(min(size) // 3, min(size) // 2 + 1))
    left, top = int(random.integers(0, size[1] - side)), int(random.integers(0, size[0] - side))
    return left, top, left + side, top + side


def draw(image: Image.Image, shape: str, box: Box, fill: Any) -> None:
    """Draws the shape so that it fills the box."""
    pen, (left, top, right, bottom) = ImageDraw.Draw(image), box

    if shape == "circle":
        pen.ellipse(box, fill)
    elif shape == "square":
        pen.rectangle(box, fill)
    else:
        pen.polygon([((left + right) // 2, top), (right, bottom), (left, bottom)], fill)


def colour(random: np.random.Generator, shape: str) -> tuple[int, ...]:
    """Near the shape's own."""
    return tuple(int(value + random.integers(-35, 36)) for value in SHAPES[shape])


def shapes(folder: Path) -> None:
    """``train/circle/0.png`` and so on: one shape an image, the folder of each shape a class."""
    random = np.random.default_rng(0)
    for part, count in PARTS.items():
        for number in range(count):
            shape, size = NAMES[number % len(NAMES)], (int(random.integers(32, 49)), int(random.integers(32, 49)))
            image = background(random, size)
            draw(image, shape, place(random, size), colour(random, shape))
            path = folder / part / shape / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)


def scenes(folder: Path) -> None:
    """``images/training/0.png`` with ``annotations/training/0.png``, as ADE20K lies; label 0 is what is no shape."""
    random = np.random.default_rng(1)
    for part, count in {"training": 32, "validation": 8, "test": 8}.items():
        for kind in ("images", "annotations"):
            (folder / kind / part).mkdir(parents=True)

        for number in range(count):
            size = (int(random.integers(40, 65)), int(random.integers(40, 65)))
            image, labels = background(random, size), Image.new("L", size[::-1], 0)
            for shape in random.permutation(NAMES)[:2]:
                box = place(random, size)
                draw(image, shape, box, colour(random, shape))
                draw(labels, shape, box, NAMES.index(shape) + 1)

            image.save(folder / "images" / part / f"{number}.png")
            labels.save(folder / "annotations" / part / f"{number}.png")


def boxes(folder: Path) -> None:
    """``train/0.png`` with ``annotations/instances_train.json``, as COCO lies; category ids have gaps, as there."""
    random = np.random.default_rng(2)
    categories = [{"id": 1 + 2 * index, "name": shape} for index, shape in enumerate(SHAPES)]
    (folder / "annotations").mkdir()

    for part, count in {"train": 32, "validation": 8, "test": 8}.items():
        (folder / part).mkdir()
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number in range(count):
            size = (int(random.integers(48, 65)), int(random.integers(48, 65)))
            image = background(random, size)
            for category in random.permutation(len(NAMES))[: 1 + number % 2]:
                left, top, right, bottom = box = place(random, size)
                draw(image, NAMES[category], box, colour(random, NAMES[category]))
                sides = (right - left + 1, bottom - top + 1)
                one = {"id": len(annotations) + 1, "image_id": number, "category_id": categories[category]["id"]}
                annotations.append(one | {"bbox": [left, top, *sides], "area": sides[0] * sides[1], "iscrowd": 0})

            image.save(folder / part / f"{number}.png")
            images.append({"id": number, "file_name": f"{number}.png", "height": size[0], "width": size[1]})

        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))


def save(folder: Path, model: PreTrainedModel, processor: Any) -> None:
    """Writes a model with its image processor."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def convnextv2(folder: Path) -> None:
    """An image classifier with the 1,000 classes of ImageNet in small: 7."""
    torch.manual_seed(0)
    config = ConvNextV2Config(hidden_sizes=[16, 32], depths=[1, 1], num_stages=2, patch_size=4, image_size=32)
    config.num_labels = 7
    save(folder, ConvNextV2ForImageClassification(config), ConvNextImageProcessorPil(size={"shortest_edge": 32}))


def upernet(folder: Path) -> None:
    """UperNet on a ConvNeXt, for the shapes of ``scenes``."""
    torch.manual_seed(0)
    stages = ["stage1", "stage2", "stage3", "stage4"]
    # Whose annotations lack out_features.
    kind = cast("Any", ConvNextConfig)
    backbone = kind(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], out_features=stages)
    config = UperNetConfig(
        backbone_config=backbone, hidden_size=16, pool_scales=[1, 2], auxiliary_in_channels=24, auxiliary_channels=8
    )
    config.id2label = dict(enumerate(NAMES))
    config.label2id = {name: index for index, name in enumerate(NAMES)}
    size = {"height": 64, "width": 64}
    save(folder, UperNetForSemanticSegmentation(config), SegformerImageProcessorPil(size=size, do_reduce_labels=True))


def rtdetr(folder: Path) -> None:
    """RT-DETR on a ResNet, for 7 classes."""
    torch.manual_seed(0)
    sizes = [16, 24, 32]
    # Whose annotations lack out_indices.
    kind = cast("Any", RTDetrResNetConfig)
    backbone = kind(
        embedding_size=8, hidden_sizes=[8, *sizes], depths=[1, 1, 1, 1], layer_type="basic", out_indices=[2, 3, 4]
    )
    config = RTDetrConfig(
        backbone_config=backbone,
        encoder_in_channels=sizes,
        encoder_hidden_dim=32,
        encoder_ffn_dim=32,
        encoder_attention_heads=2,
        d_model=32,
        decoder_in_channels=[32, 32, 32],
        decoder_ffn_dim=32,
        decoder_layers=1,
        decoder_attention_heads=2,
        num_queries=12,
        num_denoising=8,
    )
    config.num_labels = 7
    save(folder, RTDetrForObjectDetection(config), RTDetrImageProcessorPil(size={"height": 64, "width": 64}))


MAKERS = {
    "shapes": shapes,
    "scenes": scenes,
    "boxes": boxes,
    "convnextv2": convnextv2,
    "upernet": upernet,
    "rtdetr": rtdetr,
}
