"""4-D weights: a ResNet-20 trained on CIFAR-10 is adapted to inverted, blurred JPEG copies from few labelled images.

Data: ``cifar10_jpeg.npz`` and ``resnet20_cifar10.safetensors`` (He et al. 2016, section 4.2). The first 150 training
images of a class are the pool that the seed draws from, the last 50 are for validation.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.utils.data import Dataset
from transformers import EvalPrediction
from transformers.modeling_outputs import ImageClassifierOutput

from flora.recipes import Data

METRIC = "accuracy"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSES, POOL = 10, 150


@dataclass
class Task:
    """Settings of the data.

    Args:
        data: the folder with the two files.
        labels_per_class: training images of each class.
        test_images: how many of the 3,000 are used, as many of each class.
    """

    data: str
    labels_per_class: int = 20
    test_images: int = 3000

    def __post_init__(self) -> None:
        if not 1 <= self.labels_per_class <= POOL:
            raise ValueError(f"task.labels_per_class is {self.labels_per_class}, expected 1 to {POOL}")


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters: every second pixel, zeros for new channels."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.stride, self.new = width_out // width_in, (width_out - width_in) // 2
        self.conv1 = nn.Conv2d(width_in, width_out, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width_out)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.new, self.new))
        return (self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + shortcut).relu()


class ResNet20(nn.Module):
    """The network of the file; its batch norms keep their statistics, so that an adapter is all that is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        for stage, (before, width) in enumerate(((16, 16), (16, 32), (32, 64)), start=1):
            blocks = [(str(index), Block(before if index == 0 else width, width)) for index in range(3)]
            setattr(self, f"layer{stage}", nn.Sequential(OrderedDict(blocks)))
        self.linear = nn.Linear(64, CLASSES)

    def train(self, mode: bool = True) -> ResNet20:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        x = self.bn1(self.conv1(pixel_values)).relu()
        x = self.layer3(self.layer2(self.layer1(x)))  # type: ignore[operator]
        logits = self.linear(x.mean((2, 3)))
        loss = None if labels is None else cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


class Shifted(Dataset[dict[str, Tensor]]):
    """The images (3, 32, 32) with inverted brightness after a 3x3 box blur, as the network takes them."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        blurred = nn.functional.avg_pool2d(pad(pixels, (1, 1, 1, 1), mode="reflect"), 3, 1)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        self.images = ((1 - blurred - mean) / std).contiguous(memory_format=torch.channels_last)
        self.labels = torch.from_numpy(labels).long()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def load_base(task: Task) -> Any:
    """The network with its weights."""
    model = ResNet20()
    model.load_state_dict(load_file(Path(task.data) / "resnet20_cifar10.safetensors"), strict=False)
    return model.to(memory_format=torch.channels_last)


def load_data(task: Task, seed: int) -> Data:
    """The seed draws the labelled images from the pool."""
    arrays = np.load(Path(task.data) / "cifar10_jpeg.npz", allow_pickle=False)
    images, labels, random = arrays["train_x"], arrays["train_y"], np.random.default_rng(seed)
    of_class = [np.flatnonzero(labels == index) for index in range(CLASSES)]
    train = np.concatenate([random.choice(own[:POOL], task.labels_per_class, replace=False) for own in of_class])
    held = np.concatenate([own[POOL:] for own in of_class])
    apart = np.argsort(arrays["test_y"], kind="stable").reshape(CLASSES, -1)[:, : task.test_images // CLASSES].ravel()
    return Data(
        Shifted(images[train], labels[train]),
        Shifted(images[held], labels[held]),
        Shifted(arrays["test_x"][apart], arrays["test_y"][apart]),
    )


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """The accuracy."""
    logits = prediction.predictions
    return {"accuracy": float(accuracy_score(prediction.label_ids, logits.argmax(-1)))}  # type: ignore[union-attr]
