"""What the system refuses, and odd names: one line, exit code 2, and everything as it was."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from killing import contents

import flora.recipes.digits
import flora.runs.training  # noqa: F401  (what libraries do when they are imported first is not the subject)
import flora_cli
from convert_cases import random_adapter
from flora.convert import save
from foreign_models import build
from test_merge import picked


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that nothing is wrong with."""
    root = tmp_path_factory.mktemp("sound")
    save(random_adapter(build("gpt2"), picked, 0.02), root / "adapter")
    return root / "adapter"


def refuse(number: int) -> Callable[..., None]:
    """A call that the system refuses."""

    def refused(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number), str(args[0]) if args else None)

    return refused


COMMANDS = {
    "convert": ["convert", "{adapter}", "--to", "lora", "--out", "out"],
    "convert to a file": ["convert", "{adapter}", "--to", "kohya", "--out", "out.safetensors"],
    "inspect": ["inspect", "{adapter}", "--html", "out.html"],
    "copy": ["recipes", "copy", "digits"],
    "train": ["train", "digits-tiny", "output=out", "training.max_steps=1", "training.disable_tqdm=true"],
}
REFUSALS = {
    "read-only": ("mkdir", errno.EROFS, "Read-only file system"),
    "no permission": ("mkdir", errno.EACCES, "Permission denied"),
    "full": ("mkdir", errno.ENOSPC, "No space left on device"),
    "quota": ("mkdir", errno.EDQUOT, "quota exceeded"),
    "broken disk": ("open", errno.EIO, "Input/output error"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("refusal", REFUSALS)
def test_what_the_system_refuses_is_one_line(
    command: str,
    refusal: str,
    sound: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    name, number, text = REFUSALS[refusal]
    argv = [part.format(adapter=sound) for part in COMMANDS[command]]
    with monkeypatch.context() as patch:
        patch.setattr(Path if name == "mkdir" else os, name, refuse(number))
        code = flora_cli.main(argv)
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("flora: error: ")
    assert text in error
    assert error.count("\n") == 1
    assert contents(tmp_path) == {".": ""}


NAMES = ["with spaces", "ünïcödé 模型", "[glob]*?", "-dash", "#hash", "~", "quote'\"", "new\nline", "n" * 200]


@pytest.mark.parametrize("name", NAMES)
def test_odd_names_are_only_names(name: str, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / name
    assert flora_cli.main(["convert", str(sound), "--to", "flora", "--out", str(target)]) == 0
    assert flora_cli.main(["inspect", str(target)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_file_that_may_not_grow(sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As on a full disk, but in the middle of a file."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    try:
        code = flora_cli.main(["convert", str(sound), "--to", "dense", "--out", str(tmp_path / "out.safetensors")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (2, 1), error
    assert contents(tmp_path) == {".": ""}


def test_a_reader_that_has_ended() -> None:
    program = [sys.executable, "-W", "ignore", "-m", "flora_cli", "recipes"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stderr is not None
        writer.stdout.close()
        printed = writer.stderr.read().splitlines()
    lines = [line for line in printed if line.startswith(("flora", "Traceback", "Exception"))]
    assert writer.returncode == flora_cli.READER_ENDED
    assert lines == [], "as in `flora recipes | head`: it read what it wanted"
