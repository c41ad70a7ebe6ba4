"""Dense -> Tucker: truncated higher-order SVD, then higher-order orthogonal iteration, with the error.

HOSVD takes for each mode the leading left singular vectors of that mode's unfolding (De Lathauwer et al. 2000a); HOOI
improves them in turn, each on the tensor projected by all the others (2000b, algorithm 4.2). The vectors come from an
eigen-decomposition of the smaller Gram matrix of the unfolding, in float64 and in blocks, so that a layer needs little
memory beyond its own. Few vectors of a large unfolding come from a subspace iteration instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flora.errors import UserError, WrongTypeError
from flora.tucker.form import Tucker, mode_product
from flora.tucker.ranks import Ranks, resolve

# Entries turned to float64 at a time.
BLOCK = 1 << 22
# From this size on, a few singular vectors are cheaper by iteration.
LARGE = 512
ITERATIONS = 6


@dataclass(frozen=True, eq=False)
class Approximation(Tucker):
    """A Tucker form fitted to a dense tensor.

    Args:
        core, factors: as of :class:`Tucker`; the factors have orthonormal columns.
        error: ``|X - form| / |X|`` in the Frobenius norm; 0 for a zero tensor.
    """

    error: float = 0.0


def decompose(tensor: Tensor, ranks: Ranks, *, sweeps: int = 50, tolerance: float = 1e-9) -> Approximation:
    """The Tucker form of these ranks nearest to ``tensor`` that HOOI finds, starting from the truncated HOSVD.

    Args:
        tensor: shape ``(I1, ..., IN)``.
        ranks: one per mode, or one int for all (lowered to what a mode can reach); a rank equal to its size keeps the
            mode whole.
        sweeps: at most so many rounds over the modes.
        tolerance: stop once a round lowers the relative error by less than this.

    Returns:
        The form, in the dtype of ``tensor`` (float32 for half precision), with ``.error``. A rank above the product of
        the others is lowered to it, at no error.

    Raises:
        ValueError: ranks and shape do not fit, or the tensor has NaN or infinite entries.

    Examples:
        >>> form = decompose(torch.ones(5, 7, 3), (1, 1, 1))
        >>> form.ranks, form.error < 1e-6
        ((1, 1, 1), True)
    """
    if not isinstance(tensor, Tensor):
        raise WrongTypeError(
            f"decompose needs a tensor, got a {type(tensor).__name__}; give layer.weight or torch.as_tensor(x)"
        )
    if tensor.is_complex():
        raise WrongTypeError(
            f"decompose needs real numbers, got {tensor.dtype}; give the real and imaginary part apart"
        )
    if tensor.ndim == 0:
        raise UserError("decompose needs a tensor of one dimension or more, got a single number")

    ranks = resolve(tensor.shape, ranks, name="tensor")

    if not torch.isfinite(tensor).all():
        raise UserError(
            f"cannot decompose a tensor of shape {tuple(tensor.shape)} with NaN or infinite entries; give one that is "
            "finite"
        )

    if tensor.dtype == torch.float64:
        work = tensor.detach()
    else:
        work = tensor.detach().float()

    # With orthonormal factors |X - form|^2 = |X|^2 - |core|^2, so the best factors are those that keep most of the norm
    # in the core. HOOI improves one factor at a time: with all others fixed, the best one is the leading singular
    # vectors of the tensor projected by the others. The kept norm never falls, so the rounds can stop when it no longer
    # grows.
    modes = [mode for mode, (rank, size) in enumerate(zip(ranks, tensor.shape, strict=True)) if rank < size]
    total = _energy(work)
    factors = _hosvd(work, ranks, modes)
    core = _project(work, factors)
    kept = _energy(core)
    # A truncated SVD is the nearest matrix already.
    needed = tensor.ndim > 2 and len(modes) > 1 and total
    for _ in range(sweeps if needed else 0):
        for mode in modes:
            partial = _project(work, {other: factor for other, factor in factors.items() if other != mode})
            factors[mode] = leading(partial, mode, ranks[mode])[1].to(work.dtype)
            core = mode_product(partial, factors[mode].T, mode)

        previous, kept = kept, _energy(core)
        if _error(total, previous) - _error(total, kept) < tolerance:
            break

    form = Tucker(core.contiguous(), tuple(factors.get(mode) for mode in range(tensor.ndim)))

    return Approximation(form.core, form.factors, _measured_error(work, form, total))


def _hosvd(tensor: Tensor, ranks: Sequence[int], modes: Sequence[int]) -> dict[int, Tensor]:
    """Leading vectors per mode, each from the tensor already projected on those before: the largest cut first."""
    factors: dict[int, Tensor] = {}
    for mode in sorted(modes, key=lambda mode: ranks[mode] / tensor.shape[mode]):
        vectors = leading(tensor, mode, ranks[mode])[1].to(tensor.dtype)
        tensor = mode_product(tensor, vectors.T, mode)
        factors[mode] = vectors
    return factors


def _project(tensor: Tensor, factors: dict[int, Tensor]) -> Tensor:
    """The tensor in the coordinates of the factors, the mode that shrinks it most first."""
    for mode, factor in sorted(factors.items(), key=lambda item: item[1].shape[1] / item[1].shape[0]):
        tensor = mode_product(tensor, factor.T, mode)
    return tensor


def leading(tensor: Tensor, mode: int, rank: int) -> tuple[Tensor, Tensor]:
    """The largest squared singular values of the mode's unfolding, descending, and its left singular vectors.

    A few of a large unfolding are found by subspace iteration (Halko et al. 2011, algorithm 4.4), which costs products
    with the tensor alone; it may fall short of values that hardly differ, and never exceeds them. Otherwise by the
    eigen-decomposition.

    Returns:
        values of shape (K,) and vectors (In, K), float64; K = rank, or all there are.
    """
    unfolded = tensor.movedim(mode, 0).reshape(tensor.shape[mode], -1)
    if not _are_few(unfolded, rank):
        values, vectors = spectrum(tensor, mode)
        return values[:rank], vectors[:, :rank]

    # Subspace iteration: a random subspace, multiplied by the matrix and its transpose in turn, turns towards the
    # leading singular vectors. QR after each product keeps its columns apart. It is twice as wide as needed, because
    # the last columns turn slowly; the SVD of the small product then sorts them.
    # shape: right (columns, width), left (rows, width)
    random = torch.Generator().manual_seed(0)
    width = 2 * rank + 8
    right = torch.randn(unfolded.shape[1], width, generator=random, dtype=tensor.dtype).to(tensor.device)
    for _ in range(ITERATIONS):
        left = torch.linalg.qr(unfolded @ right)[0]
        right = torch.linalg.qr(unfolded.T @ left)[0]

    vectors, values, _ = torch.linalg.svd((unfolded @ right).double(), full_matrices=False)

    return values[:rank].square(), vectors[:, :rank]


def singular_values(matrix: Tensor, rank: int) -> Tensor:
    """The largest squared singular values of a matrix, descending, (K,), float64; K = rank, or all there are."""
    if _are_few(matrix, rank):
        return leading(matrix, 0, rank)[0]
    rows, columns = matrix.shape
    gram = _gram(matrix if rows <= columns else matrix.T)
    values: Tensor = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)
    return values[:rank]


def _are_few(matrix: Tensor, rank: int) -> bool:
    """Whether that many singular vectors are cheaper by iteration than by an eigen-decomposition."""
    return min(matrix.shape) >= LARGE and rank <= min(matrix.shape) // 8


def spectrum(tensor: Tensor, mode: int) -> tuple[Tensor, Tensor]:
    """The squared singular values of the mode's unfolding, descending, and its left singular vectors, in float64.

    Returns:
        values of shape (K,) and vectors (In, K), K = min(In, product of the other sizes).
    """
    unfolded = tensor.movedim(mode, 0).reshape(tensor.shape[mode], -1)
    size, others = unfolded.shape
    if size <= others:
        values, vectors = torch.linalg.eigh(_gram(unfolded))
        return values.flip(0).clamp(min=0), vectors.flip(1)

    # More rows than columns: the eigenvectors of X'X are the right singular vectors V, and the left ones are the
    # columns of X V, which have the lengths of the singular values.
    values, right = torch.linalg.eigh(_gram(unfolded.T))
    values, right = values.flip(0).clamp(min=0), right.flip(1)
    left = unfolded.new_empty(size, others, dtype=torch.float64)
    for start in range(0, size, step := max(1, BLOCK // others)):
        left[start : start + step] = unfolded[start : start + step].double() @ right

    # QR makes the columns orthonormal, also those of singular values that are zero; signs do not matter here.
    return values, torch.linalg.qr(left)[0]


def _gram(matrix: Tensor) -> Tensor:
    """``matrix @ matrix.T`` in float64, (m, n) -> (m, m), block by block."""
    gram = matrix.new_zeros(matrix.shape[0], matrix.shape[0], dtype=torch.float64)
    for start in range(0, matrix.shape[1], step := max(1, BLOCK // matrix.shape[0])):
        block = matrix[:, start : start + step].double()
        gram.addmm_(block, block.T)
    return gram


def _energy(tensor: Tensor) -> float:
    """The squared Frobenius norm, summed in float64."""
    return sum(float(block.double().square().sum()) for block in tensor.reshape(-1).split(BLOCK))


def _error(total: float, kept: float) -> float:
    if total:
        return math.sqrt(max(0.0, 1 - kept / total))
    return 0.0


def _measured_error(tensor: Tensor, form: Tucker, total: float) -> float:
    """``|X - form| / |X|`` from the difference itself: ``1 - kept energy`` cannot tell errors below 1e-4 in float32."""
    if not total:
        return 0.0
    return math.sqrt(_energy(tensor - form.to_dense()) / total)
