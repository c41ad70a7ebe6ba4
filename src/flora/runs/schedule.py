"""Whether a run's settings can work: refused where they cannot, fitted to the data where they are too large."""

from __future__ import annotations

import math
import os

from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from flora.errors import UserError

# A shorter run has hardly learnt anything, and its curve says nothing.
FEW_STEPS = 50
# Beyond this every optimiser of the Trainer diverges at once.
LARGEST_RATE = 1.0
# The least values of arguments that the Trainer takes as they come, or refuses in the middle of a run.
LEAST = {
    "dataloader_num_workers": 0,
    "gradient_accumulation_steps": 1,
    "max_grad_norm": 0,
    "max_length": 1,
    "per_device_eval_batch_size": 1,
    "per_device_train_batch_size": 1,
    "warmup_steps": 0,
    "weight_decay": 0,
}


def check_schedule(arguments: TrainingArguments) -> None:
    """Refuses settings with which a run takes no step or cannot learn; asks for no more workers than there are cores.

    The Trainer accepts them all: it then ends without a step, divides by zero, or fills the adapter with NaN.

    Raises:
        ValueError: names the setting, what it is and what was expected.
    """
    rate = arguments.learning_rate
    if not 0 < rate <= LARGEST_RATE:
        raise UserError(
            f"training.learning_rate is {rate:g}, expected above 0 and at most {LARGEST_RATE:g}; "
            "adapters usually learn at 1e-4 to 1e-2"
        )

    if arguments.max_steps == 0 or arguments.max_steps < -1:
        raise UserError(f"training.max_steps is {arguments.max_steps}, expected 1 or more; -1 counts epochs instead")
    if arguments.max_steps == -1 and not arguments.num_train_epochs > 0:
        raise UserError(
            f"training.num_train_epochs is {arguments.num_train_epochs:g}, expected above 0; a part of an epoch is 0.5"
        )

    for name, least in LEAST.items():
        given = getattr(arguments, name, None)
        if given is not None and given < least:
            raise UserError(f"training.{name} is {given}, expected {least} or more")
    for name in ("logging_steps", "save_steps", "eval_steps"):
        given = getattr(arguments, name)
        if given is not None and not given > 0:
            raise UserError(f"training.{name} is {given}, expected steps from 1, or a share of the run such as 0.1")

    known = get_available_reporting_integrations()
    for name in arguments.report_to or []:
        if name not in known:
            raise UserError(
                f"training.report_to is {name!r}, which is not installed or not known; install the package, or choose "
                f"from {', '.join(['none', *known])}"
            )

    # torch warns at every start of its workers where there are more of them than cores.
    arguments.dataloader_num_workers = min(arguments.dataloader_num_workers, cores())


def fit_to_data(arguments: TrainingArguments, examples: int) -> list[str]:
    """Makes the batch no larger than the data, and says what is likely to go wrong.

    Args:
        arguments: Of the run; the batch size is changed in place.
        examples: How many there are to train on.

    Returns:
        What was changed or is likely to disappoint, a sentence each.
    """
    notes = []

    if arguments.per_device_train_batch_size > examples:
        notes.append(
            f"training.per_device_train_batch_size lowered from {arguments.per_device_train_batch_size} to {examples}: "
            "there are no more training examples"
        )
        arguments.per_device_train_batch_size = examples

    steps = steps_of(arguments, examples)
    if arguments.warmup_steps >= 1 and arguments.warmup_steps >= steps:
        notes.append(
            f"training.warmup_steps is {arguments.warmup_steps:g} in a run of {steps} steps, so the learning rate "
            "never reaches its value; set a share of the run, such as training.warmup_steps=0.1"
        )

    if steps < FEW_STEPS:
        notes.append(
            f"this run has only {steps} steps; for a reliable result, raise training.num_train_epochs "
            f"(now {arguments.num_train_epochs:g}) or lower training.per_device_train_batch_size "
            f"(now {arguments.per_device_train_batch_size})"
        )

    return notes


def steps_of(arguments: TrainingArguments, examples: int) -> int:
    """The optimiser steps of a run, as the Trainer counts them."""
    if arguments.max_steps > 0:
        return int(arguments.max_steps)

    batch = arguments.per_device_train_batch_size * max(1, arguments.n_gpu) * arguments.world_size
    batches = math.ceil(examples / batch)
    per_epoch = max(1, math.ceil(batches / arguments.gradient_accumulation_steps))
    steps: int = math.ceil(arguments.num_train_epochs * per_epoch)

    return steps


def cores() -> int:
    """The processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
