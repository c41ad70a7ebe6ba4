"""Two processes on the CPU: the same losses as one process, then save and reload."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import flora
from distributed_run import BESIDE, TARGETS, batch, build, fresh_base, train
from flora.layers.table import weight_shape
from flora.tuner.layer import FloraLayer

SCRIPT = Path(__file__).parent / "distributed_run.py"


def launch(mode: str, folder: Path) -> None:
    """Runs distributed_run.py in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(SCRIPT), mode, str(folder)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp1", "fsdp2", "accelerate-ddp", "accelerate-fsdp2", "zero3"])
def test_two_processes_train_as_one(mode: str, tmp_path: Path) -> None:
    if mode == "zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")

    launch(mode, tmp_path)
    targets = BESIDE if mode == "zero3" else TARGETS
    model = build(targets)
    expected = train(model)
    losses = torch.load(tmp_path / "losses.pt")
    assert losses == pytest.approx(expected, abs=1e-5)
    assert len(losses) == 4
    again = PeftModel.from_pretrained(fresh_base(), tmp_path).eval()
    ids, _ = batch(0)
    with torch.no_grad():
        assert torch.allclose(again(ids), model.eval()(ids), atol=1e-5)
        assert not torch.allclose(again(ids), build(targets).eval()(ids), atol=1e-2)  # where the training started


def test_the_adapters_of_that_model_do_something() -> None:
    model = build().eval()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, FloraLayer)}
    assert len(layers) == len(TARGETS) == 6
    ids, _ = batch(0)
    with torch.no_grad():
        whole = model(ids)
        for name, layer in layers.items():
            layer.enable_adapters(False)
            assert not torch.allclose(model(ids), whole, atol=1e-4), name
            layer.enable_adapters(True)


@pytest.fixture
def one_process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning")  # there is one process
@pytest.mark.filterwarnings("ignore:.*FullyShardedDataParallel.*deprecated:FutureWarning")
@pytest.mark.parametrize("kind", [nn.LSTM, nn.Conv2d])
def test_a_base_layer_wrapped_apart_from_its_adapter_is_refused(kind: type[nn.Module], one_process_group: None) -> None:
    cpu = torch.device("cpu")
    model = FullyShardedDataParallel(
        build(), auto_wrap_policy=ModuleWrapPolicy({kind}), use_orig_params=True, device_id=cpu
    )
    with pytest.raises(ValueError, match=f"(?s)wrapped by FSDP on its own.*{kind.__name__}"):
        model(batch(0)[0])


def partitioned(module: nn.Module) -> nn.Module:
    """The module as DeepSpeed ZeRO-3 leaves it: empty parameters that know their shapes."""
    for part in module.modules():
        for name, value in list(part.named_parameters(recurse=False)):
            empty = nn.Parameter(torch.empty(0), requires_grad=value.requires_grad)
            empty.ds_shape = value.shape
            part.register_parameter(name, empty)
    return module


def test_shapes_ranks_and_paths_of_partitioned_weights() -> None:
    config = {"r": 2, "target_modules": TARGETS}
    whole = get_peft_model(fresh_base(), flora.FloraConfig(**config))
    base = partitioned(fresh_base())
    before = {name: id(value) for name, value in base.named_parameters()}
    model = get_peft_model(base, flora.FloraConfig(**config))
    pairs = [
        (one, other)
        for one, other in zip(model.modules(), whole.modules(), strict=True)
        if isinstance(one, FloraLayer) and isinstance(other, FloraLayer)
    ]
    assert len(pairs) == len(TARGETS)
    for one, other in pairs:
        assert one.settings == other.settings  # the path that the plan chose is in there
        for weight in other.attributes:
            assert weight_shape(one.get_base_layer(), weight) == weight_shape(other.get_base_layer(), weight)
            assert one.delta("default", weight).form.shape == other.delta("default", weight).form.shape
            assert one.delta("default", weight).form.ranks == other.delta("default", weight).form.ranks
    names = [name.replace("base_model.model.", "").replace(".base_layer", "") for name, _ in model.named_parameters()]
    frozen = {
        name: id(value)
        for name, (_, value) in zip(names, model.named_parameters(), strict=True)
        if ".tucker_" not in name
    }
    assert frozen == before  # the very same parameters, still empty
    assert all(value.numel() == 0 for value in base.parameters() if hasattr(value, "ds_shape"))


def test_a_budget_counts_partitioned_parameters() -> None:
    config = {"target_modules": TARGETS, "budget": 0.5}
    whole = get_peft_model(fresh_base(), flora.FloraConfig(**config)).get_nb_trainable_parameters()
    counted = get_peft_model(partitioned(fresh_base()), flora.FloraConfig(**config))
    assert sum(value.numel() for value in counted.parameters() if value.requires_grad) == whole[0]
