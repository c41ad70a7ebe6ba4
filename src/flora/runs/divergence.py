"""Training that has gone to NaN or infinity is stopped at once, before a checkpoint of it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from flora.errors import DivergedError
from flora.runs.run_folder import RunFolder


class _Watched:
    """A Trainer that looks at the loss of every batch, and at the weights before it saves them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        cast("Any", super()).__init__(*args, **kwargs)
        cast("Trainer", self).add_callback(_CheckBeforeSaving(cast("Trainer", self)))

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """One batch, as the Trainer does it."""
        loss = cast("Tensor", cast("Any", super()).training_step(model, *args, **kwargs))
        if not torch.isfinite(loss).all():
            raise _diverged(cast("Trainer", self), f"the loss is {float(loss.detach().float().mean()):g}")
        return loss


class _CheckBeforeSaving(TrainerCallback):
    """Keeps a checkpoint of weights that are not finite from being written over a good one."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The Trainer saves after this."""
        if control.should_save:
            check_weights(self.trainer)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """As after a step."""
        self.on_step_end(args, state, control)


def stopping_where_it_diverges(kind: type[Trainer]) -> type[Trainer]:
    """The same Trainer, which raises a DivergedError as soon as the loss, or a weight to be saved, is not finite."""
    return cast("type[Trainer]", type(kind.__name__, (_Watched, kind), {}))


def check_weights(trainer: Trainer) -> None:
    """Raises a DivergedError if a trained weight is not finite."""
    for name, value in cast("nn.Module", trainer.model).named_parameters():
        if value.requires_grad and not torch.isfinite(value).all():
            raise _diverged(trainer, f"{name} has NaN or infinite entries")


def _diverged(trainer: Trainer, what: str) -> DivergedError:
    state, rate = trainer.state, trainer.args.learning_rate

    if trainer.lr_scheduler is not None:
        rate = float(trainer.lr_scheduler.get_last_lr()[0])

    checkpoint = RunFolder(Path(str(trainer.args.output_dir))).last_checkpoint()
    if checkpoint is None:
        kept = "no checkpoint was written before"
    else:
        kept = f"the last good checkpoint is {checkpoint}"

    return DivergedError(
        f"training diverged at step {state.global_step + 1}: {what}, at the learning rate {rate:g}; lower "
        f"training.learning_rate (now {trainer.args.learning_rate:g}); {kept}"
    )
