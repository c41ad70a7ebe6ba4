"""A long training takes no more memory and no more time at its end than at its beginning."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest
import torch
from peft import get_peft_model
from tiny_recipe import Task, load_base, load_data

import flora

STEPS, PART = 20_000, 500
LATER, SLOWER = 1.02, 1.05  # times the memory and the time of the beginning


@pytest.mark.slow
def test_twenty_thousand_steps(capsys: pytest.CaptureFixture[str]) -> None:
    model = get_peft_model(load_base(Task()), flora.FloraConfig(target_modules="all", r=2))  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-3)
    data = load_data(Task(), 0).train
    batch = {key: torch.stack([data[index][key] for index in range(6)]) for key in data[0]}
    process, seconds, memory = psutil.Process(), [], []

    for _ in range(STEPS // PART):
        started = time.process_time()

        for _ in range(PART):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()

        seconds.append(time.process_time() - started)
        memory.append(process.memory_info().rss)

    # The quickest part of a quarter, since another process can only slow it down.
    quarter = len(seconds) // 4
    grown = memory[-1] / memory[1]
    slowed = min(seconds[-quarter:]) / min(seconds[1 : quarter + 1])

    with capsys.disabled():
        print(f"\n{STEPS} steps: memory x {grown:.4f}, time of a step x {slowed:.3f}")

    assert grown < LATER
    assert slowed < SLOWER


@pytest.mark.slow
def test_attaching_and_taking_off_five_hundred_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process, memory = psutil.Process(), []
    base = load_base(Task())
    names = set(dict(base.named_modules()))

    for _ in range(500):
        base = get_peft_model(base, flora.FloraConfig(target_modules="all", r=2)).unload()
        memory.append(process.memory_info().rss)

    assert set(dict(base.named_modules())) == names
    grown = memory[-1] / memory[50]

    with capsys.disabled():
        print(f"\n500 times on and off: memory x {grown:.4f}")

    assert grown < LATER
