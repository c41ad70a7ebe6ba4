"""The comparison: matched budgets, going on where it was, what is written."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tqdm import tqdm

from flora.comparison import compare as module
from flora.comparison import trial
from flora.comparison.compare import NOTICES, _each_notice_once, compare
from flora.comparison.matching import match_ranks
from flora.comparison.methods import METHODS
from flora.comparison.probe import probe_head
from flora.comparison.rivals import RefusedError, Request, default_budget, targets
from flora.report.comparison import against, comparison_notes, comparison_page
from flora.runs.evaluating import evaluate
from flora.runs.settings import Settings, read
from flora.runs.training import First, first_batches, trainable, training_arguments
from flora.storage.atomic import read_json

OURS_FROM_DATA = {"lora-gradient", "flora-ranks", "flora-gradient", "flora-blocks", "flora-norms"}
FROM_DATA = {*OURS_FROM_DATA, "lora-ga", "eva"}
NOTHING_TO_CUT = {"flora-blocks"}  # in so small a network; tests/test_blocks.py has a wider one
ON_LINEAR = {"pissa", "lora-ga", "eva"}
QUICK = ("task.base_epochs=2", "training.max_steps=4", "compare.learning_rates=[0.01, 0.03]")


def tiny(output: Path, *overrides: str) -> Settings:
    return read("digits-tiny", [f"output={output}", *QUICK, *overrides])


@pytest.fixture(scope="module", autouse=True)
def one_grid() -> Iterator[None]:
    """A grid that goes on has a test without trainings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "EXTENSIONS", 0)
        yield


@pytest.fixture(scope="module")
def done(cache: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, dict[str, Any]]:
    settings = tiny(tmp_path_factory.mktemp("compare") / "run")
    return settings, compare(settings, ["frozen", "flora", "lora", "full"], [0, 1])


def folder_of(settings: Settings) -> Path:
    return settings.output.with_name(f"{settings.output.name}-compare")


def test_what_is_written(done: tuple[Settings, dict[str, Any]]) -> None:
    settings, report = done
    folder = folder_of(settings)
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "compare.html", "compare.json", "compare.png", "flora", "runs",
    }  # fmt: skip
    rates = {tuple(row["search"]) for row in report["rows"]}
    assert rates == {("0.01", "0.03")}  # the same trials for every method
    assert len(list((folder / "runs").iterdir())) == 4 * (2 * 2 + 2)
    assert read_json(folder / "compare.json") == report
    assert [row["method"] for row in report["rows"]] == ["frozen", "flora", "lora", "full"]


def test_adapters_are_matched_in_trainable_parameters(done: tuple[Settings, dict[str, Any]]) -> None:
    counts = {row["method"]: row["trainable_parameters"] for row in done[1]["rows"]}
    assert counts["frozen"] == 16 * 10 + 10
    (budget,) = done[1]["budgets"]
    for method in ("flora", "lora"):
        assert 0.95 * budget < counts[method] - counts["frozen"] <= budget
    assert counts["full"] > counts["lora"]


def test_the_learning_rate_is_the_best_of_the_grid_on_validation(done: tuple[Settings, dict[str, Any]]) -> None:
    folder = folder_of(done[0])
    for row in done[1]["rows"]:
        assert row["search"][f"{row['learning_rate']:g}"] == max(row["search"].values())
        for rate, score in row["search"].items():
            size = "" if row["budget"] is None else f"-{row['budget']}"
            files = [folder / "runs" / f"search-{row['method']}{size}-lr{rate}-seed{seed}.json" for seed in (0, 1)]
            stored = [read_json(file) for file in files]
            assert statistics.fmean(run["validation"]["accuracy"] for run in stored) == score
            assert all("test" not in run for run in stored)


GRIDS = {
    "the best is inside": ({"frozen": 0.02, "full": 0.02}, [0.01, 0.02, 0.04], []),
    "at the upper end": ({"frozen": 0.02, "full": 0.05}, [0.01, 0.02, 0.04], [0.08]),
    "at both ends": ({"frozen": 0.02, "full": 0.003}, [0.01, 0.02], [0.003, 0.005, 0.04]),
    "beyond the last grid": ({"frozen": 9.0, "full": 9.0}, [0.01, 0.02], [0.04, 0.08]),
}


