"""``compare``: one task, several methods and seeds, adapters at matched trainable parameters.

Each method's learning rate is chosen by its mean validation score over the first three seeds, unless only one is given.
As long as a method chooses a rate at an edge of the grid, the grid is extended for all methods. Only the final runs use
the test set. Every run is written when it ends and found again: an interrupted comparison continues where it stopped.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

from peft import PeftModel
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers import Trainer

from flora.comparison.methods import METHODS
from flora.comparison.rivals import RefusedError, default_budget
from flora.comparison.trial import Run, train_once
from flora.errors import UserError, nearest
from flora.recipes import Data, Recipe
from flora.report.card import model_card
from flora.report.comparison import comparison_page
from flora.report.comparison_html import comparison_html
from flora.report.plots import quality_against_parameters
from flora.report.provenance import provenance, subject, versions
from flora.runs.merging import verified_merge
from flora.runs.run_folder import ADAPTER, ADAPTER_CONFIG, LABELS, METRICS, RUN
from flora.runs.settings import Settings
from flora.runs.training import measure
from flora.storage.atomic import check_target, claim, clear_parts, read_json, staged, write_json, write_text
from flora.storage.replacing import check_replaceable
from flora.tuner.statistics import logger

# The method whose first adapter is kept, ready to load.
KEPT = "flora"
# How many seeds the learning rate is chosen on.
SEARCH_SEEDS = 3
# Who tells of batch norms that keep their statistics, and of new weights of a head.
NOTICES = (logger, logging.getLogger("transformers.modeling_utils"))
# How often the grid of learning rates is extended at most.
EXTENSIONS = 2


class Contender(NamedTuple):
    """What has a line in the table of a comparison: a method, and how many parameters it may spend if it can choose."""

    method: str
    budget: int | None


@dataclass(frozen=True)
class Bench:
    """What all runs share.

    Args:
        settings: of the task.
        recipe: of it.
        folder: of the comparison.
        scratch: a folder for what is thrown away, which goes with the claim on the comparison.
        kept: the budget at which FLoRA's adapter is kept.
    """

    settings: Settings
    recipe: Recipe
    folder: Path
    scratch: Path
    kept: int | None = None

    def result(self, run: Run) -> dict[str, Any]:
        """The run's result: the stored one if all its settings are the same, else that of running it now."""
        path = self.folder / "runs" / f"{run.name}.json"
        identity = self._identity(run)

        stored = read_json(path) if path.is_file() else {}

        if isinstance(stored, dict) and stored.get("identity") == identity:
            return cast("dict[str, Any]", stored)

        try:
            found = self._run(run)
        except RefusedError as error:
            found = {"refused": str(error)}

        result = {"identity": identity, **found, **provenance()}
        write_json(path, result)

        return result

    def _identity(self, run: Run) -> dict[str, Any]:
        given = self.settings.as_dict()
        shared = {key: given[key] for key in ("recipe", "task", "adapter", "training")}
        ways = {key: given["compare"][key] for key in ("scale", "probe_epochs")}
        return {"run": asdict(run), **shared, **ways, "versions": versions()}

    def _is_kept(self, run: Run) -> bool:
        """Whether the run's adapter is the one that is kept."""
        return run.final and (run.method, run.seed, run.budget) == (KEPT, self.settings.seed, self.kept)

    def _run(self, run: Run) -> dict[str, Any]:
        # Training takes long, so what its adapter would replace is looked at first.
        if self._is_kept(run):
            check_target(self.folder / KEPT, RUN, overwrite=True)

        with tempfile.TemporaryDirectory(dir=self.scratch) as scratch:
            trainer, data, result = train_once(self.settings, self.recipe, run, Path(scratch))
            if run.final:
                return {**result, **self._final(run, trainer, data, result)}
            return result

    def _final(self, run: Run, trainer: Trainer, data: Data, result: dict[str, Any]) -> dict[str, Any]:
        """The test metrics, the size of the file, and how far the merged model is from the unmerged one."""
        model = cast("nn.Module", trainer.model)
        found: dict[str, Any] = {"test": measure(trainer, data.test)}
        found["file_bytes"] = _file_bytes(model, self.scratch)

        if not isinstance(model, PeftModel):
            return found
        if self._is_kept(run):
            self._keep(run, model, data, {**result, **found})

        batch = next(iter(trainer.get_eval_dataloader(data.test)))
        inputs = {key: value.to(trainer.args.device) for key, value in batch.items() if key != "labels"}

        try:
            _, difference, _ = verified_merge(model, inputs)
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            # The adapters of other libraries fail in these ways.
            if run.method == KEPT:
                raise
            return {**found, **_merge_failure(error)}

        return {**found, "merge_difference": difference}

    def _keep(self, run: Run, model: PeftModel, data: Data, result: dict[str, Any]) -> None:
        """Writes the adapter as an output folder that ``flora eval``, ``merge`` and ``inspect`` take."""
        training = {**self.settings.training, "learning_rate": run.learning_rate}
        adapter = {**self.settings.adapter, "budget": run.budget}
        target = self.folder / run.method

        with staged(target, RUN, overwrite=True, wait=True) as new:
            new.mkdir()
            model.save_pretrained(str(new))

            if data.processor is not None:
                data.processor.save_pretrained(new)
            if data.labels is not None:
                write_json(new / LABELS, data.labels)

            replace(self.settings, training=training, adapter=adapter, output=target).save(new)
            metrics = {"recipe": self.settings.recipe, **result, "adapter_bytes": result["file_bytes"]}

            classes = len(data.labels) if data.labels is not None else None

            card = model_card(metrics, read_json(new / ADAPTER_CONFIG), str(target), classes)
            write_text(new / "README.md", card)
            write_json(new / METRICS, {**metrics, **provenance()})


