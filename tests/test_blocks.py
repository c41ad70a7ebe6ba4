"""Channels in blocks: what is cut and what is not, the rank that it buys, and that everything else takes it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import flora
from cases import Case
from flora.comparison.methods import METHODS
from flora.comparison.rivals import RefusedError, Request
from flora.runs.settings import read
from flora.runs.training import First
from flora.tucker.blocks import cut
from flora.tucker.form import count_params
from flora.tuner.gradient.collect import adapted_weights
from flora_cli import main

OUT, IN, KERNEL, STACK = "output", "summed", "kernel", "stack"
CONV2 = (OUT, IN, KERNEL, KERNEL)

# shape, roles, ranks -> whether it is cut
CUT: dict[str, tuple[tuple[int, ...], tuple[Any, ...], tuple[int, ...], bool]] = {
    "wide, of small rank": ((128, 64, 3), (OUT, IN, KERNEL), (5, 5, 2), True),
    "transposed": ((64, 128, 3), (IN, OUT, KERNEL), (5, 5, 2), True),
    "wide": ((512, 384, 3, 3), CONV2, (8, 8, 2, 2), True),
    "of large rank": ((512, 512, 3, 3), CONV2, (64, 64, 2, 2), False),
    "narrow": ((16, 8, 3, 3), CONV2, (4, 4, 2, 2), False),
    "of prime sizes": ((127, 131, 3), (OUT, IN, KERNEL), (5, 5, 2), False),
    "depthwise": ((512, 1, 7, 7), CONV2, (4, 1, 2, 2), False),
    "linear": ((512, 512), (OUT, IN), (4, 4), False),
    "of one position": ((512, 512, 1, 1), CONV2, (4, 4, 1, 1), False),
    "of one dimension": ((512,), (OUT,), (512,), False),
    "a stack": ((8, 64, 64), (STACK, OUT, IN), (2, 2, 2), False),
}


@pytest.mark.parametrize("name", CUT)
def test_what_is_cut(name: str) -> None:
    shape, roles, ranks, expected = CUT[name]
    blocks = cut(shape, roles, ranks)
    assert (blocks is not None) == expected
    if blocks is None:
        return

    first, second = blocks.parts
    view = (first, shape[0] // first, second, shape[1] // second, *shape[2:])
    assert count_params(view, blocks.ranks) <= count_params(shape, ranks)
    assert blocks.ranks[0] == first
    assert blocks.ranks[2] == second
    assert blocks.ranks[4:] == shape[2:]


def conv1d() -> Case:
    torch.manual_seed(0)
    return Case(nn.Conv1d(64, 128, 3, padding=1))


def adapted(model: nn.Module, **config: Any) -> Any:
    given = {"target_modules": ["layer"], "init_weights": False, **config}
    return get_peft_model(model, flora.FloraConfig(**given))


def test_an_update_in_blocks_has_the_rank_it_promises_and_shares_its_factors() -> None:
    model = adapted(conv1d(), r=5, fold="blocks")
    weight = adapted_weights(model, "default")[0]
    form, shape = weight.delta.form, weight.delta.fold.shape

    first, outputs, second, inputs, width = shape
    factor_out, factor_in = form.factors[1], form.factors[3]

    # An independent sum over the blocks: the same two factors in each of them.
    dense = torch.zeros(first * outputs, second * inputs, width)
    for row in range(first):
        for column in range(second):
            block = torch.einsum("qpk,bq,dp->bdk", form.core[row, :, column], factor_out, factor_in)
            rows = slice(row * outputs, (row + 1) * outputs)
            dense[rows, column * inputs : (column + 1) * inputs] = block

    torch.testing.assert_close(weight.delta.dense(), dense * weight.delta.scale)

    plain = adapted_weights(adapted(conv1d(), r=5), "default")[0].delta
    ranks = [torch.linalg.matrix_rank(each.dense().flatten(1)).item() for each in (weight.delta, plain)]
    assert ranks[0] >= 3 * ranks[1]
    assert sum(value.numel() for value in weight.delta.parameters()) <= sum(
        value.numel() for value in plain.parameters()
    )


def test_a_budget_is_kept_and_the_saved_config_says_all(tmp_path: Path) -> None:
    model = adapted(conv1d(), budget=1016, fold="blocks")
    config = model.peft_config["default"]
    assert config.fold == {"^layer\\.weight": "(a b) (c d) kw, a=4 c=4"}
    assert config.budget is None
    assert model.get_nb_trainable_parameters()[0] <= 1016

    signal = torch.randn(3, 64, 11)
    expected = model(signal)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(conv1d(), tmp_path / "adapter")
    assert torch.equal(loaded(signal), expected)


@pytest.mark.parametrize(("form", "name"), [("lora", "other"), ("kohya", "k.safetensors"), ("dense", "d.safetensors")])
def test_blocks_go_to_other_formats(tmp_path: Path, form: str, name: str) -> None:
    model = adapted(conv1d(), r=5, fold="blocks")
    weight = adapted_weights(model, "default")[0]
    model.save_pretrained(tmp_path / "adapter")
    assert main(["convert", str(tmp_path / "adapter"), "--to", form, "--out", str(tmp_path / name)]) == 0

    there = flora.load(tmp_path / name, base=conv1d())
    found = next(iter(there.weights.values()))
    torch.testing.assert_close(found.dense(), weight.delta.dense().detach(), atol=1e-5, rtol=1e-5)


def test_what_the_user_listed_and_what_is_folded_already_stays() -> None:
    model = Case(nn.Sequential(nn.Conv1d(64, 128, 3), nn.Conv1d(128, 64, 3), nn.LSTM(64, 48)))
    config = flora.FloraConfig(r=5, target_modules="all", fold="blocks", rank_pattern={"layer.0": [5, 5, 2]})
    recorded = get_peft_model(copy.deepcopy(model), config).peft_config["default"]

    assert recorded.rank_pattern["^layer\\.0\\.weight"] == [5, 5, 2]
    assert "^layer\\.0\\.weight" not in recorded.fold
    assert recorded.fold["^layer\\.1\\.weight"].startswith("(a b) (c d) kw")
    assert recorded.fold["^layer\\.2\\.weight_ih_l0"].startswith("(gates")


def test_ranks_from_the_gradient_are_those_of_unfolded_weights() -> None:
    config = flora.FloraConfig(budget=1500, target_modules=["layer"], fold="blocks")
    with pytest.raises(ValueError, match="leave out choose_ranks, or the fold"):
        flora.adapt(conv1d(), config, [torch.randn(3, 64, 11)] * 4, choose_ranks=True)


def test_a_comparison_has_them_where_there_is_something_to_cut() -> None:
    def request(budget: int) -> Request:
        batches = [torch.randn(3, 64, 11) for _ in range(4)]
        first = First(batches, lambda model, batch: model(batch).square().mean())
        return Request({"target_modules": ["layer"]}, 1.0, budget, first=lambda: first)

    few = request(1016)
    model = METHODS["flora-blocks"].build(conv1d(), few)
    assert adapted_weights(model, "default")[0].delta.fold is not None
    assert few.starts[0].losses

    with pytest.raises(RefusedError, match="worth cutting"):
        METHODS["flora-blocks"].build(conv1d(), request(9000))


def test_a_config_file_may_say_it() -> None:
    assert read("digits", ["adapter.fold=blocks"]).adapter["fold"] == "blocks"
    with pytest.raises(ValueError, match="expected dict.* or blocks"):
        read("digits", ["adapter.fold=block"])
