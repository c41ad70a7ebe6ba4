"""The head alone is trained first, on the frozen base, before any method is put on it (Kumar et al. 2022)."""

from __future__ import annotations

from torch import nn
from transformers import TrainingArguments

from flora.comparison.rivals import RefusedError, train_head
from flora.recipes import Data, Recipe
from flora.runs.training import make_trainer
from flora.tuner.statistics import release_statistics


def probe_head(base: nn.Module, head: list[str], recipe: Recipe, data: Data, arguments: TrainingArguments) -> None:
    """Trains the head in place and leaves the rest of the base, and what of it requires a gradient, as they were.

    Args:
        base: that the method is put on afterwards.
        head: names of the modules that are trained.
        recipe: of the task.
        data: of the task.
        arguments: of this training.

    Raises:
        RefusedError: there is no head.
    """
    if not head:
        raise RefusedError("there is no head to train before: adapter.modules_to_save names none")

    required = {parameter: parameter.requires_grad for parameter in base.parameters()}
    train_head(base.requires_grad_(False), head)
    trainer = make_trainer(base, recipe, data, arguments)

    try:
        trainer.train()
    finally:
        # What the trainer put around the base goes, so that the method's own trainer begins as it would without.
        trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
        release_statistics(base)

        for parameter, flag in required.items():
            parameter.requires_grad_(flag)
            parameter.grad = None
