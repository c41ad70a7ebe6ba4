"""Fused 3-D experts: a small mixture-of-experts language model of program text learns how film reviews are written.

Data: ``sst2_train.tsv``, ``sst2_dev.tsv`` and ``sst2_test.tsv`` (SST-2, Socher et al. 2013), as characters. The base
model is a Mixtral with eight experts per layer. It is trained once, on the sources of Python's own standard library,
and cached. The seed draws the training sentences; dev is for validation. Of all three only sentences of middle length
are used.
"""

from __future__ import annotations

import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import EvalPrediction, MixtralConfig, MixtralForCausalLM

from flora.recipes import Data
from flora.storage.atomic import cache_folder
from flora.storage.cached_model import train_base
from flora.storage.progress import hidden_bars

METRIC = "next_character"
SHORTEST, LONGEST = 24, 72  # characters of the sentences that are used
HELD_OUT = 400  # sentences that are measured on, for validation and for the test
ASCII, UNSCORED = 128, -100
STEPS, BATCH = 600, 32  # of the base model


@dataclass
class Task:
    """Settings of the data.

    Args:
        data: the folder with the three files.
        sentences: to train on.
    """

    data: str
    sentences: int = 160


class Characters(Dataset[dict[str, Tensor]]):
    """Texts as character codes, each between line ends; the shorter ones are filled up, which is not scored."""

    def __init__(self, texts: list[str]) -> None:
        width = max(len(text) for text in texts) + 2
        self.ids = torch.zeros(len(texts), width, dtype=torch.long)
        self.lengths = torch.tensor([len(text) + 2 for text in texts])
        for row, text in zip(self.ids, texts, strict=True):
            row[: len(text) + 2] = torch.tensor(list(f"\n{text}\n".encode("ascii", "replace")))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        real = torch.arange(self.ids.shape[1]) < self.lengths[index]
        labels = self.ids[index].where(real, UNSCORED)
        return {"input_ids": self.ids[index], "attention_mask": real.long(), "labels": labels}


def load_base(task: Task) -> Any:
    """The model that knows program text; trained first if it is not cached."""
    folder = cache_folder() / f"experts-{STEPS}-python{sys.version_info.major}.{sys.version_info.minor}"
    train_base(
        folder,
        lambda: MixtralForCausalLM(_shape()),
        lambda: _program_text(STEPS * BATCH),
        "program text",
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        logging_steps=50,
    )

    with hidden_bars():
        return MixtralForCausalLM.from_pretrained(folder, experts_implementation="eager")


def _shape() -> MixtralConfig:
    """Of the base model."""
    return MixtralConfig(
        vocab_size=ASCII,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        use_cache=False,
        pad_token_id=0,
        bos_token_id=10,
        eos_token_id=10,
        experts_implementation="eager",
    )


def _program_text(pieces: int) -> Characters:
    """Pieces from random places of the standard library's sources, as long as the longest sentence."""
    library = Path(sysconfig.get_path("stdlib"))
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(library.glob("*.py")))
    places = np.random.default_rng(0).integers(0, len(text) - LONGEST, pieces)
    return Characters([text[place : place + LONGEST] for place in places])


def load_data(task: Task, seed: int) -> Data:
    """The seed draws the training sentences."""
    parts = {name: _read(Path(task.data) / f"sst2_{name}.tsv") for name in ("train", "dev", "test")}
    drawn = np.random.default_rng(seed).choice(len(parts["train"]), task.sentences, replace=False)
    chosen = [parts["train"][index] for index in drawn]
    return Data(Characters(chosen), *(Characters(parts[name][:HELD_OUT]) for name in ("dev", "test")))


def _read(path: Path) -> list[str]:
    sentences = [line.rpartition("\t")[0] for line in path.read_text(encoding="utf-8").splitlines()]
    return [sentence for sentence in sentences if SHORTEST <= len(sentence) <= LONGEST]


def preprocess_logits(logits: Any, labels: Tensor) -> Tensor:
    """The likeliest next character at every place."""
    if isinstance(logits, tuple):
        logits = logits[0]
    found: Tensor = logits.argmax(-1)
    return found


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """The share of the characters that are the likeliest after those before them."""
    # shape: (sentences, places); what is said at a place is about the next one
    found, true = np.asarray(prediction.predictions)[:, :-1], np.asarray(prediction.label_ids)[:, 1:]
    scored = true != UNSCORED
    return {METRIC: float((found == true)[scored].mean())}
