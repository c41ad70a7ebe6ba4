"""What the start from the gradient costs: its time in training steps, its peak memory against theirs.

Time is the processor's, on one thread, so that other work on the machine does not count.

``python -m benchmarks.quality.cost --data FOLDER --model FOLDER [--tasks cifar,...]`` writes a line for each task to
``benchmarks/results/quality/cost.json``.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.quality.pairs import PLAIN_OURS
from benchmarks.quality.run import RATE, ROOT, settings_of, words
from flora.comparison.memory import resident, watch_growth
from flora.comparison.methods import METHODS, Request
from flora.report.provenance import provenance
from flora.runs.training import first_batches, make_trainer, training_arguments
from flora.storage.atomic import read_json, write_json

COSTS = ROOT / "benchmarks" / "results" / "quality" / "cost.json"
STEPS = 20  # of training that are timed
TASKS = ["cifar", "hippocampus", "spoken", "sst2"]


class Cost(NamedTuple):
    """Of something that was run once.

    Attributes:
        seconds: of the processor that it took.
        peak: bytes that the process held at most meanwhile.
    """

    seconds: float
    peak: int


def costs(settings: Any, recipe: Any, method: str, scratch: Path) -> tuple[Cost, Cost]:
    """Of building the method with its start, and of one training step."""
    base, data = recipe.load_base(settings.task), recipe.load_data(settings.task, 0)
    changes = {"max_steps": STEPS, "learning_rate": RATE, "save_strategy": "no", "disable_tqdm": True}
    arguments = training_arguments(settings, scratch, **changes)
    budget = settings.comparison.budgets[0]
    first = partial(first_batches, base, recipe, data, arguments)
    request = Request(settings.adapter, settings.comparison.scale, budget, first=first)

    model: list[nn.Module] = []
    building = _cost(lambda: model.append(METHODS[method].build(base, request)))
    trainer = make_trainer(model[0], recipe, data, arguments)
    training = _cost(trainer.train)

    return building, Cost(training.seconds / STEPS, training.peak)


def _cost(action: Callable[[], object]) -> Cost:
    with watch_growth() as growth:
        before, began = resident("VmRSS"), time.process_time()
        action()
        return Cost(time.process_time() - began, before + (growth() or 0))


def measured(task: str, data: str, model: str) -> dict[str, Any]:
    """The two costs of a task, and what one is in terms of the other."""
    settings = settings_of(task, data, model)
    recipe = settings.load_recipe()

    with tempfile.TemporaryDirectory() as scratch:
        # The first time loads code and fills caches, and is not counted.
        costs(settings, recipe, PLAIN_OURS, Path(scratch))
        start, step = costs(settings, recipe, PLAIN_OURS, Path(scratch))

    return {
        "task": task,
        "steps": round(start.seconds / step.seconds, 1),
        "memory": round(start.peak / step.peak, 2),
        "start": {"seconds": round(start.seconds, 3), "peak": start.peak},
        "step": {"seconds": round(step.seconds, 4), "peak": step.peak},
        **provenance(),
    }


def main() -> None:
    """Measures, and keeps what is known of the other tasks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the folder with the data")
    parser.add_argument("--model", default="", help="the folder of MiniLM-L6, for sst2")
    parser.add_argument("--tasks", type=words, default=TASKS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    known = {}
    if COSTS.is_file():
        known = {row["task"]: row for row in read_json(COSTS)}

    for task in args.tasks:
        known[task] = measured(task, args.data, args.model)
        print(f"{task}: {known[task]['steps']} steps, {known[task]['memory']} x the memory", flush=True)
        write_json(COSTS, [known[name] for name in TASKS if name in known])


if __name__ == "__main__":
    main()
