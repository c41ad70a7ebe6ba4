"""Files and folders that are complete or absent: made in a locked folder nearby, then moved into place in one step.

Every output ``NAME`` has one such folder, ``.NAME.flora-part``. It holds the lock against a second writer, what is
being written, and for the moment of an exchange what was there before. A process that is killed leaves it behind; the
next one that claims the same output puts things right and removes it. Nothing else is ever touched.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from flora.errors import UserError
from flora.storage.replacing import Kind, check_replaceable
from flora.storage.system import CANNOT, Lock, exchange, flushed, sync

PART = ".flora-part"
LOCK, NEW, OLD = "lock", "new", "old"
# Bytes, on the usual file systems.
LONGEST_NAME = 255
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Claim(NamedTuple):
    """An output that this thread may write, and nobody else.

    Attributes:
        target: where it goes, with links resolved: a link that is the output stays a link.
        folder: the locked folder beside it. It goes with everything in it when the claim ends.
    """

    target: Path
    folder: Path


# A lock for each target, held by the thread that claims it.
_turns: dict[Path, threading.RLock] = {}
_claimed: dict[Path, Claim] = {}


def cache_folder() -> Path:
    """Where what can be made again is kept: the environment's ``FLORA_CACHE``, or ``~/.cache/flora``."""
    return Path(os.environ.get("FLORA_CACHE") or Path.home() / ".cache" / "flora").expanduser().resolve()


def check_target(
    target: Path,
    kind: Kind | None = None,
    *,
    overwrite: bool = False,
    sources: Sequence[str | Path] = (),
    also: Collection[str] = (),
) -> None:
    """Checks, at the door of a verb, that an output may be written.

    Args:
        target: the output.
        kind: what the verb writes; only such a file or folder is ever replaced. None for what is ours by its place.
        overwrite: whether it may be there already.
        sources: what the verb reads, and must not replace.
        also: names of files that may be in a folder besides those of its kind.

    Raises:
        FileExistsError: it exists and ``overwrite`` is not set.
        UserError: it is one of the sources or holds one, or it holds something that flora did not write.
    """
    place = _place_of(target)

    if not os.path.lexists(place):
        return

    if not overwrite:
        # A run that was killed at its very end may have left its part, which a claim removes.
        with suppress(UserError, OSError), claim(target):
            pass

        raise FileExistsError(f"{target} exists; choose another output or ask to overwrite it (--overwrite)")

    if os.path.ismount(place):
        raise UserError(f"{target} is the root of a file system, which cannot be replaced; give a folder in it")

    for source in sources:
        real = _real(Path(source))
        if place == real or place in real.parents:
            raise UserError(f"{target} is, or holds, the input {source}, which is only read; give another output")

    if kind is not None:
        check_replaceable(place, target, kind, also)


@contextmanager
def claim(target: Path, *, wait: bool = False, keep: Collection[str] = ()) -> Iterator[Claim]:
    """Claims an output for this thread, and first puts right what a killed process has left of it.

    Claims of one thread nest: :func:`staged` inside uses the claim that is there.

    Args:
        target: the output; its parent folders are made.
        wait: waits for another process that writes it, instead of raising.
        keep: names in the folder of the claim that a failure, or a kill, leaves for the next run to continue with.

    Raises:
        UserError: another process, or another thread, is writing it.
        OSError: the folder beside it cannot be made; a disk that is full is told with the output's name.
    """
    try:
        with _claim(target, wait, keep) as place:
            yield place
    except OSError as error:
        if not _is_about_a_part(error):
            raise

        raise OSError(f"cannot write {target}: {error.strerror}") from None


@contextmanager
def _claim(target: Path, wait: bool, keep: Collection[str] = ()) -> Iterator[Claim]:
    place = _place_of(target)

    # A record lock holds off other processes, but not threads.
    turn = _turns.setdefault(place, threading.RLock())
    if not turn.acquire(blocking=wait):
        raise _busy(target)

    try:
        if place in _claimed:
            yield _claimed[place]
        else:
            with _claim_folder(place, target, wait, keep) as found:
                yield found
    finally:
        turn.release()


