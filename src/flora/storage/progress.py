"""What a person sees while waiting: one bar for training, with the loss; none for loading files that take no time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging


class LossBar(ProgressCallback):
    """The Trainer's progress bar with the loss at its end instead of a line for each log entry."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Shows the latest loss."""
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.4f}")


def show_loss(trainer: Trainer) -> None:
    """Gives the Trainer a :class:`LossBar`, or nothing at all where its arguments disable bars."""
    trainer.remove_callback(PrinterCallback)
    if not trainer.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(LossBar)


@contextmanager
def hidden_bars() -> Iterator[None]:
    """No bars of transformers for loading and saving inside."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()

    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
