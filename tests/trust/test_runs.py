"""Folders of runs: which checkpoint is good, how a run takes the place of another, and who may write."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flora.comparison.compare import Bench, compare
from flora.comparison.trial import Run
from flora.errors import UserError
from flora.runs import run_folder
from flora.runs.run_folder import RunFolder, claim_run, partial_of, take_place
from flora.runs.settings import read
from flora.storage import atomic


def write_run(folder: Path, name: str) -> RunFolder:
    """A finished run that is told by its name."""
    folder.mkdir()
    (folder / "config.yaml").write_text(name)
    (folder / "metrics.json").write_text("{}")
    return RunFolder(folder)


def name_of(folder: Path) -> str:
    return (folder / "config.yaml").read_text()


def write_checkpoint(run: Path, step: int) -> Path:
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"numbers": torch.arange(7.0)}, folder / name)
    save_file({"core": torch.ones(3)}, folder / "adapter_model.safetensors")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return folder


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors", "trainer_state.json"]
)
@pytest.mark.parametrize("part", [0, 0.5, None], ids=["empty", "half", "absent"])
def test_a_checkpoint_that_lacks_a_part_is_passed_over(tmp_path: Path, name: str, part: float | None) -> None:
    good = write_checkpoint(tmp_path, 8)
    path = write_checkpoint(tmp_path, 12) / name
    assert RunFolder(tmp_path).last_checkpoint() == path.parent

    if part is None:
        path.unlink()
    else:
        os.truncate(path, int(path.stat().st_size * part))
    assert RunFolder(tmp_path).last_checkpoint() == good


@pytest.mark.parametrize("way", ["exchange", "two renames"])
def test_a_run_takes_the_place_of_another(tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way != "exchange":
        monkeypatch.setattr(atomic, "exchange", lambda first, second: False)

    out = tmp_path / "out"
    write_run(out, "old")
    run = write_run(partial_of(out), "new")

    with claim_run(out) as place:
        assert place is not None
        take_place(run, place)
    assert name_of(out) == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


class KilledError(Exception):
    """Stands for the end of the process."""


def killed_at(step: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends while it takes its place; nothing of it is cleaned up."""

    def ends(*args: object, **kwargs: object) -> None:
        raise KilledError

    with claim_run(out) as place, monkeypatch.context() as patch:
        assert place is not None
        left = place.folder.with_name("left")
        patch.setattr(run_folder, {"before": "put", "after": "_end_replacement"}[step], ends)
        with pytest.raises(KilledError):
            take_place(RunFolder(partial_of(out)), place)
        shutil.copytree(place.folder, left)

    # What the lock's end has cleared is put back, as a kill leaves it.
    shutil.rmtree(place.folder, ignore_errors=True)
    left.rename(place.folder)


@pytest.mark.parametrize("step", ["before", "after"])
def test_a_run_that_is_killed_while_it_takes_its_place(
    tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    write_run(out, "old")
    write_run(partial_of(out), "new")
    killed_at(step, out, monkeypatch)

    with claim_run(out):
        pass

    # Before the exchange the new run waits for --resume; after it the old one goes.
    names = {path.name: name_of(path) for path in tmp_path.iterdir()}
    assert names == ({"out": "old", "out.partial": "new"} if step == "before" else {"out": "new"})


def test_two_comparisons_of_one_output(tmp_path: Path) -> None:
    settings = read("digits-tiny", [f"output={tmp_path / 'out'}"])
    held, done = threading.Event(), threading.Event()

    def first() -> None:
        with atomic.claim(tmp_path / "out-compare"):
            held.set()
            done.wait()

    thread = threading.Thread(target=first)
    thread.start()
    held.wait()
    try:
        with pytest.raises(UserError, match="another flora process is writing .*out-compare; wait until it finishes"):
            compare(settings, ["frozen"], [0])
    finally:
        done.set()
        thread.join()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_comparison(tmp_path: Path) -> None:
    (tmp_path / "out-compare").mkdir()
    (tmp_path / "out-compare" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is not a comparison of flora"):
        compare(read("digits-tiny", [f"output={tmp_path / 'out'}"]), ["frozen"], [0])
    assert [path.name for path in (tmp_path / "out-compare").iterdir()] == ["thesis.txt"]


def write_comparison(folder: Path) -> None:
    """A comparison with a result, its report and the adapter that it kept."""
    (folder / "runs").mkdir(parents=True)
    (folder / "runs" / "flora.json").write_text('{"identity": {}}')
    (folder / "compare.json").write_text("{}")
    write_run(folder / "flora", "kept")


def compare_again(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to where the first run would begin."""
    settings = read("digits-tiny", [f"output={out}", "compare.budgets=[60]"])
    monkeypatch.setattr("flora.comparison.compare._compare", lambda *args: {})
    compare(settings, ["frozen"], [0], overwrite=True)


def test_a_comparison_that_is_overwritten_keeps_what_is_not_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out-compare"
    write_comparison(folder)
    (folder / "runs" / "thesis.json").write_text('["years of work"]')
    (folder / "runs" / "thesis.txt").write_text("years of work")
    (folder / "thesis.txt").write_text("years of work")

    compare_again(tmp_path / "out", monkeypatch)
    left = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    assert left == {"runs", "runs/thesis.json", "runs/thesis.txt", "thesis.txt"}


@pytest.mark.parametrize("name", ["flora/thesis.txt", "flora/config.yaml"])
def test_a_comparison_whose_adapter_is_not_its_own_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out-compare"
    write_comparison(folder)
    if name == "flora/thesis.txt":
        (folder / name).write_text("years of work")
    else:
        (folder / name).unlink()
    before = sorted(tmp_path.rglob("*"))

    with pytest.raises(UserError, match="flora (holds 'thesis.txt', which is not part of|exists and is not) a run"):
        compare_again(tmp_path / "out", monkeypatch)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_adapter_that_cannot_be_kept_is_told_before_it_is_trained(tmp_path: Path) -> None:
    folder = tmp_path / "out-compare"
    (folder / "runs").mkdir(parents=True)
    (folder / "flora").mkdir()
    (folder / "flora" / "thesis.txt").write_text("years of work")

    settings = read("digits-tiny", [f"output={tmp_path / 'out'}"])
    bench = Bench(settings, settings.load_recipe(), folder, tmp_path, kept=60)
    with pytest.raises(UserError, match="holds 'thesis.txt', which is not part of a run"):
        bench.result(Run("flora", 60, 0.01, settings.seed, final=True))
    assert [path.name for path in (folder / "runs").iterdir()] == []
