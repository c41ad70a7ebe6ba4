"""A layer and its change in one function, in every way: derivatives, layouts, dtypes, and what is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from flora.layers import device, gate
from flora.layers.conv import kernel_gradient
from flora.layers.conv.geometry import of_conv
from flora.layers.planning import BESIDE, SUMMED, SUMMED_NARROW
from flora.layers.table import find_layer
from flora.tucker.delta import TuckerDelta
from flora.tuner.config import FloraConfig

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 7), (3, 5), (2, 3)),
    "linear, core into the way up": (lambda: nn.Linear(5, 7), (3, 5), (4, 2)),
    "linear, out whole": (lambda: nn.Linear(5, 3, bias=False), (2, 4, 5), (3, 4)),
    "linear, in whole": (lambda: nn.Linear(3, 7), (5, 3), (2, 3)),
    "linear, both whole": (lambda: nn.Linear(3, 5), (2, 3), (5, 3)),
    "gpt-2's conv1d": (lambda: Conv1D(7, 5), (2, 3, 5), (2, 3)),
    "gpt-2's conv1d, in whole": (lambda: Conv1D(7, 2), (3, 2), (2, 4)),
    "linear, wide inner rank, out whole": (lambda: nn.Linear(7, 5), (2, 7), (5, 2)),
    "conv2d, depthwise": (lambda: nn.Conv2d(5, 5, 5, padding=2, groups=5), (2, 5, 7, 6), (3, 1, 2, 3)),
    "conv2d, groups": (lambda: nn.Conv2d(6, 4, (3, 2), groups=2), (2, 6, 5, 4), (3, 2, 2, 1)),
    "conv3d, three kernel factors": (lambda: nn.Conv3d(3, 4, (3, 2, 5), padding=1), (1, 3, 3, 4, 5), (2, 2, 2, 1, 3)),
    "conv3d, a flat kernel": (lambda: nn.Conv3d(3, 4, (1, 3, 2)), (1, 3, 3, 4, 5), (2, 2, 1, 2, 1)),
    "conv2d, one kernel mode whole": (lambda: nn.Conv2d(3, 4, (3, 2)), (2, 3, 4, 5), (2, 2, 3, 1)),
    "conv1d": (lambda: nn.Conv1d(3, 5, 3, stride=2, padding=1, dilation=2), (2, 3, 11), (2, 2, 2)),
    "conv2d": (lambda: nn.Conv2d(3, 5, (3, 2), padding=(1, 0)), (2, 3, 4, 5), (3, 2, 2, 2)),
    "conv2d, reflect": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 4, 5), (2, 2, 2, 2)),
    "conv2d, same": (lambda: nn.Conv2d(3, 4, (2, 3), padding="same", bias=False), (2, 3, 4, 5), (2, 2, 2, 2)),
    "conv2d, 1x1": (lambda: nn.Conv2d(3, 4, 1, stride=2), (2, 3, 4, 5), (2, 2, 1, 1)),
    "conv2d, 1x1, every pixel": (lambda: nn.Conv2d(5, 4, 1), (2, 5, 3, 4), (3, 2, 1, 1)),
    "conv2d, 1x1, both whole": (lambda: nn.Conv2d(3, 2, 1), (2, 3, 3, 4), (2, 3, 1, 1)),
    "conv3d, 1x1x1": (lambda: nn.Conv3d(5, 4, 1, stride=(1, 2, 1)), (2, 5, 2, 3, 4), (2, 3, 1, 1, 1)),
    "conv2d, out whole": (lambda: nn.Conv2d(3, 2, 3), (1, 3, 4, 5), (2, 2, 2, 2)),
    "conv2d, in whole": (lambda: nn.Conv2d(2, 5, 3), (1, 2, 4, 5), (2, 2, 2, 2)),
    "conv3d": (lambda: nn.Conv3d(3, 4, (1, 2, 2)), (1, 3, 2, 3, 3), (2, 2, 1, 2, 1)),
    "transposed conv1d": (lambda: nn.ConvTranspose1d(3, 4, 3, stride=2, output_padding=1), (2, 3, 4), (2, 3, 2)),
    "transposed conv2d": (lambda: nn.ConvTranspose2d(3, 4, (2, 3), stride=2, padding=1), (2, 3, 3, 2), (2, 2, 2, 2)),
    "transposed conv2d, patches": (lambda: nn.ConvTranspose2d(3, 4, (2, 3), stride=(2, 3)), (2, 3, 3, 2), (2, 3, 2, 2)),
    "transposed conv1d, patches, in whole": (lambda: nn.ConvTranspose1d(3, 4, 2, 2, bias=False), (2, 3, 5), (3, 2, 2)),
    "transposed conv3d, patches, out whole": (lambda: nn.ConvTranspose3d(3, 2, 2, 2), (1, 3, 2, 1, 2), (2, 2, 2, 1, 2)),
}
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # of torch, on the reference
each_layer = pytest.mark.parametrize("name", LAYERS)


CHOICES = {"summed": SUMMED, "summed, narrow": SUMMED_NARROW, "beside": BESIDE}
each_choice = pytest.mark.parametrize("way", CHOICES)


def make(name: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Tensor, TuckerDelta]:
    torch.manual_seed(0)
    build, size, ranks = LAYERS[name]
    layer = build().to(dtype).requires_grad_(False)
    delta = TuckerDelta(layer.weight.shape, ranks, scale=0.7, init_weights=False, dtype=dtype)
    for value in delta.parameters():
        nn.init.normal_(value)
    return layer, torch.randn(size, dtype=dtype).requires_grad_(True), delta


def row(layer: nn.Module) -> Any:
    found = find_layer(layer)
    assert found is not None
    return found[1]


def has_narrow_way(layer: Any) -> bool:
    return getattr(layer, "groups", 1) == 1


def fused(way: str, layer: Any, x: Tensor, delta: TuckerDelta) -> Tensor | None:
    return row(layer).fused(CHOICES[way], layer, layer.weight, layer.bias, delta, x)  # type: ignore[no-any-return]


def through(way: str, layer: nn.Module, x: Tensor, delta: TuckerDelta) -> Tensor:
    out = fused(way, layer, x, delta)
    assert out is not None
    return out


def dense(layer: Any, x: Tensor, delta: TuckerDelta) -> Tensor:
    return row(layer).apply(layer, layer.weight + delta.dense(), layer.bias, x)  # type: ignore[no-any-return]


def leaves(x: Tensor, delta: TuckerDelta) -> list[Tensor]:
    return [x, *delta.parameters()]


def same_gradients(out: Tensor, expected: Tensor, wanted: list[Tensor], atol: float) -> None:
    weight = torch.randn_like(expected)
    found = torch.autograd.grad((out * weight).sum(), wanted)
    exact = torch.autograd.grad((expected * weight).sum(), wanted)
    for value, other in zip(found, exact, strict=True):
        assert value.shape == other.shape
        assert value.dtype == other.dtype
        assert torch.allclose(value, other, atol=atol * max(1.0, float(other.abs().max())))


@pytest.fixture(params=["a CPU", "a GPU"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both orders of the products and both choices of what is kept, on whatever device there is."""
    if request.param == "a GPU":
        monkeypatch.setattr(device, "on_cpu", lambda x: False)
    return str(request.param)


