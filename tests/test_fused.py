"""The fused functions: first and second derivatives, layouts, what they keep, and when they give way."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from flora.layers import gate as fused
from flora.layers.conv import channels
from flora.layers.conv import fused as fused_conv
from flora.layers.conv import kernel_gradient as trained_kernel
from flora.layers.conv import pointwise as fused_pointwise
from flora.layers.linear import fused as fused_linear
from flora.layers.table import find_layer
from flora.tucker.form import Tucker
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


def make(name: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Tensor, Tucker]:
    torch.manual_seed(0)
    build, size, ranks = LAYERS[name]
    layer = build().to(dtype).requires_grad_(False)
    shape = layer.weight.shape
    factors = tuple(
        None if rank == length else torch.randn(length, rank, dtype=dtype).requires_grad_(True)
        for length, rank in zip(shape, ranks, strict=True)
    )
    form = Tucker(torch.randn(ranks, dtype=dtype).requires_grad_(True), factors)
    return layer, torch.randn(size, dtype=dtype).requires_grad_(True), form


def row(layer: nn.Module) -> Any:
    found = find_layer(layer)
    assert found is not None
    return found[1]


def through(layer: nn.Module, x: Tensor, form: Tucker, scale: float = 0.7) -> Tensor:
    out = row(layer).fused(layer, form, scale, x)
    assert out is not None
    return out  # type: ignore[no-any-return]


def dense(layer: Any, x: Tensor, form: Tucker, scale: float = 0.7) -> Tensor:
    return row(layer).apply(layer, layer.weight + scale * form.to_dense(), layer.bias, x)  # type: ignore[no-any-return]


def leaves(x: Tensor, form: Tucker) -> list[Tensor]:
    return [x, form.core, *(factor for factor in form.factors if factor is not None)]


@pytest.fixture(params=["a CPU", "a GPU"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both orders of the products and both choices of what is kept, on whatever device there is."""
    if request.param == "a GPU":
        for module in (channels, fused_linear, fused_conv, fused_pointwise):
            monkeypatch.setattr(module, "on_cpu", lambda x: False)
    return str(request.param)


def test_the_number_of_layers() -> None:
    assert len(LAYERS) == 24


@pytest.mark.parametrize("sums", [True, False])  # a convolution runs with W + dW, or adds to output and gradient
@each_layer
def test_output_and_gradients_equal_those_of_the_dense_weight(
    name: str, sums: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "SUM_PAYS_FROM", 0 if sums else math.inf)
    layer, x, form = make(name)
    out, expected = through(layer, x, form), dense(layer, x, form)
    assert torch.allclose(out, expected, atol=1e-12)
    weight = torch.randn_like(expected)
    found = torch.autograd.grad((out * weight).sum(), leaves(x, form))
    for value, other in zip(found, torch.autograd.grad((expected * weight).sum(), leaves(x, form)), strict=True):
        assert value.shape == other.shape
        assert torch.allclose(value, other, atol=1e-11)


