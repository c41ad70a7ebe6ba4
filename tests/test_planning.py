"""The plan's figures against the operations that torch counts, the decision row by row, its printed form, messages."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode

from flora import FloraConfig, Plan, plan
from flora.layers import device
from flora.layers.experts.stack import ExpertStack
from flora.layers.planning import BESIDE, CALLED, SUMMED, SUMMED_NARROW, Choice, Work, choose, costs
from flora.layers.table import find_layer
from flora.tucker.delta import TuckerDelta
from flora.tucker.form import count_params
from flora.tuner.forward import choice_for, expected_choice
from launches import FREE

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


def step_flops(run: Any, x: Tensor) -> int:
    """Of one forward and backward, to the input as well, as inside a network."""
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        run(x.requires_grad_()).sum().backward()
    return int(counter.get_total_flops())


def measured(layer: Any, x: Tensor, ranks: tuple[int, ...], choice: Choice) -> int:
    """What the adapter adds to the step of the frozen layer in this way."""
    layer.requires_grad_(False)
    found = find_layer(layer)
    assert found is not None
    row, delta = found[1], TuckerDelta(layer.weight.shape, ranks, init_weights=False)
    assert row.fused is not None
    run = partial(row.fused, choice, layer, layer.weight, layer.bias, delta)
    return step_flops(run, x.clone()) - step_flops(layer, x.clone())


@pytest.mark.filterwarnings("ignore:the adapter has more parameters")  # small shapes, whole modes
@pytest.mark.parametrize("choice", [SUMMED, SUMMED_NARROW, BESIDE], ids=str)
@pytest.mark.parametrize(("make", "size", "ranks", "told"), COUNTED)
def test_flops_grow_as_torch_counts(make, size, ranks, told, choice) -> None:  # type: ignore[no-untyped-def]
    """What grows with the input, to the last operation; narrow ways of a convolution run their forward again."""
    real, expected = {}, {}
    for batch in (2, 5):
        x, layer = torch.randn(batch, *size), make()
        positions = layer(x).numel() // layer.weight.shape[0]
        kind = "linear" if layer.weight.ndim == 2 else "conv"
        inputs = positions * told.get("stride", 1)
        work = Work(kind, tuple(layer.weight.shape), ranks, inputs, positions)
        priced = _all_costs(work)
        real[batch], expected[batch] = measured(make(), x, ranks, choice), priced[choice].flops
    growth = (real[5] - real[2]) / (expected[5] - expected[2])
    if choice == SUMMED:
        assert growth == 1
        assert real[5] <= expected[5] * 4 / 3  # W + dW is formed once more for the gradient of the input
    else:
        assert 0.49 <= growth <= 2.01


def _all_costs(work: Work) -> dict[Choice, Any]:
    from flora.layers import planning

    ways = {SUMMED: planning._summed, SUMMED_NARROW: planning._summed_narrow, BESIDE: planning._beside}
    return {choice: cost(work) for choice, cost in ways.items()}


def test_the_table_of_counted_layers_is_whole() -> None:
    assert len(COUNTED) == 11


# ---- the decision --------------------------------------------------------------------------------------------------

FACTS = ("is_function", "can_sum", "can_add", "readable", "dropping")
LINEAR = Work("linear", (768, 3072), (8, 8), 77, 77)  # where the figures are for beside


@pytest.mark.parametrize("facts", list(product([False, True], repeat=5)))
@pytest.mark.parametrize("wanted", ["auto", "summed", "beside"])
def test_every_row_of_the_decision(facts: tuple[bool, ...], wanted: str) -> None:
    """The truth table in the docstring of ``choose``, written once more as a list of cases."""
    is_function, can_sum, can_add, readable, dropping = facts
    found = choose(LINEAR, wanted, **dict(zip(FACTS, facts, strict=True)))
    if not is_function or (not can_sum and not can_add):
        assert found == CALLED
    elif (can_add and not readable) or (can_add and dropping) or (can_add and wanted == "beside"):
        assert found == BESIDE
    elif not can_sum:
        assert found == (CALLED if wanted == "summed" else BESIDE)
    elif wanted == "summed" or not can_add:
        assert found.way == "summed"
    else:
        assert found == BESIDE


CHOICES = [
    ((768, 3072), (8, 8), {}, "summed"),
    ((768, 3072), (8, 8), {"positions": 77}, "beside"),
    ((4096, 4096), (32, 32), {"positions": 512}, "beside"),
    ((96, 1, 7, 7), (4, 1, 2, 2), {"groups": 96}, "summed"),  # depthwise: a dense kernel is next to nothing
    ((512, 512, 3, 3), (32, 32, 2, 2), {"positions": 392}, "beside"),
    ((512, 512, 3, 3), (32, 32, 2, 2), {"positions": 392, "device": "gpu"}, "summed"),  # convolutions always are
    ((4096, 4096), (16, 16), {"positions": 77, "device": "gpu", "element_size": 2}, "beside"),
    ((768, 192), (16, 16), {"positions": 50_000, "device": "gpu", "element_size": 2}, "summed"),
    ((64, 48), (64, 48), {}, "summed"),  # whole: there is nothing to factor
    ((30_522, 768), (8, 8), {"kind": "embedding", "positions": 512}, "beside"),
]


@pytest.mark.parametrize(("shape", "ranks", "told", "way"), CHOICES)
def test_the_cheaper_way_is_chosen(shape, ranks, told, way) -> None:  # type: ignore[no-untyped-def]
    assert plan(shape, ranks, **told).way == way


def test_on_a_gpu_the_gradient_is_dense_where_tokens_far_outnumber_channels() -> None:
    narrow = Work("linear", (768, 192), (16, 16), 200_000, 200_000, cpu=False, element_size=2)
    wide = Work("linear", (4096, 4096), (16, 16), 8192, 8192, cpu=False, element_size=2)
    assert choose(narrow) == SUMMED
    assert choose(wide) == SUMMED_NARROW


KINDS = {  # kind, size of the kernel, groups, transposed
    "linear": ("linear", (), 1, False),
    "embedding": ("embedding", (), 1, False),
    "1x1": ("conv", (1, 1), 1, False),
    "1-D": ("conv", (5,), 1, False),
    "3x3": ("conv", (3, 3), 1, False),
    "3x3x3": ("conv", (3, 3, 3), 1, False),
    "grouped": ("conv", (3, 3), 4, False),
    "transposed": ("conv", (2, 2), 1, True),
}


@given(
    st.sampled_from(sorted(KINDS)), st.integers(2, 2048), st.integers(2, 2048), st.integers(1, 64),
    st.integers(1, 100_000), st.sampled_from([2, 4]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_no_choice_has_more_operations_and_bytes_than_every_alternative(  # type: ignore[no-untyped-def]
    name, out, inner, rank, positions, size, cpu, compiled
) -> None:
    """Called is what summed is without being one function: it is never cheaper."""
    kind, kernel, groups, transposed = KINDS[name]
    ranks = (min(rank, out), min(rank, inner), *(min(2, pixels) for pixels in kernel))
    work = Work(kind, (out, inner, *kernel), ranks, positions, positions, groups, transposed, cpu, size, compiled)
    chosen, priced = choose(work), dict(costs(work))
    called = priced[SUMMED]
    others = [cost for choice, cost in priced.items() if choice.way != chosen.way] + [called]
    mine = priced[chosen]
    assert not all(mine.flops > other.flops and mine.moved > other.moved for other in others)


# ---- the decision on a GPU, counted --------------------------------------------------------------------------------

# How the layer is made, and its input for a batch, from sizes that are drawn anew for each of SHAPES layers.
GPU_KINDS: dict[str, tuple[Callable[[int, int, int], nn.Module], Callable[[int, int, int], tuple[int, ...]]]] = {
    "linear": (lambda a, b, k: nn.Linear(a, b), lambda batch, a, side: (batch, side, a)),
    "1-D": (lambda a, b, k: nn.Conv1d(a, b, k), lambda batch, a, side: (batch, a, side)),
    "2-D": (lambda a, b, k: nn.Conv2d(a, b, (k, 3)), lambda batch, a, side: (batch, a, side, 7)),
    "2-D, strided": (lambda a, b, k: nn.Conv2d(a, b, k, stride=k), lambda batch, a, side: (batch, a, side, 9)),
    "3-D": (lambda a, b, k: nn.Conv3d(a, b, (k, 1, 2)), lambda batch, a, side: (batch, a, side, 3, 5)),
    "one pixel": (lambda a, b, k: nn.Conv2d(a, b, 1), lambda batch, a, side: (batch, a, side, 5)),
    "transposed, 1-D": (
        lambda a, b, k: nn.ConvTranspose1d(a, b, k, stride=2), lambda batch, a, side: (batch, a, side),
    ),
    "transposed, 2-D": (
        lambda a, b, k: nn.ConvTranspose2d(a, b, k, stride=k), lambda batch, a, side: (batch, a, side, 5),
    ),
    "transposed, 3-D": (
        lambda a, b, k: nn.ConvTranspose3d(a, b, (k, 2, 3)), lambda batch, a, side: (batch, a, side, 3, 2),
    ),
    "depthwise": (lambda a, b, k: nn.Conv2d(a, a, k, groups=a), lambda batch, a, side: (batch, a, side, 9)),
    "grouped": (lambda a, b, k: nn.Conv2d(4 * a, 4 * b, k, groups=4), lambda batch, a, side: (batch, 4 * a, side, 9)),
    "embedding": (lambda a, b, k: nn.Embedding(a, b), lambda batch, a, side: (batch, side)),
}  # fmt: skip
SHAPES = 15  # of each kind


class Counted(NamedTuple):
    """Operations of products and convolutions, bytes that all operations read and write, and launches."""

    flops: int
    moved: int
    launches: int

    def is_above(self, other: Counted) -> bool:
        """Whether everything is more."""
        return all(mine > its for mine, its in zip(self, other, strict=True))


class Moved(TorchDispatchMode):
    """Adds up the bytes of what goes into and comes out of every operation that would be a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ not in FREE and not func.is_view:
            values = tree_flatten((args, kwargs, out))[0]
            self.total += sum(value.nbytes for value in values if isinstance(value, Tensor))
            self.launches += 1
        return out


