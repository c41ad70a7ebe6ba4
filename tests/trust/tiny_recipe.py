"""A recipe whose training takes moments: a convolution and a linear layer, on numbers that are drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from transformers import EvalPrediction, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from flora.recipes import Data, Request

METRIC = "accuracy"
CLASSES = 5


@dataclass
class Task:
    """Settings of the data.

    Args:
        examples: in each split.
    """

    examples: int = 6


class TinyConfig(PretrainedConfig):
    model_type = "tiny"


class TinyModel(PreTrainedModel):
    """A convolution, then a linear layer on its mean over the picture."""

    config_class = TinyConfig

    def __init__(self, config: TinyConfig) -> None:
        super().__init__(config)
        self.conv = nn.Conv2d(2, 7, 3)
        self.head = nn.Linear(7, CLASSES)
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        # shape: (batch, 2, 6, 6) -> (batch, 7, 4, 4) -> (batch, 7)
        features = self.conv(pixel_values).relu().mean((2, 3))
        logits = self.head(features)

        if labels is None:
            loss = None
        else:
            loss = cross_entropy(logits, labels)

        return ImageClassifierOutput(loss=loss, logits=logits)


class Drawn(Dataset[dict[str, Tensor]]):
    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randn(count, 2, 6, 6, generator=generator)
        self.labels = torch.randint(CLASSES, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def load_base(task: Task) -> TinyModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return TinyModel(TinyConfig())


def load_data(task: Task, seed: int) -> Data:
    train, validation, test = (Drawn(task.examples, number) for number in (seed, 101, 102))
    return Data(train, validation, test)


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def collate(samples: list[Any]) -> dict[str, Tensor]:
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}


def predictor(task: Task, model: Any, folder: Path) -> Callable[[Request], dict[str, Any]]:
    """For the picture that is drawn by a number: its class, and a file with the numbers of all."""

    def answer(request: Request) -> dict[str, Any]:
        image = Drawn(1, int(request.given))[0]["pixel_values"]
        logits = model(image[None]).logits[0]

        path = request.file(".txt")
        path.write_text(str(logits.tolist()))

        return {"class": int(logits.argmax()), "file": str(path)}

    return answer
