"""The comparison: matched budgets, going on where it was, what is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flora import compare as module
from flora.compare import compare
from flora.folders import read_json
from flora.methods import METHODS, Request, lora_targets, targets, trainable
from flora.settings import Settings, read
from flora.training import evaluate

QUICK = ("task.base_epochs=2", "training.num_train_epochs=4", "compare.learning_rates=[0.01, 0.03]")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def tiny(output: Path, *overrides: str) -> Settings:
    return read("digits-tiny", [f"output={output}", *QUICK, *overrides])


@pytest.fixture(scope="module")
def done(cache: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, dict[str, Any]]:
    settings = tiny(tmp_path_factory.mktemp("compare") / "run")
    return settings, compare(settings, ["frozen", "flora", "lora", "full"], [0, 1])


def folder_of(settings: Settings) -> Path:
    return settings.output.with_name(f"{settings.output.name}-compare")


def test_what_is_written(done: tuple[Settings, dict[str, Any]]) -> None:
    settings, report = done
    folder = folder_of(settings)
    assert {path.name for path in folder.iterdir()} == {"README.md", "compare.json", "compare.png", "flora", "runs"}
    assert len(list((folder / "runs").iterdir())) == 4 * (2 + 2)
    assert read_json(folder / "compare.json") == report
    assert [row["method"] for row in report["rows"]] == ["frozen", "flora", "lora", "full"]


def test_adapters_are_matched_in_trainable_parameters(done: tuple[Settings, dict[str, Any]]) -> None:
    counts = {row["method"]: row["trainable_parameters"] for row in done[1]["rows"]}
    assert counts["frozen"] == 16 * 10 + 10
    assert counts["lora"] == done[1]["budget"] + counts["frozen"]
    assert 0.95 * counts["lora"] < counts["flora"] <= counts["lora"] < counts["full"]


def test_the_learning_rate_is_the_best_of_the_grid_on_validation(done: tuple[Settings, dict[str, Any]]) -> None:
    folder = folder_of(done[0])
    for row in done[1]["rows"]:
        assert row["search"][f"{row['learning_rate']:g}"] == max(row["search"].values())
        for rate, score in row["search"].items():
            stored = read_json(folder / "runs" / f"search-{row['method']}-lr{rate}-seed0.json")
            assert stored["validation"]["accuracy"] == score
            assert "test" not in stored


def test_only_adapters_are_merged(done: tuple[Settings, dict[str, Any]]) -> None:
    for row in done[1]["rows"]:
        assert (row["merge_difference"] is not None) == (row["method"] in ("flora", "lora"))
        assert row["merge_difference"] is None or row["merge_difference"] < 1e-5


def test_the_kept_adapter_is_an_output_folder(done: tuple[Settings, dict[str, Any]]) -> None:
    folder = folder_of(done[0]) / "flora"
    metrics, same = evaluate(folder)
    assert same is True
    assert metrics["accuracy"] == done[1]["rows"][1]["values"][0]
    assert "import flora\n" in (folder / "README.md").read_text()


def test_a_run_with_the_same_settings_is_not_run_again(
    done: tuple[Settings, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    run = module.Bench._run
    monkeypatch.setattr(module.Bench, "_run", lambda self, one: ran.append(one.name) or run(self, one))
    settings, report = done
    assert compare(settings, ["frozen", "full"], [0, 1])["rows"][0] == report["rows"][0]
    assert ran == []
    (folder_of(settings) / "runs" / "final-full-lr0.03-seed1.json").unlink(missing_ok=True)
    (folder_of(settings) / "runs" / "final-full-lr0.01-seed1.json").unlink(missing_ok=True)
    assert compare(settings, ["full"], [0, 1])["rows"][0]["values"] == report["rows"][3]["values"]
    assert [name.rpartition("-")[2] for name in ran] == ["seed1"]
    ran.clear()
    other = tiny(settings.output, "training.num_train_epochs=1")
    compare(other, ["frozen"], [0])
    assert len(ran) == 2 + 1


def test_what_each_method_trains(cache: None, tmp_path: Path) -> None:
    settings = tiny(tmp_path)
    recipe = settings.load_recipe()
    request = Request(settings.adapter, settings.comparison, budget=1500)
    base = recipe.load_base(settings.task)
    everything = trainable(base)
    trained = {}
    for name, method in METHODS.items():
        model = method(recipe.load_base(settings.task), request)
        trained[name] = {key for key, value in model.named_parameters() if value.requires_grad}
    assert trained["frozen"] == {"classifier.weight", "classifier.bias"}
    assert trained["full"] == {key for key, _ in base.named_parameters()}
    for name in ("flora", "lora"):
        assert all(any(part in key for part in ("lora_", "tucker_", "classifier")) for key in trained[name]), name
        assert any("classifier" in key for key in trained[name])
    refused = set(targets(base, settings.adapter)) - set(lora_targets(base, request))
    assert {name.rpartition(".")[2] for name in refused} == {"dwconv"}
    assert trainable(base.requires_grad_(True)) == everything


def test_frozen_needs_a_head(cache: None, tmp_path: Path) -> None:
    settings = tiny(tmp_path)
    base = settings.load_recipe().load_base(settings.task)
    with pytest.raises(ValueError, match=r"name it in adapter\.modules_to_save"):
        METHODS["frozen"](base, Request({"target_modules": "all"}, settings.comparison, budget=0))