def add_flops(weight: list[int], factor: list[int], rows: list[int], *_: object, **__: object) -> int:
    """Of the product that ``flora::add_rounded`` adds to a weight."""
    return 2 * math.prod(factor) * rows[0]


def counted(run: Callable[[Tensor], Tensor], x: Tensor) -> Counted:
    """Of forward and backward."""
    leaf = x.detach().requires_grad_(x.is_floating_point())
    formulas = {**IN_PLACE, torch.ops.flora.add_rounded: add_flops}
    with FlopCounterMode(display=False, custom_mapping=formulas) as flops, Moved() as moved:
        run(leaf).sum().backward()
    return Counted(int(flops.get_total_flops()), moved.total, moved.launches)


def ways(layer: Any, delta: TuckerDelta) -> dict[Choice, Callable[[Tensor], Tensor]]:
    """Every way that the layer can be run in on a GPU."""
    found = find_layer(layer)
    assert found is not None
    row = found[1]
    assert row.factored is not None
    bias = getattr(layer, "bias", None)

    def called(x: Tensor) -> Tensor:
        out: Tensor = functional_call(layer, {"weight": delta(layer.weight)}, (x,))
        return out

    def beside(x: Tensor) -> Tensor:
        fused = row.fused and row.fused(BESIDE, layer, layer.weight, bias, delta, x)
        return layer(x) + row.factored(layer, delta.stored_form, delta.scale, x) if fused is None else fused  # type: ignore[misc]

    runs: dict[Choice, Callable[[Tensor], Tensor]] = {CALLED: called, BESIDE: beside, SUMMED: called}
    if row.fused is not None:
        runs[SUMMED] = partial(row.fused, SUMMED, layer, layer.weight, bias, delta)  # type: ignore[assignment]
    if isinstance(layer, nn.Linear):
        runs[SUMMED_NARROW] = partial(row.fused, SUMMED_NARROW, layer, layer.weight, bias, delta)  # type: ignore[arg-type]
    return runs