@contextmanager
def _claim_folder(place: Path, target: Path, wait: bool, keep: Collection[str]) -> Iterator[Claim]:
    made = _make_parents(place.parent, target)
    folder = place.with_name(_part_name(place.name))

    try:
        lock = _lock(folder, target, wait)
    except BaseException:
        _remove_empty(made)
        raise

    kept = keep

    try:
        _clear(folder, {*keep, OLD})
        _put_right(folder, place)
        _claimed[place] = Claim(place, folder)
        yield _claimed[place]
        kept = ()
    finally:
        _claimed.pop(place, None)

        # What cannot be removed now is removed by the next claim.
        with suppress(OSError):
            _clear(folder, kept)

        _leave(folder, lock)
        _remove_empty(made)


@contextmanager
def staged(
    target: Path,
    kind: Kind | None = None,
    *,
    overwrite: bool = False,
    sources: Sequence[str | Path] = (),
    also: Collection[str] = (),
    wait: bool = False,
    keep_others: bool = False,
) -> Iterator[Path]:
    """A path to write a file or a folder to, which is put in the place of ``target`` when the block ends well.

    Whatever happens before, ``target`` is not there or is what it was. Files are on the disk before they get their
    name, and have the modes that the umask gives.

    Args:
        target: the output.
        kind: of output; only such a file or folder is ever replaced. None for what is ours by its place.
        overwrite: whether it may be there already.
        sources: what is read, and must not be replaced.
        also: names that a folder may hold besides those of its kind.
        wait: waits for another process that writes the output, instead of raising.
        keep_others: what a folder holds under other names than the new one stays in it.

    Raises:
        FileExistsError, UserError: as in :func:`check_target` and :func:`claim`.
        OSError: it cannot be written; nothing is left behind.
    """
    check_target(target, kind, overwrite=overwrite, sources=sources, also=also)

    try:
        with _claim(target, wait) as place:
            # Nobody can change it now.
            check_target(target, kind, overwrite=overwrite, sources=sources, also=also)
            new = place.folder / NEW
            _remove(new)
            new.mkdir()

            yield new / target.name

            sync(new, mode=new.stat().st_mode)
            if keep_others and place.target.is_dir():
                _link_others(place.target, new / target.name)
            put(new / target.name, place)
            _remove(new)
    except OSError as error:
        raise _named(error, target) from None


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """:func:`staged` for a folder that is ours by its place: a fresh folder that replaces what is there."""
    with staged(target, overwrite=True, wait=True) as new:
        new.mkdir()
        yield new


@contextmanager
def staged_files(folder: Path, last: str) -> Iterator[Path]:
    """A fresh folder inside ``folder``, whose files replace those of ``folder`` one by one when the block ends well.

    The file ``last`` is the mark that all the others are in place: the old one goes first, the new one comes last.
    """
    new = folder / PART
    _remove(new)
    new.mkdir()

    try:
        yield new
        sync(new, mode=new.stat().st_mode)
        (folder / last).unlink(missing_ok=True)

        for path in sorted(new.iterdir(), key=lambda path: path.name == last):
            path.replace(folder / path.name)

        sync(folder, deep=False)
    finally:
        _remove(new)


def _link_others(before: Path, new: Path) -> None:
    """Gives a new folder what the one before it holds under other names: the same files, which take no more room."""
    for path in before.iterdir():
        twin = new / path.name

        if os.path.lexists(twin):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, twin, symlinks=True, copy_function=_link)
        else:
            _link(path, twin)

    sync(new, deep=False)


