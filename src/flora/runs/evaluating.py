"""``evaluate``: a trained folder is loaded and measured; where the numbers are not those of then, why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flora.errors import UserError
from flora.recipes import Recipe
from flora.report.provenance import machine, versions
from flora.runs.reloading import load_adapter, load_base, read_adapter_config, read_run
from flora.runs.run_folder import ADAPTER, RunFolder
from flora.runs.settings import Settings
from flora.runs.training import make_trainer, measure, training_arguments
from flora.storage.tensors import read_tensors

# An evaluation of the same model on the same data may differ by this much.
SAME = 1e-6
# How many weights a message names.
NAMED = 3


class Evaluated(NamedTuple):
    """What was measured.

    Attributes:
        metrics: Of the split.
        same: Whether they equal those from the end of training; None where there are none to compare with.
        report: Where they do not, what differs by how much, why, and what to do; a line each.
    """

    metrics: dict[str, float]
    same: bool | None
    report: list[str]


def evaluate(
    folder: Path, overrides: Iterable[str] = (), split: str = "test", *, run_recipe_file: bool = False
) -> Evaluated:
    """Loads a trained folder and measures it.

    Args:
        folder: That ``train`` wrote.
        overrides: ``task.key=value`` items, to measure on other data than it was trained for.
        split: "train", "validation" or "test".
        run_recipe_file: Runs the Python file that the folder names as its recipe; only for one's own.

    Raises:
        FileNotFoundError, ValueError: the folder, a file in it or an override cannot be used.
    """
    overrides = list(overrides)
    if other := [item for item in overrides if not item.startswith("task.")]:
        raise UserError(f"{other[0]!r}: only settings of the data can change here, as task.key=value")

    settings = read_run(folder, overrides, run_recipe_file=run_recipe_file)
    run = RunFolder(folder)
    recipe = settings.load_recipe()
    data = recipe.load_data(settings.task, settings.seed)
    dataset: Any = data.split(split)
    trained_for = run.labels()
    if trained_for is not None and data.labels != trained_for:
        raise UserError(
            f"the data has the classes {data.labels}, but {folder} was trained for {trained_for}; "
            "give these as task.labels"
        )

    if not overrides:
        base = recipe.load_base(settings.task)
    else:
        base = load_base(folder, run_recipe_file=run_recipe_file)

    model = load_adapter(base, folder)
    arguments = training_arguments(settings, folder, save_strategy="no")
    metrics = measure(make_trainer(model, recipe, data, arguments), dataset)

    stored = {} if overrides else run.metrics()
    before = dict(stored.get(split, {}))

    # Several processes weigh the loss of a short last batch like that of a full one.
    if stored.get("processes", 1) > 1:
        before.pop("loss", None)
    if not before:
        return Evaluated(metrics, None, [])

    apart = {key: value for key, value in before.items() if not _is_same(metrics.get(key), value)}
    if not apart:
        return Evaluated(metrics, True, [])

    counted = stored.get("examples", {}).get(split)
    causes = [*_other_origin(stored), *_other_size(counted, dataset, split), *_not_saved(folder, recipe, settings)]
    if not causes:
        causes = [
            "the versions, the device and the number of examples are the same, so the files behind task.data or "
            "task.model have changed; evaluate with the same files"
        ]

    differences = [f"{key} was {value:.6g}, now it is {metrics.get(key)}" for key, value in apart.items()]

    return Evaluated(metrics, False, [*differences, *causes])


def _is_same(now: float | None, before: float) -> bool:
    return now is not None and abs(now - before) <= SAME * max(1.0, abs(before))


def _other_origin(stored: Mapping[str, Any]) -> Iterator[str]:
    """What of the machine and the packages is another than then."""
    now: dict[str, Any] = {**versions(), "device": machine()["device"]}
    then = {**stored.get("versions", {}), "device": stored.get("machine", {}).get("device")}
    others = [
        f"{name} was {value}, now it is {now.get(name)}"
        for name, value in then.items()
        if value is not None and value != now.get(name)
    ]
    if others:
        yield f"{'; '.join(others)}: another one rounds differently, which explains small differences"


def _other_size(then: int | None, dataset: Any, split: str) -> Iterator[str]:
    if then is not None and then != len(dataset):
        yield f"the {split} data had {then} examples, now there are {len(dataset)}: evaluate on the data of training"


def _not_saved(folder: Path, recipe: Recipe, settings: Settings) -> Iterator[str]:
    """The parts of the model that are not in the folder, so that they differ each time it is loaded."""
    if read_adapter_config(folder).get("freeze_batch_norm") is False:
        yield (
            "adapter.freeze_batch_norm is false, so the statistics of batch norms moved in training, and no adapter "
            "holds them: train without it, or name the norms in adapter.modules_to_save"
        )

    lost = _random_weights(folder, recipe, settings)
    if lost:
        more = f" and {len(lost) - NAMED} more" if len(lost) > NAMED else ""
        yield (
            f"{', '.join(lost[:NAMED])}{more} start at random whenever the base model is loaded, and the adapter does "
            "not hold them: name their layers in adapter.modules_to_save, and train again"
        )


def _random_weights(folder: Path, recipe: Recipe, settings: Settings) -> list[str]:
    """The weights of the base model that are others each time, and that the adapter does not bring along.

    Only a model that got a head for the classes of the data has such; others are not loaded once more.
    """
    if RunFolder(folder).labels() is None:
        return []

    loaded = []
    for seed in (0, 1):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            loaded.append(recipe.load_base(settings.task).state_dict())

    saved = read_tensors(folder / ADAPTER)[0].keys()
    first, second = loaded

    return [
        name
        for name, value in first.items()
        if not torch.equal(value, second[name]) and f"base_model.model.{name}" not in saved
    ]
