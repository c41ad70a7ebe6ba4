"""A command that is killed at any change of the file system loses nothing, and the next one leaves nothing over."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from killing import contents, copy_of, remember_templates, run_command

import flora_cli
from convert_cases import random_adapter
from flora.convert import save
from foreign_models import build
from test_extract import save_model, tuned
from test_merge import picked

SPARSE = 20  # by default one of so many kills is made; the slow suite makes all


# What differs from run to run; where no process can be started, the commit cannot be asked for.
PASSING = ("seconds", "seconds_per_step", "resumed_at", "date", "peak_memory", "growth", "commit")

Found = dict[str, Any]


def digests(place: Path) -> dict[str, str]:
    """What is in a folder, but for what is being written."""
    return contents(place, ignore=lambda name: "flora-part" in name)


def results(place: Path) -> dict[str, Any]:
    """What a training has left, without the times that it took: names, weights and what was measured."""
    found: dict[str, Any] = dict.fromkeys(digests(place))

    for name in found:
        if name.endswith((".safetensors", ".yaml")) or "adapter_config" in name:
            found[name] = (place / name).read_bytes()
        elif name.endswith(("metrics.json", "compare.json")) or "/runs/" in name:
            found[name] = timeless(json.loads((place / name).read_text()))

    return found


def is_old_or_new(old: Found, new: Found, left: Found) -> bool:
    """Whether everything is as it was, or as it was to become."""
    return left in (old, new, *with_parents(old, new))


def with_parents(old: Found, new: Found) -> list[Found]:
    """The old state with one or more of the folders that are made for the output, the outer ones first."""
    names = sorted(name for name, digest in new.items() if not digest and name not in old)
    return [{**old, **dict.fromkeys(names[:count], "")} for count in range(len(names))]


def is_run_safe(old: Found, new: Found, left: Found) -> bool:
    """Whether the run in ``out`` is the old or the new one, the inputs untouched, and what calls itself finished is."""
    inputs = [name for name in old if not name.startswith("out")]
    before, after, now = (run_in(found) for found in (old, new, left))
    finished = "out/metrics.json" in left
    return all(left[name] == old[name] for name in inputs) and (not finished or now in (before, after))


def is_replacement_safe(old: Found, new: Found, left: Found) -> bool:
    """Whether a run is there, and is the old or the new one."""
    return run_in(left) != {} and is_run_safe(old, new, left)


def is_comparison_safe(old: Found, new: Found, left: Found) -> bool:
    """Whether the inputs are untouched, and whatever there is of a comparison is that of the old or the new one."""
    inputs = [name for name in old if not name.startswith("out-compare")]
    kept = [name for name in left if name in new]
    return all(left[name] == old[name] for name in inputs) and all(
        left[name] in (found[name] for found in (old, new) if name in found) for name in kept
    )


def run_in(found: Found) -> Found:
    """What is in a run but for its settings and checkpoints, which a run that goes on adds to."""
    passing = ("config.yaml", "checkpoint-")
    names = [name for name in found if name.startswith("out/") and not any(part in name for part in passing)]
    return {name: found[name] for name in names}


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in PASSING}
    if isinstance(value, list):
        return [timeless(item) for item in value]
    return value


class Case(NamedTuple):
    """A command that writes.

    Attributes:
        argv: of the command.
        out: what it writes.
        before: commands whose outputs are there when it starts.
        again: the command that comes after a kill; the same by default.
        look: what a folder is held against another by.
        is_safe: whether nothing is lost, from what was there before, what an undisturbed run leaves, and what is there.
    """

    argv: str
    out: str
    before: tuple[str, ...] = ()
    again: str = ""
    look: Callable[[Path], Found] = digests
    is_safe: Callable[[Found, Found, Found], bool] = is_old_or_new


LORA = "convert adapter --to lora --out out"
OLD = "convert other --to lora --out out"
FILE = "convert adapter --to kohya --out out.safetensors"
MERGE = "merge adapter --base base --out out"
EXTRACT = "extract base tuned --rank 2 --out out"
CASES = {
    "convert": Case(LORA, "out"),
    "convert over": Case(f"{LORA} --overwrite", "out", (OLD,)),
    "convert to flora": Case("convert adapter --to flora --out deep/er/out", "deep"),
    "convert to a file": Case(FILE, "out.safetensors"),
    "convert over a file": Case(f"{FILE} --overwrite", "out.safetensors", (FILE.replace("adapter", "other"),)),
    "convert to dense": Case("convert adapter --to dense --out out.safetensors", "out.safetensors"),
    "merge": Case(MERGE, "out"),
    "merge over": Case(f"{MERGE} --overwrite", "out", (MERGE.replace("adapter", "other"),)),
    "merge two": Case("merge adapter other --weights 0.5 2 --base base --out out", "out"),
    "extract": Case(EXTRACT, "out"),
    "extract over": Case(f"{EXTRACT} --overwrite", "out", (OLD.replace("lora", "flora"),)),
    "extract by budget": Case("extract base tuned --budget 3000 --carry --out out", "out"),
    "inspect": Case("inspect adapter --html out.html", "out.html"),
    "inspect over": Case("inspect adapter --html out.html --overwrite", "out.html", ("inspect other --html out.html",)),
    "copy": Case("recipes copy digits", "digits.yaml"),
}

# What takes a training, or what one has left; what it has learnt is looked at, and not how long it took.
TRAIN = "train tiny.yaml output=out"
COMPARE = "compare tiny.yaml output=out --methods frozen,flora --seeds 0"
PREDICT = "predict out 1 2 3 --out found --run-recipe-file"
TRAININGS = {
    "train": Case(TRAIN, "out", again=f"{TRAIN} --resume", look=results, is_safe=is_run_safe),
    "train over": Case(f"{TRAIN} --overwrite", "out", (f"{TRAIN} seed=5",), look=results, is_safe=is_replacement_safe),
    "train further": Case(
        f"{TRAIN} --resume", "out", (f"{TRAIN} training.max_steps=1",), look=results, is_safe=is_run_safe
    ),
    "compare": Case(COMPARE, "out-compare", look=results, is_safe=is_comparison_safe),
    "compare over": Case(
        f"{COMPARE} --overwrite", "out-compare", (COMPARE,), COMPARE, look=results, is_safe=is_comparison_safe
    ),
    "predict": Case(PREDICT, "found", (TRAIN,)),
    "predict over": Case(PREDICT, "found", (TRAIN, PREDICT.replace("1 2 3", "5 7 11 13"))),
}
CONFIG = """
recipe: tiny_recipe.py
adapter: {target_modules: [conv], r: 2, scale: 0.5, modules_to_save: [head]}
training: {max_steps: 2, save_steps: 1, logging_steps: 1, save_total_limit: 2, per_device_train_batch_size: 3,
  learning_rate: 0.01, disable_tqdm: true}
