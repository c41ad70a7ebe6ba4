"""What the system refuses, and odd names: one line, exit code 2, and everything as it was."""

from __future__ import annotations

import errno
import io
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from killing import contents, copy_of

import flora.recipes.digits
import flora.runs.training  # noqa: F401  (what libraries do when they are imported first is not the subject)
import flora_cli
from convert_cases import random_adapter
from flora.convert import save
from flora.errors import UserError
from flora.runs.predicting import check_place
from flora.runs.settings import read
from foreign_models import build
from test_merge import picked


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that nothing is wrong with."""
    root = tmp_path_factory.mktemp("sound")
    save(random_adapter(build("gpt2"), picked, 0.02), root / "adapter")
    return root / "adapter"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def one_line(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """What was said about an error: one line, and nothing else."""

    def said() -> str:
        error = capsys.readouterr().err
        assert error.startswith("flora: error: "), error
        assert error.count("\n") == 1, error
        return error

    return said


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
    command: str, refusal: str, sound: Path, here: Path, one_line: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, number, text = REFUSALS[refusal]
    argv = [part.format(adapter=sound) for part in COMMANDS[command]]
    with monkeypatch.context() as patch:
        patch.setattr(Path if name == "mkdir" else os, name, refuse(number))
        code = flora_cli.main(argv)
    assert code == 2
    assert text in one_line()
    assert contents(here) == {".": ""}


SAID_BY_TORCH = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("unable to open file <a> in read-only mode: Too many open files (24)"),
    RuntimeError("unable to write to file </torch_7>: No space left on device (28)"),
    RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
    RuntimeError("can't start new thread"),
]


@pytest.mark.parametrize("error", SAID_BY_TORCH, ids=str)
def test_what_the_system_refuses_to_compiled_code(
    error: Exception, one_line: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(args: object) -> int:
        raise error

    monkeypatch.setitem(flora_cli.COMMANDS, "recipes", refused)
    assert flora_cli.main(["recipes"]) == 2
    assert str(error) in one_line()


def test_another_error_of_torch_is_a_bug(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(args: object) -> int:
        raise RuntimeError("shapes differ (24)")

    monkeypatch.setitem(flora_cli.COMMANDS, "recipes", fails)
    assert flora_cli.main(["recipes"]) == 1
    assert "this is a bug in flora" in capsys.readouterr().err


NAMES = ["with spaces", "ünïcödé 模型", "[glob]*?", "-dash", "#hash", "~", "quote'\"", "new\nline", "n" * 200]


@pytest.mark.parametrize("name", NAMES)
def test_odd_names_are_only_names(name: str, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / name
    assert flora_cli.main(["convert", str(sound), "--to", "flora", "--out", str(target)]) == 0
    assert flora_cli.main(["inspect", str(target)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_file_that_may_not_grow(sound: Path, tmp_path: Path, one_line: Callable[[], str]) -> None:
    """As on a full disk, but in the middle of a file."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    try:
        code = flora_cli.main(["convert", str(sound), "--to", "dense", "--out", str(tmp_path / "out.safetensors")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert code == 2
    one_line()
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


def victim(place: Path) -> Path:
    """A folder that must not be touched."""
    (place / "victim").mkdir()
    (place / "victim" / "thesis.txt").write_text("years of work")
    return place / "victim"


def plant(place: Path, name: str) -> None:
    """What somebody who sent a folder may have left beside an output, so that flora removes or writes elsewhere."""
    part, target = place / ".out.flora-part", victim(place)
    if name == "the part is a link":
        part.symlink_to(target)
    elif name == "the part is a file":
        part.write_text("mine")
    elif name == "the lock is a link":
        part.mkdir()
        (part / "lock").symlink_to(target / "thesis.txt")
    else:
        part.mkdir()
        (part / name).symlink_to(target)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("the part is a link", 2),
        ("the part is a file", 2),
        ("the lock is a link", 2),
        ("layers", 0),
        ("new", 0),
        ("old", 0),
        ("replaced", 0),
    ],
)
def test_planted_leftovers(
    name: str, code: int, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(tmp_path, name)
    assert flora_cli.main(["convert", str(sound), "--to", "lora", "--out", str(tmp_path / "out")]) == code
    assert capsys.readouterr().err.count("\n") == (code == 2)
    assert (tmp_path / "victim" / "thesis.txt").read_text() == "years of work"
    assert [path.name for path in (tmp_path / "victim").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("kind", ["pipe", "device", "socket"])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter.safetensors", "a.pt"])
def test_sources_that_are_no_files(
    name: str, kind: str, sound: Path, tmp_path: Path, one_line: Callable[[], str]
) -> None:
    place = copy_of(sound, tmp_path / "adapter")
    path = place / name
    path.unlink(missing_ok=True)

    if kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            os.chdir(place)
            listener.bind(name)
            os.chdir(sound)
    else:
        os.mkfifo(path)

    given = place if name.startswith("adapter_") else path
    signal.alarm(30)
    assert flora_cli.main(["inspect", str(given)]) == 2
    signal.alarm(0)
    one_line()


NO_PLACES = [".", "..", "/", "/proc/flora", "/dev/null", "file/out", "loop", "x" * 300, "a/" * 2500]


@pytest.mark.parametrize("verb", ["convert", "train", "compare"])
@pytest.mark.parametrize("name", NO_PLACES)
def test_places_where_nothing_can_be_written(
    name: str, verb: str, sound: Path, here: Path, one_line: Callable[[], str]
) -> None:
    Path("file").touch()
    Path("loop").symlink_to("loop")
    argv = {
        "convert": ["convert", str(sound), "--to", "lora", "--overwrite", "--out", name],
        "train": ["train", "digits-tiny", f"output={name}"],
        "compare": ["compare", "digits-tiny", "--methods", "frozen", "--seeds", "0", f"output={name}/x"],
    }
    if verb == "compare" and name in (".", "..", "/", "/dev/null"):
        pytest.skip("a name beside it can be written")

    assert flora_cli.main(argv[verb]) == 2
    one_line()
    assert sorted(path.name for path in here.iterdir()) == ["file", "loop"]


def test_a_screen_that_knows_ascii_only(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert flora_cli.main(["convert", str(sound), "--to", "lora", "--out", str(tmp_path / "ünï")]) == 0
    assert b"\\xfcn\\xef: lora" in written.getvalue()


def test_streams_that_are_closed(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert flora_cli.main(["convert", str(sound), "--to", "lora", "--out", str(tmp_path / "out")]) == 0
    assert flora_cli.main(["inspect", str(tmp_path / "absent")]) == 2
    sys.stdout.close()
    sys.stderr.close()


def test_a_screen_that_is_full(
    sound: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert flora_cli.main(["inspect", str(sound)]) == 2
    assert capsys.readouterr().err == "flora: error: No space left on device\n"


def test_no_message_steers_the_terminal(sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert flora_cli.main(["inspect", "a\x1b[2J\rb"]) == 2
    assert flora_cli.main(["convert", str(sound), "--to", "lora", "--out", str(tmp_path / "a\x1b[2Jb")]) == 0
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out + printed.err
    assert r"a\x1b[2Jb: lora" in printed.out


STUMBLES = ["x: " + "y" * 2_000_000, "x: !!timestamp y", "seed: !!int ''", "seed: 2024-99-99", "a: &a [*a]"]


@pytest.mark.parametrize("number", range(len(STUMBLES)))
def test_configs_that_a_parser_stumbles_over(number: int, tmp_path: Path, one_line: Callable[[], str]) -> None:
    (tmp_path / "c.yaml").write_text(STUMBLES[number])
    assert flora_cli.main(["train", str(tmp_path / "c.yaml")]) == 2
    one_line()


TYPED = ["run #2", "null", "~", "2024-01-01", "1e3", "[x]", "{a: b}", "'x'", "yes", "a: b", " x"]


@pytest.mark.parametrize("text", TYPED)
def test_paths_are_taken_as_they_are_typed(text: str) -> None:
    settings = read("vision_classify", [f"output={text}", f"task.data={text}", f"task.model={text}"])
    assert (str(settings.output), settings.task.data, settings.task.model) == (text, text, text)


@pytest.mark.parametrize("text", ["run #2", "2024-01-01", "1e3"])
def test_what_may_be_a_path_or_a_group_is_taken_as_it_is_typed(text: str) -> None:
    settings = read("digits-tiny", [f"training.deepspeed={text}", "training.report_to=[none]"])
    assert settings.training == {**settings.training, "deepspeed": text, "report_to": ["none"]}


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ("photo.png", "holds the input .*photo.png, which a result could replace"),
        ("thesis.txt", "holds files and no predictions.json, so flora predict did not write them"),
        ("", "is a file; give a folder"),
        ("predictions.json", None),
    ],
)
def test_predictions_replace_nothing_of_the_users(there: str, message: str | None, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if there:
        out.mkdir()
    (out / there).touch()

    with nullcontext() if message is None else pytest.raises(UserError, match=message):
        check_place(out, [str(tmp_path / "out" / "photo.png")] if there == "photo.png" else [])


OWN = """
from tiny_recipe import *
def load_data(task, seed):
    if task.examples < 0: raise RuntimeError("on purpose")
    return Data(Drawn(task.examples, 0), Drawn(3, 1), Drawn(3, 2))
"""


def test_what_a_recipe_of_the_users_does_is_not_called_a_bug_of_flora(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("own.py").write_text(OWN)
    Path("own.yaml").write_text("recipe: own.py\nadapter: {target_modules: [conv], r: 2}")

    assert flora_cli.main(["train", "own.yaml", "output=out", "task.examples=-1"]) == 1
    printed = capsys.readouterr().err
    assert "on purpose" in printed
    assert "own.py; look there first" in printed

    assert flora_cli.main(["train", "own.yaml", "output=out", "task.examples=0"]) == 2
    assert "error: the recipe gives no examples to train on" in capsys.readouterr().err
    assert sorted(path.name for path in here.iterdir()) == ["own.py", "own.yaml"]
