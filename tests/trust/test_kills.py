"""A command that is killed at any change of the file system loses nothing, and the next one leaves nothing over."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
from killing import Ended, contents, copy_of, run_command

from convert_cases import random_adapter
from flora.convert import save
from foreign_models import build
from test_extract import save_model, tuned
from test_merge import picked

SPARSE = 20  # by default one of so many kills is made; the slow suite makes all


class Case(NamedTuple):
    """A command that writes.

    Attributes:
        argv: of the command.
        out: what it writes.
        before: commands whose outputs are there when it starts.
    """

    argv: str
    out: str
    before: tuple[str, ...] = ()


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


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, a fine-tune of it and two adapters."""
    root = tmp_path_factory.mktemp("world") / "world"
    save_model(build("gpt2"), root / "base")
    save_model(tuned("gpt2"), root / "tuned")
    save(random_adapter(build("gpt2"), picked, 0.02), root / "adapter")
    save(random_adapter(build("gpt2"), picked, 0.03), root / "other")
    return root


def check_kills(case: Case, world: Path, scratch: Path, every: int) -> int:
    """Kills the command again and again; how often."""
    argv = case.argv.split()
    start = copy_of(world, scratch / "start")
    for command in case.before:
        assert run_command(command.split(), start).code == 0
    old = contents(start)

    place = copy_of(start, scratch / "place")
    whole = run_command(argv, place)
    assert whole.code == 0, whole.printed
    new = contents(place)
    assert set(new) >= set(old)

    kills = range(1 + hash_of(case) % min(every, whole.changes), whole.changes + 1, every)
    for at in kills:
        place = copy_of(start, scratch / "place")
        ended = run_command(argv, place, kill_at=at)
        assert ended == Ended(None, at, ended.printed), f"{case}, change {at}: {ended}"

        # Nothing is lost: the output is what it was, or what it was to become, and the inputs are untouched.
        left = contents(place, ignore=lambda name: "flora-part" in name)
        assert left in (old, new, *with_parents(old, new)), f"{case}, change {at}: {left}"

        # Nothing is left over: the next run gives what an undisturbed one gives, and only that.
        again = run_command(argv, place)
        if again.code != 0:
            assert again.code == 2
            assert "exist" in again.printed
        assert contents(place) == new, f"{case}, change {at}: {again.printed}"
    assert kills, case
    return len(kills)


def with_parents(old: dict[str, str], new: dict[str, str]) -> list[dict[str, str]]:
    """The old state with one or more of the folders that are made for the output, the outer ones first."""
    names = sorted(name for name, digest in new.items() if not digest and name not in old)
    return [{**old, **dict.fromkeys(names[:count], "")} for count in range(len(names))]


def hash_of(case: Case) -> int:
    """Which of the kills a sparse run makes: others for each command."""
    return sum(case.argv.encode())


@pytest.mark.parametrize("name", CASES)
def test_a_killed_command_loses_nothing_and_leaves_nothing(name: str, world: Path, tmp_path: Path) -> None:
    assert check_kills(CASES[name], world, tmp_path, SPARSE) > 0


@pytest.mark.slow
def test_every_change_of_every_command(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = {name: check_kills(case, world, tmp_path, 1) for name, case in CASES.items()}
    with capsys.disabled():
        print(f"\n{sum(made.values())} kills: {made}")
    assert sum(made.values()) >= 1000
