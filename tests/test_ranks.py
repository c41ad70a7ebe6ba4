"""A rank request becomes one tuple of ints: lists, clipping, lowering to reach, the budget, and every message."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flora.layers.axes import roles_of
from flora.tucker.form import count_params
from flora.tucker.ranks import Weight, resolve, solve_budget

LINEAR = ("out", "in")
CONV2D = ("out", "in", "kh", "kw")
AXES: dict[int, tuple[str, ...]] = {2: LINEAR, 3: ("out", "in", "kw"), 4: CONV2D, 5: ("out", "in", "kd", "kh", "kw")}

RESOLVED = [
    ((512, 256, 3, 3), 32, 2, CONV2D, (32, 32, 2, 2)),
    ((512, 256, 3, 3), 32, None, CONV2D, (32, 32, 3, 3)),  # None keeps the kernel whole
    ((512, 256, 3, 5), 32, 4, CONV2D, (32, 32, 3, 4)),  # each kernel mode is clipped on its own
    ((512, 256, 1, 1), 32, 2, CONV2D, (32, 32, 1, 1)),
    ((17, 13), 8, 2, LINEAR, (8, 8)),
    ((17, 3, 5), 9, 2, None, (9, 3, 5)),  # clipped to the sizes
    ((17, 5), 8, 2, LINEAR, (17, 5)),  # rank 5 is no restriction here, and the weight itself costs less than factors
    ((5, 17), 8, 2, LINEAR, (5, 17)),
    ((96, 1, 7, 7), 8, 2, CONV2D, (4, 1, 2, 2)),  # depthwise: 1 * 2 * 2 is the most that the output mode can reach
    ((96, 1, 7, 7), 8, None, CONV2D, (8, 1, 7, 7)),
    ((13, 1, 1), 8, 2, AXES[3], (13, 1, 1)),
    ((11, 7, 3, 5, 2), 6, 2, AXES[5], (6, 6, 2, 2, 2)),
    ((19,), 4, 2, ("width",), (19,)),  # one dimension: a factor would cost more than the weight
    ((13, 11, 7), 5, 2, None, (5, 5, 5)),  # unnamed dimensions are channel modes
    ((512, 256, 3, 3), [32, 16, 3, 1], 2, CONV2D, (32, 16, 3, 1)),  # a list is taken as it is
    ((17, 5), (17, 5), 2, LINEAR, (17, 5)),
    ((13, 11), [12, 2], 2, LINEAR, (12, 2)),  # also where it is above what can be reached
]


@pytest.mark.parametrize(("shape", "r", "kernel_r", "axes", "expected"), RESOLVED)
def test_resolve(
    shape: tuple[int, ...],
    r: int | list[int],
    kernel_r: int | None,
    axes: tuple[str, ...] | None,
    expected: tuple[int, ...],
) -> None:
    assert resolve(shape, r, kernel_r, axes=axes, roles=axes and roles_of(axes)) == expected


def test_the_table_of_requests_is_whole() -> None:
    assert len(RESOLVED) == 17


@st.composite
def weights(draw: st.DrawFn) -> Weight:
    """A linear or convolution weight with sizes from 1 up."""
    kernel = draw(st.lists(st.integers(1, 7), max_size=3))
    channels = (draw(st.integers(1, 40)), draw(st.integers(1, 40)))
    return Weight((*channels, *kernel), roles_of(AXES[2 + len(kernel)]))


@given(weights(), st.integers(1, 64), st.one_of(st.none(), st.integers(1, 9)))
def test_every_rank_can_be_used_and_no_more_is_lost(weight: Weight, r: int, kernel_r: int | None) -> None:
    ranks = resolve(weight.shape, r, kernel_r, roles=weight.roles)
    assert len(ranks) == len(weight.shape)
    if ranks == weight.shape:  # the weight itself, where that costs less than a form that can be anything
        return
    wanted = [
        min((size if kernel_r is None else kernel_r) if role == "kernel" else r, size)
        for size, role in zip(weight.shape, weight.roles, strict=True)
    ]
    for mode, role in enumerate(weight.roles):
        others = math.prod(ranks) // ranks[mode]
        if role == "kernel":
            assert ranks[mode] == wanted[mode]
        else:
            assert 1 <= ranks[mode] <= min(wanted[mode], others) or ranks[mode] == wanted[mode] == 1
            assert ranks[mode] == wanted[mode] or ranks[mode] == others  # lowered only as far as it must be


@given(weights(), st.integers(1, 40), st.one_of(st.none(), st.integers(1, 9)))
def test_ranks_never_fall_as_r_grows(weight: Weight, r: int, kernel_r: int | None) -> None:
    fewer = resolve(weight.shape, r, kernel_r, roles=weight.roles)
    more = resolve(weight.shape, r + 1, kernel_r, roles=weight.roles)
    assert all(low <= high for low, high in zip(fewer, more, strict=True))


CONV = (64, 3, 7, 7)
NAMED = "conv1.weight (out=64, in=3, kh=7, kw=7)"
REFUSED = [
    ((4, 4, 8), 2, ValueError, f"ranks (4, 4, 8) have 3 entries but {NAMED} has 4 dims; give one rank per dim"),
    ([4], 2, ValueError, f"ranks (4,) have 1 entry but {NAMED} has 4 dims; give one rank per dim or a single int"),
    ([65, 3, 2, 2], 2, ValueError, f"rank 65 of mode 'out' is above its size 64 in {NAMED}; give at most 64"),
    ([4, 3, 2, 8], 2, ValueError, f"rank 8 of mode 'kw' is above its size 7 in {NAMED}; give at most 7"),
    (0, 2, ValueError, "r must be at least 1, got 0"),
    (-3, 2, ValueError, "r must be at least 1, got -3"),
    ([4, 0, 2, 2], 2, ValueError, "r[1] must be at least 1, got 0"),
    ([], 2, ValueError, "r is an empty list; give one rank per dimension or a single int"),
    (4.0, 2, TypeError, "r must be an int, got 4.0 of type float"),
    ("4", 2, TypeError, "r must be an int, got '4' of type str"),
    (True, 2, TypeError, "r must be an int, got True of type bool"),
    ([4, 3, 2, 2.5], 2, TypeError, "r[3] must be an int, got 2.5 of type float"),
    (None, 2, TypeError, "r must be an int, got None of type NoneType"),
    (4, 0, ValueError, "kernel_r must be at least 1, got 0"),
    (4, 2.0, TypeError, "kernel_r must be an int, got 2.0 of type float"),
]


@pytest.mark.parametrize(("r", "kernel_r", "error", "text"), REFUSED)
def test_a_bad_request_is_refused_by_name(r: object, kernel_r: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        resolve(CONV, r, kernel_r, axes=CONV2D, name="conv1.weight")  # type: ignore[arg-type]
    assert str(caught.value).startswith(text)


def test_the_table_of_refusals_is_whole() -> None:
    assert len(REFUSED) == 15


# ---- budget --------------------------------------------------------------------------------------------------------


def spent(targets: dict[str, Weight], ranks: dict[str, tuple[int, ...]]) -> int:
    return sum(count_params(targets[name].shape, ranks[name]) for name in targets)


def floor(targets: dict[str, Weight], kernel_r: int | None) -> int:
    """What rank 1 costs everywhere, the least that can be spent."""
    at_one = {name: resolve(weight.shape, 1, kernel_r, roles=weight.roles) for name, weight in targets.items()}
    return spent(targets, at_one)


def next_steps(targets: dict[str, Weight], ranks: dict[str, tuple[int, ...]], kernel_r: int | None) -> list[int]:
    """The price of raising one weight's rank to its next choice, for every weight that has one."""
    prices = []
    for name, weight in targets.items():
        now = count_params(weight.shape, ranks[name])
        higher = (resolve(weight.shape, r, kernel_r, roles=weight.roles) for r in range(1, max(weight.shape) + 1))
        larger = [
            more
            for more in higher
            if more != ranks[name] and all(a >= b for a, b in zip(more, ranks[name], strict=True))
        ]
        if larger:
            prices.append(count_params(weight.shape, larger[0]) - now)
    return prices


