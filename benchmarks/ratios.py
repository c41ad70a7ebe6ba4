"""How much longer one method takes than another: the ratio within each repeat, and the median of those.

In a repeat every method runs once, within seconds of the others. So a busy spell of the machine, longer than that, is
in both times of a ratio; in the ratio of two medians it is not, since each median is of another moment.
"""

from __future__ import annotations

import statistics
from typing import Any

CLOCKS = {"raw": "wall clock", "cpu_raw": "processor time"}  # the times of all repeats, by each clock


def ratios(
    row: dict[str, Any], method: str, other: str, clock: str = "raw", mode: str | None = None
) -> list[float] | None:
    """Of a row's two methods, one for each repeat.

    Args:
        row: of a result.
        method, other: whose time is divided, and by whose.
        clock: a key of ``CLOCKS``.
        mode: the number of threads, or a GPU's mode; by default the headline's.

    Returns:
        The ratios, None where a method refused the row, or that mode was not measured.
    """
    found = [row["methods"].get(name, {}).get("ms") for name in (method, other)]
    if not all(found):
        return None
    if any(mode and mode not in times for times in found):
        return None
    own, reference = (times[mode or next(iter(times))][clock] for times in found)
    return [mine / theirs for mine, theirs in zip(own, reference, strict=True)]


def ratio(row: dict[str, Any], method: str, other: str, clock: str = "raw", mode: str | None = None) -> float | None:
    """The median of ``ratios``."""
    found = ratios(row, method, other, clock, mode)
    return statistics.median(found) if found else None


def spread(values: list[float]) -> float:
    """Half the interquartile range."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2
