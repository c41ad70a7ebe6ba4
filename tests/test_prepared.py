"""``flora.prepare``: whatever a model is used for, outputs and gradients are those of a model without it."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable, Iterator
from itertools import accumulate
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import flora
from conformance import TOLERANCE
from flora.layers import device, prepared
from flora.tucker.delta import TuckerDelta
from flora.tuner.layer import FloraLayer

BLOCKS = 3


class Block(nn.Module):
    """Two convolutions of unlike shapes around what is between, beside a linear layer on the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Conv2d(5, 7, (3, 5), padding=(1, 2))
        self.down = nn.Conv2d(7, 5, 3, padding=1, bias=False)
        self.mix = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(F.gelu(self.up(x)))
        return x + torch.tanh(self.mix(x.movedim(1, -1))).movedim(-1, 1)


class Net(nn.Module):
    """Blocks in a row; what the fields say is done on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(BLOCKS)])
        self.order = list(range(BLOCKS))
        self.run: Callable[[nn.Module, Tensor], Tensor] = nn.Module.__call__

    def forward(self, x: Tensor) -> Tensor:
        for place in self.order:
            x = self.run(self.blocks[place], x)
        return x


def build(dtype: torch.dtype = torch.float32, **fields: Any) -> PeftModel:
    torch.manual_seed(0)
    base = Net().to(dtype)
    torch.manual_seed(1)
    given = {"r": 2, "target_modules": ["up", "down", "mix"], "init_weights": False, "scale": 0.7, "way": "summed"}
    return get_peft_model(base, flora.FloraConfig(**{**given, **fields}))  # type: ignore[arg-type]


def inputs(seed: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(2, 5, 4, 6, dtype=dtype, requires_grad=True)


def layers_of(model: nn.Module) -> list[FloraLayer]:
    return [module for module in model.modules() if isinstance(module, FloraLayer)]


def warm(model: nn.Module) -> None:
    for _ in range(2):
        model(inputs(dtype=next(model.parameters()).dtype)).sum().backward()
    model.zero_grad()


def grouped(handle: prepared.Prepared) -> list[int]:
    return [len(group.layers) for group in handle.groups]


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where layers keep W + dW; on a CPU nothing is prepared."""
    monkeypatch.setattr(device, "on_cpu", lambda x: False)
    yield
    assert prepared._RUNNING.forward is None


# ---- against an independent oracle ---------------------------------------------------------------------------------

KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[int] | int]] = {
    "linear": (lambda: nn.Linear(7, 7), (3, 7), [3, 2]),
    "1-D": (lambda: nn.Conv1d(7, 7, 5, padding=2), (2, 7, 11), [3, 2, 4]),
    "3x5": (lambda: nn.Conv2d(7, 7, (3, 5), padding=(1, 2)), (2, 7, 4, 6), [4, 3, 2, 3]),
    "3x5, rank 2": (lambda: nn.Conv2d(7, 7, (3, 5), padding=(1, 2)), (2, 7, 4, 6), 2),
    "whole kernel": (lambda: nn.Conv2d(7, 7, 3, padding=1), (2, 7, 4, 6), [4, 3, 3, 3]),
    "whole outputs": (lambda: nn.Conv2d(7, 7, 3, padding=1), (2, 7, 4, 6), [7, 3, 2, 2]),
    "whole inputs": (lambda: nn.Conv2d(7, 7, 3, padding=1), (2, 7, 4, 6), [4, 7, 2, 3]),
    "3x3x5": (lambda: nn.Conv3d(7, 7, (3, 3, 5), padding=(1, 1, 2)), (1, 7, 3, 4, 5), [4, 3, 2, 3, 2]),
    "transposed": (lambda: nn.ConvTranspose2d(7, 7, 3, padding=1), (2, 7, 4, 6), [4, 3, 2, 3]),
    "depthwise": (lambda: nn.Conv2d(7, 7, 5, padding=2, groups=7), (2, 7, 4, 6), [3, 1, 2, 4]),
}


