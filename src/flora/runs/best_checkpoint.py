"""Which checkpoint of a run is the best one where the metric cannot tell: of equal scores, the one with less loss.

A metric that stays at 0 through the first epochs of a hard task would otherwise keep the first checkpoint.
"""

from __future__ import annotations

from typing import Any, cast

from transformers import Trainer

LOSS = "eval_loss"


class _SettlesTies:
    """A Trainer that takes the checkpoint with the smaller validation loss for the better of two with equal scores."""

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether these are the best measurements so far; the Trainer asks after each evaluation."""
        is_better = bool(cast("Any", super())._determine_best_metric(metrics, trial))
        if is_better:
            return True

        trainer = cast("Trainer", self)
        state, metric = trainer.state, str(trainer.args.metric_for_best_model)
        is_equal = metrics.get(f"eval_{metric.removeprefix('eval_')}") == state.best_metric
        if not is_equal or not _has_less_loss(metrics, state.log_history, state.best_global_step):
            return False

        state.best_global_step = state.global_step
        return True


def _has_less_loss(metrics: dict[str, float], history: list[dict[str, float]], best_step: int | None) -> bool:
    """Whether the loss is below the one that was measured at the best step."""
    best = [line[LOSS] for line in history if LOSS in line and line.get("step") == best_step]
    return bool(best) and LOSS in metrics and metrics[LOSS] < best[-1]


def settling_ties(kind: type[Trainer]) -> type[Trainer]:
    """The same Trainer, which settles ties of ``metric_for_best_model`` by the validation loss."""
    return cast("type[Trainer]", type(kind.__name__, (_SettlesTies, kind), {}))
