"""The Tucker form against its definition, a single einsum in float64."""

from __future__ import annotations

import string

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flora import Tucker
from flora.tucker.form import concatenate, count_params, mode_product


@st.composite
def forms(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """(shape, ranks, seed): 1 to 6 dimensions, any rank up to the size in each, so that some modes are whole."""
    ndim = draw(st.integers(1, 6))
    shape = tuple(draw(st.integers(1, 7 if ndim < 5 else 4)) for _ in range(ndim))
    ranks = tuple(draw(st.integers(1, size)) for size in shape)
    return shape, ranks, draw(st.integers(0, 2**31))


def make(shape: tuple[int, ...], ranks: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tucker:
    """A random form; a rank equal to its size keeps the mode whole."""
    generator = torch.Generator().manual_seed(seed)
    core = torch.randn(*ranks, generator=generator, dtype=torch.float64).to(dtype)
    factors = tuple(
        None if rank == size else torch.randn(size, rank, generator=generator, dtype=torch.float64).to(dtype)
        for size, rank in zip(shape, ranks, strict=True)
    )
    return Tucker(core, factors)


def oracle(form: Tucker) -> Tensor:
    """``dW[i1..iN] = sum_j G[j1..jN] A1[i1,j1] ... AN[iN,jN]``, with the identity for a whole mode."""
    small, large = string.ascii_lowercase[: form.core.ndim], string.ascii_uppercase[: form.core.ndim]
    matrices = [
        torch.eye(r, dtype=torch.float64) if f is None else f.double()
        for r, f in zip(form.ranks, form.factors, strict=True)
    ]
    terms = ",".join(f"{up}{down}" for up, down in zip(large, small, strict=True))
    return torch.einsum(f"{small},{terms}->{large}", form.core.double(), *matrices)


@given(forms())
def test_to_dense_is_the_mode_product_definition(drawn: tuple[tuple[int, ...], tuple[int, ...], int]) -> None:
    shape, ranks, seed = drawn
    form = make(shape, ranks, seed)
    dense = form.to_dense()
    expected = oracle(form)
    assert dense.shape == shape == form.shape
    assert form.ranks == ranks
    assert dense.is_contiguous()
    assert (dense - expected).abs().max() <= 1e-12 * max(1.0, expected.abs().max().item())


@given(forms())
def test_num_params_is_count_params_and_what_is_stored(drawn: tuple[tuple[int, ...], tuple[int, ...], int]) -> None:
    shape, ranks, seed = drawn
    form = make(shape, ranks, seed)
    stored = form.core.numel() + sum(f.numel() for f in form.factors if f is not None)
    assert form.num_params == count_params(shape, ranks) == stored


@given(forms(), st.data())
def test_mode_product_contracts_one_dimension(
    drawn: tuple[tuple[int, ...], tuple[int, ...], int], data: st.DataObject
) -> None:
    shape, _, seed = drawn
    mode = data.draw(st.integers(0, len(shape) - 1))
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(*shape, generator=generator, dtype=torch.float64)
    matrix = torch.randn(5, shape[mode], generator=generator, dtype=torch.float64)
    result = mode_product(tensor, matrix, mode)
    expected = torch.stack([(tensor.movedim(mode, -1) * row).sum(-1) for row in matrix], dim=mode)
    assert result.shape == (*shape[:mode], 5, *shape[mode + 1 :])
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_the_rank_of_every_unfolding_is_at_most_that_of_its_mode() -> None:
    form = make((11, 7, 5, 3), (4, 3, 2, 3))
    dense = form.to_dense()
    unfolding_ranks = [int(torch.linalg.matrix_rank(dense.movedim(mode, 0).flatten(1))) for mode in range(4)]
    assert unfolding_ranks == [4, 3, 2, 3]


def test_gradients_reach_the_core_and_every_factor() -> None:
    form = make((5, 3, 2), (3, 2, 2))
    leaves = [form.core, *(f for f in form.factors if f is not None)]
    for leaf in leaves:
        leaf.requires_grad_()

    def dense(core: Tensor, *factors: Tensor) -> Tensor:
        return Tucker(core, (*factors, None)).to_dense()

    assert len(leaves) == 3
    assert torch.autograd.gradcheck(dense, tuple(leaves))


def test_dtype_is_kept() -> None:
    assert make((5, 3), (2, 3), dtype=torch.bfloat16).to_dense().dtype is torch.bfloat16


# PAPER.md, section 1: the worked example, the near-flatness in k, and the totals over whole models.
CONV_COUNTS = [
    ((512, 256, 3, 3), (32, 32, 2, 2), 28_684),
    ((512, 256, 3, 3), (70, 70, 2, 2), 73_372),
    ((512, 512, 3, 3), (16, 16, 2, 2), 17_420),
    ((512, 512, 7, 7), (16, 16, 2, 2), 17_436),
    ((512, 256, 3, 3), (32, 32, 3, 3), 32 * 32 * 9 + 32 * (512 + 256)),  # whole kernel modes: LoCon-Tucker
]
DEBERTA_LAYER = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]  # query, key, value, output; intermediate, layer.output
LLAMA_LAYER = [(4096, 4096)] * 3 + [(11008, 4096), (4096, 11008)]  # q, k, v; up, down


@pytest.mark.parametrize(("shape", "ranks", "expected"), CONV_COUNTS)
def test_parameter_counts_of_the_paper(shape: tuple[int, ...], ranks: tuple[int, ...], expected: int) -> None:
    assert count_params(shape, ranks) == expected


@pytest.mark.parametrize("r", [1, 2, 8, 32])
def test_parameter_counts_of_whole_models(r: int) -> None:
    deberta = 12 * sum(count_params(shape, (r, r)) for shape in DEBERTA_LAYER)
    assert deberta == 165_888 * r + 72 * r**2
    llama = 32 * sum(count_params(shape, (r, r)) for shape in LLAMA_LAYER)
    lora = 32 * sum(r * (out + inner) for out, inner in LLAMA_LAYER)
    assert llama == lora + 160 * r**2


def test_the_table_of_counts_is_whole() -> None:
    assert len(CONV_COUNTS) == 5
    assert len(DEBERTA_LAYER) == 6
    assert len(LLAMA_LAYER) == 5


ERRORS = [
    ((2, 3), [(5, 2)], "a core of 2 dimensions (2, 3) needs 2 factors, got 1; pass None for a mode that is kept whole"),
    ((2, 3), [(5, 2), (7, 4)], "factor 1 has shape (7, 4), expected (size, 3) to fit the core (2, 3)"),
    ((2, 3), [(5, 2), (3,)], "factor 1 has shape (3,), expected (size, 3) to fit the core (2, 3)"),
]


@pytest.mark.parametrize(("core", "factors", "text"), ERRORS)
def test_factors_that_do_not_fit_are_refused(core: tuple[int, ...], factors: list[tuple[int, ...]], text: str) -> None:
    with pytest.raises(ValueError) as caught:
        Tucker(torch.zeros(core), tuple(torch.zeros(shape) for shape in factors))
    assert str(caught.value) == text


def test_counting_refuses_ranks_of_another_length() -> None:
    with pytest.raises(ValueError, match="shorter"):
        count_params((5, 3), (2,))


# ---- sums ----------------------------------------------------------------------------------------------------------


@given(forms(), st.lists(st.floats(-3, 3), min_size=1, max_size=3), st.data())
def test_the_weighted_sum_of_forms_is_exact(
    drawn: tuple[tuple[int, ...], tuple[int, ...], int], weights: list[float], data: st.DataObject
) -> None:
    shape, _, seed = drawn
    summands = [
        make(shape, tuple(data.draw(st.integers(1, size)) for size in shape), seed + number)
        for number in range(len(weights))
    ]
    total = concatenate(summands, weights)
    expected = sum(weight * oracle(form) for weight, form in zip(weights, summands, strict=True))
    torch.testing.assert_close(total.to_dense(), expected, rtol=1e-11, atol=1e-11)
    for mode, size in enumerate(shape):
        assert total.ranks[mode] <= min(size, sum(form.ranks[mode] for form in summands)) or total.ranks[mode] == size


def test_forms_of_different_shapes_are_not_added() -> None:
    with pytest.raises(ValueError) as caught:
        concatenate([make((5, 3), (2, 2)), make((3, 5), (2, 2))], [1.0, 1.0])
    assert str(caught.value) == "cannot add Tucker forms of the shapes [(5, 3), (3, 5)]; they have to be equal"
