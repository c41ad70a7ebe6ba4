"""What each of two processes runs for tests/test_distributed.py: the same training, wrapped in one way or another."""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy
from torch.nn.parallel import DistributedDataParallel

import flora

STEPS, BATCH = 4, 4


class Block(nn.Module):
    """A residual block with an attention: one unit of sharding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + torch.tanh(self.linear(x))


class Net(nn.Module):
    """Tokens -> embedding -> LSTM -> convolutions over time and width -> block -> one number per token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(23, 10)
        self.lstm = nn.LSTM(10, 10, batch_first=True)
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.block = Block(10)
        self.out = nn.Linear(10, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x, _ = self.lstm(self.embedding(ids))
        x = x + self.depthwise(torch.relu(self.conv(x.unsqueeze(1)))).mean(1)
        return self.out(self.block(x))


TARGETS = ["embedding", "lstm", "conv", "depthwise", "attention", "linear"]
# DeepSpeed keeps weights in parts, and an LSTM or an attention has to be called with weights that are changed.
BESIDE = ["embedding", "conv", "depthwise", "linear"]


def fresh_base() -> Net:
    torch.manual_seed(0)
    return Net()


def build(targets: list[str] = TARGETS) -> PeftModel:
    base = fresh_base()
    torch.manual_seed(1)
    config = flora.FloraConfig(r=2, target_modules=targets, modules_to_save=["out"], init_weights=False)
    return get_peft_model(base, config)


def batch(step: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(100 + step)
    return torch.randint(0, 23, (BATCH, 7)), torch.randn(BATCH, 7, 3)


def _is_block(module: nn.Module) -> bool:
    return isinstance(module, Block)


def wrap(model: PeftModel, mode: str) -> nn.Module:
    if mode == "ddp":
        return DistributedDataParallel(model)
    if mode == "fsdp1":
        policy = functools.partial(lambda_auto_wrap_policy, lambda_fn=_is_block)
        cpu = torch.device("cpu")
        return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=cpu)
    if mode == "fsdp2":
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
        for module in model.modules():
            if isinstance(module, Block):
                fully_shard(module, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    return model


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam([value for value in model.parameters() if value.requires_grad], lr=1e-2)


def accelerated(mode: str) -> tuple[Any, nn.Module, Any]:
    """An accelerator, and the model and its optimizer as it prepares them."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    plugin = None
    if mode == "accelerate-fsdp2":
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Block"]
        )
    model = build()
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    return accelerator, *accelerator.prepare(model, adam(model))


def train(model: nn.Module, rank: int = 0, world: int = 1, optimizer: Any = None) -> list[float]:
    """A few steps of Adam on this process's share of each batch; the losses of whole batches."""
    optimizer = optimizer or adam(model)
    losses = []
    for step in range(STEPS):
        ids, wanted = (part.chunk(world)[rank] for part in batch(step))
        loss = (model(ids) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        if world > 1:
            dist.all_reduce(total)
        losses.append(total.item() / world)
    return losses


def adapter_state(model: nn.Module, mode: str) -> dict[str, Tensor]:
    """The whole tensors of the adapter, as save_pretrained names them."""
    if mode == "fsdp1":
        with FullyShardedDataParallel.state_dict_type(
            model, StateDictType.FULL_STATE_DICT, FullStateDictConfig(rank0_only=True)
        ):
            full = model.state_dict()
    elif mode == "fsdp2":
        full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    else:
        full = getattr(model, "module", model).state_dict()
    if not full:  # FSDP gives the whole state to rank 0 alone
        return {}
    plain = build()
    return {key: value.contiguous() for key, value in get_peft_model_state_dict(plain, state_dict=full).items()}


def zero3(folder: Path) -> list[float]:
    """DeepSpeed's third stage: parameters, gradients and moments in parts, one for each process; saves the adapter."""
    import deepspeed

    # It would compile a collective of its own for processes of one machine; gloo does the same.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    model = build(BESIDE)
    config = {
        "train_micro_batch_size_per_gpu": BATCH // dist.get_world_size(),
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=adam(model), config=config)
    assert all(value.numel() == 0 for value in model.parameters()), "every parameter is in parts"

    losses = []
    for step in range(STEPS):
        ids, wanted = (part.chunk(dist.get_world_size())[dist.get_rank()] for part in batch(step))
        loss = (engine(ids) - wanted).square().mean()
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        if dist.get_rank() == 0:
            model.save_pretrained(str(folder))

    return losses


def main(mode: str, folder: Path) -> None:
    warnings.simplefilter("ignore")
    if mode.startswith("accelerate"):
        accelerator, model, optimizer = accelerated(mode)
        losses = train(model, dist.get_rank(), dist.get_world_size(), optimizer)
        state = accelerator.get_state_dict(model)
        if accelerator.is_main_process:
            accelerator.unwrap_model(model).save_pretrained(str(folder), state_dict=state)
    elif mode == "zero3":
        losses = zero3(folder)
    else:
        dist.init_process_group("gloo")
        model = wrap(build(), mode)
        losses = train(model, dist.get_rank(), dist.get_world_size())
        state = adapter_state(model, mode)
        if state and dist.get_rank() == 0:
            save_file(state, str(folder / "adapter_model.safetensors"))
            build().peft_config["default"].save_pretrained(str(folder))
    if dist.get_rank() == 0:
        torch.save(losses, folder / "losses.pt")
    dist.barrier()  # no process goes while another still writes
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