def _merge_failure(error: Exception) -> dict[str, str]:
    """Why a rival's adapter cannot be merged, in words, and what was raised."""
    raised = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"

    # What we say is what is wrong, and then what to do about our own merge.
    if isinstance(error, UserError):
        reason = str(error).partition(";")[0]
    else:
        reason = "the merge of its library fails on a layer of this model; compare.json has what it raised"

    return {"merge_error": reason, "merge_raised": raised}


def _file_bytes(model: nn.Module, folder: Path) -> int:
    """The size of the file that holds what was trained: the adapter, or the trained parameters of the model."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        path = Path(scratch) / ADAPTER

        if isinstance(model, PeftModel):
            model.save_pretrained(scratch)
        else:
            trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
            save_file({name: value.detach().cpu().contiguous() for name, value in trained.items()}, path)

        return path.stat().st_size


def compare(
    settings: Settings, methods: Sequence[str], seeds: Sequence[int], *, overwrite: bool = False
) -> dict[str, Any]:
    """Runs every method with every seed at every budget and writes the report into ``<output>-compare``.

    Args:
        settings: of the runs; ``settings.comparison`` has the budgets and the grid of learning rates.
        methods: keys of ``METHODS``; ["all"] is all of them.
        seeds: of the final runs; the first three are those of the search for the learning rate.
        overwrite: runs everything again; otherwise finished runs with the same settings are kept.

    Returns:
        What is in ``compare.json``.

    Raises:
        ValueError: a method is unknown, or there is no method or seed.
    """
    if list(methods) == ["all"]:
        methods = list(METHODS)

    for method in methods:
        if method not in METHODS:
            raise UserError(f"unknown method {method!r}, expected {', '.join(METHODS)}{nearest(method, list(METHODS))}")

    for option, given in (("--methods", list(methods)), ("--seeds", list(seeds))):
        if not given or len(set(given)) < len(given):
            raise UserError(f"{option} is {','.join(map(str, given))!r}: give one or more, each of them once")

    folder = settings.output.with_name(f"{settings.output.name}-compare")
    _check_ours(folder)

    with claim(folder) as place, _each_notice_once():
        clear_parts(folder)
        clear_parts(folder / "runs")

        if overwrite:
            _remove_results(folder, place.folder)

        recipe = settings.load_recipe()
        budgets = _budgets(settings, recipe)
        bench = Bench(replace(settings, seed=seeds[0]), recipe, folder, place.folder, budgets[0])
        return _compare(bench, methods, seeds, budgets)


def _check_ours(folder: Path) -> None:
    """Raises a UserError if there is something else in the place of a comparison."""
    if not folder.exists() or (folder / "runs").is_dir():
        return

    if not folder.is_dir() or any(folder.iterdir()):
        raise UserError(f"{folder} is not a comparison of flora; set output=FOLDER to another place, or move it away")


def _remove_results(folder: Path, scratch: Path) -> None:
    """Removes what an earlier comparison wrote: its runs, the adapter that it kept and its report; nothing else.

    Args:
        folder: of the comparison.
        scratch: what goes with the claim on it, also after a kill.

    Raises:
        UserError: there is something else beside the adapter; nothing is removed.
    """
    kept = folder / KEPT
    if os.path.lexists(kept):
        check_replaceable(kept, kept, RUN)

    # The runs go first: an adapter whose run is still there would not be made again after a kill.
    for path in (folder / "runs").glob("*.json"):
        if _is_result(path):
            path.unlink()

    if os.path.lexists(kept):
        kept.rename(scratch / KEPT)
        shutil.rmtree(scratch / KEPT)

    for name in ("README.md", "compare.html", "compare.png", "compare.json"):
        (folder / name).unlink(missing_ok=True)


def _is_result(path: Path) -> bool:
    """Whether a file is the result of a run, and not a user's own."""
    try:
        found = read_json(path)
    except UserError:
        return False
    return isinstance(found, dict) and "identity" in found


