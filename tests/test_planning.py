"""The plan's figures against the operations that torch counts, its printed form, and its messages."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from flora import FloraConfig, Plan, plan
from flora.layers import gate as fused
from flora.tucker.form import count_params

# layer, input for one sample, ranks, what plan() is told besides
COUNTED = [
    (lambda: nn.Linear(31, 47), (13, 31), (5, 5), {}),
    (lambda: nn.Linear(31, 47), (13, 31), (7, 3), {}),
    (lambda: nn.Linear(31, 47), (13, 31), (7, 31), {}),
    (lambda: nn.Linear(47, 5), (13, 47), (5, 5), {}),
    (lambda: nn.Conv1d(31, 47, 3, padding=1), (31, 19), (7, 5, 2), {}),
    (lambda: nn.Conv2d(31, 47, (3, 5), padding=(1, 2)), (31, 19, 17), (7, 5, 2, 3), {}),
    (lambda: nn.Conv2d(31, 47, (3, 5), padding=(1, 2)), (31, 19, 17), (7, 31, 2, 3), {}),
    (lambda: nn.Conv2d(31, 47, (3, 5), padding=(1, 2)), (31, 19, 17), (47, 5, 2, 3), {}),
    (lambda: nn.Conv2d(31, 47, (3, 5), padding=(1, 2), stride=(2, 1)), (31, 20, 17), (7, 5, 3, 5), {"stride": 2}),
    (lambda: nn.Conv2d(31, 47, 1), (31, 11, 7), (7, 5, 1, 1), {}),
    (lambda: nn.Conv3d(13, 17, 3, padding=1), (13, 5, 7, 9), (7, 5, 2, 2, 1), {}),
]


def product_flops(total: list[int], left: list[int], right: list[int], **_: object) -> int:
    """Of a product, or a batch of them, that is added in place; torch's counter does not know these."""
    return 2 * math.prod(left) * right[-1]


IN_PLACE = {torch.ops.aten.addmm_: product_flops, torch.ops.aten.baddbmm_: product_flops}


def step_flops(model: nn.Module, x: Tensor) -> int:
    """Of one forward and backward, to the input as well, as inside a network."""
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        model(x.requires_grad_()).sum().backward()
    return int(counter.get_total_flops())


def measured(layer: nn.Module, x: Tensor, ranks: tuple[int, ...], path: str) -> int:
    """What the adapter adds to the step of the frozen layer."""
    base = nn.Sequential(layer).requires_grad_(False)
    frozen = step_flops(base, x.clone())
    config = FloraConfig(r=list(ranks), target_modules=["0"], path=path)
    return step_flops(get_peft_model(base, config), x.clone()) - frozen


