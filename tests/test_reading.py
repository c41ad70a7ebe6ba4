"""A weight of an adapted layer that is read, not called: it is W + s dW, with gradients, and costs nothing unread."""

from __future__ import annotations

import copy
import operator
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

import flora
from cases import CASES
from conformance import adapted, close, flora_layers
from flora.errors import UserError
from flora.layers.table import parameter
from flora.tuner.layer import FloraLayer
from flora.tuner.reading import Reading

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections"),
    pytest.mark.filterwarnings("ignore:the adapter has more parameters than the weight"),
]


def get(layer: nn.Module, name: str) -> Any:
    for part in name.split("."):
        layer = getattr(layer, part)
    return layer


@pytest.mark.parametrize("name", CASES)
def test_every_weight_read_equals_the_weight_called(name: str) -> None:
    model = adapted(CASES[name], "summed")
    outer = model.base_model.model.layer
    count = 0
    for layer in flora_layers(model):
        for weight in layer.attributes:
            delta = layer.deltas(weight)["default"]
            stored = parameter(layer.get_base_layer(), weight)
            expected = stored + delta.dense()
            found = get(outer, weight)
            assert isinstance(found, Reading)
            assert (found.shape, found.dtype, found.device) == (stored.shape, stored.dtype, stored.device)
            assert torch.equal(found.detach().clone(), expected)

            (found.square() * 0.5).sum().backward()
            grads = {key: value.grad for key, value in delta.named_parameters()}
            delta.zero_grad()
            (expected.square() * 0.5).sum().backward()
            for key, value in delta.named_parameters():
                assert close(grads[key], value.grad), key
            delta.zero_grad()
            count += 1
    assert count >= 1


