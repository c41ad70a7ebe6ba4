"""The PEFT lifecycle on small whole models: what a user does with an adapter from first to last."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, get_model_status, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import flora
from flora.tuner.forward import change_of_output
from flora.tuner.layer import FloraLayer, named_layers


class Net(nn.Module):
    """A small vision net: convolutions of three kinds, a norm with buffers, a linear layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 11, 3, stride=2, padding=1, padding_mode="reflect")
        self.norm = nn.BatchNorm2d(11)
        self.depthwise = nn.Conv2d(11, 11, 5, groups=11, padding="same")
        self.up = nn.ConvTranspose2d(11, 7, 2, stride=2)
        self.mix = nn.Linear(7, 13)
        self.head = nn.Linear(13, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.depthwise(self.norm(self.stem(x))).relu())
        return self.head(self.mix(x.mean((-1, -2))).relu())  # type: ignore[no-any-return]


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


def images(seed: int = 1, count: int = 5) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(count, 3, 9, 7)


def config(**fields: Any) -> flora.FloraConfig:
    return flora.FloraConfig(
        **{"r": 3, "target_modules": "all", "modules_to_save": ["head"], "init_weights": False, **fields}
    )


def adapted(seed: int = 2, **fields: Any) -> PeftModel:
    base = net()
    torch.manual_seed(seed)
    return get_peft_model(base, config(**fields)).eval()


def layers(model: nn.Module) -> dict[str, FloraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FloraLayer)}


def llama(**fields: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    small = {"hidden_size": 22, "intermediate_size": 34, "num_hidden_layers": 2, "vocab_size": 31}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 6, "tie_word_embeddings": False}
    return LlamaForCausalLM(LlamaConfig(**{**small, **heads, **fields})).eval()


def tokens() -> Tensor:
    torch.manual_seed(1)
    return torch.randint(0, 31, (3, 5))


def test_training_moves_only_the_adapter_and_lowers_the_loss() -> None:
    model = adapted(init_weights=True).train()
    frozen = {key: value.clone() for key, value in model.state_dict().items() if "tucker_" not in key}
    optimiser = torch.optim.Adam([value for value in model.parameters() if value.requires_grad], lr=0.02)
    target = torch.arange(5)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(images()), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    moved = {key for key, value in frozen.items() if not torch.equal(model.state_dict()[key], value)}
    assert moved
    assert all("modules_to_save" in key or "norm" in key for key in moved)
    assert all(value.grad is not None for key, value in model.named_parameters() if "factor_" in key)


def test_first_step_has_a_gradient_on_the_core_only_from_a_zero_core() -> None:
    model = adapted(init_weights=True, init="orthogonal")
    model(images()).sum().backward()
    for layer in layers(model).values():
        delta = layer.delta("default")
        assert delta.core.grad.abs().max() > 0
        assert all(value.grad.abs().max() == 0 for name, value in delta.named_parameters() if name != "core")


def test_reloaded_in_another_process_under_another_name(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path / "adapter")
    torch.save(net(), tmp_path / "base.pt")
    torch.save(images(), tmp_path / "x.pt")
    script = (
        "import sys, torch, flora; from peft import PeftModel; sys.path.insert(0, sys.argv[1]); import test_tuner\n"
        "base = torch.load(sys.argv[2] + '/base.pt', weights_only=False)\n"
        "model = PeftModel.from_pretrained(base, sys.argv[2] + '/adapter', adapter_name='elsewhere').eval()\n"
        "torch.save(model(torch.load(sys.argv[2] + '/x.pt')), sys.argv[2] + '/y.pt')\n"
    )
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(Path(__file__).parent), str(tmp_path)], check=True
    )
    assert torch.equal(torch.load(tmp_path / "y.pt"), model(images()))


def test_parameter_names_in_the_model_and_in_the_file(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    live = {key for key, value in model.named_parameters() if value.requires_grad and ".stem." in key}
    names = [
        f"base_model.model.stem.tucker_weight.default.{leaf}" for leaf in ("core", "factor_0", "factor_2", "factor_3")
    ]
    assert live == set(names)  # three input channels at rank 3 are kept whole: no factor_1
    saved = {key for key in load_file(tmp_path / "adapter_model.safetensors") if ".stem." in key}
    assert saved == {name.replace(".default", "") for name in names}
    assert not any("base_layer" in key for key in load_file(tmp_path / "adapter_model.safetensors"))


def test_merge_and_unload_gives_the_plain_model_back() -> None:
    model = adapted()
    out = model(images())
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged) is Net
    assert not layers(merged)
    assert torch.allclose(merged(images()), out, atol=1e-5)
    assert merged.state_dict().keys() == net().state_dict().keys()


def test_unload_gives_the_base_back_bit_for_bit() -> None:
    plain = adapted(modules_to_save=None).unload()
    assert all(torch.equal(value, net().state_dict()[key]) for key, value in plain.state_dict().items())


