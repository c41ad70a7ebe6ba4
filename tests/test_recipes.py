"""Recipes and their configs, the digits data, settings."""

from __future__ import annotations

import importlib
import re
import sys
from dataclasses import fields
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from transformers import EvalPrediction

from flora.data.hub import hub
from flora.data.samples import locate, sample_names
from flora.recipes import CONFIGS, config_names, digits, load_recipe, recipe_names
from flora.runs.settings import read


def test_every_config_is_checked_against_its_recipe() -> None:
    names = config_names()
    assert len(names) == 25
    ids = 0
    for name in names:
        settings = read(name)
        assert settings.recipe in recipe_names()
        assert settings.recipe == name.partition("-")[0]
        for where in (getattr(settings.task, key, None) for key in ("model", "data", "images")):
            if where is None or where.startswith("./"):  # a folder that the user fills
                continue
            if name.endswith("-tiny"):
                assert where.removeprefix("sample:") in sample_names()
            else:
                assert re.fullmatch(r"[\w.-]+/[\w.-]+", where), f"{name}: {where} is no hub id"
                ids += 1
        assert (CONFIGS / f"{name}.yaml").read_text().startswith(f"# flora train {name}\n")
        assert settings.output == Path("outputs") / name
    assert ids >= 15


def test_every_recipe_has_the_names_of_the_contract() -> None:
    assert len(recipe_names()) == 10
    for name in recipe_names():
        recipe = load_recipe(name)
        for item in ("Task", "METRIC", "load_base", "load_data", "compute_metrics"):
            assert hasattr(recipe, item), f"{name}: {item}"


def test_saved_settings_read_back_the_same(tmp_path: Path) -> None:
    settings = read("digits", ["adapter.rank_pattern={dwconv: [4, 1, 2, 2]}", "training.learning_rate=1e-3", "seed=7"])
    settings.save(tmp_path)
    again = read(str(tmp_path / "config.yaml"))
    assert again == settings
    assert again.training["learning_rate"] == 1e-3
    assert again.adapter["rank_pattern"] == {"dwconv": [4, 1, 2, 2]}


def test_no_image_is_in_two_sets() -> None:
    parts = digits.splits()
    assert sorted(parts) == ["base", "pool", "test", "validation"]
    for one, other in combinations(parts.values(), 2):
        assert not set(one) & set(other)
    assert sum(map(len, parts.values())) == 1797
    source = load_digits()
    images = [bytes(source.images[index]) for part in parts.values() for index in part]
    assert len(set(images)) == len(images)


def test_few_labels_drawn_by_the_seed() -> None:
    task = digits.Task(labels_per_class=3)
    first, same, other = (digits.load_data(task, seed) for seed in (0, 0, 1))
    assert torch.equal(first.train.images, same.train.images)  # type: ignore[attr-defined]
    assert not torch.equal(first.train.images, other.train.images)  # type: ignore[attr-defined]
    assert torch.equal(first.test.images, other.test.images)  # type: ignore[attr-defined]
    assert np.bincount(first.train.labels).tolist() == [3] * 10  # type: ignore[attr-defined]


def test_the_new_domain_is_turned_and_inverted() -> None:
    parts = digits.splits()["test"][:5]
    upright = digits.Digits(parts)
    turned = digits.Digits(parts, rotation=90, invert=True)
    assert turned[0]["pixel_values"].shape == (1, 16, 16)
    torch.testing.assert_close(turned.images, -torch.rot90(upright.images, 1, (2, 3)))
    assert torch.equal(turned.labels, upright.labels)


@pytest.mark.parametrize(
    ("wrong", "message"), [({"rotation": 45}, "multiple of 90"), ({"depths": [1]}, "one of each per stage")]
)
def test_settings_of_the_task_are_checked(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        digits.Task(**wrong)  # type: ignore[arg-type]


def test_unknown_split() -> None:
    with pytest.raises(ValueError, match="split is 'tset', expected one of train, validation, test"):
        digits.load_data(digits.Task(), 0).split("tset")


def test_accuracy() -> None:
    logits = np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert digits.compute_metrics(EvalPrediction(logits, np.array([1, 0, 0, 1]))) == {"accuracy": 0.75}


def test_the_cache_of_the_base_goes_by_what_made_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path))
    task = digits.Task()
    assert digits.base_folder(task).parent == tmp_path
    assert digits.base_folder(task) == digits.base_folder(digits.Task(labels_per_class=5, rotation=180))
    assert digits.base_folder(task) != digits.base_folder(digits.Task(base_epochs=31))
    assert set(digits.BASE_FIELDS) <= {item.name for item in fields(digits.Task)}


def test_a_recipe_of_the_users_own_takes_no_module_of_pythons_place(tmp_path: Path) -> None:
    own = tmp_path / "random.py"
    own.write_text(Path(str(digits.__file__)).read_text(encoding="utf-8"), encoding="utf-8")
    recipe = load_recipe(str(own))
    assert recipe.METRIC == "accuracy"
    assert hasattr(importlib.import_module("random"), "Random")


def test_the_home_folder_may_be_written_as_a_tilde(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/photos") == str(tmp_path / "photos")


@pytest.mark.parametrize("installed", [True, False])
def test_a_mistyped_folder_is_no_missing_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, installed: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "photos").mkdir()
    if not installed:
        monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(FileNotFoundError, match=r"task.data is 'photoz': no such .* here.*; did you mean 'photos'\?"):
        hub("photoz")


def test_no_thread_setting_is_left_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        digits.load_base(digits.Task(base_epochs=1, hidden_sizes=[8, 16], depths=[1, 1]))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