@pytest.mark.filterwarnings("ignore:the adapter has more parameters")  # small shapes, whole modes
@pytest.mark.parametrize("name", GPU_KINDS)
def test_on_a_gpu_no_choice_counts_more_than_every_alternative(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From shapes alone; every way is run on the meta device and counted.

    The launches count too: a convolution of few pixels and rank 1 beside the layer has fewer operations and bytes than
    any other way, and takes longer, since it launches twice as many kernels.
    """
    monkeypatch.setattr(device, "on_cpu", lambda x: False)
    build, size = GPU_KINDS[name]
    drawn = random.Random(name)
    chosen: set[Choice] = set()

    for _ in range(SHAPES):
        inner, out = (round(2 ** drawn.uniform(1, 10)) for _ in range(2))
        rank, pixels, side = round(2 ** drawn.uniform(0, 6)), drawn.randint(1, 3), round(2 ** drawn.uniform(2, 9))
        dtype = drawn.choice([torch.float32, torch.bfloat16])

        with torch.device("meta"):
            layer: Any = build(inner, out, pixels).to(dtype).requires_grad_(False)
            caps = (rank, rank, *[2] * (layer.weight.ndim - 2))
            ranks = [min(most, length) for most, length in zip(caps, layer.weight.shape, strict=True)]
            delta = TuckerDelta(layer.weight.shape, ranks, init_weights=False)
            shape = size(drawn.randint(1, 17), inner, side)
            x = torch.zeros(shape, dtype=torch.long) if name == "embedding" else torch.empty(shape, dtype=dtype)

        kind = name if name in ("linear", "embedding") else "conv"
        groups, transposed = getattr(layer, "groups", 1), bool(getattr(layer, "transposed", False))
        channels = {"linear": inner, "embedding": 1}.get(kind, getattr(layer, "in_channels", 1))
        positions = layer(x).numel() // {"linear": out, "embedding": out}.get(kind, getattr(layer, "out_channels", 1))
        work = Work(
            kind, tuple(layer.weight.shape), tuple(ranks), x.numel() // channels, positions, groups, transposed,
            cpu=False, element_size=layer.weight.element_size(),
        )  # fmt: skip
        choice = choose(work)
        chosen.add(choice)

        found = {way: counted(run, x) for way, run in ways(layer, delta).items()}
        mine, others = found.pop(choice), list(found.values())
        assert not all(mine.is_above(other) for other in others), (work, mine, found)

    assert len(chosen) >= (2 if name == "linear" else 1)


@pytest.mark.parametrize(
    "shape", [(3, 17, 29, 11, 4), (8, 64, 40, 500, 7), (5, 301, 47, 1000, 16), (2, 13, 997, 64, 1)]
)
def test_on_a_gpu_experts_count_less_beside(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """A stack stays apart from its update: the other way would form the dense update of every expert."""
    monkeypatch.setattr(device, "on_cpu", lambda x: False)
    experts, inner, out, rows, rank = shape
    assert choose(Work("parameter", (), (), 0, 0, cpu=False), can_sum=False, can_add=True) == BESIDE

    with torch.device("meta"):
        weight = torch.empty(experts, inner, out)
        delta = TuckerDelta(weight.shape, (min(rank, experts), min(rank, inner), min(rank, out)), init_weights=False)
        x, ends = torch.empty(rows, inner), torch.empty(experts, dtype=torch.int32)

    def product(x: Tensor, matrices: Tensor, offs: Tensor) -> Tensor:
        """A grouped product of as many rows for each expert, which is what it costs; torch has none in float32."""
        share = torch.bmm(
            x[:1].expand(len(matrices), -1).unsqueeze(1).expand(-1, -(-rows // len(matrices)), -1), matrices
        )
        return share.flatten(0, 1)[:rows]

    def stack() -> ExpertStack:
        return ExpertStack.of(weight, [(delta.form, delta.scale)])

    beside = counted(lambda x: stack().grouped(x, ends, product), x)
    called = counted(lambda x: product(x, stack().dense(), ends), x)
    assert not beside.is_above(called)
    assert beside.flops < called.flops or beside.moved < called.moved


# ---- a plan as a whole ----------------------------------------------------------------------------------------------


@given(st.integers(2, 99), st.integers(2, 99), st.integers(1, 32), st.integers(1, 5000))
def test_a_plan_is_sane_for_every_linear(out: int, inner: int, r: int, positions: int) -> None:
    ranks = (min(r, out), min(r, inner))
    made = plan((out, inner), ranks, positions=positions)
    assert made.num_params == count_params((out, inner), ranks)
    assert made.flops.keys() == made.kept.keys() == made.seconds.keys()
    assert made.way in {way.partition(",")[0] for way in made.flops}
    assert all(cost > 0 for cost in (*made.flops.values(), *made.kept.values()))


def test_many_tokens_keep_only_the_input_where_weights_are_summed() -> None:
    many, half = (plan((96, 48), (8, 8), positions=4096, element_size=size) for size in (4, 2))
    assert many.kept["summed, narrow"] == 4 * 4096 * 48
    assert half.kept["beside"] == 2 * 4096 * (48 + 8)


# ---- the same function in a model and in its plan ------------------------------------------------------------------

LAYERS = {
    "linear": (lambda: nn.Linear(64, 96), {}, (2048, 64), "summed"),
    "a folded linear": (lambda: nn.Linear(64, 96), {"fold": {"0": "(qkv heads dim) in, qkv=3 heads=8"}}, (7, 64), None),
    "conv": (lambda: nn.Conv2d(8, 12, 3, padding=1), {}, (2, 8, 16, 16), "summed"),
    "transposed": (lambda: nn.ConvTranspose2d(8, 12, 2, stride=2), {}, (2, 8, 16, 16), None),
    "bilinear": (lambda: nn.Bilinear(7, 5, 11), {}, (3, 7), "beside"),
    "recurrent": (lambda: nn.GRU(7, 11), {}, (5, 3, 7), "called"),
    "embedding bag": (lambda: nn.EmbeddingBag(50, 7), {}, (3, 5), "beside"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_plan_names_the_way_that_runs(name: str) -> None:
    make, told, size, way = LAYERS[name]
    config = FloraConfig(r=3, target_modules=["0"], init_weights=False, **told)  # type: ignore[arg-type]
    model = get_peft_model(nn.Sequential(make()), config)  # type: ignore[operator]
    layer: Any = model.base_model.model[0]
    x = torch.randn(size)
    if "bag" in name:
        x = torch.randint(0, 50, size)
    chosen = choice_for(layer, ["default"], x)
    out = layer(x, torch.randn(3, 5)) if name == "bilinear" else layer(x)
    positions = x.numel() if "bag" in name else (out[0] if name == "recurrent" else out).numel()
    positions //= {"linear": 96, "a folded linear": 96}.get(name, 12 if "conv" in name or name == "transposed" else 1)
    assert expected_choice(layer, "default", positions, cpu=True)[0] == chosen
    if way is not None:
        assert chosen.way == way


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_experts_run_beside_unless_summed_is_wanted(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "on_cpu", lambda x: kind == "cpu")

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 5, 7))
            self.volume = nn.Parameter(torch.randn(3, 5, 7, 2))

    for way, parameter, expected in [
        ("auto", "up", BESIDE),
        ("summed", "up", CALLED),
        ("beside", "up", BESIDE),
        ("auto", "volume", CALLED),
    ]:
        config = FloraConfig(r=2, target_modules=[], target_parameters=[f"0.{parameter}"], way=way)
        layer: Any = get_peft_model(nn.Sequential(Experts()), config).base_model.model[0]  # type: ignore[arg-type]
        assert choice_for(layer, ["default"], torch.randn(2, 5)) == expected
        assert expected_choice(layer, "default", 4096, cpu=kind == "cpu")[0] == expected


def test_dropout_puts_the_change_beside_and_another_forward_is_called() -> None:
    config = FloraConfig(r=3, target_modules=["0"], dropout=0.5)
    model = get_peft_model(nn.Sequential(nn.Linear(64, 96)), config)  # type: ignore[arg-type]
    layer: Any = model.base_model.model[0]
    x = torch.randn(4096, 64)
    assert choice_for(layer, ["default"], x) == BESIDE
    layer.eval()
    assert choice_for(layer, ["default"], x).way == "summed"
    layer.base_layer.forward = lambda x: x
    assert choice_for(layer, ["default"], x) == CALLED
    del layer.base_layer.forward
    assert choice_for(layer, ["default"], x).way == "summed"


# ---- print ---------------------------------------------------------------------------------------------------------


def test_printed() -> None:
    lines = str(plan((768, 3072), (8, 8), positions=4096)).splitlines()
    assert lines[0] == "weight (768, 3072), ranks (8, 8): 30,784 parameters (1.30% of 2,359,296)"
    assert lines[1] == "per training step on a CPU at 4,096 output positions, beyond the frozen layer:"
    assert lines[2].split()[:-2] == ["summed", "19,441.8", "MFLOP", "57.00", "MiB", "kept"]
    assert lines[3].split()[:-2] == ["->", "summed,", "narrow", "503.3", "MFLOP", "48.00", "MiB", "kept"]
    assert lines[4] == "way: summed, the faster by operations and bytes moved"
    assert len(lines) == 5


def test_a_plan_is_a_value() -> None:
    first, second = plan((31, 17), (5, 3)), plan([31, 17], [5, 3])
    assert isinstance(first, Plan)
    assert first == second
    with pytest.raises(AttributeError):
        first.way = "beside"  # type: ignore[misc]


REFUSED = [
    (
        ((31, 17), (5, 3)),
        {"kind": "convolution"},
        ValueError,
        "unknown kind 'convolution', expected one of linear, conv",
    ),
    (((31, 17), (5, 3)), {"device": "tpu"}, ValueError, "unknown device 'tpu', expected 'cpu' or 'gpu'"),
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
    assert len(REFUSED) == 6