def dense(delta: TuckerDelta) -> Tensor:
    """``s dW``, mode by mode, in float64."""
    core, factors = delta.tensors()
    total = core.double()
    for mode, factor in enumerate(factors):
        if factor is not None:
            total = torch.tensordot(total, factor.double(), ([mode], [1])).movedim(-1, mode)
    return delta.scale * total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_dense_weights(kind: str, dtype: torch.dtype) -> None:
    make, shape, ranks = KINDS[kind]
    base = nn.Sequential(*[make() for _ in range(3)]).to(dtype)
    config = flora.FloraConfig(r=ranks, target_modules=["0", "1", "2"], init_weights=False, scale=0.3, way="summed")
    model = get_peft_model(copy.deepcopy(base), config)  # type: ignore[arg-type]
    x = torch.randn(shape, dtype=dtype)
    handle = flora.prepare(model)
    model(x)
    assert grouped(handle) == [3]
    y = model(x)
    y.float().square().sum().backward()

    weights = {
        f"{place}.weight": base[place].weight.double() + dense(layer.delta("default"))  # type: ignore[operator]
        for place, layer in enumerate(layers_of(model))
    }
    expected = torch.func.functional_call(base.double(), weights, x.double())
    trained = [value for value in model.parameters() if value.requires_grad]
    gradients = torch.autograd.grad(expected.square().sum(), trained)

    assert len(trained) >= 3 * 2
    for found, exact in zip([y, *(value.grad for value in trained)], [expected, *gradients], strict=True):
        assert found is not None
        slack = 3 * TOLERANCE[dtype] * exact.abs().max()
        assert (found.double() - exact).abs().max() <= slack


# ---- against the same model without it -----------------------------------------------------------------------------


def checkpointed(model: PeftModel, x: Tensor, **options: Any) -> list[Tensor]:
    model.get_base_model().run = lambda block, value: checkpoint(block, value, **options)  # type: ignore[assignment]
    y = model(x)
    y.square().sum().backward()
    return [y]


def both_adapters(model: PeftModel, x: Tensor) -> list[Tensor]:
    model.add_adapter("second", flora.FloraConfig(r=2, target_modules=["up", "down"], init_weights=False, way="summed"))
    model.base_model.set_adapter(["default", "second"])
    return trained_twice(model, x)


def switched(model: PeftModel, x: Tensor) -> list[Tensor]:
    model.add_adapter("second", flora.FloraConfig(r=2, target_modules=["up", "down"], init_weights=False, way="summed"))
    model.set_adapter("second")
    found = trained_twice(model, x)
    model.set_adapter("default")
    found += trained_twice(model, x)
    model.delete_adapter("second")
    return found + trained_twice(model, x)


def trained_twice(model: PeftModel, x: Tensor) -> list[Tensor]:
    """Two steps of an optimizer that writes in place."""
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.05)
    found = []
    for _ in range(2):
        optimizer.zero_grad()
        found.append(model(x))
        found[-1].square().mean().backward()
        optimizer.step()
    return found


def sample_by_sample(model: PeftModel, x: Tensor) -> list[Tensor]:
    return [model.eval()(x, adapter_names=["default", "__base__"])]


def merged(model: PeftModel, x: Tensor) -> list[Tensor]:
    model.merge_adapter()
    found = [model(x)]
    model.unmerge_adapter()
    return [*found, *trained_twice(model, x)]


def disabled(model: PeftModel, x: Tensor) -> list[Tensor]:
    with model.disable_adapter():
        found = [model(x)]
    return [*found, *trained_twice(model, x)]