class Mixer(nn.Module):
    """Reads in all the ways that models of transformers, diffusers and timm do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(6, 6, 3, groups=6, padding=2)
        self.qkv = nn.Linear(6, 18, bias=False)
        self.places = nn.Embedding(7, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.out = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:  # shape: (batch, 5, 6)
        cached = self.conv.weight.squeeze(1) * x[:, -3:].mT  # one step of a convolution from its cache
        x = x + cached.sum(-1, keepdim=True).mT + self.conv(x.mT)[..., :5].mT
        resized = F.interpolate(self.places.weight.T[None], size=5, mode="linear")[0].T
        q, k, v = F.linear(x + resized, self.qkv.weight).chunk(3, -1)
        x = x + F.scaled_dot_product_attention(q, k, v)
        weights = (self.attention.in_proj_weight, self.attention.out_proj.weight)
        x = x + x @ weights[0][:6] @ weights[1]
        x = x + self.attention(x, x, x)[0]
        return self.out(x.to(self.out.weight.dtype))  # type: ignore[no-any-return]


def mixer(**fields: Any) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(Mixer(), flora.FloraConfig(r=2, target_modules="all", init_weights=False, **fields))


def inputs() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(3, 5, 6)


@pytest.mark.parametrize("training", [True, False])
def test_unmerged_equals_merged_and_everything_trains(training: bool) -> None:
    model = mixer().train(training)
    out = model(inputs())
    out.square().sum().backward()
    untrained = [key for key, value in model.named_parameters() if value.requires_grad and value.grad is None]
    assert not untrained
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.allclose(merged(inputs()), out, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(model(inputs()), out, atol=1e-5)


def test_gradients_equal_those_of_the_dense_weights() -> None:
    model = mixer().double()
    model(inputs().double()).square().sum().backward()
    dense = copy.deepcopy(model).merge_and_unload()
    for value in dense.parameters():
        value.requires_grad_()
    dense(inputs().double()).square().sum().backward()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, FloraLayer)}
    for name, layer in layers.items():
        plain = dense.get_submodule(name.removeprefix("base_model.model."))
        for weight in layer.attributes:
            delta = layer.deltas(weight)["default"]
            found = [value.grad.clone() for value in delta.parameters()]
            delta.zero_grad()
            delta.dense().backward(parameter(plain, weight).grad)
            for value, ours in zip(delta.parameters(), found, strict=True):
                assert torch.allclose(value.grad, ours, atol=1e-9), (name, weight)
    assert len(layers) == 5


def test_after_a_step_and_another_scale_a_reading_is_new() -> None:
    layer = mixer().base_model.model.qkv
    first = layer.weight.detach().clone()
    with torch.no_grad():
        layer.delta("default").core.mul_(2)
    second = layer.weight.detach().clone()
    layer.set_scale("default", 3.0)
    third = layer.weight.detach().clone()
    base = layer.get_base_layer().weight
    assert torch.allclose(second - base, 2 * (first - base), atol=1e-6)
    assert torch.allclose(third - base, 6 * (first - base), atol=1e-6)


def test_disabled_merged_and_without_an_active_adapter_it_is_the_parameter_itself() -> None:
    model = mixer()
    layer = model.base_model.model.qkv
    stored = layer.get_base_layer().weight
    with model.disable_adapter():
        assert layer.weight is stored
    model.merge_adapter()
    assert layer.weight is stored
    model.unmerge_adapter()
    assert isinstance(layer.weight, Reading)
    assert layer.bias is layer.get_base_layer().bias


def test_questions_about_it_form_nothing() -> None:
    layer = mixer().base_model.model.qkv
    weight = layer.weight
    assert isinstance(weight, Tensor)
    assert (weight.dtype, weight.device.type, weight.shape, weight.ndim, len(weight)) == (
        torch.float32, "cpu", (18, 6), 2, 18,
    )  # fmt: skip
    assert weight.requires_grad
    assert weight.is_floating_point()
    assert not layer.reached
    weight.sum()
    assert layer.reached


def _swapped_parts(layer: Any) -> None:
    first, second = layer.weight[:2]
    first.copy_(second)


WRITES: dict[str, Callable[[Any], object]] = {
    "in place": lambda layer: layer.weight.add_(2),
    "by a tensor": lambda layer: layer.weight.mul_(torch.ones(6)),
    "an operator": lambda layer: operator.iadd(layer.weight, 1),
    "data": lambda layer: layer.weight.data.copy_(torch.zeros(18, 6)),
    "data, by a number": lambda layer: layer.weight.data.mul_(2),
    "an entry of data": lambda layer: layer.weight.data.__setitem__(0, 1.0),
    "other data": lambda layer: setattr(layer.weight, "data", torch.zeros(18, 6)),
    "other memory": lambda layer: layer.weight.set_(torch.zeros(18, 6)),
    "an entry": lambda layer: layer.weight.__setitem__((0, 0), 1.0),
    "a row": lambda layer: layer.weight[0].zero_(),
    "rows": lambda layer: operator.imul(layer.weight[:3], 2),
    "several rows": _swapped_parts,
    "a part of a part": lambda layer: layer.weight.T[0][1:].fill_(1),
    "a view": lambda layer: layer.weight.view(3, 6, 6)[1].fill_(1),
    "a shape": lambda layer: layer.weight.flatten().fill_(1),
    "detached": lambda layer: layer.weight.detach().diagonal().fill_(1),
    "the same dtype": lambda layer: layer.weight.float().contiguous().zero_(),
    "init": lambda layer: nn.init.zeros_(layer.weight),
    "init, by a view": lambda layer: nn.init.orthogonal_(layer.weight),
    "init, of a part": lambda layer: nn.init.normal_(layer.weight[:6]),
    "out": lambda layer: torch.add(torch.ones(18, 6), 1, out=layer.weight),
    "out, a part": lambda layer: torch.add(torch.ones(6), 1, out=layer.weight[3]),
    "several at once": lambda layer: torch._foreach_add_([torch.ones(2), layer.weight], 2.0),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@torch.no_grad()
def test_writing_through_it_is_refused(write: Callable[[Any], object]) -> None:
    layer = mixer().base_model.model.qkv
    before, read = layer.get_base_layer().weight.clone(), layer.weight.clone()
    with pytest.raises(RuntimeError, match="write to the base layer's"):
        write(layer)
    assert torch.equal(layer.get_base_layer().weight, before)
    assert torch.equal(layer.weight.clone(), read)


def test_a_limit_that_a_weight_keeps_to_writes_nothing() -> None:
    """As Gemma 3n limits the coefficients of its alternating updates in every step of training."""
    layer = mixer().base_model.model.qkv
    values = layer.weight.detach().clone()
    most = float(values.abs().max())
    for limited in (layer.weight.data.clamp_(-most, most), layer.weight.detach().clamp_max_(most)):
        assert torch.equal(limited.clone(), values)
    with pytest.raises(RuntimeError, match="leave the layer out"):
        layer.weight.data.clamp_(-most / 2, most / 2)
    assert torch.equal(layer.weight.detach().clone(), values)


def test_a_part_of_it_has_its_gradient_and_an_array_of_it_is_read_only() -> None:
    layer = mixer().base_model.model.qkv
    parts = layer.weight.chunk(3)
    loss = sum((place * part.square()).sum() for place, part in enumerate(parts, start=2))
    found = torch.autograd.grad(loss, [layer.delta("default").core])[0]
    exact = layer.get_base_layer().weight + layer.delta("default").dense()
    expected = (torch.arange(2, 5).repeat_interleave(6)[:, None] * exact.square()).sum()
    assert torch.allclose(found, torch.autograd.grad(expected, [layer.delta("default").core])[0], rtol=1e-5)
    assert all(isinstance(part, Reading) for part in parts)
    assert torch.equal(parts[1][4], exact[10])
    with pytest.raises(ValueError, match="read-only"):
        layer.weight.detach().numpy()[0] = 1


def test_whether_it_trains_is_set_for_the_stored_weight() -> None:
    layer = mixer().base_model.model.qkv
    stored = layer.get_base_layer().weight
    layer.weight.requires_grad = True
    assert stored.requires_grad
    layer.weight.sum().backward()
    assert torch.equal(stored.grad, torch.ones(18, 6))
    layer.weight.requires_grad_(False)
    assert not stored.requires_grad
    leaf = layer.weight.detach().requires_grad_()
    assert torch.equal(torch.autograd.grad((3 * leaf).sum(), [leaf])[0], torch.full((18, 6), 3.0))
    assert not stored.requires_grad


@torch.no_grad()
def test_multiplying_it_by_a_number_multiplies_weight_and_update() -> None:
    """As RWKV does between training and inference."""
    model = mixer()
    layer = model.base_model.model.qkv
    stored, read = layer.get_base_layer().weight.clone(), layer.weight.detach().clone()
    weight = layer.weight
    weight.div_(4)
    assert torch.allclose(weight.detach().clone(), read / 4)
    assert torch.allclose(layer.weight.detach().clone(), read / 4)
    assert torch.equal(layer.get_base_layer().weight, stored / 4)
    layer.weight.mul_(4.0)
    assert torch.allclose(layer.weight.detach().clone(), read)
    model.merge_adapter()
    assert torch.allclose(layer.weight, read)


def test_saving_copies_and_moves_see_the_base_weight() -> None:
    model = mixer()
    layer = model.base_model.model.qkv
    assert torch.equal(model.state_dict()["base_model.model.qkv.base_layer.weight"], layer.get_base_layer().weight)
    assert torch.equal(copy.deepcopy(layer).weight.detach().clone(), layer.weight.detach().clone())
    assert torch.equal(copy.deepcopy(layer.weight), layer.weight.detach().clone())
    assert torch.equal(pickle.loads(pickle.dumps(layer.weight.detach())), layer.weight.detach().clone())
    assert layer.weight.tolist() == layer.weight.detach().clone().tolist()
    assert (layer.weight.detach().numpy() == layer.weight.detach().clone().numpy()).all()
    assert model.double().base_model.model.qkv.weight.dtype == torch.float64


def test_gradient_of_a_gradient() -> None:
    layer = mixer().double().base_model.model.qkv
    core = layer.delta("default").core
    second = []
    for weight in (layer.weight, layer.summed(["default"], "weight")):
        (first,) = torch.autograd.grad(weight.pow(3).sum(), [core], create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), [core])[0])
    assert torch.allclose(*second)


def test_a_function_of_autograd_gets_it_with_its_gradient() -> None:
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(x, weight)
            return x @ weight.T

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            x, weight = ctx.saved_tensors
            return grads[0] @ weight, grads[0].T @ x

    layer = mixer().base_model.model.qkv
    x, core = torch.randn(4, 6), layer.delta("default").core
    weights = (layer.weight, layer.summed(["default"], "weight"))
    grads = [torch.autograd.grad(Product.apply(x, weight).square().sum(), [core])[0] for weight in weights]
    assert torch.allclose(*grads, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_and_autocast_read_the_weight_that_a_call_uses(dtype: torch.dtype) -> None:
    layer = mixer().to(dtype).base_model.model.qkv
    with torch.autocast("cpu", dtype):
        assert torch.equal(layer.weight.detach().clone(), layer.summed(["default"], "weight"))


def test_a_small_update_is_read_in_half_precision() -> None:
    """Rounded to the nearest number, an update below half a step of the weight's grid would mostly be lost."""
    torch.manual_seed(0)
    config = flora.FloraConfig(r=3, scale=1e-3, target_modules=["0"], init_weights=False)
    layer: Any = get_peft_model(nn.Sequential(nn.Linear(97, 61)).bfloat16(), config).base_model.model[0]
    update = layer.get_delta_weight("default").detach().double()
    read = layer.weight.detach().double() - layer.get_base_layer().weight.detach().double()
    share = float((read * update).sum() / update.square().sum())
    assert share == pytest.approx(1, abs=0.1), share


