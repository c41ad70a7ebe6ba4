"""The start from the gradient where models are not plain: several processes, bfloat16, checkpointing, 4 bits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, multiprocessing, nn
from torch import distributed as dist
from torch.utils.checkpoint import checkpoint

import flora


class Net(nn.Module):
    def __init__(self, checkpointing: bool = False) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.conv = nn.Conv1d(5, 140, 3)  # 140 outputs: a mode that is found in two passes
        self.head = nn.Linear(140, 7)

    def body(self, x: Tensor) -> Tensor:
        return self.conv(x).tanh().mean(2)

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointing:
            return self.head(checkpoint(self.body, x, use_reentrant=False))
        return self.head(self.body(x))


def net(**options: Any) -> Net:
    torch.manual_seed(0)
    return Net(**options)


def batches(first: int, dtype: torch.dtype = torch.float32) -> list[Any]:
    torch.manual_seed(1)
    other = net()
    with torch.no_grad():
        other.conv.weight.add_(torch.randn(other.conv.weight.shape) * 0.2)
    torch.manual_seed(first)
    inputs = [torch.randn(6, 5, 9) for _ in range(4)]
    return [(x.to(dtype), other(x).detach().to(dtype)) for x in inputs]


def squares(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]) - batch[1]).float().square().mean()


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if "tucker_" in name}


def one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    config = flora.FloraConfig(budget=700, target_modules=["conv"])
    model = flora.adapt(net(), config, batches(10 + rank), loss=squares, choose_ranks=True)
    torch.save({"state": state_of(model), "ranks": model.peft_config["default"].rank_pattern}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_processes_agree_and_see_all_batches(tmp_path: Path) -> None:
    multiprocessing.start_processes(one_of_two, (str(tmp_path),), nprocs=2, start_method="spawn")
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert one["ranks"] == two["ranks"]
    assert all(torch.equal(value, two["state"][name]) for name, value in one["state"].items())
    config = flora.FloraConfig(budget=700, target_modules=["conv"])
    alone = flora.adapt(net(), config, batches(10), loss=squares, choose_ranks=True)
    changed = {name: value.shape for name, value in state_of(alone).items()}
    assert changed.keys() == one["state"].keys()
    assert any(
        value.shape != changed[name] or not torch.equal(value, state_of(alone)[name])
        for name, value in one["state"].items()
    )


def one_without_gradients(rank: int, folder: str) -> None:
    """The first process never sends anything through the wide layer, as to an expert that no token goes to."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        hidden = model.conv(x).tanh().mean(2) if rank else torch.ones(len(x), 140)
        return (model.head(hidden) - y).square().mean()

    model = get_peft_model(net(), flora.FloraConfig(r=[3, 2, 2], rank_pattern={"head": 2}, target_modules="all"))
    flora.start(model, batches(10 + rank), loss=loss)
    torch.save(state_of(model), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_weight_without_gradients_in_one_process(tmp_path: Path) -> None:
    multiprocessing.start_processes(one_without_gradients, (str(tmp_path),), nprocs=2, start_method="spawn")
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert any("conv" in name and value.any() for name, value in one.items())
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_gradient_checkpointing_gives_the_same() -> None:
    states = []
    for checkpointing in (False, True):
        base = net(checkpointing=checkpointing)
        model = get_peft_model(base, flora.FloraConfig(r=[3, 2, 2], target_modules=["conv"]))
        assert flora.start(model, batches(3), loss=squares).step > 0
        states.append(state_of(model))
    assert all(torch.allclose(value, states[1][name], atol=1e-6) for name, value in states[0].items())


def test_a_base_in_bfloat16_gets_nearly_the_same_directions() -> None:
    changes = []
    for dtype in (torch.float32, torch.bfloat16):
        model = get_peft_model(net().to(dtype), flora.FloraConfig(r=[3, 2, 2], target_modules=["conv"]))
        assert flora.start(model, batches(3, dtype), loss=squares).step > 0
        changes.append(model.base_model.model.conv.get_delta_weight("default").float().flatten())
    assert torch.cosine_similarity(*changes, dim=0) > 0.98


def test_a_base_in_four_bits_has_the_gradient_of_its_dequantised_weight() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 32, bias=False), nn.Tanh(), nn.Linear(32, 3))
    quantised = copy.deepcopy(plain)
    layer = bnb.nn.Linear4bit(64, 32, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(plain[0].weight.data.clone(), requires_grad=False, quant_type="nf4")
    quantised[0] = layer.to("cpu")
    weight = bnb.functional.dequantize_4bit(quantised[0].weight.data, quantised[0].weight.quant_state)
    plain[0].weight.data = weight.reshape(32, 64).float()

    torch.manual_seed(2)
    data = [(torch.randn(9, 64), torch.randn(9, 3)) for _ in range(4)]
    changes = []
    for base in (plain, quantised):
        model = get_peft_model(base, flora.FloraConfig(r=[3, 2], target_modules=["0"]))
        begun = flora.start(model, data, loss=squares)
        changes.append((begun.losses, model.base_model.model[0].get_delta_weight("default").float().flatten()))
    assert changes[0][0].keys() == changes[1][0].keys()
    for size, value in changes[0][0].items():
        assert changes[1][0][size] == pytest.approx(value, rel=2e-2)
    if changes[0][1].any():
        assert torch.cosine_similarity(changes[0][1], changes[1][1], dim=0) > 0.98
