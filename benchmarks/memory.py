"""The memory of the process, where the system tells it."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_growth(step: Callable[[], object]) -> int | None:
    """Bytes by which the resident memory grows at most while ``step`` runs, after a first run; None off Linux."""
    step()
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        RESET.write_text("5")  # the peak starts anew from here
        before = resident("VmRSS")
        step()
        return resident("VmHWM") - before
    except (OSError, AttributeError):
        return None


def resident(field: str) -> int:
    """Bytes: VmRSS now, VmHWM at most."""
    found = re.search(rf"^{field}:\s+(\d+) kB", STATUS.read_text(encoding="ascii"), re.MULTILINE)
    if found is None:
        raise OSError(f"{STATUS} has no {field}")
    return 1024 * int(found[1])