models = st.dictionaries(st.sampled_from("abcde"), weights(), min_size=1)


@given(models, st.integers(0, 5000), st.one_of(st.none(), st.integers(1, 4)))
def test_the_budget_is_never_exceeded(targets: dict[str, Weight], extra: int, kernel_r: int | None) -> None:
    budget = floor(targets, kernel_r) + extra
    ranks = solve_budget(targets, budget, kernel_r)
    assert ranks.keys() == targets.keys()
    assert spent(targets, ranks) <= budget
    for name, weight in targets.items():
        assert all(1 <= rank <= size for rank, size in zip(ranks[name], weight.shape, strict=True))


@given(models, st.integers(0, 5000), st.one_of(st.none(), st.integers(1, 4)))
def test_no_single_step_is_left_that_the_rest_could_pay(
    targets: dict[str, Weight], extra: int, kernel_r: int | None
) -> None:
    budget = floor(targets, kernel_r) + extra
    ranks = solve_budget(targets, budget, kernel_r)
    left = budget - spent(targets, ranks)
    assert [price for price in next_steps(targets, ranks, kernel_r) if price <= left] == []


@given(models, st.integers(0, 5000), st.integers(1, 500))
def test_a_larger_budget_never_spends_less(targets: dict[str, Weight], extra: int, more: int) -> None:
    budget = floor(targets, 2) + extra
    less = spent(targets, solve_budget(targets, budget))
    assert less <= spent(targets, solve_budget(targets, budget + more))


@given(models)
def test_a_boundless_budget_gives_every_weight_all_it_can_use(targets: dict[str, Weight]) -> None:
    ranks = solve_budget(targets, 10**9, None)
    for name, weight in targets.items():
        assert ranks[name] == resolve(weight.shape, max(weight.shape), None, roles=weight.roles)


def test_equal_weights_get_equal_ranks_when_the_budget_divides() -> None:
    targets = {name: Weight((31, 17), roles_of(LINEAR)) for name in "abc"}
    ranks = solve_budget(targets, 3 * count_params((31, 17), (5, 5)))
    assert set(ranks.values()) == {(5, 5)}


def test_the_cost_of_rank_one_is_the_least_budget() -> None:
    targets = {"a": Weight((31, 17), roles_of(LINEAR)), "b": Weight((13, 7, 3), roles_of(AXES[3]))}
    least = floor(targets, 2)
    assert spent(targets, solve_budget(targets, least)) == least
    with pytest.raises(ValueError) as caught:
        solve_budget(targets, least - 1)
    assert str(caught.value) == (
        f"budget of {least - 1} parameters is below {least}, the cost of rank 1 on the 2 targeted weights; raise the "
        "budget, lower kernel_r or target fewer modules"
    )
