"""What torch does with whole models, done with an adapted one: the same as with W + s dW written into the base."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import flora
from flora.errors import UserError
from flora.tuner.layer import FloraLayer

pytestmark = pytest.mark.filterwarnings("ignore:the adapter has more parameters than the weight")


class Net(nn.Module):
    """Linear layers that are called and read, a convolution, attention, a norm: each way that a layer can run."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(7, 12)
        self.conv = nn.Conv1d(12, 10, 3, padding=1)
        self.norm = nn.LayerNorm(10)
        self.attention = nn.MultiheadAttention(10, 2, batch_first=True)
        self.read = nn.Linear(10, 10, bias=False)
        self.both = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:  # shape: (batch, 6, 7)
        x = self.norm(self.conv(torch.tanh(self.into(x)).mT).mT)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + F.linear(x, self.read.weight)
        return self.both(x) + x @ self.both.weight.T


def base() -> Net:
    torch.manual_seed(0)
    return Net()


def adapted(**fields: Any) -> PeftModel:
    net = base()
    torch.manual_seed(5)
    config = {"r": 3, "scale": 0.7, "target_modules": "all", "init_weights": False, **fields}
    return get_peft_model(net, flora.FloraConfig(**config))


def written_in(model: PeftModel, *adapters: str) -> Net:
    """A copy of the base with the updates of these adapters added to its weights."""
    net = base()
    weights = dict(net.named_parameters())
    for name, layer in model.base_model.model.named_modules():
        if not isinstance(layer, FloraLayer):
            continue
        for weight in layer.attributes:
            for adapter in adapters or ("default",):
                with torch.no_grad():
                    weights[f"{name}.{weight}"] += layer.delta(adapter, weight).dense()

    return net


def inputs() -> Tensor:
    torch.manual_seed(9)
    return torch.randn(3, 6, 7)


def _functional_call(model: PeftModel, x: Tensor) -> Tensor:
    values = {name: value.detach().clone() for name, value in model.named_parameters()}
    return torch.func.functional_call(model, values, (x,))


def _ensemble(model: PeftModel, x: Tensor) -> Tensor:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for value in other.parameters():
            value.mul_(1.5)

    parameters, buffers = torch.func.stack_module_state([other, model])

    def run(parameters: Any, buffers: Any) -> Any:
        return torch.func.functional_call(model, (parameters, buffers), (x,))

    return torch.vmap(run)(parameters, buffers)[1]


def _saved_as_a_whole(model: PeftModel, x: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)(x)  # type: ignore[no-any-return]


def _state(model: PeftModel, x: Tensor, assign: bool) -> Tensor:
    other = adapted(init_weights=True)
    other.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=assign)
    return other(x)  # type: ignore[no-any-return]


def _adapter_state(model: PeftModel, x: Tensor) -> Tensor:
    other = adapted(init_weights=True)
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    return other(x)  # type: ignore[no-any-return]


def _from_meta(model: PeftModel, x: Tensor) -> Tensor:
    with torch.device("meta"):
        other = adapted(init_weights=True)

    other = other.to_empty(device="cpu")
    other.load_state_dict(model.state_dict())
    return other(x)  # type: ignore[no-any-return]


def _swapped(model: PeftModel, x: Tensor) -> Tensor:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return model.double()(x.double()).float()  # type: ignore[no-any-return]
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def _without_gradients(model: PeftModel, x: Tensor) -> Tensor:
    with torch.inference_mode():
        out = model(x)
    return out.clone()  # type: ignore[no-any-return]


def _exported(model: PeftModel, x: Tensor) -> Tensor:
    return torch.export.export(model, (x,)).module()(x)  # type: ignore[no-any-return]


def _fx(model: PeftModel, x: Tensor) -> Tensor:
    traced = make_fx(model, tracing_mode="symbolic", _allow_non_fake_inputs=True)(x + 1)  # type: ignore[no-untyped-call]
    return traced(x)  # type: ignore[no-any-return]


def _merged_while_disabled(model: PeftModel, x: Tensor) -> Tensor:
    model.merge_adapter()
    with model.disable_adapter():
        layer = model.base_model.model.read
        assert torch.allclose(layer.weight, base().read.weight, atol=1e-6)
        assert torch.allclose(model(x), base().eval()(x), atol=1e-5)
    return model(x)  # type: ignore[no-any-return]


def _parametrized_later(model: PeftModel, x: Tensor) -> Tensor:
    layer = model.base_model.model.read
    parametrize.register_parametrization(layer.get_base_layer(), "weight", nn.Identity())
    return model(x)  # type: ignore[no-any-return]


