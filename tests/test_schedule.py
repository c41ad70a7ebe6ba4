"""Settings of a run that cannot work are refused, others are fitted to the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from flora.recipes import config_names
from flora.runs import schedule
from flora.runs.schedule import check_schedule, fit_to_data, steps_of
from flora.runs.settings import read
from flora.runs.training import training_arguments


def arguments(folder: Path, **given: Any) -> TrainingArguments:
    return TrainingArguments(str(folder), report_to="none", use_cpu=True, **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight_decay": -0.1}, "training.weight_decay is -0.1, expected 0 or more"),
        ({"dataloader_num_workers": -1}, "training.dataloader_num_workers is -1, expected 0 or more"),
        ({"save_steps": 0}, "training.save_steps is 0, expected steps from 1, or a share of the run"),
        ({"learning_rate": 1000.0}, "training.learning_rate is 1000, expected above 0 and at most 1"),
        ({"learning_rate": -1.0}, "training.learning_rate is -1"),
        ({"learning_rate": float("nan")}, "training.learning_rate is nan"),
        ({"max_steps": 0}, "training.max_steps is 0, expected 1 or more"),
        ({"num_train_epochs": -1}, "training.num_train_epochs is -1, expected above 0"),
        ({"num_train_epochs": 0}, "training.num_train_epochs is 0"),
        ({"per_device_train_batch_size": 0}, "training.per_device_train_batch_size is 0, expected 1 or more"),
        ({"gradient_accumulation_steps": 0}, "training.gradient_accumulation_steps is 0"),
    ],
)
def test_settings_with_which_nothing_is_learnt_are_refused(tmp_path: Path, given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_schedule(arguments(tmp_path, **given))


def test_ordinary_settings_pass(tmp_path: Path) -> None:
    check_schedule(arguments(tmp_path))
    check_schedule(arguments(tmp_path, max_steps=3, num_train_epochs=0))  # max_steps wins


def test_there_are_no_more_workers_than_cores(tmp_path: Path) -> None:
    given = arguments(tmp_path, dataloader_num_workers=997)
    check_schedule(given)
    assert given.dataloader_num_workers == schedule.cores()


def test_a_small_data_set_gets_a_small_batch_and_is_told_what_will_disappoint(tmp_path: Path) -> None:
    given = arguments(tmp_path, per_device_train_batch_size=64, warmup_steps=500, num_train_epochs=10)
    notes = fit_to_data(given, 43)
    assert given.per_device_train_batch_size == 43
    assert [note.partition(" ")[0] for note in notes] == [
        "training.per_device_train_batch_size", "training.warmup_steps", "this",
    ]  # fmt: skip
    assert "lowered from 64 to 43" in notes[0]
    assert "500 in a run of 10 steps" in notes[1]
    assert "only 10 steps" in notes[2]


def test_a_long_run_is_left_alone(tmp_path: Path) -> None:
    given = arguments(tmp_path, per_device_train_batch_size=7, warmup_steps=0.1, num_train_epochs=5)
    assert fit_to_data(given, 101) == []
    assert given.per_device_train_batch_size == 7


class Numbers(Dataset[Any]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("nothing is read")


@pytest.mark.parametrize(
    ("count", "given"),
    [
        (43, {"per_device_train_batch_size": 8, "num_train_epochs": 3}),
        (43, {"per_device_train_batch_size": 8, "num_train_epochs": 3, "gradient_accumulation_steps": 4}),
        (5, {"per_device_train_batch_size": 2, "num_train_epochs": 1.5, "gradient_accumulation_steps": 7}),
        (11, {"per_device_train_batch_size": 11, "max_steps": 13}),
    ],
)
def test_steps_are_counted_as_the_trainer_counts_them(tmp_path: Path, count: int, given: Any) -> None:
    settings = arguments(tmp_path, **given)
    trainer = Trainer(nn.Linear(1, 1), settings, train_dataset=Numbers(count))
    # What the training loop itself works out before its first step.
    loader = trainer.get_train_dataloader()
    *_, max_steps = trainer.set_initial_training_values(settings, loader)
    assert steps_of(settings, count) == max_steps


FULL = [name for name in config_names() if not name.endswith("-tiny") and name != "digits"]  # its data are fixed


@pytest.mark.parametrize("name", FULL)
def test_the_defaults_of_a_recipe_fit_data_of_any_size(name: str, tmp_path: Path) -> None:
    """Warm-up, logging and evaluation are shares of the run or epochs; the best checkpoint is kept."""
    settings = read(name, ["training.bf16=false"] if "bf16" in read(name).training else [])
    given = training_arguments(settings, tmp_path)
    assert given.warmup_steps < 1, "a share of the run"
    assert 0 < given.logging_steps < 1
    assert given.eval_strategy == given.save_strategy
    assert given.eval_strategy == "epoch" or 0 < given.eval_steps < 1
    assert given.load_best_model_at_end
    assert given.dataloader_num_workers <= schedule.cores()
    assert given.learning_rate <= 0.05
    assert given.save_total_limit == 2
    fit_to_data(given, 7)
    assert given.per_device_train_batch_size <= 7
