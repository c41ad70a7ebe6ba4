"""Base models that are trained here: once, and then kept."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed
from transformers.utils import CONFIG_NAME

from flora.storage.atomic import staged_folder
from flora.storage.progress import hidden_bars, show_loss

SEED = 0  # of the weights at the start


def train_base(
    folder: Path,
    make: Callable[[], PreTrainedModel],
    rows: Callable[[], Dataset[Any]],
    lesson: str,
    **options: Any,
) -> None:
    """Trains a model and writes it to ``folder``, whole or not at all; does nothing where one is already.

    Args:
        folder: Where the model is kept.
        make: Gives the model with random weights.
        rows: Gives what it is trained on.
        lesson: What it learns, for the message.
        **options: Of transformers' TrainingArguments.
    """
    if (folder / CONFIG_NAME).is_file():
        return

    print(f"training the base model on {lesson}, once; it is kept in {folder}", flush=True)

    # Such tensors are too small to share, and one thread gives the same bits everywhere.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    try:
        set_seed(SEED)
        model = make()

        with tempfile.TemporaryDirectory() as scratch:
            pinned = torch.cuda.is_available()
            arguments = TrainingArguments(
                scratch, save_strategy="no", report_to="none", dataloader_pin_memory=pinned, **options
            )
            trainer = Trainer(model, arguments, train_dataset=rows())
            show_loss(trainer)
            trainer.train()
    finally:
        torch.set_num_threads(threads)

    with staged_folder(folder) as staged, hidden_bars():
        model.cpu().save_pretrained(staged)