@pytest.mark.parametrize("name", [name for name in LAYERS if "patches" in name])
@pytest.mark.parametrize("last", [False, True])
def test_some_samples_at_a_time(name: str, last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of transposed convolutions whose patches lie apart, so that what is turned around stays in the cache."""
    monkeypatch.setattr(fused, "SUM_PAYS_FROM", 0)
    layer, x, form = make(name)
    x = torch.randn(3, *x.shape[1:], dtype=x.dtype)
    layout = {3: torch.contiguous_format, 4: torch.channels_last, 5: torch.channels_last_3d}[x.ndim]
    x = (x.to(memory_format=layout) if last else x).requires_grad_(True)
    expected = dense(layer, x, form)
    weight = torch.randn_like(expected)
    sizes = []
    for numbers in (expected.numel() // 3, 2 * expected.numel() // 3, expected.numel()):
        monkeypatch.setattr(fused_pointwise, "CACHED", numbers)
        sizes.append(fused_pointwise._slice_size(expected))
        out = through(layer, x, form)
        assert torch.allclose(out, expected, atol=1e-12)
        found = torch.autograd.grad((out * weight).sum(), leaves(x, form))
        exact = torch.autograd.grad((expected * weight).sum(), leaves(x, form), retain_graph=True)
        assert all(torch.allclose(value, other, atol=1e-11) for value, other in zip(found, exact, strict=True))
    assert sizes == [1, 2, 3]


@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("name", [name for name in LAYERS if "linear" in name])
def test_some_rows_at_a_time(name: str, sums: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a linear layer's backward, so that rows of input and gradient are fetched once."""
    monkeypatch.setattr(fused, "SUM_PAYS_FROM", 0 if sums else math.inf)
    monkeypatch.setattr(fused_linear, "LEAST_ROWS", 3)
    monkeypatch.setattr(fused_linear, "CACHED", 0)
    monkeypatch.setattr(fused_linear, "BLOCK", 1)
    layer, x, form = make(name)
    x = torch.randn(11, x.shape[-1], dtype=x.dtype, requires_grad=True)
    expected = dense(layer, x, form)
    weight = torch.randn_like(expected)
    out = through(layer, x, form)
    assert torch.allclose(out, expected, atol=1e-12)
    found = torch.autograd.grad((out * weight).sum(), leaves(x, form))
    exact = torch.autograd.grad((expected * weight).sum(), leaves(x, form))
    assert all(torch.allclose(value, other, atol=1e-11) for value, other in zip(found, exact, strict=True))


def test_both_ways_of_a_convolution_are_reached() -> None:
    _, x, form = make("conv2d")
    weight = torch.zeros(5, 3, 3, 2)
    assert not fused.sums_weights(x[:1, :, :2], weight)
    assert fused.sums_weights(torch.zeros(2, 3, 40, 50), weight)
    assert not fused.sums_weights(torch.zeros(2, 3, 40, 50), weight.bfloat16())
    assert form.ranks == (3, 2, 2, 2)


@each_layer
def test_first_and_second_derivatives_by_differences(name: str, device: str) -> None:
    layer, x, form = make(name)

    def run(x: Tensor, core: Tensor, *factors: Tensor) -> Tensor:
        given = iter(factors)
        whole = tuple(None if factor is None else next(given) for factor in form.factors)
        return through(layer, x, Tucker(core, whole))

    assert torch.autograd.gradcheck(run, leaves(x, form), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves(x, form), fast_mode=True)


@each_layer
def test_a_trained_bias_and_an_input_without_gradient(name: str) -> None:
    layer, x, form = make(name)
    if layer.bias is None:
        layer.bias = nn.Parameter(
            torch.zeros(layer(x).shape[1 if x.ndim > 2 and hasattr(layer, "stride") else -1]).double()
        )
    layer.bias.requires_grad_(True)
    wanted = [layer.bias, *leaves(x, form)[1:]]
    found = torch.autograd.grad(through(layer, x.detach(), form).square().sum(), wanted)
    expected = torch.autograd.grad(dense(layer, x.detach(), form).square().sum(), wanted)
    assert len(found) >= 2
    assert all(torch.allclose(value, other, atol=1e-10) for value, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "name",
    [
        "conv2d",
        "conv2d, reflect",
        "conv2d, 1x1",
        "conv2d, 1x1, every pixel",
        "transposed conv2d",
        "transposed conv2d, patches",
        "conv3d",
    ],
)
def test_channels_last(name: str) -> None:
    layer, x, form = make(name)
    layout = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    layer = layer.to(memory_format=layout)
    last = x.detach().to(memory_format=layout).requires_grad_(True)
    out, plain = through(layer, last, form), through(layer, x, form)
    assert out.stride() == layer(last).stride()
    assert torch.allclose(out, plain, atol=1e-12)
    weight = torch.randn_like(plain)
    found = torch.autograd.grad((out * weight).sum(), leaves(last, form))
    for value, other in zip(found, torch.autograd.grad((plain * weight).sum(), leaves(x, form)), strict=True):
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


@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("name", ["linear", "conv2d", "transposed conv2d", "conv3d"])
def test_the_input_is_kept_and_little_else(name: str, sums: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "SUM_PAYS_FROM", 0 if sums else math.inf)
    torch.manual_seed(0)
    layer, _, form = make(name, torch.float32)
    x = torch.randn(64, *LAYERS[name][1][1:]).requires_grad_(True)
    middle = x * 1.0  # an activation, as the layer before would give it
    parameters = [layer.weight, layer.bias, *leaves(x, form)]
    if name == "linear":
        hidden = 0 if sums else 4 * len(x) * min(form.ranks)
        assert kept(lambda: through(layer, middle, form), parameters) == middle.nbytes + hidden
        return
    small = 4 * 2 * sum(value.numel() for value in leaves(x, form)[1:]) + 512  # products of core and kernel factors
    assert kept(lambda: through(layer, middle, form), parameters) <= middle.nbytes + small


def test_it_gives_way_where_it_would_not_be_right() -> None:
    layer, x, form = make("linear", torch.float32)
    assert fused.can_fuse(x, layer.weight)
    assert not fused.can_fuse(x.double(), layer.weight)
    seen = []

    def loss(core: Tensor) -> Tensor:
        seen.append(fused.can_fuse(x, layer.weight))
        return row(layer).factored(layer, Tucker(core, form.factors), 1.0, x).square().sum()  # type: ignore[no-any-return]

    gradient = torch.func.grad(loss)(form.core.detach())
    assert seen == [False]
    assert gradient.abs().max() > 0
    layer.weight.requires_grad_(True)
    assert not fused.can_fuse(x, layer.weight)
    grouped = nn.Conv2d(4, 6, 3, groups=2).requires_grad_(False)
    part = Tucker(torch.randn(2, 2, 2, 2), (torch.randn(6, 2), None, torch.randn(3, 2), torch.randn(3, 2)))
    assert row(grouped).fused(grouped, part, 1.0, torch.randn(1, 4, 5, 5)) is None


@pytest.mark.parametrize("inside", [True, False], ids=["backward under autocast", "backward outside"])
@pytest.mark.parametrize("low", [True, False], ids=["bfloat16 weights", "float32 weights"])
@pytest.mark.parametrize("name", ["linear", "conv2d", "conv2d, 1x1", "transposed conv2d"])
def test_autocast(name: str, low: bool, inside: bool, device: str) -> None:
    """It is fused, computes in autocast's dtype, and the small matrices keep theirs."""
    layer, x, form = make(name, torch.float32)
    expected = dense(layer, x, form)
    weight = torch.randn_like(expected)
    exact = torch.autograd.grad((expected * weight).sum(), leaves(x, form))
    layer = layer.to(torch.bfloat16) if low else layer
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = through(layer, x, form)
        if inside:
            found = torch.autograd.grad((out * weight).sum(), leaves(x, form))
    if not inside:
        found = torch.autograd.grad((out * weight).sum(), leaves(x, form))
    assert out.dtype == torch.bfloat16
    assert (out - expected).norm() < 1e-2 * expected.norm()
    for value, other in zip(found, exact, strict=True):
        assert value.dtype == torch.float32
        assert (value - other).norm() < 2e-2 * other.norm()
    double = make(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert row(double[0]).fused(double[0], double[2], 0.7, double[1]) is None  # autocast leaves float64 alone


def test_an_exported_layer_has_only_operations_of_torch() -> None:
    row_ = LAYERS["linear"]
    model = get_peft_model(
        nn.Sequential(row_[0]()),
        FloraConfig(r=2, target_modules=["0"], init_weights=False, path="factored"),  # type: ignore[arg-type]
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
            FloraConfig(r=[6, 8], target_modules=["0", "1"], init_weights=False, path="factored", bias="all"),
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
    config = FloraConfig(r=[3, 5], target_modules=["layer"], init_weights=False, path="factored")
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


@pytest.mark.parametrize("name", ["linear", "conv2d", "transposed conv2d"])
def test_bfloat16_with_a_float32_adapter(name: str) -> None:
    layer, x, form = make(name, torch.float32)
    half = layer.to(torch.bfloat16)
    low = x.detach().bfloat16().requires_grad_(True)
    out = through(half, low, form)
    exact = dense(layer.float(), low.detach().float(), form)
    assert out.dtype == torch.bfloat16
    assert (out.float() - exact).abs().max() <= 0.02 * exact.abs().max()
    half = layer.to(torch.bfloat16)
    out = through(half, low, form)
    out.float().square().sum().backward()
    assert form.core.grad is not None
    assert form.core.grad.dtype == torch.float32
    assert low.grad is not None
    assert low.grad.dtype == torch.bfloat16


TRAINED: dict[str, Callable[[], Any]] = {
    "depthwise 7x7": lambda: nn.Conv2d(5, 5, 7, padding=3, groups=5),
    "strided, dilated": lambda: nn.Conv2d(3, 3, (5, 7), stride=2, dilation=(1, 2), padding=(2, 6), groups=3),
    "no bias": lambda: nn.Conv2d(3, 3, 5, padding=2, groups=3, bias=False),
    "depthwise, 3-D": lambda: nn.Conv3d(3, 3, (3, 4, 3), stride=(1, 3, 2), padding=1, groups=3),
    "volume": lambda: nn.Conv3d(3, 5, (3, 2, 3), padding=(1, 0, 2)),
}


SLABS = [(2, 2**20), (1, 2**20), (3, 2**20), (1, 3 * 13 * 7 * 4), (2, 3 * 13 * 7 * 4), (3, 1)]  # samples, numbers


@pytest.mark.parametrize(("samples", "numbers"), SLABS)
@pytest.mark.parametrize("padding", [(0, 0, 0), (1, 0, 2), (4, 1, 1)])
def test_the_kernel_of_a_volume_in_slabs(
    samples: int, numbers: int, padding: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the depth is cut, and with more planes of zeros than the kernel reaches."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(trained_kernel, "SLAB", numbers)
    torch.manual_seed(0)
    layer, x = nn.Conv3d(3, 5, (3, 2, 3), padding=padding), torch.randn(samples, 3, 11, 13, 7)
    assert trained_kernel.is_slow(layer, layer.weight, x)
    trained_kernel.conv(layer, layer.weight, layer.bias, x).square().sum().backward()
    found, layer.weight.grad = layer.weight.grad, None
    layer(x).square().sum().backward()
    assert found is not None
    assert layer.weight.grad is not None
    assert torch.allclose(found, layer.weight.grad, atol=1e-5 * float(layer.weight.grad.abs().max()))


@pytest.mark.parametrize("samples", [1, 2**18], ids=["sample by sample", "at once"])
@pytest.mark.parametrize(("name", "last"), [*product(TRAINED, [False]), *product(list(TRAINED)[:-1], [True])])
def test_a_trained_kernel(name: str, last: bool, samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(trained_kernel, "CACHED", samples)
    torch.manual_seed(0)
    layer = TRAINED[name]()
    dtype, tolerance = (torch.float32, 1e-4) if name == "volume" else (torch.float64, 1e-10)
    layer = layer.to(dtype)
    size = (2, layer.in_channels, 11, 13, 7)[: layer.weight.ndim]
    x = torch.randn(size, dtype=dtype)
    if last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    wanted = [x.requires_grad_(True), *layer.parameters()]
    assert trained_kernel.is_slow(layer, layer.weight, x)
    out = row(layer).apply(layer, layer.weight, layer.bias, x)
    assert torch.equal(out, layer(x))
    assert "TrainedKernel" in str(out.grad_fn)
    found = torch.autograd.grad(out.square().sum(), wanted)
    for value, other in zip(found, torch.autograd.grad(layer(x).square().sum(), wanted), strict=True):
        assert torch.allclose(value, other, atol=tolerance, rtol=1e-5)
    given = [value.detach().double().requires_grad_(True) for value in (x[:, :, :10, :10], *wanted[1:])]

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return trained_kernel.conv(layer, weight, bias, x)

    assert torch.autograd.gradcheck(run, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, given, fast_mode=True)


KEPT_BY_TORCH: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "small depthwise": (lambda: nn.Conv2d(5, 5, 3, groups=5), (2, 5, 11, 13)),
    "large, not depthwise": (lambda: nn.Conv2d(5, 5, 7), (2, 5, 11, 13)),
    "frozen": (lambda: nn.Conv2d(5, 5, 7, groups=5).requires_grad_(False), (2, 5, 11, 13)),
    "half precision": (lambda: nn.Conv2d(5, 5, 7, groups=5).bfloat16(), (2, 5, 11, 13)),
    "padded otherwise": (lambda: nn.Conv2d(5, 5, 7, padding=3, padding_mode="reflect", groups=5), (2, 5, 11, 13)),
    "strided volume": (lambda: nn.Conv3d(3, 5, 3, stride=2), (2, 3, 11, 13, 7)),
    "volume of many channels": (lambda: nn.Conv3d(65, 5, 3), (1, 65, 5, 4, 3)),
    "volume of one channel": (lambda: nn.Conv3d(1, 5, 3), (1, 1, 5, 4, 3)),
    "product on the channels": (lambda: nn.Conv3d(3, 5, 1), (1, 3, 5, 4, 3)),
    "volume in double precision": (lambda: nn.Conv3d(3, 5, 3).double(), (1, 3, 5, 4, 3)),
}


def test_a_volume_that_is_channels_last_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    layer, x = TRAINED["volume"](), torch.randn(2, 3, 11, 13, 7)
    assert trained_kernel.is_slow(layer, layer.weight, x)
    assert not trained_kernel.is_slow(layer, layer.weight, x.contiguous(memory_format=torch.channels_last_3d))


@pytest.mark.parametrize("name", KEPT_BY_TORCH)
def test_where_a_trained_kernel_is_left_to_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    make, size = KEPT_BY_TORCH[name]
    layer = make()
    assert not trained_kernel.is_slow(layer, layer.weight, torch.randn(size).to(layer.weight.dtype))


def test_volumes_are_left_to_torch_with_avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    layer = TRAINED["volume"]()
    assert not trained_kernel.is_slow(layer, layer.weight, torch.randn(2, 3, 11, 13, 7))


TRANSPOSED: dict[str, Callable[[], Any]] = {
    "strided": lambda: nn.ConvTranspose3d(3, 5, 3, stride=2, padding=1, output_padding=1),
    "no bias, dilated": lambda: nn.ConvTranspose3d(3, 5, (2, 1, 3), stride=(1, 2, 3), dilation=2, bias=False),
}


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("planes", [0, 20480], ids=["one by one", "at once"])
@pytest.mark.parametrize("name", TRANSPOSED)
def test_a_transposed_volume(name: str, planes: int, samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(trained_kernel, "LEAST_PLANES", planes)
    torch.manual_seed(0)
    layer, x = TRANSPOSED[name](), torch.randn(samples, 3, 5, 4, 2).requires_grad_()
    change = row(layer).apply
    assert torch.equal(change(layer, layer.weight.clone(), layer.bias, x), layer(x))
    weight = (layer.weight.detach() + 0.1).requires_grad_()
    out = change(layer, weight, layer.bias, x)
    assert "TransposedVolume" in str(out.grad_fn)
    assert out.is_contiguous()
    wanted = [x, weight, *([] if layer.bias is None else [layer.bias])]
    exact = torch.func.functional_call(layer, {"weight": weight}, (x,))
    assert torch.allclose(out, exact, atol=1e-5)
    found = torch.autograd.grad(out.square().sum(), wanted)
    for value, other in zip(found, torch.autograd.grad(exact.square().sum(), wanted), strict=True):
        assert torch.allclose(value, other, atol=1e-5 * float(other.abs().max()))
    given = [value.detach().double().requires_grad_() for value in wanted]

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return trained_kernel.conv_transpose(layer, weight, bias, x, list(layer.output_padding))

    assert torch.autograd.gradcheck(run, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, given, fast_mode=True)


def test_a_transposed_volume_whose_weight_is_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The change alone is computed while the layer's own weight is elsewhere, as accelerate leaves it between calls."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    layer, x = TRANSPOSED["strided"](), torch.randn(2, 3, 5, 4, 2)
    change = torch.randn_like(layer.weight)
    exact = torch.func.functional_call(layer, {"weight": change, "bias": torch.zeros(5)}, (x,))
    found = row(layer).apply(layer.to("meta"), change, None, x)
    assert torch.allclose(found, exact, atol=1e-5)


def test_an_empty_batch_of_transposed_volumes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    layer = TRANSPOSED["strided"]()
    x = torch.randn(0, 3, 5, 4, 2)
    assert row(layer).apply(layer, layer.weight + 1, layer.bias, x).shape == layer(x).shape
