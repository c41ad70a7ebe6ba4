"""Many small trainings, one JSON line each: ``python -m benchmarks.quality.run --data FOLDER --results FILE.jsonl``.

A line that is in the results is not run again, so a run that was cut short goes on, and several machines can share the
work (``--shard 0/3``, a file each). What the trainings say is told by ``python -m benchmarks.quality.page``.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
TASKS = ("cifar", "hippocampus", "spoken", "sst2", "digits", "experts")
MAIN = ("lora", "lora-gradient", "lycoris", "flora", "flora-gradient", "flora-blocks", "full", "bitfit")
RIVALS = ("rslora", "dora", "pissa", "lora-ga", "eva", "miss", "hira", "oft", "loha", "lokr", "authors")
GROUPS = {"main": MAIN, "rivals": RIVALS, "all": (*MAIN, *RIVALS, "flora-ranks", "flora-norms", "frozen")}
RATE = 0.01  # of the setting without tuning
POINTS = 12  # of a validation curve
DIGITS = 8600  # parameters, about what LoRA of rank 4 has there


@dataclass(frozen=True)
class Line:
    """What identifies a training."""

    task: str
    method: str
    budget: int | None
    learning_rate: float
    seed: int
    length: int
    probe: float = 0.0  # epochs of the head alone before


def known(line: Mapping[str, Any]) -> Line:
    """What identifies a line of the results; the older ones lack the newer fields."""
    return Line(**{name: line[name] for name in Line.__dataclass_fields__ if name in line})


@cache
def settings_of(task: str, data: str, model: str, probe: float = 0.0) -> Any:
    """The settings of a task, with its data where it is here."""
    from flora.runs.settings import read

    if task == "digits":
        return read("digits", [f"compare.budgets=[{DIGITS}]", f"compare.probe_epochs={probe}"])
    overrides = [f"task.data={data}", f"compare.probe_epochs={probe}"]
    overrides += [f"task.model={model}"] if task == "sst2" else []
    return read(str(FOLDER / f"{task}.yaml"), overrides)


def planned(args: argparse.Namespace) -> Iterator[Line]:
    """The trainings that are asked for: the first rate with all seeds, a seed of everything first."""
    from flora.comparison import methods

    for length, rate, seed, task in product(args.lengths, args.rates, args.seeds, args.tasks):
        budgets = settings_of(task, args.data, args.model).comparison.budgets
        for method in args.methods:
            for budget in budgets[: args.budgets] if methods.METHODS[method].matched else [None]:
                yield Line(task, method, budget, rate, seed, length, args.probe)


def stored(files: Iterable[Path]) -> list[dict[str, Any]]:
    """The lines of all results; a last line that was cut off is left out."""
    found = []
    for file in files:
        for text in file.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(text))
            except json.JSONDecodeError:
                print(f"{file}: a line that is cut off is left out", file=sys.stderr)
    return found


def train(line: Line, data: str, model: str, points: int = 0) -> dict[str, Any]:
    """One training on one thread, and everything that a table may need of it.

    Args:
        line: which one.
        data, model: folders.
        points: how often validation is measured on the way.
    """
    import torch
    from transformers.utils import logging

    from flora.comparison.rivals import RefusedError
    from flora.comparison.trial import Run, train_once
    from flora.report.provenance import provenance
    from flora.runs.training import measure

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    settings = settings_of(line.task, data, model, line.probe)
    recipe = settings.load_recipe()
    run = Run(line.method, line.budget, line.learning_rate, line.seed, final=True, length=line.length)
    began = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            trained = train_once(settings, recipe, run, Path(scratch), points)
            test = measure(trained.trainer, trained.data.test)[recipe.METRIC]
        result = {
            "validation": trained.result["validation"][recipe.METRIC],
            "test": test,
            "parameters": trained.result["trainable_parameters"],
            "steps": trained.result["steps"],
            "seconds": trained.result["seconds"],
            "start": trained.result.get("start"),
            **({"curve": trained.result["curve"]} if points else {}),
        }
    except RefusedError as error:
        result = {"refused": str(error)}
    except Exception as error:  # a training that fails is a line too, so that the others go on
        result = {"failed": f"{type(error).__name__}: {error}"[:300]}
    if "test" in result and not math.isfinite(result["test"]):
        result = {"refused": "the result is not a number"}
    return {
        **vars(line),
        "metric": recipe.METRIC,
        **result,
        "wall": round(time.perf_counter() - began, 2),
        **provenance(),
    }


def run_all(lines: Sequence[Line], args: argparse.Namespace) -> None:
    """Trains in several processes until the time is up; what has begun is finished."""
    deadline = time.monotonic() + 60 * args.minutes
    waiting, running = list(lines), set[Future[dict[str, Any]]]()
    args.results.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    done = 0
    with ProcessPoolExecutor(args.jobs, context) as pool, args.results.open("a", encoding="utf-8") as file:
        while running or (waiting and time.monotonic() < deadline):
            while waiting and len(running) < args.jobs and time.monotonic() < deadline:
                running.add(pool.submit(train, waiting.pop(0), args.data, args.model, POINTS * args.curve))
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                result = future.result()
                file.write(json.dumps(result) + "\n")
                file.flush()
                done += 1
                print(f"{done}/{len(lines)} {told(result)}", flush=True)


def told(result: dict[str, Any]) -> str:
    """A training in a line."""
    what = f"{result['task']} {result['method']} {result['budget'] or ''} lr {result['learning_rate']:g}"
    said = result.get("refused") or result.get("failed")
    if said is None:
        said = f"validation {result['validation']:.4f}, test {result['test']:.4f}"
    begun = f", step {result['start']['step']:g}" if result.get("start") else ""
    return f"{what} seed {result['seed']} x{result['length']}: {said}{begun} ({result['wall']:.1f} s)"


def words(text: str) -> list[str]:
    """``a,b`` -> ["a", "b"]."""
    return [word for word in text.split(",") if word]


def methods_of(text: str) -> list[str]:
    """``main,oft`` -> the main ones and OFT."""
    return [method for word in words(text) for method in GROUPS.get(word, (word,))]


def arguments() -> argparse.Namespace:
    """What is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the folder with the data")
    parser.add_argument("--model", default="", help="the folder of MiniLM-L6, for sst2")
    parser.add_argument("--results", type=Path, required=True, help="the file that gets a line for each training")
    parser.add_argument("--known", type=Path, nargs="*", default=[], help="further results that are not run again")
    parser.add_argument("--tasks", type=words, default=list(TASKS))
    parser.add_argument("--methods", type=methods_of, default=list(MAIN), help=f"names, or {', '.join(GROUPS)}")
    parser.add_argument("--rates", type=lambda text: [float(word) for word in words(text)], default=[RATE])
    parser.add_argument("--seeds", type=lambda text: [int(word) for word in words(text)], default=list(range(5)))
    parser.add_argument("--lengths", type=lambda text: [int(word) for word in words(text)], default=[1])
    parser.add_argument("--budgets", type=int, default=1, help="how many of a task's budgets, the first ones")
    parser.add_argument("--probe", type=float, default=0.0, help="epochs that a new head is trained alone before")
    parser.add_argument("--curve", action="store_true", help="measure validation on the way too")
    parser.add_argument("--shard", default="0/1", help="which part of the work, such as 0/3")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--minutes", type=float, default=600, help="no training is begun after that")
    return parser.parse_args()


def main() -> None:
    """Runs what is not in the results yet."""
    args = arguments()
    files = [file for file in [args.results, *args.known] if file.is_file()]
    done = {known(line) for line in stored(files) if "failed" not in line and ("curve" in line or not args.curve)}
    lines = [line for line in planned(args) if line not in done]
    part, parts = (int(word) for word in args.shard.split("/"))
    mine = lines[part::parts]
    print(f"{len(mine)} trainings", flush=True)
    run_all(mine, args)


if __name__ == "__main__":
    main()
