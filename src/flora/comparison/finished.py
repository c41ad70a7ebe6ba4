"""``flora compare --runs``: what runs that are finished have measured, side by side. Nothing is loaded or trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flora.errors import UserError
from flora.report.plots import training_curves
from flora.runs.config_file import Config
from flora.runs.run_folder import STATE, RunFolder
from flora.storage.atomic import read_json

# Settings that have no part in a run.
ELSEWHERE = ("output", "compare.")


def finished_runs(folders: Sequence[Path]) -> dict[str, Any]:
    """What is in the folders of finished runs.

    Args:
        folders: That ``flora train`` wrote; two or more.

    Returns:
        ``metric``; ``runs`` with their name, numbers and curves; ``differences``, the settings that are not the same in
        all: their key, and the value of each run; ``same_data``, whether all were measured on the same test set.

    Raises:
        FileNotFoundError, ValueError: A folder is no finished run, or the runs have no metric in common.
    """
    if len(folders) < 2:
        raise UserError(f"--runs has {len(folders)} folder; give two or more, of finished runs")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("--runs names one folder twice")

    runs = [_read(folder) for folder in folders]
    metrics = {run["metric"] for run in runs}
    if len(metrics) > 1:
        told = ", ".join(f"{folder} {run['metric']}" for folder, run in zip(folders, runs, strict=True))
        raise UserError(f"the runs are measured by different metrics: {told}; compare runs of one task")

    for run, name in zip(runs, _names(folders), strict=True):
        run["name"] = name

    settings = [run.pop("settings") for run in runs]
    keys = dict.fromkeys(key for given in settings for key in given)
    differences = {
        key: [given.get(key) for given in settings]
        for key in keys
        if not key.startswith(ELSEWHERE) and any(given.get(key) != settings[0].get(key) for given in settings)
    }
    same_data = not any(key == "recipe" or key.startswith("task.") for key in differences)

    return {"metric": metrics.pop(), "runs": runs, "differences": differences, "same_data": same_data}


def _read(folder: Path) -> dict[str, Any]:
    run = RunFolder(folder)
    if not run.is_begun:
        raise FileNotFoundError(f"{folder} is not a folder that `flora train` wrote")
    if not run.is_finished:
        raise UserError(f"{folder} holds a run that has not ended; end it with flora train CONFIG --resume")

    metrics = run.metrics()
    state = folder / STATE
    if state.is_file():
        history = read_json(state).get("log_history", [])
    else:
        history = []

    return {
        "metric": metrics["metric"],
        "measured": metrics,
        "curves": training_curves(history, metrics["metric"], metrics["validation"], metrics["steps"]),
        "settings": dict(_flat(Config(run.config).values)),
    }


def _flat(values: Mapping[str, Any], lead: str = "") -> list[tuple[str, Any]]:
    """``{"adapter": {"r": 8}}`` -> ``[("adapter.r", 8)]``."""
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{lead}{key}.")
        else:
            found.append((f"{lead}{key}", value))

    return found


def _names(folders: Sequence[Path]) -> list[str]:
    """The name of each folder, with its parent's where two have the same."""
    names = [folder.resolve().name for folder in folders]
    return [
        name if names.count(name) == 1 else f"{folder.resolve().parent.name}/{name}"
        for name, folder in zip(names, folders, strict=True)
    ]
