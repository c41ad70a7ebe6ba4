"""What every test starts from: a fixed seed, one thread per worker, property tests that draw the same cases."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

settings.register_profile("flora", max_examples=60, deadline=None, derandomize=True, database=None)
settings.load_profile("flora")
torch.set_num_threads(1)  # pytest-xdist already runs a process per core


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
