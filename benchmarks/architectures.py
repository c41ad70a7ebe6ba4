"""The whole models, with random weights: what they are, what they eat, what is trained besides the adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

CLASSES = 10


class UnavailableError(RuntimeError):
    """A model whose package is not installed."""


@dataclass(frozen=True)
class Model:
    """One row.

    Attributes:
        name: as printed.
        build: makes it, with random weights.
        inputs: small -> keyword arguments of the forward.
        entry: the module whose output stands for the model's input where that is made of ids; None for images.
        head: what every method trains in full; a name in the model.
        rank: of the channel modes and of LoRA.
        size: the input in words.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[bool], dict[str, Tensor]]
    head: str
    rank: int
    size: str
    entry: str | None = None


class Segmenter(nn.Module):
    """MONAI's 3-D U-Net up to its last block, and a 1x1x1 head that every method trains."""

    def __init__(self) -> None:
        super().__init__()
        try:
            from monai.networks.nets import UNet
        except ImportError as error:
            raise UnavailableError("monai is not installed") from error
        self.body = UNet(3, 1, 16, channels=(16, 32, 64, 128, 256), strides=(2, 2, 2, 2), num_res_units=2)
        self.head = nn.Conv3d(16, 2, 1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(batch, 1, depth, height, width) -> two classes for each voxel."""
        return self.head(self.body(pixel_values))


def images(batch: int, side: int) -> Callable[[bool], dict[str, Tensor]]:
    """Square images; smaller ones in a smoke run."""

    def make(small: bool) -> dict[str, Tensor]:
        return {"pixel_values": torch.randn(1 if small else batch, 3, side, side)}

    return make


def volumes(batch: int, side: int) -> Callable[[bool], dict[str, Tensor]]:
    """Cubes with one channel."""

    def make(small: bool) -> dict[str, Tensor]:
        return {"pixel_values": torch.randn(1 if small else batch, 1, *(3 * (32 if small else side,)))}

    return make


def tokens(batch: int, length: int) -> Callable[[bool], dict[str, Tensor]]:
    """Token ids."""

    def make(small: bool) -> dict[str, Tensor]:
        return {"input_ids": torch.randint(1, 1000, (1 if small else batch, length))}

    return make


def _classes(config: Any) -> Any:
    config.num_labels = CLASSES
    return config


MODELS = [
    Model(
        "ResNet-50",
        lambda: ResNetForImageClassification(_classes(ResNetConfig())),
        images(2, 224),
        "classifier",
        16,
        "batch 2, 224 x 224",
    ),
    Model(
        "ConvNeXt-V2-Tiny",
        lambda: ConvNextV2ForImageClassification(_classes(ConvNextV2Config())),
        images(2, 224),
        "classifier",
        16,
        "batch 2, 224 x 224",
    ),
    Model(
        "ViT-B/16",
        lambda: ViTForImageClassification(_classes(ViTConfig())),
        images(2, 224),
        "classifier",
        8,
        "batch 2, 224 x 224",
    ),
    Model(
        "BERT-base",
        lambda: BertForSequenceClassification(_classes(BertConfig())),
        tokens(4, 128),
        "classifier",
        8,
        "batch 4, 128 tokens",
        entry="bert.embeddings",
    ),
    Model("3-D U-Net (MONAI)", Segmenter, volumes(2, 64), "head", 16, "batch 2, 64 x 64 x 64"),
]
