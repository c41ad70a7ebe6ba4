"""Text, 2-D weights and an embedding: MiniLM-L6, trained for sentence similarity, learns sentiment from few.

Data: ``sst2_train.tsv``, ``sst2_dev.tsv`` and ``sst2_test.tsv`` (SST-2, Socher et al. 2013). The seed draws the
training sentences; dev is for validation. Of all three only the short sentences are used.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import accuracy_score
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
)

from flora.recipes import Data
from flora.storage.progress import hidden_bars

METRIC = "accuracy"
LONGEST = 70  # characters of the sentences that are used, which keeps a run short


@dataclass
class Task:
    """Settings of the data and the base model.

    Args:
        data: the folder with the three files.
        model: the folder of MiniLM-L6.
        sentences: to train on.
    """

    data: str
    model: str
    sentences: int = 512


def load_base(task: Task) -> Any:
    """The encoder with a new head of two classes."""
    with hidden_bars():
        return AutoModelForSequenceClassification.from_pretrained(task.model, num_labels=2, dtype=torch.float32)


def load_data(task: Task, seed: int) -> Data:
    """The seed draws the training sentences."""
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    parts = {name: _read(Path(task.data) / f"sst2_{name}.tsv") for name in ("train", "dev", "test")}
    drawn = np.random.default_rng(seed).choice(len(parts["train"]), task.sentences, replace=False)
    chosen = [parts["train"][index] for index in drawn]
    tokenized = partial(_tokenized, tokenizer)
    collate = DataCollatorWithPadding(tokenizer)
    held = [tokenized(sorted(parts[name], key=len_of)) for name in ("dev", "test")]
    return Data(tokenized(chosen), *held, collate)


def len_of(item: tuple[str, int]) -> int:
    """Characters; sentences of like length share a batch, so that little is padded."""
    return len(item[0])


def _read(path: Path) -> list[tuple[str, int]]:
    lines = [line.rpartition("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    return [(sentence, int(label)) for sentence, _, label in lines if 0 < len(sentence) <= LONGEST]


def _tokenized(tokenizer: PreTrainedTokenizerBase, items: list[tuple[str, int]]) -> Any:
    """Samples, as the model takes them."""
    return [{**tokenizer(text), "labels": label} for text, label in items]


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """The accuracy."""
    logits = prediction.predictions
    return {"accuracy": float(accuracy_score(prediction.label_ids, logits.argmax(-1)))}  # type: ignore[union-attr]
