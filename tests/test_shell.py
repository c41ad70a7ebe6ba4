"""A module run with other weights: what the module keeps, what it must not get, and which modules need another way."""

from __future__ import annotations

import copy
import pickle
import threading
from types import MethodType
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from flora.layers.shell import call_with, can_be_shell


class Counting(nn.Module):
    """A module whose forward keeps a cache, counts its calls, and calls a bound method that it has stored."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 7))
        self.register_buffer("seen", torch.zeros(()))
        self.calls = 0
        self.product = self.multiply

    def multiply(self, x: Tensor) -> Tensor:
        return x @ self.weight.T

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += x.shape[0]
        self.last = x
        return self.product(x)


def counting() -> tuple[Counting, Tensor, Tensor]:
    torch.manual_seed(0)
    return Counting(), torch.randn(5, 7), torch.randn(3, 7)


def test_the_other_weight_is_used_and_the_module_keeps_its_own() -> None:
    module, other, x = counting()
    before = module.weight
    assert torch.equal(call_with(module, {"weight": other}, x), x @ other.T)
    assert module.weight is before
    assert torch.equal(module(x), x @ before.T)


def test_what_the_forward_sets_is_set_on_the_module() -> None:
    module, other, x = counting()
    call_with(module, {"weight": other}, x)
    assert module.calls == 1
    assert module.last is x
    assert module.seen == 3
    assert isinstance(module.product, MethodType)
    assert module.product.__self__ is module


def test_copies_and_pickles_know_nothing_of_it() -> None:
    module, other, x = counting()
    call_with(module, {"weight": other}, x)
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    assert vars(pickle.loads(pickle.dumps(module))).keys() == vars(module).keys()


def test_hooks_run_and_gradients_arrive() -> None:
    module, other, x = counting()
    found: list[Any] = []
    module.register_forward_hook(lambda module, args, out: found.append(out) or 2 * out)
    other.requires_grad_()
    out = call_with(module, {"weight": other}, x)
    out.sum().backward()
    assert torch.equal(out, 2 * x @ other.T)
    assert len(found) == 1
    assert torch.allclose(other.grad, 2 * x.sum(0).expand(5, 7))
    assert module.weight.grad is None


def test_under_gradient_checkpointing() -> None:
    module, other, x = counting()
    other.requires_grad_()
    out = checkpoint(lambda x: call_with(module, {"weight": other}, x), x, use_reentrant=False)
    out.square().sum().backward()
    assert torch.allclose(other.grad, 2 * (x @ other.T).T @ x, atol=1e-5)


def test_a_plain_tensor_in_front_of_the_parameter_is_replaced_too() -> None:
    """As FSDP1 has it while a layer runs."""
    module, other, x = counting()
    front = module.weight.detach().clone()
    vars(module)["weight"] = front
    assert torch.equal(call_with(module, {"weight": other}, x), x @ other.T)
    assert vars(module)["weight"] is front


def test_batch_statistics_are_those_of_the_module() -> None:
    norm = nn.BatchNorm1d(7)
    x = torch.randn(5, 7)
    call_with(norm, {"weight": torch.rand(7)}, x)
    assert torch.allclose(norm.running_mean, 0.1 * x.mean(0))
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l1_reverse"])
def test_recurrent_layers_and_their_list_of_weights(name: str) -> None:
    torch.manual_seed(0)
    lstm, x = nn.LSTM(5, 7, num_layers=2, bidirectional=True), torch.randn(3, 2, 5)
    plain = lstm(x)[0]
    other = torch.randn_like(getattr(lstm, name))
    oracle = copy.deepcopy(lstm)
    getattr(oracle, name).data = other
    assert torch.allclose(call_with(lstm, {name: other}, x)[0], oracle(x)[0])
    assert torch.equal(lstm(x)[0], plain)


def test_a_weight_of_a_submodule_that_is_read() -> None:
    torch.manual_seed(0)
    attention, x = nn.MultiheadAttention(14, 2, batch_first=True), torch.randn(3, 5, 14)
    other = torch.randn(14, 14)
    oracle = copy.deepcopy(attention)
    oracle.out_proj.weight.data = other
    out = call_with(attention, {"out_proj.weight": other}, x, x, x)[0]
    assert torch.allclose(out, oracle(x, x, x)[0], atol=1e-6)
    assert attention.out_proj.weight is not other


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_parametrized_weights_are_replaced_whole(norm: Any) -> None:
    torch.manual_seed(0)
    layer, x, other = norm(nn.Linear(5, 7)), torch.randn(3, 5), torch.randn(7, 5)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    out = call_with(layer, {"weight": other}, x)
    assert torch.allclose(out, x @ other.T + layer.bias, atol=1e-6)
    assert parametrize.is_parametrized(layer, "weight")
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_a_forward_that_was_replaced_on_the_instance() -> None:
    module, other, x = counting()
    assert can_be_shell(module)
    forward = module.forward
    module.forward = lambda x: 3 * forward(x)  # holds on to the module, so a copy would run with the old weight
    assert not can_be_shell(module)
    before = module.weight
    assert torch.allclose(call_with(module, {"weight": other}, x), 3 * x @ other.T)
    assert module.weight is before


def test_a_module_that_accelerate_offloads() -> None:
    module, other, x = counting()
    cpu_offload(module, execution_device=torch.device("cpu"))
    assert module.weight.is_meta
    assert torch.equal(call_with(module, {"weight": other}, x), x @ other.T)
    assert module.weight.is_meta
    assert module.calls == 1


def test_threads_with_weights_of_their_own() -> None:
    module, _, x = counting()
    weights = [torch.randn(5, 7) for _ in range(8)]
    right: list[bool] = []

    def run(index: int) -> None:
        for _ in range(50):
            out = call_with(module, {"weight": weights[index]}, x)
            right.append(torch.equal(out, x @ weights[index].T))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(right) == 8 * 50
    assert all(right)
