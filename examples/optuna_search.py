"""Optuna looks for the rank and the learning rate of a recipe; each trial is scored on the validation part."""

from __future__ import annotations

from pathlib import Path

import optuna

from flora.runs.settings import read
from flora.runs.training import train


def main(config: str = "digits", output: Path = Path("search"), trials: int = 10) -> dict[str, float]:
    def objective(trial: optuna.Trial) -> float:
        rank = trial.suggest_categorical("r", [4, 8, 16])
        rate = trial.suggest_float("learning_rate", 1e-3, 3e-2, log=True)
        overrides = [
            f"adapter.r={rank}",
            f"training.learning_rate={rate}",
            f"output={output / str(trial.number)}",
            "training.disable_tqdm=true",
        ]
        settings = read(config, overrides)
        metrics = train(settings, overwrite=True)
        return float(metrics["validation"][settings.load_recipe().METRIC])

    study = optuna.create_study(direction="maximize")
    study.optimize(objective, n_trials=trials)
    print(f"best: {study.best_params}, {study.best_value:.4f} on validation")
    return dict(study.best_params)


if __name__ == "__main__":
    main()
