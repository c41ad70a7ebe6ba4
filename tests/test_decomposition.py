"""HOSVD and HOOI against tensorly, on awkward shapes."""

from __future__ import annotations

import warnings

import pytest
import tensorly
import torch
from tensorly.decomposition import tucker

from convert_cases import random_form
from flora.tucker.decomposition import Approximation, decompose, spectrum

SHAPES = [
    ((13, 11, 3, 5), (6, 4, 2, 4)),
    ((31, 17), (6, 6)),
    ((7, 11, 13), (4, 6, 8)),
    ((101, 5, 3), (8, 4, 2)),
    ((2, 3, 5, 7, 11), (2, 2, 4, 3, 6)),
]


@pytest.mark.parametrize(("shape", "ranks"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tucker_form_is_found_again(shape: tuple[int, ...], ranks: tuple[int, ...], dtype: torch.dtype) -> None:
    dense = random_form(shape, ranks).to_dense().to(dtype)
    form = decompose(dense, ranks)
    assert form.ranks == ranks
    assert form.core.dtype == dtype
    assert form.error < 1e-5
    assert torch.allclose(form.to_dense(), dense, rtol=1e-5, atol=1e-5 * float(dense.abs().max()))


@pytest.mark.parametrize(("shape", "ranks"), SHAPES)
def test_half_the_ranks_lose_no_more_than_tensorly_hooi(shape: tuple[int, ...], ranks: tuple[int, ...]) -> None:
    dense = random_form(shape, ranks).to_dense().double()
    half = [max(1, rank // 2) for rank in ranks]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tensorly warns of more vectors than there are
        core, factors = tucker(dense.numpy(), rank=half, n_iter_max=200, tol=1e-10)
    theirs = dense - torch.from_numpy(tensorly.tucker_to_tensor((core, factors)))
    ours = decompose(dense, half)
    assert ours.error <= 1.05 * float(theirs.norm() / dense.norm())
    assert ours.error == pytest.approx(float((dense - ours.to_dense()).norm() / dense.norm()), abs=1e-9)


@pytest.mark.parametrize("decay", [0.0, 0.5, 2.0])
def test_large_matrices_are_as_near_as_their_svd(decay: float) -> None:
    """Found by subspace iteration: within a hundredth of the optimum, with a flat spectrum too."""
    left, right = (torch.linalg.qr(torch.randn(size, 521))[0] for size in (701, 523))
    values = torch.arange(1, 522).double().pow(-decay).float()
    dense = left * values @ right.T
    form = decompose(dense, (7, 7))
    assert form.error <= 1.01 * float(values[7:].norm() / values.norm())
    exact = decompose(left[:, :7] * (1 + values[:7]) @ right[:, :7].T, (7, 7))
    assert exact.error < 1e-5


def test_factors_are_orthonormal_and_whole_modes_have_none() -> None:
    form = decompose(torch.randn(7, 5, 3), (4, 2, 3))
    assert form.factors[2] is None
    for factor in form.factors[:2]:
        assert torch.allclose(factor.T @ factor, torch.eye(factor.shape[1]), atol=1e-5)


def test_ranks_above_what_a_mode_can_reach_are_lowered() -> None:
    form = decompose(torch.randn(31, 2, 3), (20, 2, 3))
    assert form.ranks == (6, 2, 3)
    assert form.error < 1e-6
    assert decompose(torch.randn(31, 2, 3), 8).error < 1e-6


def test_spectrum_is_that_of_the_unfolding() -> None:
    dense = torch.randn(29, 3, 2).double()
    for mode in range(3):
        values, vectors = spectrum(dense, mode)
        expected = torch.linalg.svdvals(dense.movedim(mode, 0).flatten(1)).square()
        assert torch.allclose(values, expected, atol=1e-9)
        assert torch.allclose(vectors.T @ vectors, torch.eye(len(values)).double(), atol=1e-9)


def test_zeros_half_precision_and_bad_input() -> None:
    assert decompose(torch.zeros(5, 3), (2, 2)).error == 0
    assert decompose(torch.randn(5, 3).bfloat16(), (3, 3)).core.dtype == torch.float32
    assert isinstance(decompose(torch.randn(5), (5,)), Approximation)
    with pytest.raises(ValueError, match="NaN"):
        decompose(torch.full((5, 3), torch.nan), (2, 2))
    with pytest.raises(TypeError, match=r"decompose needs real numbers, got torch.complex64"):
        decompose(torch.randn(5, 3, dtype=torch.complex64), (2, 2))
    with pytest.raises(ValueError, match=r"rank 4 of mode 'd1' is above its size 3"):
        decompose(torch.randn(5, 3), (2, 4))
    with pytest.raises(ValueError, match="have 1 entry"):
        decompose(torch.randn(5, 3), (2,))