WRAPPERS: dict[str, Callable[[PeftModel, Tensor], Tensor]] = {
    "called": lambda model, x: model(x),
    "functional call": _functional_call,
    "vmap": lambda model, x: torch.vmap(model.base_model.model.into)(x) @ torch.zeros(12, 5) + model(x),
    "an ensemble": _ensemble,
    "a copy": lambda model, x: copy.deepcopy(model)(x),
    "pickled": lambda model, x: pickle.loads(pickle.dumps(model))(x),
    "saved as a whole": _saved_as_a_whole,
    "state": lambda model, x: _state(model, x, assign=False),
    "state, assigned": lambda model, x: _state(model, x, assign=True),
    "state of the adapter": _adapter_state,
    "from the meta device": _from_meta,
    "double": lambda model, x: model.double()(x.double()).float(),
    "double, swapped": _swapped,
    "checkpointed": lambda model, x: checkpoint(model, x, use_reentrant=False),
    "inference mode": _without_gradients,
    "traced by jit": lambda model, x: torch.jit.trace(model, (x + 1,), check_trace=False)(x),
    "exported": _exported,
    "fx, symbolic sizes": _fx,
    "data parallel": lambda model, x: nn.parallel.DataParallel(model)(x),
    "merged, then disabled": _merged_while_disabled,
    "parametrized later": _parametrized_later,
    "unmerged": lambda model, x: model.merge_adapter() or model.unmerge_adapter() or model(x),
    "merged for good": lambda model, x: model.merge_and_unload()(x),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("run", WRAPPERS.values(), ids=WRAPPERS)
def test_what_torch_does_with_a_model(run: Callable[[PeftModel, Tensor], Tensor]) -> None:
    model = adapted().eval()
    expected = written_in(model).eval()(inputs())
    assert (expected - base().eval()(inputs())).abs().max() > 0.1
    if run is not WRAPPERS["checkpointed"]:
        model.requires_grad_(False)
    assert torch.allclose(run(model, inputs()), expected, atol=2e-5)


def test_gradients_through_functional_calls_and_checkpoints() -> None:
    model = adapted()
    model(inputs()).square().sum().backward()
    expected = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    trained = {name: model.get_parameter(name).detach() for name in expected}

    def loss(values: dict[str, Tensor]) -> Any:
        return torch.func.functional_call(model, values, (inputs(),)).square().sum()

    for name, value in torch.func.grad(loss)(trained).items():
        assert torch.allclose(value, expected[name], rtol=1e-3, atol=1e-4), name
    for reentrant in (True, False):
        model.zero_grad()
        checkpoint(model, inputs().requires_grad_(), use_reentrant=reentrant).square().sum().backward()
        for name in expected:
            assert torch.allclose(model.get_parameter(name).grad, expected[name], rtol=1e-3, atol=1e-4), name


def test_what_trains_is_what_asks_for_gradients() -> None:
    model = adapted()
    for name, value in model.named_parameters():
        value.requires_grad_("factor_0" in name or name.endswith("read.base_layer.weight"))
    model(inputs()).square().sum().backward()
    for name, value in model.named_parameters():
        assert (value.grad is not None) == value.requires_grad, name
    dense = written_in(model)
    dense(inputs()).square().sum().backward()
    stored = model.base_model.model.read.get_base_layer().weight
    assert torch.allclose(stored.grad, dense.read.weight.grad, rtol=1e-4, atol=1e-4)


def test_two_adapters_with_scales_of_their_own() -> None:
    model = adapted().eval()
    torch.manual_seed(7)
    model.add_adapter("second", flora.FloraConfig(r=2, scale=1.9, target_modules=["into", "read"], init_weights=False))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(AssertionError):
        assert torch.allclose(model(inputs()), written_in(model).eval()(inputs()), atol=2e-5)
    for scale in (1.0, 0.5):
        for layer in (model.base_model.model.into, model.base_model.model.read):
            layer.set_scale("second", scale)
        both = written_in(model, "default")
        with torch.no_grad():
            for name in ("into", "read"):
                layer = model.base_model.model.get_submodule(name)
                both.get_parameter(f"{name}.weight").add_(layer.delta("second").dense())
        assert torch.allclose(model(inputs()), both.eval()(inputs()), atol=2e-5)


def test_under_fake_tensors_the_shape_is_known() -> None:
    model = adapted().eval()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert model(torch.randn(3, 6, 7)).shape == (3, 6, 5)


def test_a_weight_that_is_read_is_refused_where_it_is_traced_by_symbols() -> None:
    class Leaves(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, FloraLayer) or super().is_leaf_module(m, module_qualified_name)

    class Reader(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self[0](x), self[1].weight)

    config = flora.FloraConfig(r=2, target_modules=["0", "1"])
    model = get_peft_model(Reader(nn.Linear(7, 12), nn.Linear(12, 5)), config)
    with pytest.raises(UserError, match=r"1: its weight is read while torch\.fx"):
        Leaves().trace(model.base_model.model)


def test_a_number_as_a_target_means_no_part_of_a_parametrized_weight() -> None:
    def net() -> nn.Module:
        return nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 7)), nn.Linear(7, 3))

    for targets in (["0"], "0", r".*0"):
        model = get_peft_model(net(), flora.FloraConfig(r=2, target_modules=targets))
        found = [name for name, module in model.named_modules() if isinstance(module, FloraLayer)]
        assert found == ["base_model.model.0"]
    with pytest.raises(UserError, match="_WeightNorm"):
        get_peft_model(net(), flora.FloraConfig(r=2, target_modules=["0.parametrizations.weight.0"]))
