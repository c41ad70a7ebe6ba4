"""The trainable update: its names, its shapes, and its use as a torch parametrization without PEFT."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from flora import Tucker, TuckerDelta
from flora.tucker.form import count_params

NAMED = [
    ((11, 7, 5, 3), (4, 3, 2, 2), {"core", "factor_0", "factor_1", "factor_2", "factor_3"}),
    ((11, 7, 5, 3), (4, 3, 5, 3), {"core", "factor_0", "factor_1"}),  # whole modes have no factor
    ((11, 7), (11, 2), {"core", "factor_1"}),
    ((13,), (13,), {"core"}),
]


@pytest.mark.parametrize(("shape", "ranks", "names"), NAMED)
def test_parameters_by_name_and_shape(shape: tuple[int, ...], ranks: tuple[int, ...], names: set[str]) -> None:
    delta = TuckerDelta(shape, ranks)
    state = delta.state_dict()
    assert state.keys() == names == dict(delta.named_parameters()).keys()
    assert state["core"].shape == ranks
    for mode, (size, rank) in enumerate(zip(shape, ranks, strict=True)):
        if rank != size:
            assert state[f"factor_{mode}"].shape == (size, rank)
    assert sum(parameter.numel() for parameter in delta.parameters()) == count_params(shape, ranks)
    assert delta.form.shape == shape


def test_the_table_of_names_is_whole() -> None:
    assert len(NAMED) == 4


def test_dense_is_scale_times_the_form() -> None:
    delta = TuckerDelta((11, 7, 5), (4, 3, 5), scale=0.37, init_weights=False, dtype=torch.float64)
    core, first, second = delta.core, delta.get_parameter("factor_0"), delta.get_parameter("factor_1")
    expected = 0.37 * torch.einsum("abk,oa,ib->oik", core, first, second)
    torch.testing.assert_close(delta.dense(), expected, rtol=1e-12, atol=1e-12)


def test_the_form_holds_the_live_parameters() -> None:
    delta = TuckerDelta((11, 7), (4, 3), init="orthogonal")
    assert isinstance(delta.form, Tucker)
    assert delta.form.core is delta.core
    with torch.no_grad():
        delta.core.fill_(1)
    assert torch.count_nonzero(delta.dense()) > 0


@pytest.mark.parametrize("ranks", [(4,), (4, 3, 2), (4, 8)])
def test_ranks_that_do_not_fit_the_shape_are_refused(ranks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError) as caught:
        TuckerDelta((11, 7), ranks)
    text = f"ranks {ranks} do not fit the shape (11, 7); give one from 1 to the size per dimension"
    assert str(caught.value) == text


def test_a_rank_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ranks\[0\] must be at least 1, got 0"):
        TuckerDelta((11, 7), (0, 3))


@pytest.mark.parametrize(
    ("scale", "message"), [(float("nan"), "a finite number, got nan"), (float("inf"), "got inf"), (True, "got True")]
)
def test_a_scale_that_is_no_number_is_refused(scale: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TuckerDelta((11, 7), (2, 3), scale=scale)


def test_dtype_and_device_of_the_parameters() -> None:
    delta = TuckerDelta((11, 7), (4, 3), device="cpu", dtype=torch.float64)
    assert {parameter.dtype for parameter in delta.parameters()} == {torch.float64}


def test_called_with_a_weight_it_keeps_the_weight_s_dtype() -> None:
    delta = TuckerDelta((11, 7), (4, 3), init_weights=False)
    weight = torch.randn(11, 7).bfloat16()
    assert delta(weight).dtype is torch.bfloat16
    torch.testing.assert_close(delta(weight), weight + delta.dense().bfloat16())


# ---- as a torch parametrization ------------------------------------------------------------------------------------


def test_as_a_parametrization_it_starts_as_the_layer_and_follows_the_update() -> None:
    layer = nn.Conv2d(7, 11, (3, 5), stride=2, padding=1, padding_mode="reflect")
    x = torch.randn(2, 7, 13, 17)
    before = layer(x)
    weight = layer.weight.detach().clone()
    delta = TuckerDelta((11, 7, 3, 5), (4, 3, 2, 2), scale=0.5)
    parametrize.register_parametrization(layer, "weight", delta)
    assert torch.equal(layer(x), before)
    with torch.no_grad():
        delta.core.normal_()
    dense = nn.Conv2d(7, 11, (3, 5), stride=2, padding=1, padding_mode="reflect")
    with torch.no_grad():
        dense.weight.copy_(weight + delta.dense())
        dense.bias.copy_(layer.bias)  # type: ignore[arg-type]
    torch.testing.assert_close(layer(x), dense(x))


def test_a_parametrized_layer_learns_and_is_baked_in() -> None:
    layer = nn.Linear(7, 11)
    layer.requires_grad_(False)
    delta = TuckerDelta((11, 7), (4, 3))
    parametrize.register_parametrization(layer, "weight", delta)
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.05)
    x, target = torch.randn(64, 7), torch.randn(64, 11)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(layer(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapted = layer(x)
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer.weight) is nn.Parameter
    assert torch.equal(layer(x), adapted)


def test_a_copy_is_independent() -> None:
    delta = TuckerDelta((11, 7), (4, 3), init_weights=False)
    twin = copy.deepcopy(delta)
    assert torch.equal(twin.dense(), delta.dense())
    with torch.no_grad():
        twin.core.zero_()
    assert torch.count_nonzero(delta.dense()) > 0


def test_state_goes_from_one_delta_to_another() -> None:
    source = TuckerDelta((11, 7), (4, 3), init_weights=False)
    target = TuckerDelta((11, 7), (4, 3))
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.dense(), source.dense())


def test_its_print_says_shape_ranks_scale_and_size() -> None:
    assert repr(TuckerDelta((11, 7), (4, 3), scale=0.5)) == (
        "TuckerDelta(shape=(11, 7), ranks=(4, 3), scale=0.5, params=77)"
    )
