"""Training, resuming, evaluating and merging, on a recipe of a second."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import ConvNextV2ForImageClassification, Trainer, TrainerCallback, TrainingArguments

import flora_cli
from flora.errors import UserError
from flora.runs import training
from flora.runs.best_checkpoint import settling_ties
from flora.runs.evaluating import evaluate
from flora.runs.merging import merge
from flora.runs.reloading import load_adapter, load_base
from flora.runs.run_folder import RunFolder
from flora.runs.sample_inputs import random_inputs
from flora.runs.settings import Settings, read
from flora.runs.training import train
from flora.storage.atomic import claim, read_json, staged_folder, write_text

FILES = {
    "README.md", "adapter_config.json", "adapter_model.safetensors", "config.yaml", "loss.png", "metrics.json",
    "report.html",
}  # fmt: skip


def tiny(output: Path, *overrides: str) -> Settings:
    quick = ("training.disable_tqdm=true", "task.base_epochs=2")
    return read("digits-tiny", [f"output={output}", *quick, *overrides])


@pytest.fixture(scope="module")
def trained(cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests that change it copy it."""
    output = tmp_path_factory.mktemp("trained") / "run"
    train(tiny(output))
    return output


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def digest(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class Kill(TrainerCallback):
    """Stops the process' training at a step, as a signal would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture
def killed_at(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the next training die at a step."""
    make = training.make_trainer

    def arm(step: int | None) -> None:
        def armed(*args: Any) -> Any:
            trainer = make(*args)
            if step is not None:
                trainer.add_callback(Kill(step))
            return trainer

        monkeypatch.setattr(training, "make_trainer", armed)

    return arm


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


def test_the_output_folder(trained: Path) -> None:
    assert {path.name for path in trained.iterdir()} == FILES | {"trainer_state.json", "checkpoint-16", "checkpoint-20"}
    metrics = read_json(trained / "metrics.json")
    assert metrics["steps"] == 20
    assert set(metrics["test"]) == set(metrics["validation"]) == {"loss", "accuracy"}
    assert metrics["trainable_parameters"] == sum(value.numel() for value in weights(trained).values())
    assert metrics["adapter_bytes"] == (trained / "adapter_model.safetensors").stat().st_size
    losses = [entry["loss"] for entry in read_json(trained / "trainer_state.json")["log_history"] if "loss" in entry]
    assert losses[-1] < losses[0]
    card = (trained / "README.md").read_text()
    assert "import flora\n" in card
    assert f"{metrics['test']['accuracy']:.4f}" in card
    assert "ConvNextV2ForImageClassification.from_pretrained(" in card


def test_a_run_is_kept_when_its_page_cannot_be_made(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tiny(folder)

    def broken(tested: Any) -> None:
        raise ZeroDivisionError("a picture of nothing")

    monkeypatch.setattr(settings.load_recipe(), "findings", broken)
    train(settings, overwrite=True)
    assert "note: the page report.html could not be written (ZeroDivisionError" in capsys.readouterr().out
    assert (folder / "metrics.json").is_file()
    assert not (folder / "report.html").exists()
    assert weights(folder)


def test_evaluated_again_the_numbers_are_the_same(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("test", "validation"):
        metrics, equal, _ = evaluate(trained, split=split)
        assert metrics == pytest.approx(read_json(trained / "metrics.json")[split])
        assert equal is True
    assert evaluate(trained, ["task.rotation=0"])[1] is None
    with pytest.raises(ValueError, match="only settings of the data can change"):
        evaluate(trained, ["seed=1"])
    assert flora_cli.main(["eval", str(trained)]) == 0
    assert "the same as at the end of training" in capsys.readouterr().out


def test_other_numbers_are_noticed_with_what_has_changed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = read_json(folder / "metrics.json")
    right = metrics["test"]["accuracy"]
    metrics["test"]["accuracy"] = 0.01
    (folder / "metrics.json").write_text(json.dumps(metrics))
    assert flora_cli.main(["eval", str(folder)]) == 1
    told = capsys.readouterr().out
    assert f"  accuracy was 0.01, now it is {right}\n" in told
    assert "loss was" not in told
    assert "the files behind task.data or task.model have changed" in told

    metrics["versions"]["torch"], metrics["machine"]["device"] = "1.0", "abacus"
    metrics["examples"]["test"] = 7
    (folder / "metrics.json").write_text(json.dumps(metrics))
    found = evaluate(folder)
    assert found.same is False
    _, origin, size = found.report
    assert "torch was 1.0, now it is" in origin
    assert "device was abacus, now it is" in origin
    assert "peft" not in origin
    assert "the test data had 7 examples, now there are" in size


def test_killed_and_resumed_ends_with_the_same_weights(trained: Path, tmp_path: Path, killed_at: Any) -> None:
    settings = tiny(tmp_path / "run")
    killed_at(10)
    with pytest.raises(KeyboardInterrupt):
        train(settings)
    assert not (tmp_path / "run" / "metrics.json").exists()
    with pytest.raises(ValueError, match="a run that was cut short; --resume continues it"):
        train(settings)
    killed_at(None)
    assert train(settings, resume=True)["resumed_at"] == 8
    assert same(weights(tmp_path / "run"), weights(trained))


def test_a_finished_run_is_not_replaced_unasked(folder: Path) -> None:
    before = weights(folder)
    with pytest.raises(ValueError, match="holds a finished run; --overwrite replaces it"):
        train(tiny(folder))
    assert same(before, weights(folder))


def test_replacing_leaves_the_old_run_whole_until_the_end(folder: Path, killed_at: Any) -> None:
    before, other = weights(folder), tiny(folder, "seed=1")
    killed_at(10)
    with pytest.raises(KeyboardInterrupt):
        train(other, overwrite=True)
    assert same(before, weights(folder))
    assert evaluate(folder)[1] is True
    killed_at(None)
    assert train(other, resume=True)["resumed_at"] == 8
    assert not same(before, weights(folder))
    assert read_json(folder / "metrics.json")["seed"] == 1
    assert [path.name for path in folder.parent.iterdir()] == ["run"]
    assert evaluate(folder)[1] is True


def test_resuming_what_is_finished_changes_nothing(folder: Path) -> None:
    before = (folder / "metrics.json").read_bytes()
    train(tiny(folder), resume=True)
    assert (folder / "metrics.json").read_bytes() == before


def test_a_finished_run_can_be_trained_for_longer(folder: Path) -> None:
    longer = tiny(folder, "training.num_train_epochs=12")
    metrics = train(longer, resume=True)
    assert (metrics["resumed_at"], metrics["steps"]) == (20, 24)


def test_resuming_with_another_task_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"another task.labels_per_class: .* started with 4, and now it is 5"):
        train(tiny(folder, "task.labels_per_class=5", "training.num_train_epochs=12"), resume=True)


OTHER = {
    "seed=1": "--resume with another seed: .* was started with 0, and now it is 1",
    "adapter.r=3": "--resume with another adapter.r: ",
    "training.learning_rate=0.01": "--resume with another training.learning_rate: ",
    "training.num_train_epochs=2": "is a finished run of 10 epochs, and 2 epochs are requested",
}


@pytest.mark.parametrize("item", OTHER)
def test_a_finished_run_goes_on_only_with_its_own_settings(folder: Path, item: str) -> None:
    before = digest(folder)
    with pytest.raises(UserError, match=OTHER[item]):
        train(tiny(folder, item), resume=True)
    assert digest(folder) == before


def test_a_start_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> None:
        raise UserError("the logger is not installed")

    monkeypatch.setattr(training, "make_trainer", fails)
    with pytest.raises(UserError, match="the logger"):
        train(tiny(tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


def test_a_start_that_was_killed_before_its_first_checkpoint_does_not_block_the_next(tmp_path: Path) -> None:
    settings = tiny(tmp_path / "run", "training.max_steps=1")
    RunFolder(settings.output).begin(settings.text(), None, fresh=True)
    assert train(settings)["steps"] == 1


def test_a_run_that_diverges_stops_and_keeps_its_last_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Poison(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 10:
                for value in model.parameters():
                    value.data.fill_(float("inf"))

    make = training.make_trainer

    def poisoned(*args: Any) -> Any:
        trainer = make(*args)
        trainer.add_callback(Poison())
        return trainer

    monkeypatch.setattr(training, "make_trainer", poisoned)
    quick = ["training.disable_tqdm=true", "task.base_epochs=2"]
    assert flora_cli.main(["train", "digits-tiny", f"output={tmp_path / 'run'}", *quick]) == 1
    error = capsys.readouterr().err
    assert error.startswith("flora: error: training diverged at step 11: the loss is nan, at the learning rate 0.015; ")
    assert error.endswith(f"the last good checkpoint is {tmp_path / 'run' / 'checkpoint-8'}\n")
    assert error.count("\n") == 1
    monkeypatch.setattr(training, "make_trainer", make)
    assert train(tiny(tmp_path / "run"), resume=True)["resumed_at"] == 8


def test_two_runs_into_one_folder(folder: Path) -> None:
    before = digest(folder)
    refused: list[str] = []

    def second() -> None:
        try:
            train(tiny(folder, "seed=1"), overwrite=True)
        except UserError as error:
            refused.append(str(error))

    with claim(folder):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert refused == [f"another flora process is writing {folder}; wait until it finishes, or give another output"]
    assert digest(folder) == before


def test_a_linked_output_stays_a_link(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "disk" / "run")
    (tmp_path / "run").symlink_to(tmp_path / "disk" / "run")
    train(tiny(tmp_path / "run", "seed=1", "training.max_steps=1"), overwrite=True)
    assert (tmp_path / "run").is_symlink()
    assert read_json(tmp_path / "disk" / "run" / "metrics.json")["seed"] == 1
    assert {path.name for path in (tmp_path / "disk").iterdir()} == {"run"}
    assert {path.name for path in tmp_path.iterdir()} == {"run", "disk"}


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"is not an output folder of flora \(it has no config.yaml\)"):
        train(tiny(tmp_path), overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


def test_only_whole_checkpoints_count(folder: Path) -> None:
    assert RunFolder(folder).last_checkpoint() == folder / "checkpoint-20"
    state = folder / "checkpoint-20" / "trainer_state.json"
    state.write_text(state.read_text()[:50])
    assert RunFolder(folder).last_checkpoint() == folder / "checkpoint-16"
    (folder / "checkpoint-16" / "optimizer.pt").unlink()
    assert RunFolder(folder).last_checkpoint() is None


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "a.txt", "old")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            write_text(tmp_path / "a.txt", "new")

    def half_a_folder() -> None:
        with staged_folder(tmp_path / "b") as staged:
            (staged / "half").touch()
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        half_a_folder()
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_merged_equals_unmerged(trained: Path, tmp_path: Path) -> None:
    done = merge(trained, tmp_path / "merged")
    assert done.difference < 1e-5
    merged = ConvNextV2ForImageClassification.from_pretrained(tmp_path / "merged").eval()
    adapted = load_adapter(load_base(trained), trained)
    inputs = random_inputs(merged)
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, adapted(**inputs).logits, rtol=0, atol=1e-5)
        assert (merged(**inputs).logits - load_base(trained)(**inputs).logits).abs().max() > 1e-2


def test_another_adapter_name_gives_the_same_logits(trained: Path) -> None:
    inputs = random_inputs(load_base(trained))
    with torch.no_grad():
        first = load_adapter(load_base(trained), trained)(**inputs).logits
        other = (
            PeftModel.from_pretrained(load_base(trained), str(trained), adapter_name="other").eval()(**inputs).logits
        )
    assert torch.equal(first, other)


def test_merge_never_replaces_unasked(trained: Path, tmp_path: Path) -> None:
    merge(trained, tmp_path / "merged")
    with pytest.raises(FileExistsError, match=r"exists; choose another output or ask to overwrite it"):
        merge(trained, tmp_path / "merged")
    merge(trained, tmp_path / "merged", overwrite=True)
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="exists and is not a merged model"):
        merge(trained, tmp_path / "mine", overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"merged", "mine"}


def broken_merge(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that merging says; nothing is written."""
    out = folder.parent / "merged"
    assert flora_cli.main(["merge", str(folder), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert [path.name for path in folder.parent.iterdir()] == ["run"]
    return error


@pytest.mark.parametrize("keep", [0, 5, 200, -10])
def test_a_truncated_file(keep: int, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "adapter_model.safetensors is truncated or corrupt" in broken_merge(folder, capsys)


def test_an_adapter_with_nan(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = weights(folder)
    key = next(key for key in tensors if key.endswith("dwconv.tucker_weight.core"))
    tensors[key][0] = float("nan")
    save_file(tensors, folder / "adapter_model.safetensors")
    error = broken_merge(folder, capsys)
    assert "has NaN or infinite entries" in error
    assert key in error


def test_a_base_that_does_not_fit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wider = tiny(folder, "task.hidden_sizes=[12, 16]")
    base = wider.load_recipe().load_base(wider.task)
    capsys.readouterr()  # the bar of its training
    config = read_json(folder / "adapter_config.json")
    config["base_model_name_or_path"] = base.name_or_path
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert "convnextv2.embeddings.patch_embeddings" in broken_merge(folder, capsys)


def test_a_base_that_is_gone_is_made_again_by_the_recipe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLORA_CACHE", str(folder.parent / "empty"))
    config = read_json(folder / "adapter_config.json")
    config["base_model_name_or_path"] = str(folder.parent / "gone")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert merge(folder, folder.parent / "merged").difference < 1e-5


def test_settings_are_kept_with_the_run(trained: Path) -> None:
    settings = tiny(trained)
    assert replace(read(str(trained / "config.yaml")), output=trained) == settings


def test_the_best_checkpoint_is_what_a_real_config_keeps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = ("task.data=sample:vision/shapes", "task.model=sample:vision/convnextv2", "training.disable_tqdm=true")
    # A rate so high that the last epoch is not the best one.
    quick = ("training.num_train_epochs=4", "training.learning_rate=0.3", "training.per_device_train_batch_size=16")
    output = tmp_path / "run"
    metrics = train(read("vision_classify", [f"output={output}", *samples, *quick]))
    assert "note: this run has only" in capsys.readouterr().out

    state = read_json(output / "trainer_state.json")
    measured = [entry["eval_accuracy"] for entry in state["log_history"] if "eval_accuracy" in entry]
    assert len(measured) == 4
    assert metrics["validation"]["accuracy"] == pytest.approx(max(measured))
    assert sum("loss" in entry for entry in state["log_history"]) == metrics["steps"]
    assert evaluate(output)[1] is True


@pytest.mark.parametrize(
    ("scores", "losses", "best"),
    [
        ([0.0, 0.0, 0.0], [3.0, 1.0, 2.0], 2),
        ([0.0, 0.5, 0.5], [1.0, 2.0, 3.0], 2),
        ([0.25, 0.5, 0.25], [3.0, 2.0, 1.0], 2),
        ([0.5, 0.25, 0.5], [2.0, 1.0, 1.5], 3),
    ],
)
def test_of_checkpoints_with_equal_scores_the_one_with_less_loss_is_the_best(
    scores: list[float], losses: list[float], best: int, tmp_path: Path
) -> None:
    choice = {"save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True}
    arguments = TrainingArguments(str(tmp_path), metric_for_best_model="accuracy", report_to="none", **choice)
    trainer = settling_ties(Trainer)(torch.nn.Linear(2, 2), arguments, eval_dataset=[0])

    for step, (score, loss) in enumerate(zip(scores, losses, strict=True), 1):
        trainer.state.global_step = step
        found = {"eval_accuracy": score, "eval_loss": loss}
        trainer.state.log_history.append({**found, "step": step})
        assert trainer._determine_best_metric(found, None) == (trainer.state.best_global_step == step)

    assert trainer.state.best_global_step == best