@pytest.mark.parametrize(("best", "rates", "wider"), GRIDS.values(), ids=GRIDS)
def test_one_grid_for_all_goes_on_past_an_end_that_is_best(
    monkeypatch: pytest.MonkeyPatch, best: dict[str, float], rates: list[float], wider: list[float]
) -> None:
    monkeypatch.setattr(module, "EXTENSIONS", 2)
    ran: list[module.Run] = []

    def result(run: module.Run) -> dict[str, Any]:
        ran.append(run)
        distance = abs(math.log(run.learning_rate / best[run.method]))
        return {"validation": {"accuracy": run.seed / 100 - distance}, "seconds": 0.0}

    comparison = SimpleNamespace(learning_rates=rates)
    bench: Any = SimpleNamespace(
        settings=SimpleNamespace(comparison=comparison), recipe=SimpleNamespace(METRIC="accuracy"), result=result
    )
    scores = module._search(bench, [("frozen", None), ("full", None)], [4, 5, 6, 7], tqdm(disable=True))
    for (method, _), found in scores.items():
        assert list(found) == sorted([*rates, *wider])
        for rate, score in found.items():
            assert score == pytest.approx(0.05 - abs(math.log(rate / best[method])))
    assert {run.seed for run in ran} == {4, 5, 6}, "the first three seeds"
    assert len(ran) == 2 * 3 * len([*rates, *wider])


def test_one_rate_is_not_searched_for(cache: None, tmp_path: Path) -> None:
    settings = tiny(tmp_path / "run", "compare.learning_rates=[0.02]", "training.max_steps=1")
    row = compare(settings, ["frozen"], [0])["rows"][0]
    assert (row["learning_rate"], row["search"]) == (0.02, {})
    assert [path.name for path in (folder_of(settings) / "runs").iterdir()] == ["final-frozen-lr0.02-seed0.json"]


def test_only_adapters_are_merged(done: tuple[Settings, dict[str, Any]]) -> None:
    for row in done[1]["rows"]:
        assert (row["merge_difference"] is not None) == (row["method"] in ("flora", "lora"))
        assert row["merge_difference"] is None or row["merge_difference"] < 1e-5


def test_the_kept_adapter_is_an_output_folder(done: tuple[Settings, dict[str, Any]]) -> None:
    folder = folder_of(done[0]) / "flora"
    metrics, same, _ = evaluate(folder)
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
    for file in (folder_of(settings) / "runs").glob("final-full-*-seed1.json"):
        file.unlink()
    assert compare(settings, ["full"], [0, 1])["rows"][0]["values"] == report["rows"][3]["values"]
    assert [name.rpartition("-")[2] for name in ran] == ["seed1"]
    ran.clear()
    other = tiny(settings.output, "training.max_steps=2")
    compare(other, ["frozen"], [0])
    assert len(ran) >= 2 + 1
    ran.clear()
    note = folder_of(settings) / "notes.txt"
    note.write_text("mine")
    compare(other, ["frozen"], [0], overwrite=True)
    assert len(ran) >= 2 + 1, "everything is run again"
    assert {path.name for path in folder_of(settings).iterdir()} == {
        "README.md", "compare.html", "compare.json", "compare.png", "runs", note.name
    }  # fmt: skip


