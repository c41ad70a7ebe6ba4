"""What a person sees while waiting: a bar with the loss on a terminal, a line for each loss elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging


class LossBar(ProgressCallback):
    """The Trainer's progress bar with the loss at its end instead of a line for each log entry."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Shows the latest loss."""
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.4f}")


class LossLines(TrainerCallback):
    """A line for each loss and each evaluation: what a log file, a pipe or a batch system can hold."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Prints the step and the numbers that a person looks for."""
        shown = {name: value for name, value in (logs or {}).items() if name in ("loss", "learning_rate")}
        shown |= {name: value for name, value in (logs or {}).items() if _is_measured(name)}

        if shown and state.is_world_process_zero:
            numbers = "  ".join(f"{name} {float(value):.4g}" for name, value in shown.items())
            print(f"step {state.global_step}/{state.max_steps}  {numbers}", file=sys.stderr, flush=True)


def _is_measured(name: str) -> bool:
    """Whether a log entry is a metric of an evaluation, and not how long it took."""
    return name.startswith("eval_") and not name.endswith(("_runtime", "_per_second", "_time"))


def show_loss(trainer: Trainer) -> None:
    """Gives the Trainer a :class:`LossBar` on a terminal, else :class:`LossLines`; nothing where bars are disabled."""
    trainer.remove_callback(PrinterCallback)
    if trainer.args.disable_tqdm:
        return

    trainer.remove_callback(ProgressCallback)
    if sys.stderr.isatty():
        trainer.add_callback(LossBar)
    else:
        trainer.add_callback(LossLines)


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
