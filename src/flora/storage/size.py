"""Sizes of files and tensors, written for people."""

from __future__ import annotations


def size(count: float) -> str:
    """Bytes in the largest decimal unit that leaves at least 1.

    Examples:
        >>> size(43_700)
        '43.7 KB'
    """
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count:.0f} B"