def test_methods_and_properties_that_read_a_weight() -> None:
    class Table(nn.Linear):
        def step(self, x: Tensor) -> Tensor:
            self.steps = getattr(self, "steps", 0) + 1
            return x @ self.weight.T

        @property
        def doubled(self) -> Tensor:
            return 2 * self.weight

    torch.manual_seed(0)
    config = flora.FloraConfig(r=2, target_modules=["0"], init_weights=False)
    layer: Any = get_peft_model(nn.Sequential(Table(5, 7)), config).base_model.model[0]
    x = torch.randn(3, 5)
    expected = layer.get_base_layer().weight + layer.delta("default").dense()
    assert torch.allclose(layer.step(x), x @ expected.T, atol=1e-6)
    assert torch.allclose(layer.doubled, 2 * expected)
    assert layer.get_base_layer().steps == 1
    assert layer.in_features == 5


def test_raw_parameters_of_one_module_read_through_all_their_wrappers() -> None:
    model = adapted(CASES["experts"], "auto")
    outer = model.base_model.model.layer
    for layer in flora_layers(model):
        name = layer.parameter_name
        assert torch.allclose(getattr(outer, name).detach().clone(), layer.summed(["default"], name))


def test_an_adapter_per_sample_cannot_be_read() -> None:
    model = mixer().eval()
    model.add_adapter("second", flora.FloraConfig(r=2, target_modules=["qkv"], init_weights=False))
    with pytest.raises(ValueError, match="cannot be used with conv: its weight is read"):
        model(inputs(), adapter_names=["default", "second", "default"])
    model(inputs())