@pytest.mark.parametrize("budget", [900, 1500])
def test_what_each_method_trains(cache: None, tmp_path: Path, budget: int) -> None:
    settings = tiny(tmp_path)
    recipe = settings.load_recipe()
    request = Request(settings.adapter, 2.0, budget)
    base = recipe.load_base(settings.task)
    head = sum(value.numel() for value in base.classifier.parameters())
    marks = {"flora": "tucker_", "lora": "lora_", "dora": "lora_", "loha": "hada_", "lokr": "lokr_"}
    marks |= {"lycoris": "lycoris.", "authors": ".", "rslora": "lora_", "miss": "miss_", "hira": "hira_", "oft": "oft_"}
    for name, method in METHODS.items():
        if name in FROM_DATA or name in ON_LINEAR:
            continue
        model = method.build(recipe.load_base(settings.task), request)
        trained = {key for key, value in model.named_parameters() if value.requires_grad}
        assert any("classifier" in key for key in trained), name
        if method.matched:
            assert 0.7 * budget < trainable(model) - head <= budget, name
            assert all(marks[name] in key or "classifier" in key for key in trained)
    names = {key for key, _ in base.named_parameters()}
    for name, expected in (
        ("full", names),
        ("frozen", {"classifier.weight", "classifier.bias"}),
        ("bitfit", {key for key in names if key.endswith(".bias")} | {"classifier.weight"}),
    ):
        model = METHODS[name].build(recipe.load_base(settings.task), request)
        assert {key for key, value in model.named_parameters() if value.requires_grad} == expected


def first_of(settings: Settings, base: Any) -> First:
    recipe = settings.load_recipe()
    with tempfile.TemporaryDirectory() as scratch:
        arguments = training_arguments(settings, Path(scratch), save_strategy="no")
        return first_batches(base, recipe, recipe.load_data(settings.task, 0), arguments)


@pytest.mark.parametrize("name", sorted(FROM_DATA - NOTHING_TO_CUT))
def test_methods_that_start_from_the_data(cache: None, tmp_path: Path, name: str) -> None:
    settings = tiny(tmp_path, "task.base_epochs=12")
    base = settings.load_recipe().load_base(settings.task)
    first = first_of(settings, base)
    request = Request(settings.adapter, 1.0, 900, first=lambda: first)
    model = METHODS[name].build(base, request)
    trained = {key: value.numel() for key, value in model.named_parameters() if value.requires_grad}
    adapter = sum(count for key, count in trained.items() if "classifier" not in key)
    assert 0.4 * 900 < adapter <= 900
    assert len(trained) > 3
    if name in OURS_FROM_DATA:
        assert request.starts[0].losses
    assert any("norm.tucker" in key for key in trained) == (name == "flora-norms")
    with pytest.raises(RefusedError, match="from the data"):
        METHODS[name].build(settings.load_recipe().load_base(settings.task), Request(settings.adapter, 1.0, 900))


def test_every_method_starts_where_the_base_model_is(cache: None, tmp_path: Path) -> None:
    settings = tiny(tmp_path)
    recipe = settings.load_recipe()
    images = torch.stack([recipe.load_data(settings.task, 0).test[index]["pixel_values"] for index in range(5)])
    expected = recipe.load_base(settings.task).eval()(images).logits
    for name, method in METHODS.items():
        if name in FROM_DATA:
            continue
        model = method.build(recipe.load_base(settings.task), Request(settings.adapter, 2.0, 1500)).eval()
        if name == "oft":
            with pytest.raises(RefusedError, match="four dimensions"):
                model(pixel_values=images)
            continue
        assert torch.allclose(model(pixel_values=images).logits, expected, atol=1e-5), name


def test_a_head_is_trained_first_and_nothing_else(cache: None, tmp_path: Path) -> None:
    settings = tiny(tmp_path)
    recipe = settings.load_recipe()
    base: Any = recipe.load_base(settings.task)
    base.convnextv2.embeddings.requires_grad_(False)
    before = {name: (value.clone(), value.requires_grad) for name, value in base.named_parameters()}
    data = recipe.load_data(settings.task, 0)
    arguments = training_arguments(settings, tmp_path, save_strategy="no", disable_tqdm=True)
    probe_head(base, ["classifier"], recipe, data, arguments)
    changed = {name for name, value in base.named_parameters() if not torch.equal(value, before[name][0])}
    assert changed == {"classifier.weight", "classifier.bias"}
    assert all(value.requires_grad == before[name][1] for name, value in base.named_parameters())
    with pytest.raises(RefusedError, match="no head"):
        probe_head(base, [], recipe, data, arguments)