def _compare(bench: Bench, methods: Sequence[str], seeds: Sequence[int], budgets: Sequence[int]) -> dict[str, Any]:
    settings, recipe = bench.settings, bench.recipe
    contenders = [
        Contender(method, budget) for method in methods for budget in (budgets if METHODS[method].matched else [None])
    ]

    with tqdm(unit="run") as bar:
        found = _search(bench, contenders, seeds, bar)
        rows = []
        for contender in contenders:
            search = found[contender]
            best = max(search, key=search.__getitem__, default=settings.comparison.learning_rates[0])
            finals = [_tell(bench, Run(*contender, best, seed, final=True), bar) for seed in seeds]
            named = {**contender._asdict(), "title": METHODS[contender.method].title}
            rows.append({**named, **_row(recipe.METRIC, search, best, finals)})

    report = {
        "recipe": settings.recipe,
        "subject": subject(settings.recipe, settings.task),
        "folder": str(bench.folder),
        "metric": recipe.METRIC,
        "seeds": list(seeds),
        "budgets": list(budgets),
        "rows": rows,
        "settings": settings.as_dict(),
        **provenance(),
    }
    _write(bench.folder, report)

    return report


@contextmanager
def _each_notice_once() -> Iterator[None]:
    """What is said of a base and of an adapter, for all trainings together, which would say the same."""
    said: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if text in said:
            return False

        said.add(text)
        return True

    for notices in NOTICES:
        notices.addFilter(is_new)

    try:
        yield
    finally:
        for notices in NOTICES:
            notices.removeFilter(is_new)