@pytest.mark.filterwarnings("ignore:the adapter has more parameters")  # small shapes, whole modes
@pytest.mark.parametrize(("make", "size", "ranks", "told"), COUNTED)
def test_flops_are_those_that_torch_counts(make, size, ranks, told, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(fused, "can_fuse", lambda *_: False)  # separate operations, nothing computed twice
    figures: dict[int, dict[str, tuple[int, int]]] = {}
    for batch in (2, 5):
        x = torch.randn(batch, *size)
        layer = make()
        out = layer(x)
        positions = out.numel() // layer.weight.shape[0]
        planned = plan(layer.weight.shape, ranks, positions=positions, **told)
        figures[batch] = {path: (measured(make(), x, ranks, path), planned.flops[path]) for path in planned.flops}
    for path, (real, expected) in figures[5].items():
        before, expected_before = figures[2][path]
        assert real - before == expected - expected_before, path  # what grows with the input, to the last operation
        if path == "rebuild":
            assert real == expected
        else:  # folding core and factors is left out of the plan: it does not grow with the input
            assert expected <= real
            assert real - expected == before - expected_before


@pytest.mark.filterwarnings("ignore:the adapter has more parameters")
@pytest.mark.parametrize(("make", "size", "ranks", "told"), COUNTED)
def test_the_fused_way_computes_at_most_its_forward_again(  # type: ignore[no-untyped-def]
    make, size, ranks, told, monkeypatch
) -> None:
    """Where it adds into output and gradient; with a sum of the weights it computes less per position."""
    monkeypatch.setattr(fused, "SUM_PAYS_FROM", math.inf)
    real = {batch: measured(make(), torch.randn(batch, *size), ranks, "factored") for batch in (2, 5)}
    weight = make().weight
    outs = {batch: make()(torch.randn(batch, *size)).numel() // weight.shape[0] for batch in (2, 5)}
    expected = {batch: plan(weight.shape, ranks, positions=outs[batch], **told).flops["factored"] for batch in (2, 5)}
    growth = (real[5] - real[2]) / (expected[5] - expected[2])
    assert 1 <= growth <= 4 / 3


def test_the_table_of_counted_layers_is_whole() -> None:
    assert len(COUNTED) == 11


def test_grouped_convolution_forward() -> None:
    """Forward alone: torch's counter leaves the groups out of a convolution's backward."""
    x, told = torch.randn(3, 22, 19, 17), {"groups": 11, "positions": 3 * 19 * 17}
    layer = nn.Conv2d(22, 33, (3, 5), padding=(1, 2), groups=11)
    ranks = (2, 1, 2, 3)
    planned = plan(layer.weight.shape, ranks, **told)
    model = get_peft_model(nn.Sequential(layer), FloraConfig(r=list(ranks), target_modules=["0"], path="factored"))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    frozen = 2 * x.shape[0] * 19 * 17 * layer.weight.numel()
    folding = 2 * (2 * 1) * (2 * 3) * (3 * 5)  # the core times its two kernel factors, seen as one
    assert counter.get_total_flops() - frozen - folding == planned.flops["factored"] // 3


# ---- the choice ----------------------------------------------------------------------------------------------------

CHOICES = [
    ((768, 3072), (8, 8), {}, "factored"),
    ((4096, 4096), (32, 32), {}, "factored"),
    ((96, 1, 7, 7), (4, 1, 2, 2), {"groups": 96}, "rebuild"),  # depthwise: a dense kernel is next to nothing
    ((512, 256, 3, 3), (32, 32, 2, 2), {}, "factored"),
    ((128, 64, 2, 2), (16, 16, 2, 2), {"stride": 4}, "factored"),  # patches: a product on the channels
    ((64, 48), (64, 48), {}, "rebuild"),  # whole: there is nothing to factor
    ((30_522, 768), (8, 8), {"kind": "embedding", "positions": 512}, "factored"),
]


@pytest.mark.parametrize(("shape", "ranks", "told", "path"), CHOICES)
def test_the_cheaper_path_is_chosen(shape, ranks, told, path) -> None:  # type: ignore[no-untyped-def]
    chosen = plan(shape, ranks, **told)
    assert chosen.path == path
    assert chosen.flops[path] == min(chosen.flops.values())


def test_the_table_of_choices_is_whole() -> None:
    assert len(CHOICES) == 7


@given(st.integers(2, 99), st.integers(2, 99), st.integers(1, 32), st.integers(1, 5000))
def test_a_plan_is_sane_for_every_linear(out: int, inner: int, r: int, positions: int) -> None:
    ranks = (min(r, out), min(r, inner))
    made = plan((out, inner), ranks, positions=positions)
    assert made.num_params == count_params((out, inner), ranks)
    assert made.flops.keys() == made.kept.keys() == {"rebuild", "factored"}
    assert all(cost > 0 for cost in (*made.flops.values(), *made.kept.values()))
    twice = plan((out, inner), ranks, positions=2 * positions)
    assert twice.flops["factored"] == 2 * made.flops["factored"]


def test_bytes_scale_with_the_element() -> None:
    single, half = (plan((96, 48), (8, 8), positions=16, element_size=size) for size in (4, 2))
    assert single.kept == {path: 2 * kept for path, kept in half.kept.items()}


def test_many_tokens_keep_only_the_input_where_weights_are_summed() -> None:
    many, half = (plan((96, 48), (8, 8), positions=4096, element_size=size) for size in (4, 2))
    assert many.kept["factored"] == 4 * 4096 * 48
    assert half.kept["factored"] == 2 * 4096 * (48 + 8)  # half precision does not sum


# ---- print ---------------------------------------------------------------------------------------------------------


def test_printed() -> None:
    lines = str(plan((768, 3072), (8, 8), positions=4096)).splitlines()
    assert lines[0] == "weight (768, 3072), ranks (8, 8): 30,784 parameters (1.30% of 2,359,296)"
    assert lines[1] == "per training step at 4,096 output positions, beyond the frozen layer:"
    assert lines[2].split()[:-2] == ["rebuild", "19,441.8", "MFLOP", "57.00", "MiB", "kept"]
    assert lines[3].split()[:-2] == ["->", "factored", "755.0", "MFLOP", "48.00", "MiB", "kept"]
    assert lines[4] == "path: factored, the faster by operations and bytes moved"
    assert len(lines) == 5


def test_a_plan_is_a_value() -> None:
    first, second = plan((31, 17), (5, 3)), plan([31, 17], [5, 3])
    assert isinstance(first, Plan)
    assert first == second
    with pytest.raises(AttributeError):
        first.path = "rebuild"  # type: ignore[misc]


REFUSED = [
    (
        ((31, 17), (5, 3)),
        {"kind": "convolution"},
        ValueError,
        "unknown kind 'convolution', expected one of linear, conv",
    ),
    (((31, 17), (5,)), {}, ValueError, "ranks (5,) and shape (31, 17) do not fit; give one rank per dimension"),
    (((31, 17), (5, 18)), {}, ValueError, "rank 18 of mode 1 is above its size 17 in shape (31, 17)"),
    (((31, 17), (0, 3)), {}, ValueError, "ranks[0] must be at least 1, got 0"),
    (((31, 17), (5, 3.0)), {}, TypeError, "ranks[1] must be an int, got 3.0 of type float"),
]


@pytest.mark.parametrize(("args", "told", "error", "text"), REFUSED)
def test_a_bad_request_is_refused(args, told, error, text) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error) as caught:
        plan(*args, **told)
    assert str(caught.value).startswith(text)


def test_the_table_of_refusals_is_whole() -> None:
    assert len(REFUSED) == 5
