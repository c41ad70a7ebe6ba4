"""What the trainings say: means, paired differences with their intervals, and Holm's correction over the pairs."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from scipy.stats import t as student

CONFIDENCE = 0.95
OURS = "flora-gradient"
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


def cells(lines: Iterable[Mapping[str, Any]], length: int = 1) -> dict[tuple[str, str], list[Cell]]:
    """(task, method) -> a cell for each learning rate; of equal trainings the last, of several budgets the first."""
    latest: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for line in lines:
        if line.get("test") is not None and line["length"] == length:
            latest[line["task"], line["method"], line["budget"], line["learning_rate"], line["seed"]] = line
    found: dict[tuple[str, str], dict[float, list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for line in latest.values():
        found[line["task"], line["method"]][line["learning_rate"]].append(line)
    return {
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