def test_safe_merge_refuses_nan_and_leaves_the_weights() -> None:
    model = adapted()
    with torch.no_grad():
        layers(model)["base_model.model.stem"].delta("default").core.fill_(float("nan"))
    before = model.base_model.model.stem.base_layer.weight.clone()
    with pytest.raises(ValueError, match="NaN or infinite entries in stem; the base weight was left as it is"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(model.base_model.model.stem.base_layer.weight, before)


@pytest.mark.parametrize("leave", [False, True])
def test_a_refused_safe_merge_leaves_every_layer_as_it_was(leave: bool) -> None:
    model = adapted()
    last = list(layers(model).values())[-1]
    with torch.no_grad():
        last.delta("default").core.fill_(float("inf"))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"NaN or infinite entries in {last.place}"):
        model.merge_and_unload(safe_merge=True) if leave else model.merge_adapter(safe_merge=True)
    assert not any(layer.merged for layer in layers(model).values())
    assert len(layers(model)) == 4
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class One(nn.Module):
    """One layer, called ``layer``."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        out = self.layer(x)
        return out[0] if isinstance(out, tuple) else out


class Twice(nn.Module):
    """A block and a layer that both stand in two places of the tree."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1))
        self.skip = nn.ModuleDict({"inner": self.block, "mix": nn.Conv2d(3, 3, 1)})
        self.late = nn.ModuleDict({"mix_again": self.skip["mix"]})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.skip["mix"](self.skip["inner"](x))
        return self.late["mix_again"](self.block(x))  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:the adapter has more parameters than the weight")
@pytest.mark.parametrize("targets", ["all", ["block.0", "mix"]])
def test_a_module_in_several_places_has_one_adapter(targets: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Twice()
    fresh = copy.deepcopy(base)
    model = get_peft_model(base, flora.FloraConfig(r=2, target_modules=targets, init_weights=False))
    assert set(layers(model)) == {"base_model.model.block.0", "base_model.model.skip.mix"}
    x = torch.randn(2, 3, 5, 7)
    out = model(x)
    assert not torch.allclose(out, fresh(x), atol=1e-3)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path, adapter_name="other")
    assert torch.equal(again(x), out)
    plain = model.merge_and_unload()
    assert torch.allclose(plain(x), out, atol=1e-5)
    assert plain.late["mix_again"] is plain.skip["mix"]
    assert plain.state_dict().keys() == fresh.state_dict().keys()


class Pyramid(nn.Module):
    """Runs its layers from something that the tree does not show, as MaskFormer, Mask2Former and UperNet do."""

    def __init__(self, hold: Any) -> None:
        super().__init__()
        layers = [nn.Conv2d(3, 7, 3, padding=1), nn.Conv2d(7, 5, (1, 3))]
        for place, layer in enumerate(layers):
            self.add_module(str(place), layer)
        hold(vars(self), layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in tree_leaves(self.held):
            x = layer(x).tanh()
        return x


HELD = {
    "a list": lambda attributes, layers: attributes.update(held=layers),
    "a tuple": lambda attributes, layers: attributes.update(held=tuple(layers)),
    "a dict": lambda attributes, layers: attributes.update(held=dict(enumerate(layers))),
    "lists in lists": lambda attributes, layers: attributes.update(held=[[layers[0]], (layers[1],)]),
    "in a dict of the class's own": lambda attributes, layers: attributes.update(held={"all": [tuple(layers)]}),
}


@pytest.mark.parametrize("targets", ["all", ["1"]])
@pytest.mark.parametrize("hold", HELD.values(), ids=HELD)
def test_a_module_that_is_held_beside_the_tree_is_adapted_there_too(hold: Any, targets: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Pyramid(hold)
    fresh, x = copy.deepcopy(base), torch.randn(2, 3, 5, 7)
    model = get_peft_model(base, flora.FloraConfig(r=2, target_modules=targets, init_weights=False))
    out = model(x)
    dense = copy.deepcopy(fresh)
    for name, layer in layers(model).items():
        dense.get_submodule(name.removeprefix("base_model.model.")).weight.data += layer.get_delta_weight("default")
    assert torch.allclose(out, dense(x), atol=1e-6)
    assert not torch.allclose(out, fresh(x), atol=1e-3)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path)(x), out)
    assert torch.allclose(copy.deepcopy(model).merge_and_unload()(x), out, atol=1e-6)
    assert torch.equal(model.unload()(x), fresh(x))


@pytest.mark.parametrize("hold", HELD.values(), ids=HELD)
def test_a_module_to_save_that_is_held_beside_the_tree_is_trained_there_too(hold: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Pyramid(hold)
    fresh, x = copy.deepcopy(base), torch.randn(2, 3, 5, 7)
    model = get_peft_model(base, flora.FloraConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    saved = model.base_model.model.get_submodule("1").modules_to_save["default"]
    with torch.no_grad():
        saved.weight.mul_(3)
    out = model(x)

    dense = copy.deepcopy(fresh)
    dense.get_submodule("1").weight.data *= 3
    assert torch.allclose(out, dense(x), atol=1e-6)
    assert not torch.allclose(out, fresh(x), atol=1e-3)
    out.square().sum().backward()
    assert saved.weight.grad.abs().sum() > 0

    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path)(x), out)
    assert torch.allclose(copy.deepcopy(model).merge_and_unload()(x), out, atol=1e-6)
    model.add_adapter("other", flora.FloraConfig(r=3, target_modules=["0"], modules_to_save=["1"]))
    model.set_adapter("other")
    assert torch.equal(model(x), fresh(x))
    model.set_adapter("default")
    assert torch.equal(model(x), out)
    assert torch.equal(model.unload()(x), dense(x))


def test_token_rows_of_an_embedding_beside_the_tree_are_trained_there_too() -> None:
    torch.manual_seed(0)
    base = Lookup()
    fresh, ids = copy.deepcopy(base), torch.tensor([[1, 4, 2]])
    model = get_peft_model(
        base, flora.FloraConfig(r=1, target_modules=["mix"], trainable_token_indices={"tokens": [4, 6]})
    )
    rows = model.base_model.model.tokens.token_adapter.trainable_tokens_delta["default"]
    with torch.no_grad():
        rows.add_(2)
    dense = copy.deepcopy(fresh)
    dense.tokens.weight.data[[4, 6]] += 2
    assert torch.allclose(model(ids), dense(ids), atol=1e-6)
    assert torch.allclose(model.merge_and_unload()(ids), dense(ids), atol=1e-6)