def test_every_method_begins_with_the_head_that_was_probed(
    cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny(tmp_path, "compare.probe_epochs=1", "training.max_steps=1")
    heads = []

    def begin(trainer: Any, seed: int) -> dict[str, Any]:
        heads.append([value.clone() for name, value in trainer.model.named_parameters() if "classifier" in name][-1])
        return {"seconds": 1.0, "steps": 1}

    monkeypatch.setattr(trial, "_train", begin)
    for method in ("lora", "flora", "full"):
        trial.train_once(settings, settings.load_recipe(), trial.Run(method, 900, 0.01, 0, final=False), tmp_path)
    plain = settings.load_recipe().load_base(settings.task).classifier.bias
    assert not torch.equal(heads[0], plain)
    assert all(torch.equal(head, heads[0]) for head in heads)


def test_a_curve_leaves_the_training_as_it_is(cache: None, tmp_path: Path) -> None:
    settings = tiny(tmp_path)
    run = trial.Run("lora", 900, 0.01, 0, final=False)
    plain, curved = (
        trial.train_once(settings, settings.load_recipe(), run, tmp_path, points).result for points in (0, 3)
    )
    assert [step for step, _ in curved["curve"]] == [1, 3, 4]
    assert curved["curve"][-1][1] == curved["validation"]["accuracy"]
    assert curved["validation"] == plain["validation"]
    assert "curve" not in plain


def test_finding_the_targets_leaves_the_base_as_it_is(cache: None, tmp_path: Path) -> None:
    settings = tiny(tmp_path)
    base = settings.load_recipe().load_base(settings.task)
    before = {name: type(module) for name, module in base.named_modules()}
    assert len(targets(base, settings.adapter)) == 8
    assert default_budget(base, settings.adapter, 2) == 2 * default_budget(base, settings.adapter, 1) > 0
    assert {name: type(module) for name, module in base.named_modules()} == before


def test_lora_is_put_on_stacks_of_experts_too(cache: None) -> None:
    """By PEFT's ``target_parameters``, at ranks of their own; DoRA has no such way and leaves them out."""
    settings = read("text_causal-moe-tiny")
    base = settings.load_recipe().load_base(settings.task)
    experts = [name for name, leaves in targets(base, settings.adapter).items() if leaves]
    assert experts == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    budget = default_budget(base, settings.adapter, 2) + 900
    adapted: Any = METHODS["lora"].build(base, Request(settings.adapter, 1.0, budget))
    stacks = {name: trainable(adapted.base_model.model.get_submodule(name)) for name in experts}
    assert stacks[experts[0]] > stacks[experts[1]] > 0
    assert 0.9 * budget < trainable(adapted) - trainable(adapted.base_model.model.lm_head) <= budget
    base = settings.load_recipe().load_base(settings.task)
    other = METHODS["dora"].build(base, Request(settings.adapter, 1.0, budget))
    assert not any("experts" in name for name, value in other.named_parameters() if value.requires_grad)


@pytest.mark.parametrize(
    "method", [name for name, method in METHODS.items() if method.matched and name not in FROM_DATA]
)
def test_too_small_a_budget_is_refused(cache: None, tmp_path: Path, method: str) -> None:
    settings = tiny(tmp_path)
    base = settings.load_recipe().load_base(settings.task)
    with pytest.raises(RefusedError, match="rank 1"):
        METHODS[method].build(base, Request(settings.adapter, 2.0, 7))


def test_frozen_needs_a_head(cache: None, tmp_path: Path) -> None:
    settings = tiny(tmp_path)
    base = settings.load_recipe().load_base(settings.task)
    with pytest.raises(RefusedError, match=r"adapter\.modules_to_save names none"):
        METHODS["frozen"].build(base, Request({"target_modules": "all"}, 2.0, 0))


def test_a_method_that_refuses_is_a_row_with_its_reason(cache: None, tmp_path: Path) -> None:
    settings = tiny(tmp_path / "run", "compare.budgets=[7]", "compare.learning_rates=[0.03]", "training.max_steps=2")
    report = compare(settings, ["frozen", "lora"], [0])
    assert "refused" not in report["rows"][0]
    assert "more than the 7" in report["rows"][1]["refused"]
    assert "LoRA: not possible here (rank 1 costs" in comparison_page(report)
    assert "head alone" not in comparison_page(report)


def test_the_page_tells_of_a_head_that_was_trained_first(cache: None, tmp_path: Path) -> None:
    given = ["compare.budgets=[900]", "compare.learning_rates=[0.03]", "training.max_steps=1"]
    plain, probed = (
        compare(tiny(tmp_path / name, *given, f"compare.probe_epochs={epochs}"), ["lora"], [0])
        for name, epochs in (("plain", 0), ("probed", 1.5))
    )
    told = "Before every method the head alone was trained for 1.5 epochs, on the frozen base."
    assert (told in comparison_notes(plain), told in comparison_notes(probed)) == (False, True)
    assert plain["rows"][0]["values"] != probed["rows"][0]["values"]


def test_what_every_training_would_say_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with _each_notice_once():
        for notices in 2 * NOTICES:
            notices.warning("%s weights are new", 3)
        NOTICES[0].warning("%s weights are new", 5)
    NOTICES[0].warning("%s weights are new", 3)

    told = [record.getMessage() for record in caplog.records if "weights are new" in record.getMessage()]
    assert told == [f"{count} weights are new" for count in (3, 5, 3)]


def test_an_adapter_that_its_own_library_cannot_merge_is_told(cache: None, tmp_path: Path) -> None:
    """PEFT's LoHa cannot be merged where a trained head is a module of several layers; FLoRA can."""
    quick = ["training.max_steps=2", "training.disable_tqdm=true", "compare.learning_rates=[0.01]"]
    report = compare(read("text_glue-tiny", [f"output={tmp_path / 'run'}", *quick]), ["loha", "flora"], [0])
    loha, flora = report["rows"]
    assert loha["merge_difference"] is None
    told = "LoHa cannot be merged here: the merge of its library fails on a layer of this model; compare.json has what"
    assert any(note.startswith(told) for note in comparison_notes(report))
    assert loha["runs"][0]["merge_raised"] == "AttributeError: 'ContextPooler' object has no attribute 'weight'"
    assert flora["merge_difference"] < 1e-5
    assert flora["merge_error"] is None
    page = comparison_page(report)
    assert "One seed (0), so no spread" in page
    assert "nan" not in page


def test_dora_leaves_out_layers_whose_result_would_be_nan() -> None:
    """RT-DETR's ``sampling_offsets`` start at zero; DoRA divides by the norm of each output's weights."""
    base = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 5))
    with torch.no_grad():
        base[1].weight[3] = 0.0
    adapted = METHODS["dora"].build(base, Request({"target_modules": ["0", "1"]}, 1.0, 60))
    assert trainable(adapted) == 4 * (5 + 7) + 7
    assert torch.isfinite(adapted(torch.ones(2, 5))).all()