class Qkv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 18)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.qkv.weight, self.qkv.bias)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it where its graph breaks
def test_an_adapter_per_sample_cannot_be_read_under_a_compiler() -> None:
    torch.compiler.reset()
    config = flora.FloraConfig(r=2, target_modules=["qkv"], init_weights=False)
    model = get_peft_model(Qkv(), config).eval()
    model.add_adapter("second", config)
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(Exception, match="cannot be used with qkv: its weight is read"):
        compiled(inputs(), adapter_names=["default", "second", "default"])
    assert torch.allclose(compiled(inputs()), model(inputs()), atol=1e-6)
    with pytest.raises(Exception, match="cannot be used with qkv: its weight is read"):
        compiled(inputs(), adapter_names=["default", "second", "default"])


class Piece(nn.Parameter):
    """A part of a weight on this process, as libraries that shard have it."""

    width = 7


def _shard(layer: Any) -> Any:
    base = layer.get_base_layer()
    base._parameters["weight"] = base.weight.detach().as_subclass(Piece)
    return layer


def _partition(layer: Any) -> Any:
    layer.get_base_layer().weight.ds_shape = (18, 6)
    return layer


USES: dict[str, Callable[[Any], object]] = {
    "a product": lambda weight: torch.ones(2, 6) @ weight.T,
    "a function": lambda weight: F.linear(torch.ones(2, 6), weight),
    "a part": lambda weight: weight[0],
    "detached": lambda weight: weight.detach() + 1,
    "data": lambda weight: weight.data.sum(),
    "another dtype": lambda weight: weight.double(),
    "a copy": lambda weight: weight.clone(),
    "numbers": lambda weight: weight.tolist(),
    "an array": lambda weight: weight.detach().numpy(),
    "its memory": lambda weight: weight.data_ptr(),
    "a deep copy": copy.deepcopy,
    "a pickle": pickle.dumps,
    "a write": lambda weight: weight.zero_(),
    "an attribute that is set": lambda weight: setattr(weight, "state", 1),
}