def evaluated(model: PeftModel, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        found = [model.eval()(x)]
    with torch.inference_mode():
        found.append(model(x).clone())
    return [*found, *trained_twice(model.train(), x)]


def partly_without_graph(model: PeftModel, x: Tensor) -> list[Tensor]:
    def run(block: nn.Module, value: Tensor) -> Tensor:
        with torch.set_grad_enabled(block is not model.get_base_model().blocks[0]):
            return block(value)  # type: ignore[no-any-return]

    model.get_base_model().run = run  # type: ignore[assignment]
    return trained_twice(model, x)


def twice_in_one_forward(model: PeftModel, x: Tensor) -> list[Tensor]:
    model.get_base_model().order = [0, 1, 0, 2, 1]
    return trained_twice(model, x)


def some_left_out(model: PeftModel, x: Tensor) -> list[Tensor]:
    """The other layers have no gradient, rather than one of zeros."""
    model.get_base_model().order = [0, 2]
    return trained_twice(model, x)


def two_forwards_one_backward(model: PeftModel, x: Tensor) -> list[Tensor]:
    first, second = model(x), model(2 * x)
    (first * second).sum().backward()
    return [first, second]


def backward_twice(model: PeftModel, x: Tensor) -> list[Tensor]:
    y = model(x)
    y.sum().backward(retain_graph=True)
    y.square().sum().backward()
    return [y]


def part_of_the_model(model: PeftModel, x: Tensor) -> list[Tensor]:
    """A block called by itself, before and after its weights have changed."""
    block = model.get_base_model().blocks[1]
    before = block(x)
    found = [before, *trained_twice(model, x), block(x)]
    found[-1].sum().backward()
    return found


def written_on_the_way(model: PeftModel, x: Tensor) -> list[Tensor]:
    """A hook writes into a later layer, after the forward has begun."""
    core = model.get_base_model().blocks[2].down.delta("default").core

    def write(*ignored: Any) -> None:
        with torch.no_grad():
            core.mul_(2)

    model.get_base_model().blocks[0].register_forward_hook(write)
    return trained_twice(model, x)


def rescaled(model: PeftModel, x: Tensor) -> list[Tensor]:
    layers = layers_of(model)
    layers[0].set_scale("default", 3)
    found = [*trained_twice(model, x)]
    layers[1].scale_layer(0.5)
    return [*found, *trained_twice(model, x)]


def partly_frozen(model: PeftModel, x: Tensor) -> list[Tensor]:
    layers = layers_of(model)
    layers[0].requires_grad_(False)
    layers[3].delta("default").core.requires_grad_(False)
    return trained_twice(model, x)


def replaced(model: PeftModel, x: Tensor) -> list[Tensor]:
    """Other parameters, and other tensors in the same ones."""
    layers = layers_of(model)
    layers[0].delta("default").core = nn.Parameter(2 * layers[0].delta("default").core.detach())
    layers[3].delta("default").core.data = layers[3].delta("default").core.data.clone() * 3
    return trained_twice(model, x)


def in_another_dtype(model: PeftModel, x: Tensor) -> list[Tensor]:
    return [y.float() for y in trained_twice(model.double(), x.detach().double())]


def under_autocast(model: PeftModel, x: Tensor) -> list[Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    y.float().square().sum().backward()
    return [y]


def gradient_of_a_gradient(model: PeftModel, x: Tensor) -> list[Tensor]:
    y = model(x)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    wanted = [value for value in model.parameters() if value.requires_grad]
    of_weights = torch.autograd.grad(y.sin().sum(), wanted, create_graph=True)
    (first.square().sum() + sum(each.square().sum() for each in of_weights)).backward()
    return [y, first, *of_weights]


def channels_last(model: PeftModel, x: Tensor) -> list[Tensor]:
    return trained_twice(model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last))  # type: ignore[call-overload]


def dropping(model: PeftModel, x: Tensor) -> list[Tensor]:
    for layer in layers_of(model):
        layer.settings["default"] = layer.settings["default"].__class__("auto", 0.5, {"weight": 0.7})
    torch.manual_seed(3)
    return trained_twice(model, x)


def hooked_saved_tensors(model: PeftModel, x: Tensor) -> list[Tensor]:
    with torch.autograd.graph.save_on_cpu():
        return trained_twice(model, x)


def after_an_exception(model: PeftModel, x: Tensor) -> list[Tensor]:
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 3, 4, 6))
    assert prepared._RUNNING.forward is None
    return trained_twice(model, x)


