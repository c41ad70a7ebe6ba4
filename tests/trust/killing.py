"""Runs a command in a forked process and kills it at a chosen change of the file system."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flora_cli

# What Python tells its audit hooks before it changes something on the disk, and the exchange, which calls the system.
CHANGES = {
    "os.chmod", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate", "os.utime",
    "flora.exchange",
}  # fmt: skip


class Ended(NamedTuple):
    """How a command ended: its exit code (None if it was killed), and how often it changed the file system."""

    code: int | None
    changes: int
    printed: str


def run_command(argv: list[str], place: Path, *, kill_at: int = 0) -> Ended:
    """Runs ``flora ARGV`` in a fork whose working directory is ``place``.

    Args:
        argv: of the command.
        place: everything that it reads and writes; only changes in there count.
        kill_at: the number of the change before which it is killed; 0 for none.
    """
    printed = place.parent / f"{place.name}.printed"
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        _be_the_command(argv, place, kill_at, writer, printed)

    os.close(writer)
    with os.fdopen(reader) as pipe:
        told = pipe.read()
    os.waitpid(pid, 0)
    code, changes = json.loads(told) if told else (None, kill_at)
    return Ended(code, changes, printed.read_text(errors="replace"))


def _be_the_command(argv: list[str], place: Path, kill_at: int, writer: int, printed: Path) -> None:
    """Never returns: a fork must not come back into the tests."""
    changes, code = 0, 1
    inside = os.path.realpath(place)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal changes
        if is_change(event, args) and any(is_inside(value, inside) for value in args):
            changes += 1
            if changes == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        handle = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout = os.fdopen(os.dup(1), "w")  # pytest's own would not write there
        sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
        os.chdir(place)
        os.fsync = lambda handle: None  # a killed process loses nothing of what the system has in memory
        sys.addaudithook(hook)
        code = flora_cli.main(argv)
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(writer, json.dumps([code, changes]).encode())
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
