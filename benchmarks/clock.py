"""Timing: methods take turns within every repeat, so that a busy spell of the machine meets all of them alike.

Both the wall clock and the processor time of the process are read. With one thread they agree on a machine that is
otherwise idle; on a busy one the wall clock counts the waiting for a core as well.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

Step = Callable[[], object]
Times = list[tuple[float, float]]  # seconds by the wall clock and of the processor, for each repeat


@dataclass(frozen=True)
class Budget:
    """How long to measure: until ``seconds`` have passed, but between ``least`` and ``most`` repeats of every method.

    A machine so busy that ``least`` repeats would take three times as long is let off after two.
    """

    warmup: int
    least: int
    most: int
    seconds: float

    def shortened(self) -> Budget:
        """A smoke run: one warm-up, two repeats."""
        return Budget(1, 2, 2, 0.0)


def interleave(
    steps: Mapping[str, Step], budget: Budget, seed: int = 0, wait: Callable[[], None] | None = None
) -> dict[str, Times]:
    """The times of each repeat of each step.

    Args:
        steps: by name. In every repeat each runs once, in an order drawn anew, so that none always follows another.
        budget: how often.
        seed: of the orders.
        wait: called before the clock is read; on a GPU, its synchronisation.
    """
    order, draw = list(steps), random.Random(seed)
    for name in order * budget.warmup:
        steps[name]()
    times: dict[str, Times] = {name: [] for name in order}
    begun = time.perf_counter()
    for repeat in range(budget.most):
        passed = time.perf_counter() - begun
        if passed > (budget.seconds if repeat >= budget.least else 3 * budget.seconds) and repeat >= 2:
            break
        draw.shuffle(order)
        for name in order:
            times[name].append(seconds(steps[name], wait))
    return times


def seconds(step: Step, wait: Callable[[], None] | None = None) -> tuple[float, float]:
    """Of one run, by the wall clock and of the processor."""
    if wait is not None:
        wait()
    begun, worked = time.perf_counter(), time.process_time()
    step()
    if wait is not None:
        wait()
    return time.perf_counter() - begun, time.process_time() - worked


def summary(times: Times) -> dict[str, Any]:
    """Median, quartiles and extremes of the wall times, the median processor time, and all times; in milliseconds."""
    wall, processor = ([round(1e3 * pair[part], 3) for pair in times] for part in (0, 1))
    low, middle, high = statistics.quantiles(wall, n=4, method="inclusive") if len(wall) > 1 else wall * 3
    figures = {"median": middle, "q1": low, "q3": high, "min": min(wall), "max": max(wall)}
    figures["cpu_median"] = statistics.median(processor)
    return {**{key: round(value, 4) for key, value in figures.items()}, "raw": wall, "cpu_raw": processor}


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Runs the body with that many threads within operations."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
