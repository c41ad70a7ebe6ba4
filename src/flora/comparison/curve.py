"""The validation score on the way: what a comparison of how fast methods learn is made of."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from flora.runs.training import measure


class ValidationCurve(TrainerCallback):
    """Measures at some evenly spaced steps; the training itself, its random numbers too, is that without it.

    Args:
        trainer: whose validation set is measured.
        metric: of it.
        points: how often, the last step included.

    Attributes:
        scores: pairs of a step and its score.
        seconds: that measuring took.
    """

    def __init__(self, trainer: Trainer, metric: str, points: int) -> None:
        self.trainer, self.metric, self.points = trainer, metric, points
        self.scores: list[tuple[int, float]] = []
        self.seconds = 0.0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measures if the step is one of those."""
        if state.global_step not in self._steps(state.max_steps):
            return

        began = time.perf_counter()
        # A loader draws a random number when it begins, which must not shift those of the training.
        with torch.random.fork_rng():
            score = measure(self.trainer, self.trainer.eval_dataset)[self.metric]  # type: ignore[arg-type]

        self.scores.append((state.global_step, score))
        self.seconds += time.perf_counter() - began

    def _steps(self, last: int) -> set[int]:
        return {max(1, round(last * (index + 1) / self.points)) for index in range(self.points)}
