"""Quantised linears through PEFT's backends: bitsandbytes 8- and 4-bit, torchao int8; all on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from transformers import TorchAoConfig

import flora
from flora.errors import UserError
from flora.tuner.layer import FloraLayer

bnb = pytest.importorskip("bitsandbytes", reason="in the extra quantized; its wheels exist for Linux and Windows only")
quantization = pytest.importorskip("torchao.quantization", reason="in the dev extra; wheels for Linux and macOS only")

pytestmark = [
    # bitsandbytes says so in every 8-bit product of float32 inputs.
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast"),
    # The weight is dequantised on a CPU, which is what is tested.
    pytest.mark.filterwarnings("ignore:.*(deprecated|will be removed).*:DeprecationWarning:torchao"),
]
RANK, IN, OUT = 4, 64, 96  # bitsandbytes' blocks of 64


class Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(IN, OUT)


def bnb_8bit() -> Net:
    layer = bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False)
    layer.load_state_dict(linear().state_dict())
    net = Net(layer.to("cpu"))
    net.is_loaded_in_8bit = True  # where PEFT's LoRA looks
    return net


def bnb_4bit() -> Net:
    layer = bnb.nn.Linear4bit(IN, OUT, quant_type="nf4", compute_dtype=torch.float32)
    layer.load_state_dict(linear().state_dict())
    net = Net(layer.to("cpu"))
    net.is_loaded_in_4bit = True
    return net


def torchao_int8() -> Net:
    net = Net(linear())
    config = quantization.Int8WeightOnlyConfig()
    quantization.quantize_(net, config)
    net.hf_quantizer = SimpleNamespace(quantization_config=TorchAoConfig(config))  # as transformers sets it
    return net


KINDS = {"bitsandbytes 8-bit": bnb_8bit, "bitsandbytes 4-bit": bnb_4bit, "torchao int8": torchao_int8}
each_kind = pytest.mark.parametrize("build", KINDS.values(), ids=KINDS)


def x() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(5, IN)


def adapted(build: Callable[[], Net], **fields: object) -> PeftModel:
    base = build()
    torch.manual_seed(2)
    config = flora.FloraConfig(**{"r": RANK, "target_modules": ["layer"], "init_weights": False, **fields})
    return get_peft_model(base, config).eval()


def dense(model: PeftModel) -> Tensor:
    (layer,) = (module for module in model.modules() if isinstance(module, FloraLayer))
    return layer.get_delta_weight("default").detach()


def with_lora(build: Callable[[], Net], update: Tensor) -> PeftModel:
    """PEFT's own LoRA with the same update."""
    model = get_peft_model(build(), LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["layer"])).train()
    left, sizes, right = torch.linalg.svd(update, full_matrices=False)
    layer = model.base_model.model.layer
    layer.lora_B.default.weight.data = left[:, :RANK] * sizes[:RANK]
    layer.lora_A.default.weight.data = right[:RANK].contiguous()
    return model


def test_all_kinds_are_here() -> None:
    assert len(KINDS) == 3


@each_kind
def test_output_is_the_base_layers_and_the_factored_change(build: Callable[[], Net]) -> None:
    model = adapted(build)
    change = x() @ dense(model).T
    assert change.abs().max() > 0.1
    assert torch.allclose(model(x()), build().eval()(x()) + change, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(model(x()), build().eval()(x()))


@each_kind
def test_hooks_of_the_base_layer_stand_around_the_adapted_one(build: Callable[[], Net]) -> None:
    model = adapted(build)
    plain = model(2 * x())
    base = model.base_model.model.layer.get_base_layer()
    base.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    base.register_forward_hook(lambda module, args, out: 3 * out)
    assert torch.allclose(model(x()), 3 * plain, atol=1e-5)


@each_kind
def test_gradients_reach_the_adapter(build: Callable[[], Net]) -> None:
    model = adapted(build).train()
    model(x()).square().sum().backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    assert len(gradients) == 3
    assert all(value is not None and value.abs().max() > 0 for value in gradients.values())


@each_kind
def test_an_input_that_needs_a_gradient_gets_it(build: Callable[[], Net]) -> None:
    model = adapted(build).train()
    given = x().requires_grad_()
    model(given).sum().backward()
    plain = x().requires_grad_()
    build().train()(plain).sum().backward()
    assert torch.allclose(given.grad - plain.grad, dense(model).sum(0).expand(5, IN), atol=1e-4)


@each_kind
@pytest.mark.filterwarnings("ignore:Merge lora module to .-bit linear")  # what is measured here
@pytest.mark.filterwarnings("ignore:Unmerge lora module to .-bit linear")
def test_merging_is_as_exact_as_lora_on_the_same_layer(build: Callable[[], Net]) -> None:
    model = adapted(build)
    with torch.no_grad():
        out, plain = model(x()), build()(x())
        lora = with_lora(build, dense(model))
        lora.merge_adapter()
        model.merge_adapter()
        merged, theirs = model(x()), lora(x())
        model.unmerge_adapter()
        again = model(x())
    effect = (out - plain).norm()
    error, lora_error = (merged - out).norm() / effect, (theirs - out).norm() / effect
    assert error <= 1.1 * lora_error + 1e-3
    assert error < 0.5
    assert (again - out).norm() <= 2.5 * (theirs - out).norm() + 1e-3 * effect


@each_kind
@torch.no_grad()
def test_merge_and_unload_leaves_a_quantised_layer(build: Callable[[], Net]) -> None:
    model = adapted(build)
    merged = model.merge_and_unload()
    assert type(merged.layer) is type(build().layer)
    assert type(merged.layer.weight) is type(build().layer.weight)


@each_kind
def test_saved_and_loaded(build: Callable[[], Net], tmp_path: Path) -> None:
    model = adapted(build)
    model.save_pretrained(tmp_path)
    assert len(get_peft_model_state_dict(model)) == 3  # the adapter alone, nothing of the quantised base
    again = PeftModel.from_pretrained(build(), tmp_path, adapter_name="other").eval()
    with torch.no_grad():
        assert torch.equal(again(x()), model(x()))


@each_kind
def test_one_training_step_changes_the_adapter_alone(build: Callable[[], Net]) -> None:
    model = adapted(build).train()
    before = copy.deepcopy({name: value.detach() for name, value in model.named_parameters() if value.requires_grad})
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=1e-2)
    model(x()).square().mean().backward()
    optimizer.step()
    after = dict(model.named_parameters())
    assert all(not torch.equal(after[name], value) for name, value in before.items())
    with model.eval().disable_adapter():
        assert torch.equal(model(x()), build().eval()(x()))