compare: {learning_rates: [0.01], budgets: [60]}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, a fine-tune of it and two adapters."""
    root = tmp_path_factory.mktemp("world") / "world"
    save_model(build("gpt2"), root / "base")
    save_model(tuned("gpt2"), root / "tuned")
    save(random_adapter(build("gpt2"), picked, 0.02), root / "adapter")
    save(random_adapter(build("gpt2"), picked, 0.03), root / "other")
    return root


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config and the recipe that it names."""
    root = tmp_path_factory.mktemp("workshop") / "workshop"
    root.mkdir()
    (root / "tiny.yaml").write_text(CONFIG)
    # A recipe that is imported is the same in every fork, so that what flora knows of it need not be made again.
    (root / "tiny_recipe.py").write_text("from tiny_recipe import *\n")
    return root


def warm(case: Case, start: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a command in this process, so that its forks need not import anything."""
    place = copy_of(start, scratch / "warm")
    remember_templates(monkeypatch)

    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.chdir(place)
        for command in (*case.before, case.argv):
            assert flora_cli.main(command.split()) == 0


class Kills(NamedTuple):
    """How a command is killed.

    Attributes:
        every: one of so many changes.
        power_cut: what was not flushed is lost as well.
    """

    every: int
    power_cut: bool = False


class Undisturbed(NamedTuple):
    """What a command does when nothing happens to it.

    Attributes:
        case: the command.
        start: a folder with all that is there when it starts.
        old: what is in there.
        new: what is in there when it has ended.
        changes: that it makes.
    """

    case: Case
    start: Path
    old: Found
    new: Found
    changes: int

    def check_safe(self, place: Path, about: object) -> None:
        """Nothing is lost: the output is what it was, or what it was to become, and the inputs are untouched."""
        left = self.case.look(place)
        assert self.case.is_safe(self.old, self.new, left), f"{about}: {left}"

    def check_next(self, place: Path, about: object) -> None:
        """Nothing is left over: the next run gives what an undisturbed one gives, and only that."""
        second = run_command((self.case.again or self.case.argv).split(), place)
        if second.code != 0:
            assert second.code == 2, second
            assert "exist" in second.errors

        assert self.case.look(place) == self.new, f"{about}: {second}"
        assert set(contents(place)) == set(self.new), f"{about}: {second}"


def undisturbed(case: Case, world: Path, scratch: Path) -> Undisturbed:
    """Runs a command once, after those that come before it."""
    start = copy_of(world, scratch / "start")
    for command in case.before:
        assert run_command(command.split(), start).code == 0
    old = case.look(start)

    place = copy_of(start, scratch / "place")
    whole = run_command(case.argv.split(), place)
    assert whole.code == 0, whole
    new = case.look(place)
    assert set(new) >= set(old)

    return Undisturbed(case, start, old, new, whole.changes)


def check_kills(case: Case, world: Path, scratch: Path, kills: Kills) -> int:
    """Kills the command again and again; how often."""
    known = undisturbed(case, world, scratch)

    # What the next run makes of a disk is a matter of what is on it, so the same disk is not tried twice.
    tried: list[dict[str, str]] = []

    chosen = range(1 + hash_of(case) % min(kills.every, known.changes), known.changes + 1, kills.every)
    for at in chosen:
        about = f"{case}, change {at}"
        place = copy_of(known.start, scratch / "place")
        ended = run_command(case.argv.split(), place, kill_at=at, power_cut=kills.power_cut)
        assert ended.code is None, f"{about}: {ended}"
        known.check_safe(place, about)

        disk = contents(place)
        if disk not in tried:
            tried.append(disk)
            known.check_next(place, about)

    assert chosen, case
    return len(chosen)


def hash_of(case: Case) -> int:
    """Which of the kills a sparse run makes: others for each command."""
    return sum(case.argv.encode())


@pytest.mark.parametrize("name", CASES)
def test_a_killed_command_loses_nothing_and_leaves_nothing(name: str, world: Path, tmp_path: Path) -> None:
    assert check_kills(CASES[name], world, tmp_path, Kills(SPARSE)) > 0


@pytest.mark.parametrize("name", TRAININGS)
def test_a_killed_training_loses_nothing_and_leaves_nothing(
    name: str, workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm(TRAININGS[name], workshop, tmp_path, monkeypatch)
    assert check_kills(TRAININGS[name], workshop, tmp_path, Kills(3 * SPARSE, power_cut=True)) > 0


@pytest.mark.slow
def test_every_change_of_every_command(
    world: Path,
    workshop: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """All with a power cut; of those without one in five, since what is lost then is a part of what a cut takes."""
    made: dict[str, int] = {}
    failed: list[str] = []

    for start, cases in ((world, CASES), (workshop, TRAININGS)):
        for name, case in cases.items():
            warm(case, start, tmp_path, monkeypatch)
            before = sum(made.values())

            # A command that fails does not keep the others from being tried.
            for words, kills in (("power cut", Kills(1, power_cut=True)), ("no power cut", Kills(5))):
                try:
                    made[f"{name}, {words}"] = check_kills(case, start, tmp_path, kills)
                except AssertionError as error:
                    failed.append(f"{name}, {words}: {error}")

            with capfd.disabled():
                all_made = sum(made.values())
                print(f"{name}: {all_made - before} kills; {all_made} so far, {len(failed)} failed", flush=True)

    assert failed == [], "\n".join(failed)
    assert sum(made.values()) >= 1000
