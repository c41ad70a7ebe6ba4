"""One training of a comparison: a method on a task with a learning rate and a seed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import Trainer, set_seed

from flora.comparison.curve import ValidationCurve
from flora.comparison.memory import watch_growth
from flora.comparison.methods import METHODS
from flora.comparison.probe import probe_head
from flora.comparison.rivals import RefusedError, Request
from flora.errors import DivergedError
from flora.recipes import Data, Recipe
from flora.runs.settings import Settings
from flora.runs.training import first_batches, make_trainer, measure, trainable, training_arguments

# What transformers' Trainer takes where a config says nothing.
EPOCHS = 3


@dataclass(frozen=True)
class Run:
    """One training: what makes it different from the others of the comparison.

    Attributes:
        method: a key of ``METHODS``.
        budget: parameters it may spend; None for a method that has no choice.
        learning_rate: of this run.
        seed: of the drawn data, the start and the order.
        final: False while the learning rate is searched for: then the test set is not touched.
        length: times as many epochs as configured.
    """

    method: str
    budget: int | None
    learning_rate: float
    seed: int
    final: bool
    length: int = 1

    @property
    def name(self) -> str:
        """The name of its files."""
        size = "" if self.budget is None else f"-{self.budget}"

        kind = "final" if self.final else "search"

        longer = "" if self.length == 1 else f"-x{self.length}"

        return f"{kind}-{self.method}{size}-lr{self.learning_rate:g}{longer}-seed{self.seed}"


class Trained(NamedTuple):
    """What a run leaves: its trainer with the model, the data, and what was measured so far."""

    trainer: Trainer
    data: Data
    result: dict[str, Any]


def train_once(settings: Settings, recipe: Recipe, run: Run, scratch: Path, points: int = 0) -> Trained:
    """Builds the method on a fresh base model, trains it, and measures it on validation.

    Args:
        settings: of the task.
        recipe: of it.
        run: what is special about this one.
        scratch: a folder for what the trainer may write.
        points: how often validation is measured on the way, for ``curve`` in the result.

    Raises:
        RefusedError: the method cannot adapt this model, there is no head to probe, or training diverged.
    """
    set_seed(run.seed)
    base = recipe.load_base(settings.task)
    data = recipe.load_data(settings.task, run.seed)
    epochs = run.length * settings.training.get("num_train_epochs", EPOCHS)
    changes = {
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "num_train_epochs": epochs,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    arguments = training_arguments(settings, scratch, **changes)
    request = Request(
        settings.adapter,
        settings.comparison.scale,
        run.budget or 0,
        first=lambda: first_batches(base, recipe, data, arguments),
    )

    if probed := settings.comparison.probe_epochs:
        set_seed(run.seed)
        own = training_arguments(settings, scratch, **{**changes, "num_train_epochs": probed})
        probe_head(base, request.head, recipe, data, own)

    set_seed(run.seed)
    model = METHODS[run.method].build(base, request)
    trainer = make_trainer(model, recipe, data, arguments)
    curve = ValidationCurve(trainer, recipe.METRIC, points)
    if points:
        trainer.add_callback(curve)

    try:
        trained = {**_train(trainer, run.seed), "validation": measure(trainer, data.validation)}
    except ValueError as error:
        # Losses of detectors refuse boxes that are NaN.
        diverged = isinstance(error, DivergedError)
        if not diverged and all(torch.isfinite(value).all() for value in model.parameters()):
            raise

        raise RefusedError(f"training diverged at the learning rate {run.learning_rate:g}") from error

    result: dict[str, Any] = {
        "trainable_parameters": trainable(model),
        "total_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seed": run.seed,
        **trained,
    }

    if points:
        result["seconds"] = round(result["seconds"] - curve.seconds, 3)
        result["curve"] = curve.scores

    if request.starts:
        begun = request.starts[-1]
        result["start"] = {"step": begun.step, "seconds": round(begun.seconds, 3), "left_out": list(begun.left_out)}

    return Trained(trainer, data, result)


def _train(trainer: Trainer, seed: int) -> dict[str, Any]:
    """Trains; the time it takes, and by how much the memory grows at most."""
    set_seed(seed)

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()

    with watch_growth() as growth:
        started = time.perf_counter()
        trainer.train()
        seconds, grown = time.perf_counter() - started, growth()

    return {
        "seconds": round(seconds, 3),
        "steps": trainer.state.global_step,
        "peak_memory": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else grown,
    }
