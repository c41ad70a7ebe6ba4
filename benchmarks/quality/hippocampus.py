"""5-D weights: a 3-D U-Net that segments the hippocampus in MRI is adapted to another contrast from a few volumes.

Data: ``hippocampus.npz`` (Medical Segmentation Decathlon, task 4). The base network learned volumes 0 to 119 as
they are, by ``example.py``. The new domain is inverted, has another gamma and noise: the seed draws training volumes
from 160 to 199, 120 to 159 are for validation, 200 to 259 are the test set.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.metrics import compute_dice
from torch import Tensor
from torch.nn.functional import one_hot
from torch.utils.data import Dataset
from transformers import EvalPrediction

from flora.data.volume_unet import VolumeUNet
from flora.recipes import Data
from flora.storage.progress import hidden_bars

METRIC = "dice"
CLASSES = 3  # background, anterior, posterior
KNOWN, VALIDATION, POOL, TEST = range(120), range(120, 160), range(160, 200), range(200, 260)
BASE = Path(__file__).parents[2] / "examples" / "hippocampus" / "unet"


@dataclass
class Task:
    """Settings of the data.

    Args:
        data: the folder with the file.
        volumes: to train on.
        gamma: exponent of the inverted intensities.
        noise: standard deviation of what is added to them.
    """

    data: str
    volumes: int = 8
    gamma: float = 2.0
    noise: float = 0.1

    def __post_init__(self) -> None:
        if not 1 <= self.volumes <= len(POOL):
            raise ValueError(f"task.volumes is {self.volumes}, expected 1 to {len(POOL)}")


class Volumes(Dataset[dict[str, Tensor]]):
    """Volumes (1, 32, 48, 32) and labels (32, 48, 32); the noise of a volume is always the same."""

    def __init__(self, task: Task, indices: Any, *, shifted: bool) -> None:
        arrays = np.load(Path(task.data) / "hippocampus.npz", allow_pickle=False)
        volumes = torch.from_numpy(arrays["x"][list(indices)]).float()[:, None] / 255
        if shifted:
            noise = [torch.randn(volumes.shape[1:], generator=torch.Generator().manual_seed(int(at))) for at in indices]
            volumes = (1 - volumes) ** task.gamma + task.noise * torch.stack(noise)
        self.volumes, self.labels = volumes, torch.from_numpy(arrays["y"][list(indices)]).long()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.volumes[index], "labels": self.labels[index]}


def load_base(task: Task) -> Any:
    """The network that knows the volumes as they are."""
    with hidden_bars():
        return VolumeUNet.from_pretrained(BASE).to(memory_format=torch.channels_last_3d)


def load_data(task: Task, seed: int) -> Data:
    """The new domain; the seed draws the training volumes from the pool."""
    drawn = np.random.default_rng(seed).choice(list(POOL), task.volumes, replace=False)
    parts = [Volumes(task, indices, shifted=True) for indices in (drawn, VALIDATION, TEST)]
    return Data(*parts)


def preprocess_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """The class of every voxel."""
    return logits.argmax(1)


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """The Dice score, mean over the volumes and the two parts of the hippocampus."""
    found, true = (torch.as_tensor(value).long() for value in (prediction.predictions, prediction.label_ids))
    hot = [one_hot(value, CLASSES).movedim(-1, 1) for value in (found, true)]
    return {"dice": float(compute_dice(*hot, include_background=False).nanmean())}