def _link(source: str | Path, target: str | Path) -> None:
    """A second name for a file, or a copy where the file system has no such thing."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in {*CANNOT, errno.EPERM, errno.EMLINK}:
            raise

        shutil.copy2(source, target, follow_symlinks=False)


def put(source: Path, place: Claim) -> None:
    """Puts a finished file or folder in the place of a claimed target, at once where the system can do that.

    What was there is then where ``source`` was, or gone. Without an exchange a kill may leave the target absent for the
    moment between two renames; the next claim puts the old state back.
    """
    with flushed(place.target.parent):
        _move(source, place)


def _move(source: Path, place: Claim) -> None:
    target = place.target

    if not os.path.lexists(target):
        source.rename(target)
    elif source.is_dir() != target.is_dir():
        code = errno.EISDIR if target.is_dir() else errno.ENOTDIR

        raise OSError(code, os.strerror(code), str(target))
    elif source.is_file() and target.is_file():
        source.replace(target)
    elif not exchange(source, target):
        target.rename(place.folder / OLD)

        try:
            source.rename(target)
        except BaseException:
            (place.folder / OLD).rename(target)
            raise


def write_text(path: Path, text: str) -> None:
    """Writes a file so that a reader, or a killed writer, sees the old text or the new, never a part."""
    with staged(path, overwrite=True, wait=True) as new:
        new.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, *, sort_keys: bool = False) -> None:
    """:func:`write_text` of the value as JSON; PEFT sorts the keys of its configs, and so do ours."""
    write_text(path, json.dumps(value, indent=2, sort_keys=sort_keys) + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it is not JSON; names the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        # Numbers of thousands of digits, and brackets, are refused too.
        raise UserError(f"{path} is not valid JSON ({error}); it was truncated or edited") from None


def clear_parts(folder: Path) -> None:
    """Removes what a killed process has left inside a folder of ours that this thread has claimed."""
    for path in [*folder.glob(PART), *folder.glob(f".*{PART}")]:
        _remove(path)


def _real(path: Path) -> Path:
    """The path without links, whether or not it exists."""
    return Path(os.path.realpath(path))


def _place_of(target: Path) -> Path:
    """Where an output goes, which must have a name that every library here can open."""
    place = _real(target)

    if not place.name:
        raise UserError(f"{target} cannot be an output; give the path of a file or folder in it")
    if not is_text(place):
        raise UserError(
            f"{target} has a name that is not UTF-8 text, which safetensors cannot open; give another output"
        )

    return place


def is_text(path: Path) -> bool:
    """Whether a path is UTF-8 text; a name on a disk may be any bytes."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _part_name(name: str) -> str:
    part = f".{name}{PART}"
    if len(os.fsencode(part)) <= LONGEST_NAME:
        return part
    return f".{name[:40]}-{sha256(os.fsencode(name)).hexdigest()[:16]}{PART}"


def _make_parents(parent: Path, target: Path) -> list[Path]:
    """Makes the folders above an output; those that were not there, the innermost first."""
    missing = [path for path in (parent, *parent.parents) if not path.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _named(error, target) from None
    return missing


def _remove_empty(folders: Sequence[Path]) -> None:
    """Removes folders that were made for an output which has not come, the inner ones first."""
    # What is not empty stays, and with it what is above.
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _lock(folder: Path, target: Path, wait: bool) -> Lock:
    """The lock on the folder of a claim, which is made where it is not there."""
    while True:
        # Everything in the folder is removed, so it must be the one that is made here and not a way to another.
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise UserError(f"{folder} is in the way of {target} and is not a folder that flora made; move it away")

        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise _named(error, target) from None

        try:
            lock = Lock.take(folder / LOCK, wait=wait)
        except FileNotFoundError:
            # Another process has removed the folder since.
            continue
        except OSError as error:
            # Only if it is empty.
            with suppress(OSError):
                folder.rmdir()

            raise _named(error, target) from None

        if lock is None:
            raise _busy(target)
        if lock.is_of(folder / LOCK):
            return lock

        lock.release()


def _busy(target: Path) -> UserError:
    return UserError(f"another flora process is writing {target}; wait until it finishes, or give another output")


def _put_right(folder: Path, place: Path) -> None:
    """Brings back what a process had moved aside when it was killed between two renames, or removes it."""
    old = folder / OLD
    if os.path.lexists(old) and not os.path.lexists(place):
        old.rename(place)
    _remove(old)


def _clear(folder: Path, keep: Collection[str]) -> None:
    """Removes what is in the folder of a claim, but for some names; nothing of ours is a link, so links go too."""
    for path in folder.iterdir():
        if path.name != LOCK and (path.name not in keep or path.is_symlink()):
            _remove(path)


def _leave(folder: Path, lock: Lock) -> None:
    """Gives the lock back, and removes the folder unless something is kept in it."""
    # Another process may come in at any moment.
    with suppress(OSError):
        if [path.name for path in folder.iterdir()] == [LOCK]:
            (folder / LOCK).unlink()
            folder.rmdir()
    lock.release()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_about_a_part(error: OSError) -> bool:
    """Whether the name in an error says nothing to the user: a file in the making, or none, as where a disk is full."""
    if error.filename is None:
        return error.errno in FULL
    return PART in str(error.filename)


def _named(error: OSError, target: Path) -> OSError:
    """The system's error about a file that is being written, with the name of the output; any other as it is."""
    # The claim that the part belongs to has the output's own name.
    if PART in str(target):
        return error

    about = [name for name in (error.filename, error.filename2) if name is not None]
    if error.errno is None or (about and not any(PART in str(name) or str(name) in str(target) for name in about)):
        return error
    return OSError(f"cannot write {target}: {error.strerror}; nothing was left behind")
