"""What is kept of one weight's gradients: their common Tucker form, found while they stream by one at a time.

The gradients of several batches are one tensor ``(batch, I1, ..., IN)`` whose first mode stays whole. Its higher-order
SVD is found in two passes: the first collects, for each mode that is too wide to be kept, the range of its unfolding
times a random matrix (Halko et al. 2011; for tensors Che and Wei 2019), the second the gradients projected on those
ranges. Where no mode is wide, the second pass alone is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from flora.tucker.decomposition import spectrum
from flora.tucker.form import mode_product

# A mode up to this size is kept as it is.
NARROW = 192
# How many columns a range has beyond twice the rank that is wanted.
SPARE = 8


class Directions(NamedTuple):
    """The higher-order SVD of a weight's gradients.

    Attributes:
        vectors: for each mode its singular vectors, ``(In, Kn)``, the leading one first.
        energy: squares of the core, summed over the batches, ``(K1, ..., KN)``.
        total: the squared norm of all the gradients.
        mean: the mean gradient in these vectors, ``(K1, ..., KN)``.
    """

    vectors: list[Tensor]
    energy: Tensor
    total: float
    mean: Tensor


class Sketch:
    """Takes the gradients of one weight, in float32 and in any number of parts per batch, and gives their directions.

    Under several processes the weight may have no gradient in some of them, as an expert that no token was sent to.

    Args:
        shape: ``(I1, ..., IN)`` of the weight as the adapter sees it.
        rank: the largest that a mode which is not whole may get.
        batches: how many will come.
        seed: of the random matrices.
        device: that the gradients come on.
    """

    def __init__(self, shape: Sequence[int], rank: int, batches: int, seed: int, device: torch.device) -> None:
        self.shape, self.batches, self.seed, self.device = tuple(shape), batches, seed, device
        self.widths = [size if size <= NARROW else min(size, max(NARROW // 2, 2 * rank + SPARE)) for size in shape]
        self.ranges: dict[int, Tensor] = {}
        self.bases: dict[int, Tensor] = {}
        self.cores: Tensor | None = None
        self.norms = torch.zeros(batches, dtype=torch.float64)

    @property
    def needs_ranges(self) -> bool:
        """Whether a mode is wide, so that the batches have to come twice."""
        return any(width < size for width, size in zip(self.widths, self.shape, strict=True))

    def add_to_ranges(self, gradient: Tensor, batch: int) -> None:
        """The first pass: a random part of the range of each wide mode."""
        # shape: gradient (I1, ..., IN)
        for mode, (size, width) in enumerate(zip(self.shape, self.widths, strict=True)):
            if width == size:
                continue

            # The unfolding (In, rest) times a random matrix (rest, width) has the leading directions of the unfolding
            # among its columns. Every process and batch draws its own matrix: their sum is as random as each of them.
            others = math.prod(self.shape) // size
            stream = (process_number() * self.batches + batch) * len(self.shape) + mode
            random = torch.Generator(gradient.device).manual_seed(1000003 * self.seed + stream)
            right = torch.randn(others, width, generator=random, device=gradient.device)
            part = gradient.movedim(mode, 0).reshape(size, others) @ right

            if mode in self.ranges:
                self.ranges[mode] = self.ranges[mode] + part
            else:
                self.ranges[mode] = part

    def close_ranges(self) -> None:
        """Between the passes: an orthonormal basis of each range, the same on every process."""
        for mode, (size, width) in enumerate(zip(self.shape, self.widths, strict=True)):
            if width == size or mode in self.bases:
                continue

            # Every process takes part in every sum, with zeros where no gradient came to it.
            found = self.ranges.pop(mode, None)
            if found is None:
                found = torch.zeros(size, width, device=self.device)

            # Where none came to any of them, the mode is kept as it is.
            add_up(found)
            if found.any():
                self.bases[mode] = of_first_process(torch.linalg.qr(found)[0].contiguous())

    def add(self, gradient: Tensor, batch: int) -> None:
        """The second pass: the gradient in the bases."""
        # shape: gradient (I1, ..., IN)
        core = gradient
        for mode, basis in self.bases.items():
            core = mode_product(core, basis.T, mode)

        if self.cores is None:
            self.cores = self._no_cores()

        self.cores[batch] += core
        self.norms[batch] += float(gradient.double().square().sum())

    def _no_cores(self) -> Tensor:
        kept = [self.bases[mode].shape[1] if mode in self.bases else size for mode, size in enumerate(self.shape)]
        return torch.zeros(self.batches, *kept, device=self.device)

    def directions(self) -> Directions | None:
        """The higher-order SVD of all that came; None if nothing did, or it is zero or not finite."""
        if self.cores is None and not is_distributed():
            return None

        own = self._no_cores() if self.cores is None else self.cores
        cores = gather(own).double().cpu()
        total = float(gather(self.norms.to(self.device)).sum())
        if not math.isfinite(total) or not torch.isfinite(cores).all() or not cores.any():
            return None

        # Sequential higher-order SVD over the stacked cores (batches, K1, ..., KN): the singular vectors of each mode
        # are found after the modes before have been turned into theirs. The dimension of the batches is left alone.
        # Vectors in the coordinates of a range become vectors of the weight by its basis.
        vectors = []
        for mode in range(len(self.shape)):
            inner = complete(spectrum(cores, mode + 1)[1], cores.shape[mode + 1])
            cores = mode_product(cores, inner.T, mode + 1)
            basis = self.bases.get(mode)
            vectors.append(inner if basis is None else basis.double().cpu() @ inner)

        energy = cores.square().sum(0)

        return Directions(vectors, energy, max(total, float(energy.sum())), cores.mean(0))


def complete(vectors: Tensor, count: int) -> Tensor:
    """Orthonormal columns, and further ones up to ``count``; (In, K) -> (In, count)."""
    missing = count - vectors.shape[1]
    if missing <= 0:
        return vectors[:, :count]
    # Random columns without their part in the given ones. That part is taken off twice, because after once rounding
    # still leaves some of it.
    random = torch.randn(vectors.shape[0], missing, generator=torch.Generator().manual_seed(0), dtype=vectors.dtype)
    random = random - vectors @ (vectors.T @ random)
    return torch.cat([vectors, torch.linalg.qr(random - vectors @ (vectors.T @ random))[0]], 1)


def is_distributed() -> bool:
    """Whether there are other processes to agree with."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def process_number() -> int:
    """Of this process among all of them."""
    if is_distributed():
        return dist.get_rank()
    return 0


def add_up(value: Tensor) -> None:
    """The sum over the processes, in place."""
    if is_distributed():
        dist.all_reduce(value)


def of_first_process(value: Tensor) -> Tensor:
    """What the first process has, written into the value."""
    if is_distributed():
        dist.broadcast(value, 0)
    return value


def gather(value: Tensor) -> Tensor:
    """What all processes have, one after the other along the first dimension."""
    if not is_distributed():
        return value
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, value.contiguous())
    return torch.cat(parts)
