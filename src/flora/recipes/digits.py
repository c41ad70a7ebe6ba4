"""Handwritten digits: a ConvNeXt-V2 that knows upright digits is adapted to rotated, inverted ones from few labels.

Data: the UCI handwritten digits that scikit-learn ships (1,797 real 8x8 images, no download). The base model is trained
once on half of them, upright, and cached. The other half is split into a pool that few labelled training images are
drawn from, a validation and a test set; no image is in two of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset
from transformers import ConvNextV2Config, ConvNextV2ForImageClassification

from flora.data.results import accuracy, ranked
from flora.data.shown import Findings, Shown, classified, grey
from flora.errors import UserError
from flora.recipes import Data, Request, Tested
from flora.storage.atomic import cache_folder
from flora.storage.cached_model import train_base
from flora.storage.progress import hidden_bars

METRIC = "accuracy"
SPLIT_SEED = 0  # which image is in which set never changes
SIZES = {"base": 900, "pool": 300, "validation": 250}  # test is the rest
BASE_FIELDS = ("hidden_sizes", "depths", "base_epochs", "base_learning_rate")


@dataclass
class Task:
    """Settings of the data and the base model.

    Args:
        labels_per_class: training images of each digit.
        rotation: of the images of the new domain, in degrees, counter-clockwise.
        invert: whether the new domain is dark on light.
        hidden_sizes, depths: channels and blocks of each stage of the base model.
        base_epochs: over the upright digits.
        base_learning_rate: the same.
    """

    labels_per_class: int = 10
    rotation: int = 90
    invert: bool = True
    hidden_sizes: list[int] = field(default_factory=lambda: [32, 64])
    depths: list[int] = field(default_factory=lambda: [2, 2])
    base_epochs: int = 30
    base_learning_rate: float = 2e-3

    def __post_init__(self) -> None:
        if self.rotation % 90:
            raise UserError(f"task.rotation is {self.rotation}, expected a multiple of 90 degrees")

        if len(self.hidden_sizes) != len(self.depths):
            raise UserError(
                f"task.hidden_sizes {self.hidden_sizes} and task.depths {self.depths} differ in length; "
                "give one of each per stage"
            )


@cache
def _source() -> Any:
    """The data set, read once: reading takes longer than all that follows."""
    return load_digits()


class Digits(Dataset[dict[str, Tensor]]):
    """Images (1, 16, 16) in [-1, 1] with their labels, as the model takes them."""

    def __init__(self, indices: np.ndarray, *, rotation: int = 0, invert: bool = False) -> None:
        source = _source()
        images = torch.tensor(source.images[indices] / 16, dtype=torch.float32)[:, None]
        images = torch.rot90(interpolate(images, size=16, mode="bilinear"), rotation // 90, (2, 3))
        self.images = (1 - images if invert else images) * 2 - 1
        self.labels = torch.tensor(source.target[indices])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def splits() -> dict[str, np.ndarray]:
    """The indices of the images of each set: base, pool, validation, test; disjoint, each digit in equal parts."""
    labels = _source().target
    left, parts = np.arange(len(labels)), {}
    for name, size in SIZES.items():
        parts[name], left = train_test_split(left, train_size=size, stratify=labels[left], random_state=SPLIT_SEED)
    return {**parts, "test": left}


def load_data(task: Task, seed: int) -> Data:
    """The new domain; the seed draws the labelled images from the pool.

    Raises:
        ValueError: the pool has too few images of a digit.
    """
    parts, labels = splits(), _source().target
    pool, random = parts["pool"], np.random.default_rng(seed)
    most = int(np.bincount(labels[pool]).min())
    if not 1 <= task.labels_per_class <= most:
        raise UserError(
            f"task.labels_per_class is {task.labels_per_class}, expected 1 to {most}, as many as the pool has"
        )

    chosen = [random.choice(pool[labels[pool] == digit], task.labels_per_class, replace=False) for digit in range(10)]
    parts["train"] = np.concatenate(chosen)
    domain = {name: Digits(parts[name], rotation=task.rotation, invert=task.invert) for name in ("train", "test")}
    validation = Digits(parts["validation"], rotation=task.rotation, invert=task.invert)

    return Data(domain["train"], validation, domain["test"])


compute_metrics = accuracy


def findings(tested: Tested) -> Findings:
    """Which digits are taken for which, and the worst errors."""
    test = cast("Digits", tested.data.test)

    def show(index: int) -> Shown:
        return Shown(pictures=[(f"test image {index}", grey(test.images[index, 0].numpy()))])

    return classified(tested.predictions, tested.labels, [str(digit) for digit in range(10)], show)


def predictor(task: Task, model: Any, folder: Path) -> Callable[[Request], dict[str, Any]]:
    """Gives the digit on a test image, which is chosen by its number."""
    test = Digits(splits()["test"], rotation=task.rotation, invert=task.invert)

    def answer(request: Request) -> dict[str, Any]:
        if not request.given.isdecimal() or len(request.given) > 9 or int(request.given) >= len(test):
            raise UserError(f"{request.given!r}: expected the number of a test image, 0 to {len(test) - 1}")
        pixels = test[int(request.given)]["pixel_values"][None].to(model.device)
        return ranked(model(pixel_values=pixels).logits[0], [str(digit) for digit in range(10)])

    return answer


def base_folder(task: Task) -> Path:
    """Where the base model of these settings is cached."""
    settings = {key: value for key, value in asdict(task).items() if key in BASE_FIELDS}
    key = hashlib.sha256(json.dumps([settings, SIZES, SPLIT_SEED], sort_keys=True).encode()).hexdigest()[:12]
    return cache_folder() / f"digits-{key}"


def load_base(task: Task) -> ConvNextV2ForImageClassification:
    """The base model from the cache; trained first, with a progress bar, if it is not there."""
    folder = base_folder(task)
    train_base(
        folder,
        lambda: _network(task),
        lambda: Digits(splits()["base"]),
        "upright digits",
        num_train_epochs=task.base_epochs,
        per_device_train_batch_size=32,
        learning_rate=task.base_learning_rate,
        weight_decay=0.05,
        warmup_steps=50,
        logging_strategy="no",
        seed=SPLIT_SEED,
    )

    with hidden_bars():
        return ConvNextV2ForImageClassification.from_pretrained(folder)


def _network(task: Task) -> ConvNextV2ForImageClassification:
    """The network of the base model, with random weights."""
    config = ConvNextV2Config(
        num_channels=1,
        image_size=16,
        patch_size=2,
        num_stages=len(task.depths),
        depths=task.depths,
        hidden_sizes=task.hidden_sizes,
    )
    config.num_labels = 10

    return ConvNextV2ForImageClassification(config)
