"""The page of the trainings: which rate is chosen, what the intervals are, and what is corrected."""

from __future__ import annotations

import math
from typing import Any

import pytest
from benchmarks.quality.page import render
from benchmarks.quality.pairs import best, cells, difference, holm
from scipy.stats import ttest_rel


def line(method: str, seed: int, test: float, *, rate: float = 0.01, validation: float = 0.5) -> dict[str, Any]:
    return {
        "task": "cifar", "method": method, "budget": 8000, "learning_rate": rate, "seed": seed, "length": 1,
        "validation": validation, "test": test, "steps": 60, "seconds": 6.0,
        "start": {"step": 0.01, "seconds": 1.0, "left_out": []} if method == "flora-gradient" else None,
        "machine": {"cores": 2, "device": "cpu"}, "versions": {"torch": "2"}, "commit": "abc",
    }  # fmt: skip


OURS, THEIRS = [0.52, 0.50, 0.54, 0.51], [0.44, 0.45, 0.43, 0.47]
LINES = [line("flora-gradient", seed, value) for seed, value in enumerate(OURS)]
LINES += [line("lora", seed, value) for seed, value in enumerate(THEIRS)]


def test_the_difference_is_that_of_the_paired_test() -> None:
    found = difference(dict(enumerate(OURS)), dict(enumerate(THEIRS)))
    assert found is not None
    oracle = ttest_rel(OURS, THEIRS)
    assert found.p == pytest.approx(oracle.pvalue)
    low, high = oracle.confidence_interval(0.95)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    assert math.isnan(difference({0: 1.0}, {0: 0.5}).half)  # type: ignore[union-attr]
    assert difference({0: 1.0}, {1: 0.5}) is None


def test_holms_correction() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": math.nan}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.7, "b": 0.9}) == {"a": 1.0, "b": 1.0}


def test_the_rate_is_chosen_on_validation_and_by_enough_seeds() -> None:
    more = [line("lora", seed, 0.1, rate=0.03, validation=0.6) for seed in range(3)]
    more += [line("lora", seed, 0.9, rate=0.1, validation=0.9) for seed in range(2)]
    chosen = best(cells([*LINES, *more])["cifar", "lora"])
    assert chosen is not None
    assert chosen.rate == 0.03


def test_the_page_says_who_is_ahead() -> None:
    refusal = {**line("pissa", 0, 0.0), "refused": "no layer"} | {"test": None}
    spent = [{"task": "cifar", "steps": 7.3, "memory": 1.02}]
    page = render([*LINES, refusal], [{"task": "a way", "validation": "0.4"}], spent)
    assert "The best means over the tasks: FLoRA, gradient start 0.51" in page
    assert "a way" in page
    assert "1.02" in page
    assert "± 0.027 (n=4, 0.01)" in " ".join(page.split())
    assert "| **+0.070 ± 0.050, n=4, p=0.021** |" in " ".join(page.split())
    assert "over the 1 pairs" in page
    assert "4 trainings" not in page
    assert "commit abc" in page
