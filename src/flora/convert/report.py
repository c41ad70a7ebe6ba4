"""What a conversion did, measured: the written file is read back and its changes are compared with the source's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from flora.convert.adapter import Adapter
from flora.errors import UserError

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class Report:
    """The result of writing an adapter. ``print(report)`` says it in a few lines.

    Attributes:
        target: what was written.
        format: its format.
        weights: how many weights it changes.
        largest_error: the largest absolute difference of any entry of any change, file against source.
        relative_error: the largest ``|file - source| / |source|`` of any weight, in the Frobenius norm.
        worst: the weight with that relative error.
        target_bytes: size of what was written.
        source_bytes: size of the source, if it was a file.
        remarks: what the user should know, such as readers that will not take the file.
    """

    target: Path
    format: str
    weights: int
    largest_error: float
    relative_error: float
    worst: str
    target_bytes: int
    source_bytes: int | None = None
    remarks: tuple[str, ...] = ()

    def __str__(self) -> str:
        source = "" if self.source_bytes is None else f", source {_size(self.source_bytes)}"
        lines = [
            f"{self.target}: {self.format}, {self.weights} weights, {_size(self.target_bytes)}{source}",
            f"exact (no SVD): largest error {self.largest_error:.1e}, "
            f"relative {self.relative_error:.1e} ({self.worst})",
        ]
        return "\n".join([*lines, *(f"note: {remark}" for remark in self.remarks)])


def compare(source: Adapter, written: Adapter) -> tuple[float, float, str]:
    """The largest absolute and relative difference of any weight's change, and the name of the latter.

    Raises:
        ValueError: the adapters do not change the same weights, or a change differs by more than rounding.
    """
    if source.weights.keys() != written.weights.keys() or source.extras.keys() != written.extras.keys():
        odd = sorted((source.weights.keys() ^ written.weights.keys()) | (source.extras.keys() ^ written.extras.keys()))
        raise UserError(f"what was written does not hold {odd[0]} as the source does; nothing was kept")
    largest, relative, worst = 0.0, 0.0, next(iter(source.weights), "")
    for name, entry in source.weights.items():
        expected = entry.dense().double()
        difference = written.weights[name].dense().double() - expected
        largest = max(largest, float(difference.abs().max()))
        norm = float(expected.norm())
        error = float(difference.norm()) / norm if norm else float(difference.norm())
        if error > TOLERANCE.get(entry.form.core.dtype, 1e-5):
            raise UserError(f"{name}: what was written differs by {error:.1e} from the source; nothing was kept")
        relative, worst = max((relative, worst), (error, name))
    return largest, relative, worst


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return (
        path.stat().st_size
        if path.is_file()
        else sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    )


def _size(count: int) -> str:
    return f"{count / 2**20:,.2f} MiB" if count >= 2**20 else f"{count / 2**10:,.1f} KiB"


def table(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    """Left-aligned columns of text under their headers."""
    lines = [headers, *rows]
    widths = [max(len(row[column]) for row in lines) for column in range(len(headers))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in lines)
