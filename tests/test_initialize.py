"""How an adapter starts: the three initialisers as the authors' code has them, and what our default promises."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flora import INITIALIZERS, Tucker, TuckerDelta
from flora.tucker.initialize import initialize
from flora.tucker.ranks import Role

ZERO_CORE = ["orthogonal", "paper_conv", "paper_nlu", "paper_llm"]
SIZES_AND_RANKS = [(20_011, 5), (10_007, 13), (4_001, 37)]  # large, so that a sample's std is within a per cent


def filled(name: str, shape: tuple[int, ...], ranks: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tucker:
    """A form that the initialiser filled; the core starts as NaN, so that a core left alone is seen."""
    core = torch.full(ranks, math.nan, dtype=dtype)
    factors = [torch.full((size, rank), math.nan, dtype=dtype) for size, rank in zip(shape, ranks, strict=True)]
    initialize(core, factors, name)
    return Tucker(core, tuple(factors))


def rms(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item()


def kurtosis(sample: Tensor) -> float:
    """3 for a normal distribution, 1.8 for a uniform one."""
    centred = sample.flatten().double()
    return (centred.pow(4).mean() / centred.square().mean().square()).item()


def test_the_initialisers_are_these() -> None:
    assert list(INITIALIZERS) == ["zero_first", *ZERO_CORE]


@pytest.mark.parametrize("name", ZERO_CORE)
def test_the_core_is_zero_and_every_factor_is_random(name: str) -> None:
    form = filled(name, (29, 23, 5), (7, 3, 2))
    assert torch.count_nonzero(form.core) == 0
    assert torch.count_nonzero(form.to_dense()) == 0
    for factor in form.factors:
        assert factor is not None
        assert torch.isfinite(factor).all()
        assert torch.linalg.matrix_rank(factor) == factor.shape[1]


@pytest.mark.parametrize(("name", "trained"), [("zero_first", "factor_0"), *((name, "core") for name in ZERO_CORE)])
def test_at_the_first_step_only_what_is_zero_has_a_gradient(name: str, trained: str) -> None:
    delta = TuckerDelta((11, 7, 3), (5, 3, 2), init=name)
    (delta.dense() * torch.randn(11, 7, 3)).sum().backward()
    gradients = {key: parameter.grad for key, parameter in delta.named_parameters()}
    assert gradients.keys() == {"core", "factor_0", "factor_1", "factor_2"}
    for key, gradient in gradients.items():
        assert gradient is not None
        assert (torch.count_nonzero(gradient) > 0) == (key == trained), key


@pytest.mark.parametrize(("size", "rank"), SIZES_AND_RANKS)
def test_paper_conv_is_normal_with_std_sqrt_of_one_over_two_ranks(size: int, rank: int) -> None:
    factor = filled("paper_conv", (size, 3), (rank, 2)).factors[0]
    assert factor is not None
    assert factor.std().item() == pytest.approx(math.sqrt(1 / (2 * rank)), rel=0.015)
    assert abs(factor.mean().item()) < 5 * math.sqrt(1 / (2 * rank)) / math.sqrt(factor.numel())
    assert kurtosis(factor) == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize(("size", "rank"), SIZES_AND_RANKS)
def test_paper_nlu_is_normal_with_std_two_hundredths(size: int, rank: int) -> None:
    factor = filled("paper_nlu", (size, 3), (rank, 2)).factors[0]
    assert factor is not None
    assert factor.std().item() == pytest.approx(0.02, rel=0.015)
    assert kurtosis(factor) == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize(("size", "rank"), SIZES_AND_RANKS)
def test_paper_llm_is_uniform_within_one_over_the_root_of_the_rank(size: int, rank: int) -> None:
    factor = filled("paper_llm", (size, 3), (rank, 2)).factors[0]
    assert factor is not None
    bound = 1 / math.sqrt(rank)
    assert factor.abs().max().item() <= bound
    assert factor.abs().max().item() > 0.999 * bound  # the bound is met, not just kept
    assert factor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.015)
    assert kurtosis(factor) == pytest.approx(1.8, abs=0.05)


@pytest.mark.parametrize(("shape", "ranks"), [((64, 48), (16, 16)), ((48, 40, 7, 7), (16, 12, 4, 4))])
def test_paper_conv_gives_rms_two_to_the_minus_n_halves(shape: tuple[int, ...], ranks: tuple[int, ...]) -> None:
    ratios = []
    for seed in range(24):
        torch.manual_seed(seed)
        form = filled("paper_conv", shape, ranks)
        core = torch.randn(ranks)
        ratios.append(rms(Tucker(core, form.factors).to_dense()) / rms(core))
    mean = math.sqrt(sum(ratio**2 for ratio in ratios) / len(ratios))
    assert mean == pytest.approx(2 ** (-len(shape) / 2), rel=0.1)


@st.composite
def shapes_and_ranks(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=5)))
    return shape, tuple(draw(st.integers(1, size)) for size in shape)


@given(shapes_and_ranks(), st.floats(0.01, 8))
def test_orthogonal_gives_rms_of_the_update_equal_to_s_times_that_of_the_core(
    drawn: tuple[tuple[int, ...], tuple[int, ...]], scale: float
) -> None:
    shape, ranks = drawn
    delta = TuckerDelta(shape, ranks, scale=scale, init="orthogonal", dtype=torch.float64)
    with torch.no_grad():
        delta.core.normal_()
    assert rms(delta.dense()) == pytest.approx(scale * rms(delta.core), rel=1e-9)


def test_orthogonal_has_columns_of_length_root_size_over_rank() -> None:
    factor = filled("orthogonal", (31, 5), (7, 2), torch.float64).factors[0]
    assert factor is not None
    torch.testing.assert_close(factor.T @ factor, torch.eye(7, dtype=torch.float64) * 31 / 7)


ROLES: list[tuple[Role, ...]] = [
    ("output", "summed"),
    ("output", "summed", "kernel", "kernel"),
    ("summed", "output", "kernel"),
    ("stack", "output", "summed"),
    ("stack", "output"),
    ("output", "output", "summed"),  # the gates of an LSTM, folded out
    ("output", "summed", "summed"),  # two inputs
]


@pytest.mark.parametrize("roles", ROLES, ids=" ".join)
@pytest.mark.parametrize("width", [24, 96])
def test_our_default_changes_outputs_alike_at_any_width(roles: tuple[Role, ...], width: int) -> None:
    """For inputs of rms 1 the change has rms s * sqrt(J1) * rms(first factor), whatever width and ranks of the rest."""
    sizes = {"kernel": 5, "stack": 7}
    shape = tuple(sizes.get(role, width) for role in roles)
    is_summed = [role in ("summed", "kernel") for role in roles]
    for rank in (2, 5):
        torch.manual_seed(rank)
        ranks = [min(rank, size - 1) for size in shape]
        delta = TuckerDelta(shape, ranks, scale=3.0, roles=roles, dtype=torch.float64)
        assert torch.count_nonzero(delta.dense()) == 0
        with torch.no_grad():
            delta.factor_0.normal_()

        over = math.prod(size for summed, size in zip(is_summed, shape, strict=True) if summed)
        outputs = rms(delta.dense()) * math.sqrt(over)  # for independent inputs of rms 1
        first = math.sqrt(shape[0]) if is_summed[0] else 1.0
        assert outputs == pytest.approx(3 * first * math.sqrt(delta.form.ranks[0]) * rms(delta.factor_0), rel=0.35)


def test_our_default_is_the_start_of_lora() -> None:
    delta = TuckerDelta((31, 23), (5, 7), dtype=torch.float64)
    down = delta.core @ delta.factor_1.T
    torch.testing.assert_close(down @ down.T, torch.eye(5, dtype=torch.float64))
    assert torch.count_nonzero(delta.factor_0) == 0


@pytest.mark.parametrize("ranks", [(4, 2, 2), (9, 2, 2), (9, 5, 3)])
def test_our_default_with_a_whole_first_mode_or_a_large_first_rank(ranks: tuple[int, ...]) -> None:
    delta = TuckerDelta((9, 5, 3), ranks)
    assert torch.count_nonzero(delta.dense()) == 0
    assert (torch.count_nonzero(delta.core) == 0) == (ranks[0] == 9)
    assert all(torch.isfinite(parameter).all() for parameter in delta.parameters())


def test_not_identity_fills_the_core() -> None:
    core, factors = torch.zeros(40, 50), [torch.zeros(60, 40), torch.zeros(70, 50)]
    initialize(core, factors, "zero_first", identity=False)
    assert core.std().item() == pytest.approx(0.05, rel=0.1)
    assert torch.count_nonzero(Tucker(core, tuple(factors)).to_dense()) > 0


def test_the_same_seed_gives_the_same_start() -> None:
    forms = []
    for _ in range(2):
        torch.manual_seed(17)
        forms.append(filled("orthogonal", (13, 7), (3, 2)))
    assert all(torch.equal(a, b) for a, b in zip(forms[0].factors, forms[1].factors, strict=True) if a is not None)


def test_tensors_on_the_meta_device_are_left_to_the_file() -> None:
    delta = TuckerDelta((11, 7), (5, 3), device="meta")
    assert all(parameter.is_meta for parameter in delta.parameters())
