"""The page of the trainings: which rate is chosen, what the intervals are, and what is corrected."""

from __future__ import annotations

import math
from typing import Any

import pytest
from benchmarks.quality.page import render
from benchmarks.quality.pairs import Setting, best, cells, difference, holm, relative_steps, settings
from scipy.stats import ttest_rel

from flora.comparison.starts import NOT_CUT


def line(method: str, seed: int, test: float, *, rate: float = 0.01, validation: float = 0.5) -> dict[str, Any]:
    return {
        "task": "cifar", "method": method, "budget": 8000, "learning_rate": rate, "seed": seed, "length": 1,
        "validation": validation, "test": test, "steps": 60, "seconds": 6.0,
        "start": {"step": 0.01, "seconds": 1.0, "left_out": []} if method == "flora-blocks" else None,
        "machine": {"cores": 2, "device": "cpu"}, "versions": {"torch": "2"}, "commit": "abc",
    }  # fmt: skip


OURS, THEIRS = [0.52, 0.50, 0.54, 0.51], [0.44, 0.45, 0.43, 0.47]
LINES = [line("flora-blocks", seed, value) for seed, value in enumerate(OURS)]
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
    assert "have all of them: FLoRA, gradient start, blocks 0.51" in page
    assert "a way" in page
    assert "1.02" in page
    assert "± 0.027 (n=4, 0.01)" in " ".join(page.split())
    assert "| **+0.070 ± 0.050, n=4, p=0.021** |" in " ".join(page.split())
    assert "over the 1 pairs" in page
    assert "4 trainings" not in page
    assert "commit abc" in page


def test_budgets_lengths_and_probes_have_tables_of_their_own() -> None:
    """Full fine-tuning has no budget and is in the tables of all; older lines have no probe."""
    more = [
        {**line("lora", 0, 0.6), "budget": 24000},
        {**line("flora-blocks", 0, 0.7), "budget": 24000},
        {**line("flora-blocks", 0, 0.8), "length": 3},
        {**line("flora-blocks", 0, 0.9), "probe": 2.0},
        {**line("full", 0, 0.3), "budget": None},
    ]
    lines = [*LINES, *more]
    expected = [Setting(), Setting(length=3), Setting(budget=1), Setting(probe=2.0)]
    assert settings(lines) == expected
    scores = [cells(lines, setting)["cifar", "flora-blocks"][0].test[0] for setting in expected]
    assert scores == [0.52, 0.8, 0.7, 0.9]
    assert cells(lines, expected[2])["cifar", "full"][0].test == cells(lines)["cifar", "full"][0].test == {0: 0.3}
    page = render(lines)
    for title in ("No tuning, 3 times the steps", "No tuning, budget 2", "alone for 2 epochs before"):
        assert title in page
    assert "Parameters of the adapters: 24,000 on cifar" in page


def test_steps_to_the_score_of_lora() -> None:
    ours = [{**line("flora-blocks", seed, 0.5), "curve": [[20, 0.3], [40, 0.5], [60, 0.6]]} for seed in (0, 1)]
    theirs = [{**line("lora", 0, 0.5), "curve": [[20, 0.1], [40, 0.2], [60, 0.4]]}]
    theirs += [{**line("lora", 1, 0.5), "curve": [[20, 0.1], [40, 0.8], [60, 0.7]]}]
    found = cells([*ours, *theirs])
    shares = relative_steps(found["cifar", "flora-blocks"][0], found["cifar", "lora"][0])
    assert shares == {0: pytest.approx(40 / 60), 1: math.inf}
    assert "| 1 of 2 " in render([*ours, *theirs])
    assert "Steps to LoRA" not in render(LINES)


def test_the_gain_of_the_start_at_each_rate() -> None:
    usual = [{**line("flora", seed, 0.4), "learning_rate": rate} for rate in (0.001, 0.01) for seed in range(3)]
    ours = [{**line("flora-gradient", seed, 0.5), "learning_rate": rate} for rate in (0.001, 0.01) for seed in range(3)]
    page = " ".join(render([*LINES, *usual, *ours]).split())
    assert "| 0.001 | +0.100 ± 0.000, n=3 |" in page
    assert "other learning rates" not in render(LINES)


def test_what_cannot_be_is_told_once_for_each_reason() -> None:
    refused = [{**line("oft", 0, 0.0), "task": task, "refused": "no layer"} for task in ("cifar", "digits", "cifar")]
    assert "* OFT: no layer (4-D; depthwise)" in render([*LINES, *refused])


def test_what_each_part_adds() -> None:
    ranks = [line("flora-ranks", seed, value + 0.01) for seed, value in enumerate(OURS)]
    plain = [line("flora-gradient", seed, value) for seed, value in enumerate(OURS)]
    page = " ".join(render([*LINES, *ranks, *plain]).split())
    assert "| the ranks, with the start | **+0.010 ± 0.000, n=4, p=0.000** |" in page
    assert "the start, on LoRA's form" not in page


def test_where_nothing_is_cut_ours_is_the_start_alone() -> None:
    plain = [line("flora-gradient", seed, value) for seed, value in enumerate(OURS)]
    refusal = {**line("flora-blocks", 0, 0.0), "refused": NOT_CUT} | {"test": None}
    lines = [*plain, *LINES[len(OURS) :], refusal]
    found = cells(lines)
    assert found["cifar", "flora-blocks"] is found["cifar", "flora-gradient"]

    page = " ".join(render(lines).split())
    assert "FLoRA, gradient start, blocks 0.51" in page
    assert "the blocks, with the start" not in page
    assert NOT_CUT not in page
