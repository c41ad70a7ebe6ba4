"""The Conv1d encoder of a voice activity detector learns ten spoken digits, with a new head, from few recordings.

Data: ``spoken_digits.npz`` (Free Spoken Digit Dataset) and ``speech_encoder.safetensors`` (Silero VAD). Takes 0 to 4 of
every speaker are the test set, 5 to 9 are for validation, and the seed draws the training takes from the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from scipy.signal import resample_poly
from sklearn.metrics import accuracy_score
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.utils.data import Dataset
from transformers import EvalPrediction
from transformers.modeling_outputs import SequenceClassifierOutput

from flora.recipes import Data

METRIC = "accuracy"
CLASSES, TEST, VALIDATION = 10, 5, 10  # takes below these numbers


@dataclass
class Task:
    """Settings of the data.

    Args:
        data: the folder with the two files.
        labels_per_class: training takes of each digit.
    """

    data: str
    labels_per_class: int = 20


class Encoder(nn.Module):
    """Spectrum, four convolutions, mean and maximum over time, and a head that knows nothing yet."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        self.conv1 = nn.Conv1d(129, 128, 3, padding=1)
        self.conv2 = nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(64, 64, 3, stride=2, padding=1)
        self.conv4 = nn.Conv1d(64, 128, 3, padding=1)
        self.standard = nn.BatchNorm1d(256, affine=False)  # with the statistics of the pool, which stay as they are
        self.head = nn.Linear(256, CLASSES)

    def features(self, sound: Tensor) -> Tensor:
        """Sound (batch, time) at 16 kHz -> (batch, 256)."""
        both = self.stft_conv(pad(sound[:, None], (64, 64), mode="reflect"))
        x = (both[:, :129].square() + both[:, 129:].square() + 1e-12).sqrt()
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = layer(x).relu()
        return torch.cat([x.mean(2), x.amax(2)], 1)

    def train(self, mode: bool = True) -> Encoder:
        super().train(mode)
        self.standard.eval()
        return self

    def forward(self, sound: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        logits = self.head(self.standard(self.features(sound)))
        loss = None if labels is None else cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class Takes(Dataset[dict[str, Tensor]]):
    """Sounds at 16 kHz with a peak of 0.5, and their digits."""

    def __init__(self, sounds: Tensor, labels: Tensor) -> None:
        self.sounds, self.labels = sounds, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"sound": self.sounds[index], "labels": self.labels[index]}


@cache
def read(folder: str) -> tuple[Tensor, Tensor, np.ndarray]:
    """The sounds as the encoder takes them, the digits, and the number of the take."""
    arrays = np.load(Path(folder) / "spoken_digits.npz", allow_pickle=False)
    sounds = resample_poly(arrays["x"].astype(np.float32), 2, 1, axis=1)
    sounds = 0.5 * sounds / np.abs(sounds).max(axis=1, keepdims=True)
    return torch.from_numpy(sounds.astype(np.float32)), torch.from_numpy(arrays["y"]).long(), arrays["take"]


def load_base(task: Task) -> Any:
    """The encoder with its weights and a new head."""
    model = Encoder()
    state = load_file(Path(task.data) / "speech_encoder.safetensors")
    missing = model.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    sounds, _, takes = read(task.data)
    with torch.no_grad():
        features = model.features(sounds[torch.from_numpy(takes >= VALIDATION)])
    model.standard.running_mean.copy_(features.mean(0))  # type: ignore[union-attr, operator]
    # Features that are all but silent would otherwise be blown up a hundredfold.
    variance = features.var(0)
    model.standard.running_var.copy_(variance.clamp(min=0.1 * float(variance.mean())))  # type: ignore[union-attr, operator]
    return model


def load_data(task: Task, seed: int) -> Data:
    """The seed draws the training takes."""
    sounds, labels, takes = read(task.data)
    random = np.random.default_rng(seed)
    pool = [np.flatnonzero((labels.numpy() == digit) & (takes >= VALIDATION)) for digit in range(CLASSES)]
    train = np.concatenate([random.choice(own, task.labels_per_class, replace=False) for own in pool])
    parts = (train, np.flatnonzero((takes >= TEST) & (takes < VALIDATION)), np.flatnonzero(takes < TEST))
    return Data(*[Takes(sounds[index], labels[index]) for index in parts])


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """The accuracy."""
    logits = prediction.predictions
    return {"accuracy": float(accuracy_score(prediction.label_ids, logits.argmax(-1)))}  # type: ignore[union-attr]
