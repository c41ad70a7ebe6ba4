"""What every test starts from: a fixed seed, one thread per worker, property tests that draw the same cases."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("flora", max_examples=60, deadline=None, derandomize=True, database=None)
settings.load_profile("flora")
torch.set_num_threads(1)  # pytest-xdist already runs a process per core


@pytest.fixture(scope="module", autouse=True)
def _forget_what_stays() -> None:
    """Each training collects garbage several times; what is imported by now is then not walked through again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What can be made again, such as a pretrained base, is made once for each module, apart from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
