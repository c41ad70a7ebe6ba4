"""What a conversion did, measured: the written file is read back and its changes are compared with the source's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from flora.convert.adapter import Adapter, Entry
from flora.convert.arithmetic import core_in_orthonormal_basis, in_dtype
from flora.errors import REPORT, UserError
from flora.storage.size import size
from flora.storage.tensors import CONFIG, WEIGHTS
from flora.tucker.form import concatenate


class Rounding(NamedTuple):
    """How far rounding may move the result of one weight, and the outputs of a whole model; relative to the largest."""

    weight: float
    model: float


ROUNDING = {
    # Adapters are in float32 there.
    torch.float64: Rounding(weight=1e-6, model=1e-6),
    torch.float32: Rounding(weight=1e-5, model=1e-4),
    torch.float16: Rounding(weight=5e-3, model=1e-2),
    torch.bfloat16: Rounding(weight=4e-2, model=5e-2),
}
# From this many entries on, the change of a weight is compared in factored form.
LARGE = 2**24


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
        claim: what holds of the change itself: a conversion is exact, an extraction is as near as its ranks allow.
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
    claim: str = "exact (no SVD)"

    def __str__(self) -> str:
        source = "" if self.source_bytes is None else f", source {size(self.source_bytes)}"

        lines = [
            f"{self.target}: {self.format}, {self.weights} weights, {size(self.target_bytes)}{source}",
            f"{self.claim}: largest error {self.largest_error:.1e}, relative {self.relative_error:.1e} ({self.worst})",
        ]
        return "\n".join([*lines, *(f"note: {remark}" for remark in self.remarks)])


def compare(source: Adapter, written: Adapter) -> tuple[float, float, str]:
    """The largest absolute and relative difference of any weight's change, and the name of the latter.

    Of a weight of more than ``LARGE`` entries the absolute one is a bound.

    Raises:
        ValueError: the adapters do not change the same weights, or a change differs by more than rounding.
    """
    if source.weights.keys() != written.weights.keys() or source.extras.keys() != written.extras.keys():
        odd = sorted((source.weights.keys() ^ written.weights.keys()) | (source.extras.keys() ^ written.extras.keys()))
        raise UserError(f"the written file does not hold {odd[0]} as the source does; nothing was kept; {REPORT}")

    largest, relative, worst = 0.0, 0.0, next(iter(source.weights), "")
    for name, entry in source.weights.items():
        found = _difference(entry, written.weights[name])
        dtype = entry.form.core.dtype
        if not found.relative <= ROUNDING.get(dtype, ROUNDING[torch.float32]).weight:
            remedy = REPORT
            # What is lost is about as small as the smallest numbers of this type.
            if found.largest < 100 * torch.finfo(dtype).tiny:
                remedy = f"the change is too small for {dtype}; save the adapter in float32 first (model.float())"

            raise UserError(
                f"{name}: the written file differs from the source by {found.relative:.1e}; nothing was kept; {remedy}"
            )

        largest = max(largest, found.largest)
        relative, worst = max((relative, worst), (found.relative, name))

    return largest, relative, worst


class _Difference(NamedTuple):
    """Between two changes of one weight: of any entry, or a bound of it, and in the Frobenius norm."""

    largest: float
    relative: float


def _difference(expected: Entry, written: Entry) -> _Difference:
    """How far two changes are apart.

    The change of a large weight is not formed, which could take more memory than the machine has: the difference of two
    Tucker forms is a Tucker form, and its norm is that of a small core. The norm is also a bound of every entry.
    """
    first, second = (in_dtype(entry, torch.float64) for entry in (expected, written))

    if math.prod(expected.shape) <= LARGE:
        dense = first.dense()
        apart = second.dense() - dense
        return _Difference(float(apart.abs().max()), _ratio(float(apart.norm()), float(dense.norm())))

    forms = [first.stored_form(), second.stored_form()]
    apart = core_in_orthonormal_basis(concatenate(forms, [first.scale, -second.scale]))
    norm = float(apart.norm())
    full = abs(first.scale) * float(core_in_orthonormal_basis(forms[0]).norm())

    return _Difference(norm, _ratio(norm, full))


def _ratio(part: float, whole: float) -> float:
    if whole:
        return part / whole
    return part


def size_of(path: Path) -> int:
    """Bytes of an adapter: of its file, or of the two files that it has in a folder with checkpoints and tokenizers."""
    if path.is_file():
        return path.stat().st_size
    return sum((path / name).stat().st_size for name in (CONFIG, WEIGHTS) if (path / name).is_file())


def table(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    """Left-aligned columns of text under their headers."""
    lines = [headers, *rows]
    widths = [max(len(row[column]) for row in lines) for column in range(len(headers))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in lines)