def copied(model: PeftModel, x: Tensor) -> list[Tensor]:
    other = copy.deepcopy(model)
    return [*trained_twice(other, x), *trained_twice(model, x)]


def through_a_whole_checkpoint(model: PeftModel, x: Tensor, **options: Any) -> list[Tensor]:
    found = []
    for _ in range(2):
        found.append(checkpoint(model, x, **options))
        found[-1].square().sum().backward()
    return found


USES: dict[str, Callable[[PeftModel, Tensor], list[Tensor]]] = {
    "steps": trained_twice,
    "two adapters": both_adapters,
    "adapters switched, added, deleted": switched,
    "an adapter for each sample": sample_by_sample,
    "merged": merged,
    "disabled": disabled,
    "eval, no_grad, inference_mode": evaluated,
    "a part without a graph": partly_without_graph,
    "layers used twice": twice_in_one_forward,
    "layers left out": some_left_out,
    "two forwards, one backward": two_forwards_one_backward,
    "two backwards": backward_twice,
    "a part called by itself": part_of_the_model,
    "a weight written to on the way": written_on_the_way,
    "scales": rescaled,
    "partly frozen": partly_frozen,
    "parameters replaced": replaced,
    "another dtype": in_another_dtype,
    "autocast": under_autocast,
    "a gradient of a gradient": gradient_of_a_gradient,
    "channels last": channels_last,
    "dropout": dropping,
    "saved tensors with hooks": hooked_saved_tensors,
    "an exception": after_an_exception,
    "a copy": copied,
    "checkpointed blocks": lambda model, x: checkpointed(model, x, use_reentrant=False),
    "checkpointed blocks, reentrant": lambda model, x: checkpointed(model, x, use_reentrant=True),
    "checkpointed as a whole": lambda model, x: through_a_whole_checkpoint(model, x, use_reentrant=False),
    "checkpointed as a whole, reentrant": lambda model, x: through_a_whole_checkpoint(model, x, use_reentrant=True),
}


@pytest.mark.parametrize("use", USES)
def test_a_use_gives_the_same_numbers(use: str) -> None:
    found: list[list[Tensor | None]] = []
    for prepares in (False, True):
        model, x = build(), inputs()
        if prepares:
            handle = flora.prepare(model)
        warm(model)
        if prepares:
            assert grouped(handle) == [BLOCKS] * 3

        outputs = USES[use](model, x)
        found.append([*outputs, x.grad, *(value.grad for value in model.parameters())])

    without, with_it = found
    assert len(without) == len(with_it)
    for expected, value in zip(without, with_it, strict=True):
        assert (expected is None) == (value is None)
        if expected is not None and value is not None:
            tolerance = 3e-2 if use == "autocast" else 2e-5
            scale = expected.abs().max().item() + 1e-3
            assert (expected.float() - value.float()).abs().max().item() <= tolerance * scale


# ---- what stands around a model ------------------------------------------------------------------------------------


def test_threads_do_not_see_each_other() -> None:
    model = build()
    flora.prepare(model)
    warm(model)
    wanted = [value for value in model.parameters() if value.requires_grad]
    batches = [inputs(seed) for seed in range(4)]
    expected = [torch.autograd.grad(model(x).square().sum(), wanted) for x in batches]
    found: dict[int, Any] = {}
    together = threading.Barrier(len(batches))

    def work(place: int) -> None:
        together.wait()
        for _ in range(5):
            found[place] = torch.autograd.grad(model(batches[place]).square().sum(), wanted)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    for place, gradients in enumerate(expected):
        assert all(torch.allclose(*pair, rtol=1e-4, atol=1e-4) for pair in zip(gradients, found[place], strict=True))


