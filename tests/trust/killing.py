"""Runs a command in a forked process and kills it at a chosen change of the file system."""

from __future__ import annotations

import fcntl
import gc
import hashlib
import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import pytest
import safetensors.torch
import torch
from matplotlib.figure import Figure

import flora_cli

# What Python tells its audit hooks before it changes something on the disk, and the exchange, which calls the system.
CHANGES = {
    "os.chmod", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate", "os.utime",
    "flora.exchange",
}  # fmt: skip


HANGS = 300  # seconds after which a command counts as one that waits for ever
PIPE = 1 << 20  # bytes that are printed and not read yet


class Ended(NamedTuple):
    """How a command ended.

    Attributes:
        code: its exit code; None if it was killed.
        changes: how often it changed the file system.
        printed: on the standard output.
        errors: on the standard error.
    """

    code: int | None
    changes: int
    printed: str
    errors: str


class Disk:
    """The file system as a running command changes it.

    Args:
        place: the folder in which changes count.
        kill_at: the number of the change before which the process is killed; 0 for none.
        power_cut: with the process goes what it has not flushed: such files are left with half of their bytes. A disk
            writes in an order of its own, so at every other change the file that was written last is whole.
        by: the signal.

    Attributes:
        changes: made so far.
        dirty: files that were written and not flushed since, the latest last.
    """

    def __init__(self, place: Path, kill_at: int, power_cut: bool, by: signal.Signals) -> None:
        self.inside, self.kill_at, self.power_cut, self.by = os.path.realpath(place), kill_at, power_cut, by
        self.changes = 0
        self.dirty: list[str] = []
        self.over = False

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        """Python's audit hook."""
        # The other arguments of an opened file are its mode and its flags.
        paths = args[:1] if event == "open" else args
        if self.over or not is_change(event, args) or not any(is_inside(value, self.inside) for value in paths):
            return

        self.change()

        if event == "open":
            self.written(os.fsdecode(args[0]))
        elif event in ("os.rename", "flora.exchange"):
            old, new = (os.path.abspath(os.fsdecode(value)) for value in args[:2])  # noqa: PTH100 (no link is followed)
            self.move(old, new, both=event == "flora.exchange")

    def change(self) -> None:
        """One more; the end, if it is the one."""
        self.changes += 1
        if self.changes != self.kill_at:
            return

        self.over = True
        lost = self.dirty[: len(self.dirty) - self.changes % 2] if self.power_cut else []
        for path in lost:
            if Path(path).is_file():
                os.truncate(path, Path(path).stat().st_size // 2)
        os.kill(os.getpid(), self.by)

    def move(self, old: str, new: str, *, both: bool) -> None:
        """What was written under one name has another now."""
        names = {old: new, new: old} if both else {old: new}
        gone = [] if both else [path for path in self.dirty if is_below(path, new)]
        self.dirty = [renamed(path, names) for path in self.dirty if path not in gone]

    def written(self, path: str) -> None:
        """A file whose bytes are not on the disk yet."""
        real = os.path.realpath(path)
        self.dirty = [*(other for other in self.dirty if other != real), real]

    def flush(self, handle: int) -> None:
        """Stands for ``os.fsync``: a killed process loses nothing of what the system has in memory."""
        path = os.readlink(f"/proc/self/fd/{handle}")  # noqa: PTH115 (as a string)
        if is_below(path, self.inside):
            self.change()
            self.dirty = [other for other in self.dirty if other != path]

    def telling(self, write: Callable[..., Any], at: int) -> Callable[..., Any]:
        """A function of compiled code that writes the file which an argument names: a change that Python cannot see."""

        def writes(*args: Any, **kwargs: Any) -> Any:
            path = args[at] if len(args) > at else None
            if not isinstance(path, (str, os.PathLike)) or not is_inside(path, self.inside):
                return write(*args, **kwargs)

            self.change()
            done = write(*args, **kwargs)
            self.written(os.fsdecode(path))
            self.change()
            return done

        return writes


def run_command(
    argv: list[str],
    place: Path,
    *,
    kill_at: int = 0,
    power_cut: bool = False,
    by: signal.Signals = signal.SIGKILL,
    under: Callable[[], object] = lambda: None,
) -> Ended:
    """Runs ``flora ARGV`` in a fork whose working directory is ``place``.

    Args:
        argv: of the command.
        place: everything that it reads and writes; only changes in there count.
        kill_at: the number of the change before which it is killed; 0 for none.
        power_cut: what was not flushed is lost too.
        by: the signal that kills it.
        under: called in the fork before the command: what it must cope with.
    """
    # Pipes and not files, which may not grow under every limit.
    told, printed, errors = (Pipe.open() for _ in range(3))

    pid = os.fork()
    if pid == 0:
        disk = Disk(place, kill_at, power_cut, by)
        _be_the_command(argv, disk, under, [told.writer, printed.writer, errors.writer])

    texts = [pipe.text() for pipe in (told, printed, errors)]
    os.waitpid(pid, 0)
    code, changes = json.loads(texts[0]) if texts[0] else (None, kill_at)
    return Ended(code, changes, texts[1], texts[2])


class Pipe(NamedTuple):
    """The two ends of a pipe that takes all that a command prints."""

    reader: int
    writer: int

    @classmethod
    def open(cls) -> Pipe:
        """A new one."""
        pipe = cls(*os.pipe())
        fcntl.fcntl(pipe.writer, fcntl.F_SETPIPE_SZ, PIPE)
        return pipe

    def text(self) -> str:
        """What the other process has written, when it has ended."""
        os.close(self.writer)
        with os.fdopen(self.reader, errors="replace") as stream:
            return stream.read()


def _be_the_command(argv: list[str], disk: Disk, under: Callable[[], object], writers: list[int]) -> None:
    """Never returns: a fork must not come back into the tests."""
    code = 1
    told, printed, errors = writers

    # The next full collection would walk through all that the tests have imported.
    gc.freeze()

    try:
        os.dup2(printed, 1)
        os.dup2(errors, 2)
        sys.stdout = os.fdopen(os.dup(1), "w")  # pytest's own would not write there
        sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
        os.chdir(disk.inside)
        os.fsync = disk.flush  # type: ignore[assignment]
        Figure.savefig = draw_nothing  # type: ignore[method-assign, assignment]
        torch.save = disk.telling(torch.save, 1)
        safetensors.torch.serialize_file = disk.telling(safetensors.torch.serialize_file, 1)
        sys.addaudithook(disk.audit)
        # A shell lets what it starts in the background ignore Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.alarm(HANGS)
        under()
        code = flora_cli.main(argv)
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()

        os.write(told, json.dumps([code, disk.changes]).encode())
        os._exit(0)


def is_change(event: str, args: tuple[Any, ...]) -> bool:
    """Whether an audit event is about a change of the file system."""
    if event == "open":
        mode, flags = args[1], args[2]
        return bool((isinstance(mode, str) and set(mode) & set("wax+")) or flags & (os.O_WRONLY | os.O_RDWR))
    return event in CHANGES


def is_inside(value: object, folder: str) -> bool:
    if not isinstance(value, (str, bytes, os.PathLike)):
        return False
    path = os.path.join(os.getcwd(), os.fsdecode(value))  # noqa: PTH109, PTH118 (inside an audit hook)
    return path.startswith((folder + os.sep, os.path.realpath(folder) + os.sep))


def is_below(path: str, folder: str) -> bool:
    """Whether a path is the folder, or in it; both whole and without links."""
    return path == folder or path.startswith(folder + os.sep)


def renamed(path: str, names: dict[str, str]) -> str:
    """The path of a file after the folder that it is in, or the file itself, has got another name."""
    for old, new in names.items():
        if is_below(path, old):
            return new + path.removeprefix(old)
    return path


def draw_nothing(figure: Figure, path: Any, **options: Any) -> None:
    """Stands for drawing a picture, which takes longer than the trainings here."""
    if hasattr(path, "write"):
        path.write(b"<svg></svg>" if isinstance(path, io.BytesIO) else "<svg></svg>")
        return

    with Path(path).open("wb") as stream:
        stream.write(b"a picture")


def remember_templates(patch: pytest.MonkeyPatch) -> None:
    """Cards and pages are made from texts that never change; compiling them takes longer than the trainings here."""
    compile_text = jinja2.Environment.compile
    compiled: dict[Any, Any] = {}

    def remembered(self: jinja2.Environment, source: Any, *args: Any, **options: Any) -> Any:
        key = (str(source), args, *sorted(options.items()))
        if key not in compiled:
            compiled[key] = compile_text(self, source, *args, **options)
        return compiled[key]

    patch.setattr(jinja2.Environment, "compile", remembered)


def contents(place: Path, name: str = "", ignore: Callable[[str], bool] = lambda name: False) -> dict[str, str]:
    """Every file below a folder with the digest of what is in it, every folder with an empty one."""
    found = {}
    root = place / name
    for path in sorted([root, *root.rglob("*")]) if root.exists() else []:
        inside = str(path.relative_to(place))
        if not ignore(inside):
            found[inside] = "" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def copy_of(world: Path, place: Path) -> Path:
    """A fresh copy of the files that a command starts from."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(world, place, symlinks=True)
    return place