class Lookup(nn.Module):
    """Looks its tokens up in a list that the tree does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.mix = nn.Embedding(11, 5), nn.Linear(5, 7)
        self.held = [self.tokens]

    def forward(self, ids: Tensor) -> Tensor:
        return self.mix(self.held[0](ids))  # type: ignore[no-any-return]


def _another_forward(module: nn.Module) -> None:
    old = module.forward
    module.forward = lambda x: 2 * old(x)  # type: ignore[method-assign]


def _another_method(module: nn.Module) -> None:
    cls = type(module)
    module.forward = MethodType(lambda self, x: 2 * cls.forward(self, x), module)  # type: ignore[method-assign]


def _times(value: Any, factor: float) -> Any:
    return tuple(factor * each if each is not None and each.is_floating_point() else each for each in value)


AROUND: dict[str, Any] = {
    "before": lambda layer: layer.register_forward_pre_hook(lambda module, args: _times(args, 3)),
    "before, with names": lambda layer: layer.register_forward_pre_hook(
        lambda module, args, kwargs: (_times(args, 3), kwargs), with_kwargs=True
    ),
    "after": lambda layer: layer.register_forward_hook(lambda module, args, out: 3 * out),
    "of the backward": lambda layer: layer.register_full_backward_hook(lambda module, down, up: _times(down, 5)),
    "before the backward": lambda layer: layer.register_full_backward_pre_hook(lambda module, up: _times(up, 5)),
    "another forward": _another_forward,
    "another method": _another_method,
}
HOOKED: dict[str, Any] = {
    "linear": (lambda: nn.Sequential(nn.Linear(7, 11), nn.Linear(11, 5)), (13, 7)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(3, 7, 3), nn.ConvTranspose2d(7, 5, (2, 3))), (2, 3, 11, 5)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(13, 7), nn.Linear(7, 5)), None),
}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # ids require no gradient
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("way", ["auto", "summed", "beside"])
@pytest.mark.parametrize("kind", HOOKED)
@pytest.mark.parametrize("around", AROUND)
def test_what_stands_around_a_layer_stands_around_the_adapted_one(around: str, kind: str, way: str, late: bool) -> None:
    """Hooks, and a forward that was replaced on the instance: as around a layer whose weight is W + s dW."""
    torch.manual_seed(0)
    build, shape = HOOKED[kind]
    base = build().double()
    dense = copy.deepcopy(base)
    x = torch.randint(13, (3, 5)) if shape is None else torch.randn(shape, dtype=torch.float64)
    put = AROUND[around]
    for layer in [] if late else base:
        put(layer)
    model = get_peft_model(base, flora.FloraConfig(r=2, target_modules="all", init_weights=False, way=way))
    if late:
        model(x)
    for layer in model.base_model.model if late else []:
        put(layer.get_base_layer())
    for name, layer in layers(model).items():
        owner = dense.get_submodule(name.removeprefix("base_model.model."))
        owner.weight.data += layer.get_delta_weight("default").detach()
        put(owner)

    out, expected = model(x), dense(x)
    assert torch.allclose(out, expected, atol=1e-10)
    for outputs in (out, expected):
        outputs.square().sum().backward()
    for name, layer in layers(model).items():
        owner = dense.get_submodule(name.removeprefix("base_model.model."))
        found = [value.grad for value in layer.delta("default").parameters()]
        layer.zero_grad()
        layer.get_delta_weight("default").backward(owner.weight.grad)
        for value, ours in zip(layer.delta("default").parameters(), found, strict=True):
            assert ours is not None
            assert torch.allclose(value.grad, ours, atol=1e-9), name


# Torch's own, where a hook of the backward breaks a graph.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("kind", ["linear", pytest.param("conv", marks=pytest.mark.slow)])
def test_hooks_stand_around_an_adapted_layer_under_a_compiler(kind: str) -> None:
    """All of them at once: outputs and gradients of a copy whose weights are W + s dW."""
    torch.manual_seed(0)
    build, shape = HOOKED[kind]
    base = build().double()
    dense = copy.deepcopy(base)
    x = torch.randn(shape, dtype=torch.float64)
    model = get_peft_model(base, flora.FloraConfig(r=2, target_modules="all", init_weights=False))
    for name, layer in layers(model).items():
        owner = dense.get_submodule(name.removeprefix("base_model.model."))
        owner.weight.data += layer.get_delta_weight("default").detach()
        for around in (around for around in AROUND if not around.startswith("another")):
            AROUND[around](owner)
            AROUND[around](layer.get_base_layer())

    torch._dynamo.reset()
    found, wanted = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, exact = torch.compile(model, backend="aot_eager")(found), dense(wanted)
    assert torch.allclose(out, exact, rtol=1e-9, atol=1e-9)
    out.square().sum().backward()
    exact.square().sum().backward()
    assert torch.allclose(found.grad, wanted.grad, rtol=1e-9, atol=1e-9)


def test_hooks_stand_around_an_adapted_layer_in_an_export() -> None:
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(7, 11)), flora.FloraConfig(r=2, target_modules="all", init_weights=False)
    ).eval()
    AROUND["after"](model.base_model.model[0].get_base_layer())
    x = torch.randn(13, 7)
    exported = torch.export.export(model.base_model.model, (x,), strict=False).module()
    assert torch.allclose(exported(x), model(x), atol=1e-5)


def test_hooks_stand_around_an_adapted_layer_whose_base_is_offloaded() -> None:
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(7, 11)), torch.randn(13, 7)
    model = get_peft_model(base, flora.FloraConfig(r=2, target_modules="all", init_weights=False))
    layer = model.base_model.model[0].get_base_layer()
    AROUND["before"](layer)
    AROUND["after"](layer)
    out = model(x)
    cpu_offload(layer, execution_device=torch.device("cpu"))
    assert layer.weight.is_meta
    assert torch.allclose(model(x), out, atol=1e-5)


def test_a_hook_is_given_the_layer_itself_and_an_adapter_for_each_sample_runs_between_hooks() -> None:
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(7, 5)), torch.randn(3, 7)
    seen: list[Any] = []
    base[0].register_forward_hook(lambda module, args, out: seen.append(module) or 2 * out)
    model = get_peft_model(base, flora.FloraConfig(r=2, target_modules=["0"], init_weights=False)).eval()
    layer: Any = model.base_model.model[0]
    out = model(x)
    assert seen == [layer.get_base_layer()]
    mixed = model(x, adapter_names=["default", "__base__", "default"])
    assert torch.allclose(mixed[::2], out[::2], atol=1e-6)
    with model.disable_adapter():
        assert torch.allclose(mixed[1], model(x)[1], atol=1e-6)


def test_a_tie_between_modules_is_refused_with_the_remedy_that_fits() -> None:
    base = nn.ModuleDict({"one": nn.Linear(5, 5), "other": nn.Linear(5, 5)})
    base["one"].weight = base["other"].weight
    with pytest.raises(ValueError, match=r"one\.weight = other\.weight.* give one of the modules a copy"):
        get_peft_model(base, flora.FloraConfig(r=2, target_modules=["one"]))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_a_layer_with_an_adapter_of_another_method_is_refused() -> None:
    base = inject_adapter_in_model(LoraConfig(r=2, target_modules=["mix"]), net(), adapter_name="first")
    before = {key: value.clone() for key, value in base.state_dict().items()}
    with pytest.raises(ValueError, match="mix already has an adapter of another method"):
        inject_adapter_in_model(config(modules_to_save=None), base, adapter_name="second")
    assert base.state_dict().keys() == before.keys()


@pytest.mark.parametrize("holder", [nn.ParameterList([torch.ones(5, 7)]), nn.ParameterDict({"a": torch.ones(5, 7)})])
def test_an_entry_of_a_container_of_parameters_is_refused(holder: nn.Module) -> None:
    leaf = next(name for name, _ in holder.named_parameters())
    with pytest.raises(ValueError, match=f"w.{leaf} of target_parameters is an entry of an nn.Parameter"):
        get_peft_model(nn.ModuleDict({"w": holder}), flora.FloraConfig(r=2, target_parameters=[f"w.{leaf}"]))


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.* is deprecated")
def test_all_names_what_it_leaves_out() -> None:
    base = nn.ModuleDict({"normed": nn.utils.weight_norm(nn.Conv1d(3, 5, 3)), "pruned": nn.Linear(5, 7)})
    prune.l1_unstructured(base["pruned"], "weight", 0.5)
    base["plain"] = nn.Linear(5, 7)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model = get_peft_model(base, flora.FloraConfig(r=2, target_modules="all"))
    texts = [str(each.message) for each in seen]
    assert set(layers(model)) == {"base_model.model.plain"}
    assert any("leaves out normed: its weight is recomputed before every forward" in text for text in texts)
    assert any("leaves out pruned: its weight is pruned" in text for text in texts)


EMPTY: dict[str, Any] = {
    "linear": (lambda: nn.Linear(7, 5), (7,)),
    "conv1d": (lambda: nn.Conv1d(7, 5, 3), (7, 9)),
    "conv3d": (lambda: nn.Conv3d(7, 5, 3), (7, 5, 3, 4)),
    "grouped": (lambda: nn.Conv2d(6, 6, 3, groups=6), (6, 5, 7)),
    "transposed": (lambda: nn.ConvTranspose2d(7, 5, 2, stride=2), (7, 3, 5)),
    "lstm": (lambda: nn.LSTM(7, 5, batch_first=True), (3, 7)),
}


@pytest.mark.filterwarnings("ignore:the adapter has more parameters than the weight")
@pytest.mark.parametrize("name", EMPTY)
@pytest.mark.parametrize("path", ["summed", "beside"])
def test_a_batch_without_samples(name: str, path: Any) -> None:
    build, shape = EMPTY[name]
    base = One(build())
    expected = base(torch.zeros(0, *shape)).shape
    fields: dict[str, Any] = {"way": path, "init_weights": False}
    model = get_peft_model(base, flora.FloraConfig(r=2, target_modules=["layer"], **fields))
    out = model(torch.zeros(0, *shape))
    out.sum().backward()
    assert out.shape == expected


NORMED = {
    "spectral": lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(5, 7, 3)),
    "orthogonal": lambda: nn.utils.parametrizations.orthogonal(nn.Linear(7, 7)),
}


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NORMED)
def test_a_parametrization_that_cannot_hold_the_merged_weight_is_taken_off(
    name: str, training: bool, safe: bool
) -> None:
    torch.manual_seed(0)
    base = One(NORMED[name]())
    model = get_peft_model(base, flora.FloraConfig(r=2, target_modules=["layer"], init_weights=False))
    x = torch.randn(2, 5, 7, 7) if name == "spectral" else torch.randn(3, 7)
    out = model.eval()(x)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.train(training)
    with pytest.warns(UserWarning, match=r"removes the parametrization of layer\.weight"):
        model.merge_adapter(safe_merge=safe)
    assert torch.allclose(model.eval()(x), out, atol=1e-5)
    model.train(training).unmerge_adapter()
    assert torch.allclose(model.eval()(x), out, atol=1e-5)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.allclose(value, before[key], atol=1e-6) for key, value in after.items())
    with pytest.warns(UserWarning, match="removes the parametrization of"):
        plain = model.merge_and_unload(safe_merge=safe)
    assert type(plain.layer) in (nn.Conv2d, nn.Linear)
    assert torch.allclose(plain.eval()(x), out, atol=1e-5)


@pytest.mark.parametrize("name", NORMED)
def test_merging_a_copy_leaves_the_parametrization_of_the_model(name: str) -> None:
    torch.manual_seed(0)
    model = get_peft_model(One(NORMED[name]()), flora.FloraConfig(r=2, target_modules=["layer"], init_weights=False))
    x = torch.randn(2, 5, 7, 7) if name == "spectral" else torch.randn(3, 7)
    out = model.eval()(x)
    with pytest.warns(UserWarning, match="removes the parametrization of"):
        plain = copy.deepcopy(model).merge_and_unload()
    assert torch.allclose(plain(x), out, atol=1e-5)
    assert torch.equal(model(x), out)


@pytest.mark.filterwarnings("ignore:the adapter has more parameters than the weight")
@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda: nn.LSTM(7, 5), {"bias_ih_l0", "bias_hh_l0"}),
        (lambda: nn.GRU(7, 5, num_layers=2), {"bias_ih_l0", "bias_hh_l0", "bias_ih_l1", "bias_hh_l1"}),
        (lambda: nn.LSTMCell(7, 5), {"bias_ih", "bias_hh"}),
        (lambda: nn.Linear(7, 5), {"bias"}),
        (lambda: nn.Linear(7, 5, bias=False), set()),
    ],
)
def test_biases_of_adapted_layers_train_and_are_saved(build: Any, names: set[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = One(build())
    fresh = copy.deepcopy(base)
    fields: dict[str, Any] = {"bias": "tucker_only", "init_weights": False}
    model = get_peft_model(base, flora.FloraConfig(r=2, target_modules=["layer"], **fields))
    layer = layers(model)["base_model.model.layer"]
    assert set(layer.biases()) == names
    for value in layer.biases().values():
        assert value.requires_grad
        nn.init.normal_(value)
    out = model(torch.ones(3, 7))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(fresh, tmp_path, adapter_name="other")
    assert torch.equal(again(torch.ones(3, 7)), out)


@pytest.mark.filterwarnings("ignore:the adapter has more parameters than the weight")
def test_a_weighted_sum_where_the_model_has_a_base_layer_of_its_own() -> None:
    torch.manual_seed(0)
    base = nn.ModuleDict({"base_layer": nn.Sequential(nn.Conv1d(3, 5, 2)), "head": nn.Linear(5, 7)})
    config = flora.FloraConfig(r=2, target_modules="all", init_weights=False)
    model = get_peft_model(base, config)
    model.add_adapter("second", flora.FloraConfig(r=3, target_modules="all", init_weights=False))
    model.base_model.add_weighted_adapter(["default", "second"], [0.5, -1.5], "sum")
    for name, layer in named_layers(model):
        one, two, found = (layer.delta(adapter, "weight").dense() for adapter in ("default", "second", "sum"))
        torch.testing.assert_close(found, 0.5 * one - 1.5 * two, msg=name)


@pytest.mark.parametrize("merge", [True, False])
def test_a_layer_in_two_places_one_of_them_named_base_layer(merge: bool) -> None:
    torch.manual_seed(0)
    shared = nn.Linear(5, 5)
    first, second = nn.ModuleDict({"base_layer": shared}), nn.ModuleDict({"other": shared})
    base = nn.ModuleDict({"first": first, "second": second})
    model = get_peft_model(base, flora.FloraConfig(r=2, target_modules="all", init_weights=False))
    expected = shared.weight.detach().clone()
    if merge:
        expected += named_layers(model)[0].layer.get_delta_weight("default").detach()

    plain = model.merge_and_unload() if merge else model.unload()
    assert plain["first"]["base_layer"] is plain["second"]["other"] is shared
    torch.testing.assert_close(shared.weight.detach(), expected)


@pytest.mark.filterwarnings("ignore:the adapter has more parameters than the weight")
def test_a_weighted_sum_of_adapters_is_exact() -> None:
    model = adapted()
    torch.manual_seed(5)
    model.add_adapter("second", config(r=2, modules_to_save=None, exclude_modules=["head"]))
    model.base_model.add_weighted_adapter(["default", "second"], [0.75, -2.0], "sum")
    for name, layer in layers(model).items():
        expected = 0.75 * layer.get_delta_weight("default") - 2.0 * layer.get_delta_weight("second")
        assert torch.allclose(layer.get_delta_weight("sum"), expected, atol=1e-6), name
    assert len(layers(model)) == 4
    with pytest.raises(ValueError, match="already exists"):
        model.base_model.add_weighted_adapter(["default"], [1.0], "sum")
    with pytest.raises(ValueError, match="do not exist"):
        model.base_model.add_weighted_adapter(["nobody"], [1.0], "other")


@pytest.mark.filterwarnings("ignore:the adapter has more parameters than the weight")  # the sum of tiny layers
def test_a_weighted_sum_saves_and_loads(tmp_path: Path) -> None:
    model = adapted(modules_to_save=None)
    model.base_model.add_weighted_adapter(["default", "default"], [0.5, 0.25], "sum")
    model.base_model.set_adapter("sum")
    out = model.eval()(images())
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = PeftModel.from_pretrained(net(), tmp_path / "sum").eval()
    assert torch.allclose(again(images()), out, atol=1e-6)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix, self.norm = nn.Embedding(13, 7), nn.Linear(7, 11), nn.BatchNorm1d(11)
        self.head = nn.Linear(11, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.mix(self.table(ids))))  # type: ignore[no-any-return]


def of_words(**fields: Any) -> flora.FloraConfig:
    return flora.FloraConfig(r=2, target_modules=["mix"], init_weights=False, **fields)


@pytest.mark.filterwarnings("ignore:the adapter has more parameters than the weight")  # the sum of tiny layers
@pytest.mark.parametrize("first", [True, False])
def test_a_weighted_sum_has_the_weighted_changes_of_what_is_held_in_full(first: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Words().eval()
    head, rows = base.head.weight.detach().clone(), base.table.weight.detach()[[2, 5]].clone()
    full = of_words(modules_to_save=["head"], trainable_token_indices={"table": [2, 5]})
    model = get_peft_model(base, full if first else of_words(), adapter_name="one")
    model.add_adapter("two", full)
    for name, value in model.named_parameters():
        if "modules_to_save" in name or "tokens_delta" in name:
            nn.init.normal_(value)
    saved: Any = model.base_model.model.head.modules_to_save
    tokens: Any = model.base_model.model.table.token_adapter.trainable_tokens_delta
    expected = [head.clone(), rows.clone()]
    for adapter, factor in (("one", 0.75), ("two", -2.0)):
        if adapter in saved:
            expected[0] += factor * (saved[adapter].weight.detach() - head)
            expected[1] += factor * (tokens[adapter].detach() - rows)

    model.base_model.add_weighted_adapter(["one", "two"], [0.75, -2.0], "sum")
    model.set_adapter("sum")
    assert torch.allclose(saved["sum"].weight, expected[0], atol=1e-6)
    assert torch.allclose(model.base_model.model.table(torch.tensor([2, 5])), expected[1], atol=1e-6)
    ids = torch.arange(13)
    out = model(ids)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    torch.manual_seed(0)
    assert torch.allclose(PeftModel.from_pretrained(Words().eval(), tmp_path / "sum").eval()(ids), out, atol=1e-6)


NO_SUM: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "biases": ({"bias": "all"}, {}, "has changed biases of the base model itself"),
    "other rows": (
        {"trainable_token_indices": {"table": [1]}},
        {"trainable_token_indices": {"table": [2]}},
        "train different rows of embeddings",
    ),
    "statistics": ({"modules_to_save": ["norm"]}, {}, "norm of modules_to_save has running statistics"),
}


@pytest.mark.parametrize("name", NO_SUM)
def test_what_has_no_weighted_sum_is_refused_and_nothing_added(name: str) -> None:
    first, second, message = NO_SUM[name]
    model = get_peft_model(Words(), of_words(**first), adapter_name="one")
    model.add_adapter("two", of_words(**second))
    model.train()(torch.arange(13))
    with pytest.raises(ValueError, match=message):
        model.base_model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "sum")
    assert set(model.peft_config) == {"one", "two"}
    assert all("sum" not in layer.settings for layer in layers(model).values())


def test_tensors_are_swapped_in_place() -> None:
    model, other = adapted(), adapted(seed=7)
    addresses = {key: value.data_ptr() for key, value in model.named_parameters()}
    model.base_model.swap_adapter("default", get_peft_model_state_dict(other))
    swapped = {name: layer.get_delta_weight("default") for name, layer in layers(model).items()}
    assert all(torch.equal(value, layers(other)[name].get_delta_weight("default")) for name, value in swapped.items())
    assert {key: value.data_ptr() for key, value in model.named_parameters()} == addresses
    state = get_peft_model_state_dict(adapted(r=2))
    with pytest.raises(ValueError, match="cannot swap 'default'"):
        model.base_model.swap_adapter("default", state)


def test_an_adapter_per_sample() -> None:
    model = adapted(modules_to_save=None)
    torch.manual_seed(5)
    model.add_adapter("second", config(modules_to_save=None))
    model.eval()
    names = ["second", "__base__", "default", "second", "default"]
    with torch.no_grad():
        mixed = model(images(), adapter_names=names)
        for row, name in enumerate(names):
            if name == "__base__":
                with model.disable_adapter():
                    alone = model(images())
            else:
                model.set_adapter(name)
                alone = model(images())
            assert torch.allclose(mixed[row], alone[row], atol=1e-6)
        with pytest.raises(ValueError, match="unknown adapters \\['nobody'\\]"):
            model(images(), adapter_names=["nobody"] * 5)
        with pytest.raises(ValueError, match="3 entries for a batch of 5"):
            model(images(), adapter_names=["default"] * 3)
    with pytest.raises(ValueError, match="inference only"):
        model.train()(images(), adapter_names=names)


def test_an_adapter_per_sample_is_refused_where_it_cannot_be() -> None:
    base = nn.Sequential(nn.LSTM(7, 5))
    model = get_peft_model(base, flora.FloraConfig(r=2, target_modules=["0"])).eval()
    with pytest.raises(ValueError, match="cannot be used with LSTM"):
        model(torch.randn(3, 2, 7), adapter_names=["default"] * 3)


def test_patterns_of_rank_and_scale_and_exclusion() -> None:
    model = adapted(
        r=3, rank_pattern={"mix": [2, 5], "st.m": 2}, scale_pattern={"mix": 0.5}, scale=4.0, exclude_modules=["up"]
    )
    found = {name.removeprefix("base_model.model."): layer.delta("default") for name, layer in layers(model).items()}
    assert set(found) == {"stem", "depthwise", "mix"}
    assert found["mix"].form.ranks == (2, 5)
    assert found["mix"].scale == 0.5
    assert found["stem"].form.ranks == (2, 2, 2, 2)
    assert found["stem"].scale == 4.0


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all", {"stem", "depthwise", "up", "mix"}),
        ("all-conv", {"stem", "depthwise", "up"}),
        ("all-linear", {"mix"}),
        ("all-norm", {"norm"}),
        (["all-conv", "all-norm"], {"stem", "depthwise", "up", "norm"}),
        (["ALL-norm", "mix"], {"norm", "mix"}),
        (".*(stem|mix)", {"stem", "mix"}),
        (["up", "mix"], {"up", "mix"}),
    ],
)
def test_shorthands_regex_and_lists(targets: Any, expected: set[str]) -> None:
    found = {name.removeprefix("base_model.model.") for name in layers(adapted(target_modules=targets))}
    assert found == expected


def test_a_shorthand_in_a_list_is_the_end_of_a_name_where_there_is_one() -> None:
    base = nn.ModuleDict({"all": nn.Linear(11, 13), "other": nn.Linear(13, 7)})
    named = get_peft_model(base, flora.FloraConfig(target_modules=["all"], r=2))
    assert list(layers(named)) == ["base_model.model.all"]


def test_norms_of_a_models_own_class_are_norms() -> None:
    names = set(layers(get_peft_model(llama(), flora.FloraConfig(target_modules="all-norm"))))
    ends = ("layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm")
    assert {f"base_model.model.model.{end}" for end in ends} < names
    assert len(names) == 2 * 2 + 1


def test_layers_to_transform() -> None:
    model = get_peft_model(llama(), flora.FloraConfig(target_modules=["q_proj"], layers_to_transform=[1], r=2))
    assert list(layers(model)) == ["base_model.model.model.layers.1.self_attn.q_proj"]


def test_all_leaves_out_the_head_of_a_transformers_model() -> None:
    names = set(layers(get_peft_model(llama(), flora.FloraConfig(target_modules="all", r=2))))
    assert len(names) == 2 * 7 + 1
    assert not any("lm_head" in name for name in names)
    bert = BertForSequenceClassification(
        BertConfig(hidden_size=14, num_attention_heads=2, intermediate_size=22, num_hidden_layers=1, vocab_size=29)
    )
    names = set(layers(get_peft_model(bert, flora.FloraConfig(target_modules="all", r=2))))
    assert names
    assert not any("classifier" in name for name in names)


def test_a_budget_is_spent_and_recorded() -> None:
    model = adapted(budget=350, modules_to_save=None)
    spent = sum(layer.delta("default").form.num_params for layer in layers(model).values())
    assert 300 < spent <= 350
    cfg = model.peft_config["default"]
    assert cfg.budget is None
    assert len(cfg.rank_pattern) == 5
    with pytest.raises(ValueError, match="budget of 20 parameters is below"):
        adapted(budget=20)


@pytest.mark.parametrize("extra", [{"bias": "all"}, {"bias": "tucker_only"}, {"modules_to_save": ["head"]}])
def test_what_is_trained_in_full_comes_on_top_of_a_budget(extra: dict[str, Any]) -> None:
    model = adapted(budget=350, **{"modules_to_save": None, **extra})

    trained = {name: value.numel() for name, value in model.named_parameters() if value.requires_grad}
    updates = sum(count for name, count in trained.items() if ".tucker_" in name)

    assert 300 < updates <= 350
    assert sum(trained.values()) > updates


def test_tied_weights_are_refused_or_left_out() -> None:
    base = llama(tie_word_embeddings=True)
    before = set(base.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own warning about tied layers
        with pytest.raises(ValueError, match=r"tied weight .*lm_head\.weight.*tie_word_embeddings=False"):
            get_peft_model(base, flora.FloraConfig(target_modules=["embed_tokens"]))
    assert set(base.state_dict()) == before
    with pytest.warns(UserWarning, match="leaves out model.embed_tokens: the weight is tied"):
        model = get_peft_model(base, flora.FloraConfig(target_modules="all", r=2))
    assert len(layers(model)) == 14


def test_unmatched_targets_are_named() -> None:
    with pytest.warns(UserWarning, match=r"target_modules \['mxi'\] match nothing: instead of 'mxi' try 'mix'"):
        adapted(target_modules=["stem", "mxi"])


def test_low_memory_loading_injection_and_direct_state_dicts(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(net(), tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(again(images()), model(images()))
    bare = adapted(modules_to_save=None)
    injected = inject_adapter_in_model(config(modules_to_save=None), net())
    set_peft_model_state_dict(injected, get_peft_model_state_dict(bare))
    assert torch.equal(injected.eval()(images()), bare(images()))


def test_scales_of_layers_as_diffusers_sets_them() -> None:
    layer = layers(adapted(scale=2.0))["base_model.model.mix"]
    whole = layer.get_delta_weight("default")
    layer.set_scale("default", 0.5)
    assert layer.delta("default").scale == 1.0
    layer.scale_layer(3.0)
    assert torch.allclose(layer.get_delta_weight("default"), 1.5 * whole)
    layer.unscale_layer(3.0)
    assert layer.delta("default").scale == 1.0
    layer.unscale_layer()
    assert torch.equal(layer.get_delta_weight("default"), whole)


def test_what_is_merged_is_taken_out_again_whatever_the_scale_is_by_then() -> None:
    model = adapted(scale=2.0)
    state = get_peft_model_state_dict(model)
    before = {name: layer.get_base_layer().weight.clone() for name, layer in layers(model).items()}
    model.merge_adapter()
    for layer in layers(model).values():
        layer.scale_layer(3.0)

    with pytest.raises(ValueError, match=r"'default' is merged into the base weights; call unmerge_adapter\(\) before"):
        model.base_model.swap_adapter("default", state)

    model.unmerge_adapter()
    for name, layer in layers(model).items():
        assert torch.allclose(layer.get_base_layer().weight, before[name], atol=1e-6), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("upcast", [True, False])
def test_half_precision_bases(dtype: torch.dtype, upcast: bool) -> None:
    torch.manual_seed(2)
    model = get_peft_model(net().to(dtype), config(), autocast_adapter_dtype=upcast)
    assert {value.dtype for key, value in model.named_parameters() if "tucker_" in key} == {
        torch.float32 if upcast else dtype
    }
    out = model(images().to(dtype))
    assert out.dtype == dtype
    out.float().square().mean().backward()
    assert all(torch.isfinite(value.grad).all() for key, value in model.named_parameters() if "tucker_" in key)


def test_a_small_update_is_not_rounded_away_in_bfloat16() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8, bias=False)).to(torch.bfloat16)
    base[0].weight.data.fill_(1.0)
    model = get_peft_model(base, flora.FloraConfig(r=8, target_modules=["0"], way="summed", scale=1e-3))
    with torch.no_grad():
        for value in layers(model)["base_model.model.0"].delta("default").parameters():
            value.fill_(0.3)
    x = torch.zeros(1, 8, 3, 3, dtype=torch.bfloat16)
    x[..., 1, 1] = 1e-2
    change = change_of_output(layers(model)["base_model.model.0"], "default", x)
    assert change.abs().max() > 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    model = adapted(dropout=0.0)
    x = images().requires_grad_(True)
    model(x).square().sum().backward()
    plain = {key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    for key, value in model.named_parameters():
        if value.requires_grad:
            assert torch.allclose(value.grad, plain[key], atol=1e-6), key


def test_dropout_is_on_the_adapter_only_and_off_in_eval() -> None:
    model = adapted(dropout=0.5, modules_to_save=None)
    assert torch.equal(model(images()), adapted(modules_to_save=None)(images()))
    model.train()
    model.base_model.model.norm.eval()
    x = images()
    first, second = model(x), model(x)
    assert not torch.equal(first, second)


def test_batch_norm_buffers_stay_with_the_base() -> None:
    model = adapted(init_weights=True).train()
    before = model.base_model.model.norm.running_mean.clone()
    model(images())
    assert torch.equal(model.base_model.model.norm.running_mean, before)
    merged = model.merge_and_unload()
    assert torch.equal(merged.norm.running_mean, before)
    merged.train()(images())  # an ordinary model again
    assert not torch.equal(merged.norm.running_mean, before)


def test_pickles_copies_and_status() -> None:
    model = adapted()
    cfg = model.peft_config["default"]
    assert pickle.loads(pickle.dumps(cfg)) == cfg
    assert json.loads(json.dumps(cfg.to_dict(), default=sorted))["peft_type"] == "TUCKER"
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(images()), model(images()))
    assert torch.equal(copy.deepcopy(model)(images()), model(images()))
    status = get_model_status(model)
    assert status.adapter_model_type == "FloraModel"
    assert status.num_adapter_layers == 5  # four layers and the head that is saved whole


def test_torch_encoders_do_not_go_round_the_adapters() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(14, 2, 22, batch_first=True)
    base = nn.TransformerEncoder(layer, 2).eval()
    wrapped = get_peft_model(
        nn.Sequential(base), flora.FloraConfig(r=3, target_modules="all", init_weights=False)
    ).eval()
    x, mask = torch.randn(3, 5, 14), torch.arange(5).expand(3, 5) >= torch.tensor([[5], [4], [2]])
    encoder = wrapped.base_model.model[0]
    with torch.no_grad():
        fast = encoder(x, src_key_padding_mask=mask)
        plain = copy.deepcopy(wrapped).merge_and_unload()[0](x, src_key_padding_mask=mask)
    slow = encoder(x, src_key_padding_mask=mask)
    keep = ~mask
    assert len(layers(wrapped)) == 2 * 3
    assert torch.allclose(fast[keep], slow[keep], atol=1e-5)
    assert torch.allclose(fast[keep], plain[keep], atol=1e-5)


def test_transformers_add_load_and_delete_an_adapter(tmp_path: Path) -> None:
    model = llama()
    plain = model(tokens()).logits
    model.add_adapter(flora.FloraConfig(r=2, target_modules=["q_proj", "down_proj"], init_weights=False), "mine")
    out = model(tokens()).logits
    assert not torch.allclose(out, plain)
    model.save_pretrained(tmp_path)
    other = llama()
    other.load_adapter(str(tmp_path), adapter_name="theirs")
    assert torch.allclose(other(tokens()).logits, out, atol=1e-6)
    model.disable_adapters()
    assert torch.allclose(model(tokens()).logits, plain, atol=1e-6)
    other.delete_adapter("theirs")
    assert torch.allclose(other(tokens()).logits, plain, atol=1e-6)


def test_generation_and_trainable_tokens() -> None:
    model = get_peft_model(
        llama(),
        flora.FloraConfig(
            r=2, target_modules=["v_proj"], trainable_token_indices={"embed_tokens": [3, 5]}, init_weights=False
        ),
    ).eval()
    out = model.generate(input_ids=tokens(), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert out.shape == (3, 8)
    assert any("trainable_tokens" in key for key, value in model.named_parameters() if value.requires_grad)