@pytest.mark.parametrize("shard", [_shard, _partition])
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_sharded_weight_says_what_it_is_like_and_refuses_to_be_used(
    use: Callable[[Any], object], shard: Callable[[Any], Any]
) -> None:
    model = mixer().eval()
    layer = shard(model.base_model.model.qkv)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    assert (weight.shape, weight.dtype, weight.device.type) == ((18, 6), torch.float32, "cpu")
    assert not hasattr(weight, "quant_state")
    assert getattr(weight, "width", getattr(weight, "ds_shape", None)) in (7, (18, 6))
    with torch.no_grad(), pytest.raises(UserError, match="qkv: its weight is read instead of .* quantised or sharded"):
        use(weight)
    with pytest.raises(UserError, match="exclude this layer"):
        model(inputs())
    with model.disable_adapter():
        assert type(layer.weight) in (Piece, nn.Parameter)
        model(inputs())


def test_dropout_that_cannot_apply_is_said_once() -> None:
    model = mixer(dropout=0.25, exclude_modules=["conv", "places", "attention", "out"]).train()
    with pytest.warns(UserWarning, match=r"qkv: its weight is read .* dropout of 0\.25 has no effect"):
        model(inputs())
    model(inputs())  # warnings are errors here


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_that_nothing_reaches_is_named(training: bool) -> None:
    class Unused(Mixer):
        def forward(self, x: Tensor) -> Tensor:
            return self.out(x) @ self.qkv.base_layer.weight[:6]

    model = get_peft_model(Unused(), flora.FloraConfig(r=2, target_modules=["qkv", "out"])).train(training)
    with torch.no_grad():
        model(inputs())
    with pytest.warns(UserWarning, match="1 of 2 adapted layers were neither called nor read .*: qkv"):
        model(inputs())
    model(inputs())


def test_compiled() -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    model = get_peft_model(Qkv(), flora.FloraConfig(r=2, target_modules=["qkv"], init_weights=False))
    out = torch.compile(model, backend="aot_eager", fullgraph=True)(inputs())
    assert torch.allclose(out, model(inputs()), atol=1e-6)
