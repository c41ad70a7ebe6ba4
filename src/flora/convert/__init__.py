"""Every format to and from one in-memory :class:`Adapter`. Key names and shapes only: nothing here needs PEFT.

>>> sorted(FORMATS)
['flora']
"""

from __future__ import annotations

from pathlib import Path

from flora.convert import native
from flora.convert.adapter import Adapter, Entry
from flora.convert.files import check_exists
from flora.convert.layout import Layout

FORMATS = {"flora": native}

__all__ = ["FORMATS", "Adapter", "Entry", "Layout", "load"]


def load(path: str | Path) -> Adapter:
    """Reads an adapter of any format; which one it is is seen from the files.

    Args:
        path: a folder that PEFT saved, or a tensor file.

    Raises:
        FileNotFoundError: the path, or a file of the folder, does not exist.
        ValueError: no format matches, or the file is truncated, corrupt, foreign, has NaN or does not fit together.
    """
    path = check_exists(Path(path), "adapter")
    return native.read(path)
