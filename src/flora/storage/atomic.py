"""Files and folders that are either whole or absent: everything is staged beside its place and renamed into it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flora.errors import UserError

STAGING = ".staging-"
WEIGHTS = ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")
CHECKPOINT_FILES = ("optimizer.pt", "scheduler.pt", "trainer_state.json")


def cache_folder() -> Path:
    """Where what can be made again is kept: the environment's ``FLORA_CACHE``, or ``~/.cache/flora``."""
    return Path(os.environ.get("FLORA_CACHE") or Path.home() / ".cache" / "flora").expanduser().resolve()


def write_text(path: Path, text: str) -> None:
    """Writes a file so that a reader, or a killed writer, sees the old text or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, staged = tempfile.mkstemp(prefix=STAGING, dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        Path(staged).chmod(0o644)
        Path(staged).replace(path)
    except BaseException:
        Path(staged).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """:func:`write_text` of the value as JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON; names the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); it was cut short or edited") from None


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A fresh folder beside ``target`` to write into; on success it takes the place of ``target``, else it goes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f"{STAGING}{target.name}-", dir=target.parent))
    try:
        staged.chmod(0o755)
        yield staged
        replace_folder(staged, target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


@contextmanager
def staged_files(folder: Path, last: str) -> Iterator[Path]:
    """A fresh folder inside ``folder``; on success its files replace those of ``folder`` one by one, ``last`` last.

    The file ``last`` is the mark that all the others are in place.
    """
    staged = Path(tempfile.mkdtemp(prefix=STAGING, dir=folder))
    try:
        yield staged
        for path in sorted(staged.iterdir(), key=lambda path: path.name == last):
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def replace_folder(source: Path, target: Path) -> None:
    """Renames ``source`` to ``target``; a folder that is there already goes once the new one is in its place."""
    if not target.exists():
        source.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f"{STAGING}{target.name}-old-", dir=target.parent))
    target.rename(old / target.name)
    try:
        source.rename(target)
    except BaseException:
        (old / target.name).rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete ``checkpoint-*`` of a run, or None.

    The Trainer writes ``trainer_state.json`` last, so a checkpoint without a readable one was cut short; one whose
    removal was cut short lacks other files. Both are passed over.
    """
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(found, key=lambda path: -int(path.name.removeprefix("checkpoint-"))):
        if _is_complete(path):
            return path
    return None


def _is_complete(checkpoint: Path) -> bool:
    if not all((checkpoint / name).is_file() for name in CHECKPOINT_FILES):
        return False
    if not any((checkpoint / name).is_file() for name in WEIGHTS) or not any(checkpoint.glob("rng_state*.pth")):
        return False
    try:
        return "global_step" in read_json(checkpoint / "trainer_state.json")
    except ValueError:
        return False