def _search(
    bench: Bench, contenders: Sequence[Contender], seeds: Sequence[int], bar: tqdm[Any]
) -> dict[Contender, dict[float, float]]:
    """The mean of validation over the first seeds, for every method and each learning rate of one grid for all.

    Nothing where there is one rate, as there is nothing to choose then.
    """
    rates = sorted(bench.settings.comparison.learning_rates)
    scores: dict[Contender, dict[float, float]] = {contender: {} for contender in contenders}
    if len(rates) == 1:
        return scores

    for _ in range(1 + EXTENSIONS):
        for contender, known in scores.items():
            for rate in rates:
                if rate not in known:
                    runs = [Run(*contender, rate, seed, final=False) for seed in seeds[:SEARCH_SEEDS]]
                    known[rate] = statistics.fmean(_score(_tell(bench, run, bar), bench.recipe) for run in runs)

            scores[contender] = dict(sorted(known.items()))

        chosen = {max(known, key=known.__getitem__) for known in scores.values() if max(known.values()) > -math.inf}
        wider = []
        if rates[0] in chosen:
            wider.append(rates[0] ** 2 / rates[1])
        if rates[-1] in chosen:
            wider.append(rates[-1] ** 2 / rates[-2])

        if not wider:
            break

        rates = sorted([*rates, *(float(f"{rate:.1g}") for rate in wider)])

    return scores


def _budgets(settings: Settings, recipe: Recipe) -> list[int]:
    given, rank = settings.comparison.budgets, settings.comparison.lora_r
    return list(given) or [default_budget(recipe.load_base(settings.task), settings.adapter, rank)]


def _score(result: dict[str, Any], recipe: Recipe) -> float:
    """The validation metric; below every other where there is none, or training diverged."""
    if "validation" in result:
        score = float(result["validation"][recipe.METRIC])
    else:
        score = -math.inf

    if math.isnan(score):
        return -math.inf

    return score


def _tell(bench: Bench, run: Run, bar: tqdm[Any]) -> dict[str, Any]:
    """Runs, and says so."""
    bar.set_description(f"{run.method} lr={run.learning_rate:g} seed={run.seed}")
    result = bench.result(run)

    what = f"final, seed {run.seed}" if run.final else "search"

    told = f"{run.method:<8} {run.budget or '':<8} lr {run.learning_rate:<8g} {what:<14}"

    if "refused" in result:
        bar.write(f"{told} refused: {result['refused']}")
    else:
        bar.write(f"{told} validation {_score(result, bench.recipe):.4f}  {result['seconds']:.1f} s")

    bar.update()

    return result


def _row(metric: str, search: dict[float, float], best: float, finals: list[dict[str, Any]]) -> dict[str, Any]:
    """A method's line of the table, with every number it is made of; or why there is none."""
    if refusals := [result["refused"] for result in finals if "refused" in result]:
        return {"refused": refusals[0]}

    values = [result["test"][metric] for result in finals]
    memory = [result["peak_memory"] for result in finals if result["peak_memory"] is not None]
    merged = [result["merge_difference"] for result in finals if "merge_difference" in result]

    return {
        "trainable_parameters": finals[0]["trainable_parameters"],
        "learning_rate": best,
        "mean": statistics.mean(values),
        "std": statistics.stdev(values) if len(values) > 1 else 0.0,
        "values": values,
        "validation": [result["validation"][metric] for result in finals],
        "search": {f"{rate:g}": score for rate, score in search.items()},
        "seconds": statistics.mean(result["seconds"] for result in finals),
        "seconds_per_step": statistics.median(result["seconds"] / result["steps"] for result in finals),
        "peak_memory": statistics.median(memory) if memory else None,
        "file_bytes": finals[0]["file_bytes"],
        "merge_difference": max(merged, default=None),
        "merge_error": finals[0].get("merge_error"),
        "runs": finals,
    }


def _write(folder: Path, report: dict[str, Any]) -> None:
    seeds = len(report["seeds"])
    title = f"{report['subject']}: {report['metric']}, {seeds} {'seed' if seeds == 1 else 'seeds'}"

    with staged(folder / "compare.png", overwrite=True, wait=True) as picture:
        quality_against_parameters(picture, report["rows"], report["metric"], title)

    write_text(folder / "README.md", comparison_page(report))
    write_json(folder / "compare.json", report)
    write_text(folder / "compare.html", comparison_html(report))