def test_after_an_interrupt_a_part_runs_with_its_own_weights() -> None:
    """Ctrl-C is no exception for torch, which then runs no hook after the forward."""
    model = build()
    flora.prepare(model)
    warm(model)

    def interrupt(*ignored: Any) -> None:
        raise KeyboardInterrupt

    hook = model.get_base_model().blocks[2].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(inputs())
    hook.remove()
    trained = [value for value in model.parameters() if value.requires_grad]
    with torch.no_grad():
        for value in trained:
            value.mul_(1.5)

    found = model.get_base_model().blocks[0](inputs())
    expected = model.get_base_model().blocks[0].requires_grad_(False)(inputs())
    model(inputs())

    assert torch.allclose(found, expected, atol=1e-5)


def test_a_pickled_model_is_prepared_and_an_adapter_is_saved_as_ever(tmp_path: Path) -> None:
    model, x = build(), inputs()
    before = model.state_dict().keys()
    flora.prepare(model)
    warm(model)
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(Net(), str(tmp_path))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    warm(loaded)
    handle = flora.prepare(loaded)

    assert model.state_dict().keys() == before
    assert again.peft_config["default"].r == 2
    assert grouped(handle) == [BLOCKS] * 3
    assert torch.allclose(loaded(x), model(x), atol=1e-6)


def test_it_is_there_once_and_goes_without_a_trace() -> None:
    model = build()
    hooks = len(model._forward_pre_hooks), len(model._forward_hooks)
    with flora.prepare(model) as handle:
        assert flora.prepare(model) is handle
        warm(model)
        assert grouped(handle) == [BLOCKS] * 3
    assert (len(model._forward_pre_hooks), len(model._forward_hooks)) == hooks

    copied = copy.deepcopy(build())
    flora.prepare(copied)
    other = copy.deepcopy(copied)
    flora.prepare(other).remove()
    assert len(other._forward_pre_hooks) == 0
    assert len(copied._forward_pre_hooks) == 1


def test_on_a_cpu_nothing_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model = build()
    handle = flora.prepare(model)
    warm(model)
    assert grouped(handle) == []


class Heads(nn.ModuleList):
    """Layers side by side."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [head(x) for head in self]


def heads(make: Callable[[], nn.Module], rank: int) -> PeftModel:
    config = flora.FloraConfig(r=rank, target_modules=["0", "1"], init_weights=False)
    return get_peft_model(Heads([make(), make()]), config)  # type: ignore[arg-type]


@pytest.mark.parametrize(("height", "found"), [(101, [2]), (11, [])])
def test_a_weight_that_is_large_beside_its_input_is_formed_alone(height: int, found: list[int]) -> None:
    """Its gradient would wait for the other layers', and take more memory than their inputs did."""
    model = heads(lambda: nn.Conv2d(29, 31, 9), 8)
    handle = flora.prepare(model)
    model(torch.randn(1, 29, height, 100))
    assert grouped(handle) == found


