"""The memory of the process, where the system reports it."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@contextmanager
def watch_growth() -> Iterator[Callable[[], int | None]]:
    """Yields a function that says by how many bytes the resident memory grew at most since; None off Linux."""
    gc.collect()

    try:
        ctypes.CDLL(None).malloc_trim(0)
        # The peak is counted from here on.
        RESET.write_text("5")
        before = resident("VmRSS")
    except (OSError, AttributeError):
        yield lambda: None
    else:
        yield lambda: resident("VmHWM") - before


def peak_growth(step: Callable[[], object]) -> int | None:
    """Bytes by which the resident memory grows at most while ``step`` runs, after a first run; None off Linux."""
    step()
    with watch_growth() as growth:
        step()
        return growth()


def resident(field: str) -> int:
    """Bytes: VmRSS now, VmHWM at most."""
    found = re.search(rf"^{field}:\s+(\d+) kB", STATUS.read_text(encoding="ascii"), re.MULTILINE)
    if found is None:
        raise OSError(f"{STATUS} has no {field}")
    return 1024 * int(found[1])