def test_oft_has_blocks_of_each_layers_own_size() -> None:
    """Widths of 9 and 35, which no block of two fits; PEFT's own rotation of a 3x3 kernel changes the base."""
    parts = [torch.nn.Conv2d(3, 9, 3), torch.nn.Conv2d(9, 7, 1), torch.nn.Flatten(), torch.nn.Linear(35, 4)]
    base = torch.nn.Sequential(*parts)
    images = torch.randn(2, 3, 3, 7, generator=torch.Generator().manual_seed(0))
    expected = base(images)
    adapted: Any = METHODS["oft"].build(base, Request({"target_modules": ["0", "1", "3"]}, 1.0, 110))
    layers = adapted.base_model.model
    assert type(layers[0]) is torch.nn.Conv2d
    assert (layers[1].oft_block_size["default"], layers[3].oft_block_size["default"]) == (9, 5)
    assert trainable(adapted) == 9 * (9 - 1) // 2 + 35 * (5 - 1) // 2
    assert torch.allclose(adapted(images), expected, atol=1e-5)


def test_a_rate_at_which_training_diverges_is_not_chosen(
    cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = trial._train

    def diverging(trainer: Any, seed: int) -> dict[str, Any]:
        if trainer.args.learning_rate == 0.03:
            for value in trainer.model.parameters():
                value.data.fill_(float("nan"))
            raise ValueError("boxes must be finite")
        return train(trainer, seed)

    monkeypatch.setattr(trial, "_train", diverging)
    settings = tiny(tmp_path / "run", "training.max_steps=2")
    assert compare(settings, ["frozen"], [0])["rows"][0]["learning_rate"] <= 0.01
    only = tiny(tmp_path / "only", "training.max_steps=2", "compare.learning_rates=[0.03]")
    row = compare(only, ["frozen"], [0])["rows"][0]
    assert row["refused"] == "training diverged at the learning rate 0.03"


def test_an_error_that_is_not_divergence_is_raised(
    cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(trainer: Any, seed: int) -> dict[str, Any]:
        raise ValueError("a defect")

    monkeypatch.setattr(trial, "_train", broken)
    with pytest.raises(ValueError, match="a defect"):
        compare(tiny(tmp_path / "run"), ["frozen"], [0])


@pytest.mark.parametrize(
    "change",
    [
        "compare.budgets=[0]",
        "compare.lora_r=0",
        "compare.learning_rates=[]",
        "compare.learning_rates=[-1]",
        "compare.probe_epochs=-1",
    ],
)
def test_bad_settings_are_named(tmp_path: Path, change: str) -> None:
    with pytest.raises(ValueError, match=change.partition("=")[0].replace(".", r"\.")):
        tiny(tmp_path, change)


@given(
    prices=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    fixed=st.integers(0, 30),
    spare=st.integers(0, 500),
)
def test_ranks_spend_the_budget(prices: list[int], fixed: int, spare: int) -> None:
    def costs(rank: int) -> dict[str, int]:
        return {str(index): fixed + price * rank for index, price in enumerate(prices)}

    budget = sum(costs(1).values()) + spare
    ranks = match_ranks(costs, budget)
    spent = sum(fixed + price * ranks[str(index)] for index, price in enumerate(prices))
    assert set(ranks) == set(costs(1))
    assert max(ranks.values()) - min(ranks.values()) <= 1
    assert budget - max(prices) < spent <= budget or budget - spent < sum(prices)
    with pytest.raises(ValueError, match="rank 1 costs"):
        match_ranks(costs, sum(costs(1).values()) - 1)


def row(method: str, values: list[float], budget: int | None = 100) -> dict[str, Any]:
    return {
        "method": method,
        "title": method,
        "budget": budget,
        "values": values,
        "trainable_parameters": 100,
        "search": {"1": 0.5, "2": 0.6, "3": 0.4},
        "learning_rate": 2.0,
        "merge_difference": None,
    }


def test_the_interval_is_students() -> None:
    ours, theirs = row("flora", [0.8, 0.9, 0.7]), row("lora", [0.7, 0.7, 0.7])
    found = against(theirs, [ours, theirs])
    assert found is not None
    assert found[0] == pytest.approx(0.1)
    assert found[1] == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-5)  # t of 2 degrees of freedom, 97.5 %
    assert against(ours, [ours, theirs]) is None
    assert against(row("lora", [0.7] * 3, budget=50), [ours]) is None


def test_where_only_the_gradient_start_was_compared_it_is_held_against_the_others() -> None:
    rows = [{**row("flora-gradient", [0.8, 0.9, 0.7]), "search": {}}, {**row("lora", [0.7, 0.7, 0.7]), "search": {}}]
    assert against(rows[1], rows) is not None
    assert against(rows[0], rows) is None
    notes = comparison_notes({"rows": rows, "seeds": [0, 1, 2], "budgets": [100]})
    assert "one learning rate for all, so that nothing was chosen" in notes[0]


def test_losses_are_told() -> None:
    rows = [row("flora", [0.5, 0.51, 0.49]), row("lora", [0.9, 0.91, 0.89]), row("full", [0.3, 0.31, 0.29], None)]
    notes = comparison_notes({"rows": rows, "seeds": [0, 1, 2], "budgets": [100]})
    assert "FLoRA is worse than lora at 100 (-0.4000)." in notes
    assert "FLoRA is better than full (+0.2000)." in notes