def peak(run: Callable[[], object]) -> int:
    """The most bytes that were there at once while ``run`` ran, beyond those from before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()

    changes: list[tuple[int, int]] = []
    events = list(found.profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]
    while events:
        event = events.pop()
        events += event.children
        size = getattr(event.extra_fields, "alloc_size", None)
        if size is not None:
            changes.append((event.start_time_ns, size))

    return max(accumulate(size for _, size in sorted(changes, key=itemgetter(0))))


def memory(model: nn.Module, x: Tensor) -> tuple[int, int]:
    """The peaks of a forward and of a step, once two steps have been made."""
    for _ in range(2):
        model(x).sum().backward()
    model.zero_grad()

    return peak(lambda: model(x)), peak(lambda: model(x).sum().backward())


def test_memory_is_that_of_a_model_without_it() -> None:
    """What forward leaves, and the peak of a step, in relation to each layer alone; below LoRA's."""
    x = torch.randn(2, 32, 23, 41, requires_grad=True)
    places = [str(place) for place in range(0, 16, 2)]
    configs = {kind: kind(r=8, target_modules=places) for kind in (flora.FloraConfig, LoraConfig)}  # type: ignore[operator]

    alone, ours, lora = (
        get_peft_model(
            nn.Sequential(*[layer for _ in places for layer in (nn.Conv2d(32, 32, 3, padding=1), nn.GELU())]),
            configs[kind],
        )
        for kind in (flora.FloraConfig, flora.FloraConfig, LoraConfig)
    )
    handle = flora.prepare(ours)
    found = [memory(model, x) for model in (alone, ours, lora)]

    assert grouped(handle) == [8]
    for by_itself, together, of_lora in zip(*found, strict=True):
        assert together <= 1.02 * by_itself
        assert together <= of_lora


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(TypeError, match="takes a module, got str"):
        flora.prepare("model")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no FLoRA adapter to prepare; attach one first"):
        flora.prepare(nn.Linear(3, 3))

    model = heads(lambda: nn.Conv2d(5, 7, 3), 2)
    flora.prepare(model)
    x = torch.randn(1, 5, 6, 6)
    model(x)
    first, second = model(x)
    first.sum().backward()
    with pytest.raises(ValueError, match="second backward went through one forward of a model with flora.prepare"):
        second.sum().backward()

    y = sum(out.sum() for out in model(x))
    with torch.no_grad():
        layers_of(model)[0].delta("default").core.mul_(2)
    with pytest.raises(ValueError, match="take it before the optimizer's step"):
        torch.autograd.grad(y, [layers_of(model)[0].delta("default").core], create_graph=True)


@pytest.mark.slow
def test_a_compiler_sees_nothing_of_it() -> None:
    model, x = build(), inputs()
    expected = model(x)
    flora.prepare(model)
    warm(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(2):
        assert torch.allclose(compiled(x), expected, atol=1e-5)
    torch.compiler.reset()


@pytest.fixture
def group() -> Iterator[None]:
    """A group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(
    "options", [{}, {"find_unused_parameters": True}, {"static_graph": True}], ids=["plain", "unused", "static"]
)
def test_ddp_trains_the_same(options: dict[str, bool]) -> None:
    found = []
    for prepares in (False, True):
        model, x = build(), inputs()
        if prepares:
            handle = flora.prepare(model)
        warm(model)
        wrapped = nn.parallel.DistributedDataParallel(model, **options)  # type: ignore[arg-type]
        if "find_unused_parameters" in options:
            model.get_base_model().order = [0, 2]  # type: ignore[assignment]
        found.append(trained_twice(wrapped, x) + trained_twice(wrapped, x) + list(model.parameters()))  # type: ignore[arg-type]

    assert grouped(handle)
    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(*found, strict=True))


@pytest.mark.usefixtures("group")
def test_under_fsdp2_layers_form_their_own() -> None:
    """Also where an evaluation has left a block's parameters in their place."""
    from torch.distributed.fsdp import fully_shard

    found = []
    for prepares in (False, True):
        model, x = build(), inputs()
        if prepares:
            handle = flora.prepare(model)
            warm(model)
            assert grouped(handle) == [BLOCKS] * 3
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        for block in model.get_base_model().blocks:  # type: ignore[union-attr]
            fully_shard(block, mesh=mesh, reshard_after_forward=False)
        fully_shard(model, mesh=mesh)
        outputs = trained_twice(model, x)
        with torch.no_grad():
            outputs.append(model(x))
        outputs += trained_twice(model, x)
        found.append([*outputs, *(value.full_tensor() for value in model.parameters())])  # type: ignore[attr-defined]
        if prepares:
            assert grouped(handle) == []

    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(*found, strict=True))
