"""What every verb that writes leaves: files with the modes of the umask, and the same bytes from the same input."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from killing import copy_of, run_command
from test_kills import CASES, TRAININGS, Case, Found, warm, workshop, world  # noqa: F401 (two are fixtures)

COMMANDS = {
    name: CASES[name]
    for name in ("convert", "convert to a file", "convert to dense", "merge", "extract", "inspect", "copy")
}
TRAINED = {name: TRAININGS[name] for name in ("train", "compare", "predict")}


def left_by(case: Case, start: Path, place: Path, mask: int) -> Found:
    """What a command leaves that runs under the umask; the modes of its output are checked."""
    copy_of(start, place)
    before = os.umask(mask)
    try:
        for command in (*case.before, case.argv):
            ended = run_command(command.split(), place)
            assert ended.code == 0, ended
    finally:
        os.umask(before)

    output = place / case.out
    for path in [output, *output.rglob("*")]:
        expected = 0o777 if path.is_dir() else 0o666
        assert path.stat().st_mode & 0o777 == expected & ~mask, f"{path} {path.stat().st_mode:o}"

    return {name: value for name, value in case.look(place).items() if name.startswith(case.out)}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command(name: str, world: Path, tmp_path: Path) -> None:  # noqa: F811
    case = COMMANDS[name]
    assert left_by(case, world, tmp_path / "first", 0o027) == left_by(case, world, tmp_path / "second", 0o077)


@pytest.mark.parametrize("name", TRAINED)
def test_a_training(
    name: str,
    workshop: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was measured in seconds is not looked at."""
    case = TRAINED[name]
    warm(case, workshop, tmp_path, monkeypatch)
    assert left_by(case, workshop, tmp_path / "first", 0o027) == left_by(case, workshop, tmp_path / "second", 0o077)
