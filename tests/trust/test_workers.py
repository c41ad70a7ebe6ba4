"""Threads that train, and processes that are forked or spawned, compute what one thread alone computes."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from peft import get_peft_model
from tiny_recipe import Task, load_base, load_data
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import flora


def adapted(seed: int) -> Any:
    """The tiny model with an adapter that does something."""
    torch.manual_seed(seed)
    config = flora.FloraConfig(target_modules="all", r=2, init_weights=False)
    return get_peft_model(load_base(Task()), config)  # type: ignore[arg-type]


def train(model: Any, seed: int) -> list[float]:
    data = load_data(Task(), seed).train
    batch = {key: torch.stack([data[index][key] for index in range(6)]) for key in data[0]}
    optimizer = torch.optim.Adam([value for value in model.parameters() if value.requires_grad], lr=0.01)
    losses = []

    for _ in range(20):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    return losses


def test_two_threads_train_two_models_as_one_after_the_other() -> None:
    alone = [train(adapted(seed), seed) for seed in (3, 4)]
    models, found = [adapted(3), adapted(4)], {}
    threads = [
        threading.Thread(target=lambda place, seed: found.update({place: train(models[place], seed)}), args=pair)
        for pair in ((0, 3), (1, 4))
    ]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    for place, losses in enumerate(alone):
        assert losses[-1] < losses[0]
        assert found[place] == pytest.approx(losses, abs=1e-6)


class Features(Dataset[Tensor]):
    """What an adapted model makes of each sample, computed where the sample is loaded."""

    def __init__(self, model: Any) -> None:
        self.model, self.data = model, load_data(Task(), 0).test

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    @torch.no_grad()
    def __getitem__(self, index: int) -> Tensor:
        return self.model(pixel_values=self.data[index]["pixel_values"][None]).logits[0]


@pytest.mark.parametrize("way", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_workers_have_the_adapter(way: str) -> None:
    features = Features(adapted(3).eval())
    expected = torch.stack([features[index] for index in range(len(features))])
    loaded = torch.cat(list(DataLoader(features, batch_size=2, num_workers=1, multiprocessing_context=way)))
    torch.testing.assert_close(loaded, expected)

    with features.model.disable_adapter():
        assert not torch.allclose(features[0], expected[0], atol=1e-3)
