"""What the trainings say: means, paired differences with their intervals, and Holm's correction over the pairs."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from scipy.stats import t as student

from flora.comparison.starts import NOT_CUT

CONFIDENCE = 0.95
OURS = "flora-blocks"
# What ours is where the shapes ask for no blocks.
PLAIN_OURS = "flora-gradient"
SEARCH_SEEDS = 3  # that a learning rate has to have been tried with before it may be chosen

Scores = dict[int, float]  # seed -> what was measured


class Cell(NamedTuple):
    """A method on a task at a learning rate.

    Attributes:
        rate: the learning rate.
        validation, test: by seed.
        lines: the trainings.
    """

    rate: float
    validation: Scores
    test: Scores
    lines: list[Mapping[str, Any]]


class Difference(NamedTuple):
    """Ours minus another method, seed by seed.

    Attributes:
        mean: of the differences.
        half: half the interval of Student's t, NaN for a single seed.
        p: of the two-sided test that the mean is zero.
        count: of the seeds that both have.
    """

    mean: float
    half: float
    p: float
    count: int


class Setting(NamedTuple):
    """What all trainings of a table share.

    Attributes:
        length: times the steps.
        budget: which of the task's budgets, 0 for its smallest.
        probe: epochs that a new head was trained alone before.
    """

    length: int = 1
    budget: int = 0
    probe: float = 0.0


PLAIN = Setting()


def budgets_of(lines: Iterable[Mapping[str, Any]]) -> dict[str, list[int]]:
    """Task -> its budgets, from the smallest."""
    found: dict[str, set[int]] = defaultdict(set)
    for line in lines:
        if line["budget"] is not None:
            found[line["task"]].add(line["budget"])

    return {task: sorted(own) for task, own in found.items()}


def settings(lines: Sequence[Mapping[str, Any]]) -> list[Setting]:
    """Those that there are adapters' trainings in, the plain one first."""
    budgets = budgets_of(lines)
    return sorted(
        {
            Setting(line["length"], budgets[line["task"]].index(line["budget"]), line.get("probe", 0.0))
            for line in lines
            if line["budget"] is not None
        },
        key=lambda found: (found.probe, found.budget, found.length),
    )


def cells(lines: Sequence[Mapping[str, Any]], setting: Setting = PLAIN) -> dict[tuple[str, str], list[Cell]]:
    """(task, method) -> a cell for each learning rate; of equal trainings the last.

    Ours has the cells of the same without blocks where there is nothing to cut.
    """
    budgets = budgets_of(lines)
    latest: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for line in lines:
        place = 0 if line["budget"] is None else budgets[line["task"]].index(line["budget"])
        own = Setting(line["length"], place, line.get("probe", 0.0))
        # A method without a budget is a row of every budget's table.
        if line["budget"] is None:
            own = own._replace(budget=setting.budget)

        if line.get("test") is not None and own == setting:
            latest[line["task"], line["method"], line["learning_rate"], line["seed"]] = line

    found: dict[tuple[str, str], dict[float, list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for line in latest.values():
        found[line["task"], line["method"]][line["learning_rate"]].append(line)
    by_place = {
        place: [
            Cell(
                rate,
                {line["seed"]: line["validation"] for line in own},
                {line["seed"]: line["test"] for line in own},
                own,
            )
            for rate, own in sorted(by_rate.items())
        ]
        for place, by_rate in found.items()
    }

    for task in tasks_not_cut(lines):
        if (task, PLAIN_OURS) in by_place:
            by_place[task, OURS] = by_place[task, PLAIN_OURS]

    return by_place


def tasks_not_cut(lines: Iterable[Mapping[str, Any]]) -> set[str]:
    """Those on which ours has nothing to cut into blocks."""
    return {line["task"] for line in lines if line["method"] == OURS and line.get("refused") == NOT_CUT}


def at_rate(listed: Sequence[Cell], rate: float) -> Cell | None:
    """The cell of one learning rate."""
    return next((cell for cell in listed if cell.rate == rate), None)


def best(listed: Sequence[Cell]) -> Cell | None:
    """The cell of the rate that is best on validation, over the seeds that all the rates have."""
    usable = [cell for cell in listed if len(cell.validation) >= SEARCH_SEEDS]
    if not usable:
        return None
    shared = set.intersection(*[set(cell.validation) for cell in usable])
    return max(usable, key=lambda cell: statistics.fmean(cell.validation[seed] for seed in shared or cell.validation))


def difference(ours: Scores, theirs: Scores) -> Difference | None:
    """Ours minus theirs over the seeds that both have; None where there is none."""
    pairs = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    if not pairs:
        return None
    mean = statistics.fmean(pairs)
    if len(pairs) < 2:
        return Difference(mean, math.nan, math.nan, 1)
    error = statistics.stdev(pairs) / math.sqrt(len(pairs))
    half = float(student.ppf((1 + CONFIDENCE) / 2, len(pairs) - 1)) * error
    if not error:
        return Difference(mean, 0.0, 1.0 if not mean else 0.0, len(pairs))
    p = 2 * float(student.sf(abs(mean) / error, len(pairs) - 1))
    return Difference(mean, half, p, len(pairs))


def steps_to(curve: Sequence[Sequence[float]], score: float) -> float:
    """The first measured step at which a curve is at least as high as that; infinite where it never is."""
    return next((float(step) for step, own in curve if own >= score), math.inf)


def relative_steps(ours: Cell, theirs: Cell) -> dict[int, float]:
    """Seed -> our first step at the other's final validation score, in its number of steps."""
    curves = [{line["seed"]: line["curve"] for line in cell.lines if "curve" in line} for cell in (ours, theirs)]
    shared = sorted(curves[0].keys() & curves[1].keys())
    return {seed: steps_to(curves[0][seed], curves[1][seed][-1][1]) / curves[1][seed][-1][0] for seed in shared}


def holm(values: Mapping[str, float]) -> dict[str, float]:
    """Corrected p-values: the smallest times their number, the next times one fewer, never falling (Holm 1979)."""
    corrected, highest = {}, 0.0
    known = {name: value for name, value in values.items() if not math.isnan(value)}
    for index, name in enumerate(sorted(known, key=known.__getitem__)):
        highest = max(highest, min(1.0, (len(known) - index) * known[name]))
        corrected[name] = highest
    return corrected


def interval(scores: Scores) -> tuple[float, float]:
    """The mean, and half the interval of Student's t."""
    values = list(scores.values())
    if len(values) < 2:
        return values[0], math.nan
    error = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), float(student.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * error