@pytest.mark.gpu  # torchao's int4 kernels need mslk, a CUDA package
def test_torchao_int4() -> None:
    net = Net(linear().to("cuda", torch.bfloat16))
    config = quantization.Int4WeightOnlyConfig(group_size=32)
    quantization.quantize_(net, config)
    net.hf_quantizer = SimpleNamespace(quantization_config=TorchAoConfig(config))
    model = adapted(lambda: net)
    given = x().to("cuda", torch.bfloat16)
    with model.disable_adapter():
        plain = model(given)
    change = given.float() @ dense(model).float().T
    assert torch.allclose(model(given).float(), plain.float() + change, atol=5e-2)


class Reader(Net):
    """Reads the weight of its layer, and calls the layer too."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.layer.weight.device)
        return self.layer(x) + x @ self.layer.weight.T


def reader(build: Callable[[], Net]) -> PeftModel:
    model = adapted(build)
    model.base_model.model.__class__ = Reader
    return model


def test_a_quantised_weight_that_stands_for_numbers_is_read_with_its_update() -> None:
    model = reader(torchao_int8)
    plain = torchao_int8().layer.weight.dequantize()
    layer = model.base_model.model.layer
    assert torch.allclose(layer.weight + 0, plain + dense(model), atol=1e-6)
    assert torch.allclose(model(x()), model.base_model.model.layer(x()) + x() @ (plain + dense(model)).T, atol=1e-4)
    layer.weight.square().sum().backward()
    found = [value.grad.clone() for value in layer.delta("default").parameters()]
    layer.zero_grad()
    (plain + layer.delta("default").dense()).square().sum().backward()
    for value, own in zip(layer.delta("default").parameters(), found, strict=True):
        assert torch.allclose(value.grad, own, rtol=1e-4)


@pytest.mark.parametrize("build", [bnb_8bit, bnb_4bit])
def test_a_packed_weight_that_is_read_is_refused(build: Callable[[], Net]) -> None:
    model = reader(build)
    stored = build().layer.weight
    weight = model.base_model.model.layer.weight
    assert (weight.shape, weight.dtype) == (stored.shape, stored.dtype)
    assert hasattr(weight, "quant_state") == hasattr(stored, "quant_state")
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(UserError, match="layer: its weight is read .* quantised"):
            model(x())
    with model.disable_adapter():
        assert type(model.base_model.model.layer.weight) is type(stored)


def test_only_asking_what_a_packed_weight_is_like_changes_nothing() -> None:
    model = adapted(bnb_4bit)
    expected = model(x())

    class Asking(Net):
        def forward(self, x: Tensor) -> Tensor:
            if self.layer.weight.dtype == torch.uint8:
                x = x.to(self.layer.weight.device)
            return self.layer(x)

    model.base_model.model.__class__ = Asking
    assert torch.equal(model(x()), expected)
    torch.compiler.reset()
    with pytest.warns(UserWarning, match="layer: its weight is read .* without the adapter"):
        compiled = torch.compile(model, backend="eager")(x())
    assert torch.allclose(compiled, expected, atol=1e-5)