@each_choice
@each_layer
def test_output_and_gradients_equal_those_of_the_dense_weight(name: str, way: str, kind: str) -> None:
    layer, x, delta = make(name)
    if way != "summed" and not has_narrow_way(layer):
        assert fused(way, layer, x, delta) is None
        return
    out, expected = through(way, layer, x, delta), dense(layer, x, delta)
    assert torch.allclose(out, expected, atol=1e-12)
    same_gradients(out, expected, leaves(x, delta), 1e-11)


@each_choice
@pytest.mark.parametrize("name", [name for name in LAYERS if "linear" in name])
def test_some_rows_at_a_time(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a linear layer's backward, so that rows of input and gradient are fetched once."""
    monkeypatch.setattr(device, "LEAST_ROWS", 3)
    monkeypatch.setattr(device, "CACHED", 0)
    monkeypatch.setattr(device, "BLOCK", 1)
    layer, x, delta = make(name)
    x = torch.randn(11, x.shape[-1], dtype=x.dtype, requires_grad=True)
    assert device.rows_at_a_time(11, 5, x) == 3
    same_gradients(through(way, layer, x, delta), dense(layer, x, delta), leaves(x, delta), 1e-11)


@each_choice
@each_layer
def test_first_and_second_derivatives_by_differences(name: str, way: str, kind: str) -> None:
    layer, x, delta = make(name)
    if way != "summed" and not has_narrow_way(layer):
        return
    names = [key for key, _ in delta.named_parameters()]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        given = TuckerDelta(delta.core.new_empty(layer.weight.shape).shape, delta.core.shape, scale=0.7, dtype=x.dtype)
        for key, value in zip(names, values, strict=True):
            del given._parameters[key]
            setattr(given, key, value)
        return through(way, layer, x, given)

    assert torch.autograd.gradcheck(run, leaves(x, delta), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves(x, delta), fast_mode=True)


@each_choice
@each_layer
def test_a_trained_bias_and_an_input_without_gradient(name: str, way: str) -> None:
    layer, x, delta = make(name)
    if way != "summed" and not has_narrow_way(layer):
        return
    if layer.bias is None:
        channels = layer(x).shape[1 if x.ndim > 2 and hasattr(layer, "stride") else -1]
        layer.bias = nn.Parameter(torch.zeros(channels).double())
    layer.bias.requires_grad_(True)
    wanted = [layer.bias, *delta.parameters()]
    same_gradients(through(way, layer, x.detach(), delta), dense(layer, x.detach(), delta), wanted, 1e-11)


LAST = [name for name in LAYERS if name.startswith(("conv2d", "conv3d", "transposed conv2d", "transposed conv3d"))]


@each_choice
@pytest.mark.parametrize("name", LAST)
def test_channels_last(name: str, way: str) -> None:
    layer, x, delta = make(name)
    if way != "summed" and not has_narrow_way(layer):
        return
    layout = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    expected = dense(layer, x, delta)
    layer = layer.to(memory_format=layout)
    last = x.detach().to(memory_format=layout).requires_grad_(True)
    out = through(way, layer, last, delta)
    assert torch.allclose(out, expected, atol=1e-12)
    weight = torch.randn_like(expected)
    found = torch.autograd.grad((out * weight).sum(), leaves(last, delta))
    for value, other in zip(found, torch.autograd.grad((expected * weight).sum(), leaves(x, delta)), strict=True):
        assert torch.allclose(value, other, atol=1e-11)


def kept(run: Callable[[], Tensor], known: list[Tensor]) -> int:
    """Bytes that a forward keeps for backward, each storage once, parameters left out."""
    storages: dict[int, int] = {}
    skip = {tensor.untyped_storage().data_ptr() for tensor in known}

    def pack(tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in skip:
            storages[pointer] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storages.values())


@each_choice
@pytest.mark.parametrize("name", ["linear", "conv2d", "transposed conv2d", "conv3d", "conv2d, depthwise"])
def test_the_input_is_kept_and_little_else(name: str, way: str, kind: str) -> None:
    layer, x, delta = make(name, torch.float32)
    if way != "summed" and not has_narrow_way(layer):
        return
    x = torch.randn(64, *x.shape[1:]).requires_grad_(True)
    middle = x * 1.0  # an activation, as the layer before would give it
    known = [layer.weight, layer.bias, *leaves(x, delta)]
    rows = 4 * layer.weight.numel()  # of the steps between core and weight, at most
    hidden = 4 * len(x) * min(delta.core.shape) if name == "linear" and way == "beside" else 0
    small = 4 * 4 * sum(value.numel() for value in delta.parameters()) + rows + 512
    assert kept(lambda: through(way, layer, middle, delta), known) <= middle.nbytes + hidden + small
    if name == "linear" and kind == "a CPU" and way != "summed":
        assert kept(lambda: through(way, layer, middle, delta), known) == middle.nbytes + hidden


def test_it_gives_way_where_it_would_not_be_right() -> None:
    layer, x, delta = make("linear", torch.float32)
    ready = gate.prepare(x, layer.weight, None)
    assert ready is not None
    assert ready.fused
    assert gate.prepare(x.double(), layer.weight, None) is None
    assert fused("summed", layer, x.double(), delta) is None
    seen = []

    def loss(core: Tensor) -> Tensor:
        seen.append(gate.is_plain_eager())
        return row(layer).factored(layer, delta.stored_form, 1.0, x * core.sum()).square().sum()  # type: ignore[no-any-return]

    torch.func.grad(loss)(delta.core.detach())
    assert seen == [False]
    layer.weight.requires_grad_(True)
    assert not gate.prepare(x, layer.weight, None).fused  # type: ignore[union-attr]
    assert fused("beside", layer, x, delta) is None


@pytest.mark.parametrize("name", ["linear", "conv2d", "conv2d, depthwise"])
def test_a_weight_that_is_trained_itself_takes_plain_operations(name: str) -> None:
    layer, x, delta = make(name)
    layer.weight.requires_grad_(True)
    wanted = [layer.weight, *leaves(x, delta)]
    same_gradients(through("summed", layer, x, delta), dense(layer, x, delta), wanted, 1e-11)


@pytest.mark.parametrize("inside", [True, False], ids=["backward under autocast", "backward outside"])
@pytest.mark.parametrize("low", [True, False], ids=["bfloat16 weights", "float32 weights"])
@pytest.mark.parametrize("name", ["linear", "conv2d", "conv2d, 1x1", "transposed conv2d"])
@each_choice
def test_autocast(name: str, way: str, low: bool, inside: bool, kind: str) -> None:
    """It is fused, computes in autocast's dtype, and the small matrices keep theirs."""
    layer, x, delta = make(name, torch.float32)
    expected = dense(layer, x, delta)
    weight = torch.randn_like(expected)
    exact = torch.autograd.grad((expected * weight).sum(), leaves(x, delta))
    layer = layer.to(torch.bfloat16) if low else layer
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = through(way, layer, x, delta)
        if inside:
            found = torch.autograd.grad((out * weight).sum(), leaves(x, delta))
    if not inside:
        found = torch.autograd.grad((out * weight).sum(), leaves(x, delta))
    assert out.dtype == torch.bfloat16
    assert (out - expected).norm() < 2e-2 * expected.norm()
    for value, other in zip(found, exact, strict=True):
        assert value.dtype == torch.float32
        assert (value - other).norm() < 3e-2 * other.norm()
    double = make(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # which leaves float64 alone
        assert fused(way, *double) is None


# ---- half precision ------------------------------------------------------------------------------------------------


@each_choice
@pytest.mark.parametrize("name", ["linear", "conv2d", "transposed conv2d", "conv2d, depthwise", "conv3d"])
def test_bfloat16_with_a_float32_adapter(name: str, way: str, kind: str) -> None:
    layer, x, delta = make(name, torch.float32)
    if way != "summed" and not has_narrow_way(layer):
        return
    half, low = layer.to(torch.bfloat16), x.detach().bfloat16().requires_grad_(True)
    out = through(way, half, low, delta)
    out.float().square().sum().backward()
    exact = dense(layer.float(), low.detach().float(), delta)
    assert out.dtype == torch.bfloat16
    assert (out.float() - exact).abs().max() <= 0.03 * exact.abs().max()
    assert delta.core.grad is not None
    assert delta.core.grad.dtype == torch.float32
    assert low.grad is not None
    assert low.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_sum_in_half_precision_keeps_a_small_update_in_the_mean(dtype: torch.dtype) -> None:
    """Rounding to the nearest would give W itself: every entry of dW is far below half a step of W."""
    torch.manual_seed(0)
    weight = (1 + 0.9 * torch.rand(512, 384)).to(dtype)
    factor, rows = torch.full((512, 1), 1e-4), torch.rand(384, 1)
    changed = device.add_update(weight, factor, rows, 0.5)
    assert changed.dtype == dtype
    update = 0.5 * factor @ rows.T
    assert torch.equal((weight.float() + update).to(dtype), weight) or dtype == torch.float16
    found = (changed.float() - weight.float()).mean()
    assert abs(found - update.mean()) < 0.05 * update.mean()
    assert torch.equal(device.add_update(weight, torch.zeros_like(factor), rows, 0.5), weight)
    assert torch.equal(device.add_update(weight, factor, rows, 0.5), changed)  # the same pattern each time
    step = 1.1 * torch.finfo(dtype).eps
    assert (changed.float() - weight.float() - update).abs().max() <= step


@pytest.mark.parametrize("rows", ["all", "each"])
def test_a_tiny_adapter_changes_outputs_by_the_right_amount(rows: str) -> None:
    """Summed in bfloat16: the mean change of many outputs is that of float32, that of each output within its noise."""
    torch.manual_seed(0)
    layer = nn.Linear(2048, 128, bias=False).to(torch.bfloat16).requires_grad_(False)
    layer.weight.copy_(1 + torch.rand(128, 2048))
    delta = TuckerDelta((128, 2048), (2, 3), init_weights=False)
    nn.init.constant_(delta.core, 0.02)
    for factor in (delta.factor_0, delta.factor_1):
        nn.init.constant_(factor, 0.02)
    update = delta.dense().float()
    x = torch.ones(1, 2048, dtype=torch.bfloat16)
    weight = device.add_update(layer.weight, *_two(delta), 1.0)
    change = (weight.float() - layer.weight.float()) @ x.float().T
    exact = update @ x.float().T
    assert update.max() < torch.finfo(torch.bfloat16).eps / 8
    if rows == "all":
        assert abs(change.mean() - exact.mean()) < 0.05 * exact.mean()
    else:
        assert (change - exact).abs().mean() < 0.35 * exact.mean()


def _two(delta: TuckerDelta) -> tuple[Tensor, Tensor]:
    core, (out, inner) = delta.tensors()
    assert out is not None
    assert inner is not None
    return out, inner @ core.T


# ---- compilers and exporters ---------------------------------------------------------------------------------------


def test_an_exported_layer_has_only_operations_of_torch() -> None:
    row_ = LAYERS["linear"]
    model = get_peft_model(
        nn.Sequential(row_[0]()),
        FloraConfig(r=2, target_modules=["0"], init_weights=False, way="beside"),  # type: ignore[arg-type]
    ).base_model.model.eval()
    x = torch.randn(row_[1])
    for strict in (False, True):
        program = torch.export.export(model, (x,), strict=strict)
        assert not any("flora" in str(node.target) for node in program.graph.nodes if node.op == "call_function")
        assert torch.allclose(program.module()(x), model(x), atol=1e-6)


def test_a_compiled_linear_layer_is_one_operation() -> None:
    """Forward and backward equal the eager ones, for batches of any size, with and without a bias."""
    compiler = torch._dynamo.lookup_backend("aot_eager")
    for bias in (True, False):  # the biases are trained too
        model = get_peft_model(
            nn.Sequential(nn.Linear(136, 72, bias=bias), nn.Linear(72, 40, bias=bias)),
            FloraConfig(r=[6, 8], target_modules=["0", "1"], init_weights=False, way="beside", bias="all"),
        )
        trained = [value for value in model.parameters() if value.requires_grad]
        seen: list[int] = []  # of each graph

        def watching(graph: Any, inputs: Any, seen: list[int] = seen) -> Any:
            parts = [part for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]
            seen.append([str(node.target) for part in parts for node in part.graph.nodes].count("flora.linear"))
            return compiler(graph, inputs)

        torch.compiler.reset()
        run = torch.compile(model, backend=watching, fullgraph=True, dynamic=True)
        for count in (3, 7, 300):
            x = torch.randn(count, 5, 136, requires_grad=count != 7)
            first, second = model(x), run(x)
            assert torch.allclose(first, second, atol=1e-5)
            wanted = [*([x] if x.requires_grad else []), *trained]
            exact = torch.autograd.grad(first.square().sum(), wanted)
            for value, other in zip(torch.autograd.grad(second.square().sum(), wanted), exact, strict=True):
                assert torch.allclose(value, other, atol=1e-4 * float(other.abs().max()))
        assert set(seen) == {2}


class Recomputed(nn.Module):
    """A layer under activation checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(17, 11)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.layer, x, use_reentrant=False)
        return out.tanh()


def test_compiled_under_checkpointing_and_autocast() -> None:
    config = FloraConfig(r=[3, 5], target_modules=["layer"], init_weights=False, way="beside")
    model = get_peft_model(Recomputed(), config)  # type: ignore[arg-type]
    x = torch.randn(7, 17, requires_grad=True)
    wanted = [x, *(value for value in model.parameters() if value.requires_grad)]
    exact = torch.autograd.grad(model(x).square().sum(), wanted)
    torch.compiler.reset()
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    for value, other in zip(torch.autograd.grad(run(x).square().sum(), wanted), exact, strict=True):
        assert torch.allclose(value, other, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = run(x)
    for value, other in zip(torch.autograd.grad(low.square().sum(), wanted), exact, strict=True):
        assert (value - other).norm() < 3e-2 * other.norm()


# ---- the gradient of a large depthwise kernel ----------------------------------------------------------------------

TRAINED: dict[str, Callable[[], Any]] = {
    "depthwise 7x7": lambda: nn.Conv2d(5, 5, 7, padding=3, groups=5),
    "strided, dilated": lambda: nn.Conv2d(3, 3, (5, 7), stride=2, dilation=(1, 2), padding=(2, 6), groups=3),
    "no bias": lambda: nn.Conv2d(3, 3, 5, padding=2, groups=3, bias=False),
    "depthwise, 3-D": lambda: nn.Conv3d(3, 3, (3, 4, 3), stride=(1, 3, 2), padding=1, groups=3),
}


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("cached", [1, 2**19], ids=["sample by sample", "at once"])
@pytest.mark.parametrize("name", TRAINED)
def test_the_gradient_of_a_depthwise_kernel(
    name: str, cached: int, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "CACHED", cached)
    torch.manual_seed(0)
    layer = TRAINED[name]().double()
    x = torch.randn((2, layer.in_channels, 11, 13, 7)[: layer.weight.ndim], dtype=torch.float64)
    if last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    geometry = of_conv(layer, x).geometry
    out = layer(x)
    grad = torch.randn_like(out)
    assert kernel_gradient.gradient(geometry, x, grad, layer.weight) is not None
    found = geometry.gradients(grad, x, layer.weight, False)[1]
    assert torch.allclose(found, torch.autograd.grad(out, layer.weight, grad)[0], atol=1e-10)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernel", [(3, 2, 5), (1, 3, 1)])
def test_the_gradients_of_a_volume_of_few_channels(
    bias: bool, kernel: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "prefers_volumes_channels_last", lambda x: True)
    torch.manual_seed(0)
    layer = nn.Conv3d(3, 5, kernel, padding=(1, 0, 2), bias=bias)
    x = torch.randn(2, 3, 7, 11, 13).requires_grad_(True)
    out = layer(x)
    grad = torch.randn_like(out)
    geometry = of_conv(layer, x).geometry
    assert kernel_gradient.gradient(geometry, x.detach(), grad, layer.weight) is not None

    expected = torch.autograd.grad(out, (x, layer.weight), grad)
    for found, right in zip(geometry.gradients(grad, x.detach(), layer.weight, True), expected, strict=True):
        assert found is not None
        assert torch.allclose(found, right, rtol=1e-4, atol=1e-4)
    assert geometry.gradients(grad, x.detach(), layer.weight, False)[0] is None


LEFT_TO_TORCH: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "small depthwise": (lambda: nn.Conv2d(5, 5, 3, groups=5), (2, 5, 11, 13)),
    "large, not depthwise": (lambda: nn.Conv2d(5, 5, 7), (2, 5, 11, 13)),
    "half precision": (lambda: nn.Conv2d(5, 5, 7, groups=5).bfloat16(), (2, 5, 11, 13)),
    "several outputs a channel": (lambda: nn.Conv2d(5, 10, 7, groups=5), (2, 5, 11, 13)),
    "volume of one channel": (lambda: nn.Conv3d(1, 5, 3), (2, 1, 7, 5, 3)),
    "volume of many channels": (lambda: nn.Conv3d(67, 5, 3), (1, 67, 3, 5, 3)),
    "volume, strided": (lambda: nn.Conv3d(3, 5, 3, stride=(1, 1, 2)), (2, 3, 7, 5, 3)),
    "volume, kernel of one pixel": (lambda: nn.Conv3d(3, 5, 1), (2, 3, 7, 5, 3)),
}


@pytest.mark.parametrize("name", LEFT_TO_TORCH)
def test_where_the_gradient_of_a_kernel_is_left_to_torch(name: str) -> None:
    build, size = LEFT_TO_TORCH[name]
    layer = build()
    x = torch.randn(size).to(layer.weight.dtype)
    assert kernel_gradient.gradient(of_conv(layer, x).geometry, x, layer(x).detach(), layer.weight) is None
