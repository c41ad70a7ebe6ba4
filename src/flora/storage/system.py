"""What the system offers for safe writing: a lock that dies with its process, an exchange, a flush to the disk."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:
    # Windows: no lock is taken there.
    fcntl = None  # type: ignore[assignment]

AT_FDCWD = -100
# The flag of renameat2 on Linux and of renamex_np on macOS.
EXCHANGE = 2
# A file system that cannot do it says so by one of these.
CANNOT = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


class Lock:
    """A lock file that this process holds. The system takes the lock back when the process ends, however it ends.

    It is a record lock, which the workers that a process forks do not inherit.
    """

    def __init__(self, handle: int) -> None:
        self.handle = handle

    @classmethod
    def take(cls, path: Path, *, wait: bool) -> Lock | None:
        """The lock, or None where another process has it and this one does not wait."""
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)

        if fcntl is None:
            return cls(handle)

        try:
            fcntl.lockf(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                os.close(handle)
                return None

            if error.errno not in CANNOT:
                os.close(handle)
                raise

        return cls(handle)

    def is_of(self, path: Path) -> bool:
        """Whether the file that is locked is still the one of that name: its last holder removes it."""
        try:
            return os.path.samestat(os.fstat(self.handle), path.stat())
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Gives the lock back."""
        os.close(self.handle)


def exchange(first: Path, second: Path) -> bool:
    """Lets two files or folders change places, in one step that cannot be seen or cut short half-way.

    Returns:
        Whether that was done; False where this system or its file system cannot.
    """
    sys.audit("flora.exchange", str(first), str(second))
    call = _exchange_call()
    if call is None:
        return False
    if call(os.fsencode(first), os.fsencode(second)) == 0:
        return True

    code = ctypes.get_errno()
    if code in CANNOT:
        return False

    raise OSError(code, os.strerror(code), str(first), None, str(second))


def _exchange_call() -> Any:
    """A function of two paths that returns 0 where it has exchanged them; None where the system has none."""
    if sys.platform not in ("linux", "darwin"):
        return None

    library = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "linux" and hasattr(library, "renameat2"):
        return lambda first, second: library.renameat2(AT_FDCWD, first, AT_FDCWD, second, EXCHANGE)
    if sys.platform == "darwin" and hasattr(library, "renamex_np"):
        return lambda first, second: library.renamex_np(first, second, EXCHANGE)

    return None


def sync(path: Path, *, mode: int | None = None, deep: bool = True) -> None:
    """Waits until a file, or a folder, is on the disk, so that a power cut cannot take it.

    Args:
        path: of a file or folder.
        mode: the mode of a folder that was made under the umask; files and folders inside get the same, without the
            bits that make files executable. None leaves their modes.
        deep: with everything inside; False for the names in a folder alone.
    """
    if path.is_dir():
        folders = [path]
        files = []
    else:
        folders = []
        files = [path]

    if deep:
        for root, names, others in os.walk(path):
            folders += [Path(root, name) for name in names]
            files += [Path(root, name) for name in others]

    for file in files:
        if not file.is_symlink() and file.is_file():
            if mode is not None:
                file.chmod(mode & 0o666)

            with flushed(file):
                pass

    for folder in folders:
        if not folder.is_symlink():
            if mode is not None:
                folder.chmod(mode & 0o7777)

            with flushed(folder):
                pass


@contextmanager
def flushed(path: Path) -> Iterator[None]:
    """Waits, when the block has ended well, until a file or the names in a folder are on the disk.

    It is opened before the block, so that a system without a handle to spare refuses before anything is changed.

    Args:
        path: of the file or folder.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        # A file without the right to read it, or Windows' folders.
        handle = None

    try:
        yield
        if handle is not None:
            _flush(handle)
    finally:
        if handle is not None:
            with suppress(OSError):
                os.close(handle)


def _flush(handle: int) -> None:
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in CANNOT:
            raise
