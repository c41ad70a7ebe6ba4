"""To and from LyCORIS / Kohya files: the real lycoris-lora, the real diffusers, and ComfyUI's formula."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from lycoris import create_lycoris_from_weights
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import flora
from convert_cases import conv_adapter, difference, random_adapter, random_form
from flora.convert import Adapter, Entry, Layout, convert, load, save
from flora.layers.layout import of_module


class Convs(nn.Module):
    """Convolutions of every dimension, grouped and depthwise too, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.uneven = nn.Conv2d(7, 11, (3, 5))
        self.grouped = nn.Conv2d(6, 9, (2, 3), groups=3)
        self.depthwise = nn.Conv2d(5, 5, 7, groups=5)
        self.pointwise = nn.Conv2d(7, 13, 1)
        self.line = nn.Conv1d(5, 7, 3)
        self.space = nn.Conv3d(3, 5, (2, 1, 3))
        self.block = nn.ModuleDict({"proj_out": nn.Linear(13, 5)})


def weights(name: str, value: Tensor) -> bool:
    return value.ndim > 1


@pytest.mark.parametrize("mid", [True, False])
def test_the_real_lycoris_merges_the_same_weights(tmp_path: Path, mid: bool) -> None:
    model = Convs()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    adapter = random_adapter(model, weights)
    save(adapter, tmp_path / "a.safetensors", format="kohya", mid=mid)
    network, _ = create_lycoris_from_weights(1.0, str(tmp_path / "a.safetensors"), model)
    assert len(network.loras) == len(adapter.weights) == 7
    network.merge_to(1.0)
    for name, entry in adapter.weights.items():
        merged = model.get_parameter(name).detach()
        assert torch.allclose(merged, before[name] + entry.dense(), atol=1e-5), name
        assert not torch.allclose(merged, before[name], atol=1e-3)


def test_what_lycoris_itself_saves_comes_back(tmp_path: Path) -> None:
    """Its alpha is not its rank, and it knows no names with dots: those come from the base."""
    model = Convs()
    adapter = random_adapter(model, weights)
    save(adapter, tmp_path / "a.safetensors", format="kohya")
    network, _ = create_lycoris_from_weights(1.0, str(tmp_path / "a.safetensors"), model)
    for lora in network.loras:
        lora.alpha.mul_(0.5)
        network.add_module(lora.lora_name, lora)
    network.save_weights(str(tmp_path / "theirs.safetensors"), None, None)
    with pytest.raises(ValueError, match=r"underscores for dots.*--base"):
        load(tmp_path / "theirs.safetensors")
    back = load(tmp_path / "theirs.safetensors", base=model)
    for name, entry in adapter.weights.items():
        assert torch.allclose(back.weights[name].dense(), 0.5 * entry.dense(), atol=1e-6), name


def test_round_trip_keeps_the_ranks(tmp_path: Path) -> None:
    adapter = conv_adapter((11, 7, 3, 5), (6, 2, 2, 4))
    save(adapter, tmp_path / "a.safetensors", format="kohya")
    back = load(tmp_path / "a.safetensors")
    assert back.weights["net.conv.weight"].ranks == (6, 2, 3, 5), "the zero padding to a square core is gone"
    assert difference(adapter, back) < 1e-6
    save(back, tmp_path / "flora", format="flora")
    assert difference(adapter, load(tmp_path / "flora")) < 1e-6


def comfy(tensors: dict[str, Tensor], stem: str, shape: torch.Size) -> Tensor:
    """ComfyUI's change of a weight, as FORMATS.md has it: (alpha / rank) up mid down, or diff."""
    if f"{stem}.diff" in tensors:
        return tensors[f"{stem}.diff"]
    up, down = tensors[f"{stem}.lora_up.weight"], tensors[f"{stem}.lora_down.weight"]
    scale = float(tensors[f"{stem}.alpha"]) / down.shape[0]
    mid = tensors.get(f"{stem}.lora_mid.weight")
    if mid is not None:
        assert mid.ndim == 4, "a 3-D or 5-D lora_mid crashes it"
        assert mid.shape[0] == mid.shape[1]
        down = torch.einsum("pqhw,qi->pihw", mid, down.flatten(1))
    return scale * (up.flatten(1) @ down.flatten(1)).reshape(shape)


@pytest.mark.parametrize("mid", [True, False])
def test_comfyui_formula_in_half_precision_too(tmp_path: Path, mid: bool) -> None:
    model = Convs()
    model.up = nn.ConvTranspose2d(5, 7, 3)
    adapter = random_adapter(model, weights)
    save(adapter, tmp_path / "a.safetensors", format="kohya", prefix="lora_unet", mid=mid)
    tensors = load_file(tmp_path / "a.safetensors")
    mids = {key.removesuffix(".lora_mid.weight") for key in tensors if key.endswith("lora_mid.weight")}
    assert mids == ({"lora_unet_uneven", "lora_unet_grouped", "lora_unet_depthwise"} if mid else set())
    for name, entry in adapter.weights.items():
        stem = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        change = comfy(tensors, stem, torch.Size(entry.shape))
        assert torch.allclose(change, entry.dense(), atol=1e-5), name
        if f"{stem}.alpha" in tensors:  # the reader's own scale is exactly 1, in any precision
            assert tensors[f"{stem}.alpha"].half() == tensors[f"{stem}.lora_down.weight"].shape[0]
    assert "lora_unet_up.diff" in tensors


def small_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


def test_diffusers_loads_the_kohya_file_of_a_unet(tmp_path: Path) -> None:
    """From an adapter that PEFT trained and saved, to the same answers without flora in the model."""
    unet, trained = small_unet(), small_unet()
    trained.load_state_dict(unet.state_dict())
    targets = ["to_q", "to_v", "to_out.0", "conv1", "conv2", "proj_in", "conv_shortcut"]
    config = flora.FloraConfig(r=3, kernel_r=2, scale=1.3, target_modules=targets, init_weights=False)
    model = get_peft_model(trained, config).eval()
    model.save_pretrained(tmp_path / "adapter")
    adapter = load(tmp_path / "adapter", base=unet)
    assert {entry.layout.kind for entry in adapter.weights.values()} == {"linear", "conv"}
    options = {"to": "kohya", "prefix": "lora_unet", "mid": False, "base": unet}
    report = convert(tmp_path / "adapter", tmp_path / "a.safetensors", **options)
    assert report.relative_error < 1e-6
    sample, context = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 12)
    with torch.no_grad():
        expected, plain = (net(sample, 1, context).sample for net in (model, unet))
    state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(str(tmp_path / "a.safetensors"))
    StableDiffusionLoraLoaderMixin.load_lora_into_unet(state, alphas, unet)
    with torch.no_grad():
        answer = unet(sample, 1, context).sample
    assert torch.allclose(answer, expected, atol=1e-5)
    assert not torch.allclose(plain, expected, atol=1e-3)


def test_foreign_and_broken_files_are_refused(tmp_path: Path) -> None:
    adapter, path = conv_adapter((5, 3, 3, 2), (2, 2, 2, 2)), tmp_path / "a.safetensors"
    save(adapter, path, format="kohya")
    tensors = load_file(path)
    cases = {
        "foreign key: lycoris_net_conv.hada_w1_a": {**tensors, "lycoris_net_conv.hada_w1_a": torch.ones(2, 2)},
        "lacks lora_down.weight": {key: v for key, v in tensors.items() if "lora_down" not in key},
        "do not fit": {**tensors, "lycoris_net_conv.lora_up.weight": torch.ones(5, 3, 1, 1)},
        "has NaN": {**tensors, "lycoris_net_conv.lora_up.weight": torch.full((5, 2, 1, 1), torch.nan)},
        "has the key lycoris_other": {"lycoris_other.diff": torch.ones(3, 2)},
    }
    base = {"net.conv.weight": adapter.weights["net.conv.weight"].layout}
    from flora.convert.formats import kohya

    for message, broken in cases.items():
        save_file(broken, path)
        with pytest.raises(ValueError, match=message):
            kohya.read(path, base)
    assert len(cases) == 5


class Nested(nn.Module):
    """Names of which one ends like another, as in Flux: ``single.0.out`` and ``out``."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(5, 7)
        self.single = nn.ModuleList([nn.ModuleDict({"out": nn.Linear(5, 7)}) for _ in range(2)])


def up_and_down(stem: str, seed: int, out: int = 7) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {f"{stem}.lora_up.weight": torch.randn(out, 2), f"{stem}.lora_down.weight": torch.randn(2, 5)}


def test_a_key_gives_the_whole_name(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    stems = {"lora_unet_single_0_out": "single.0.out", "lora_unet_single_1_out": "single.1.out", "lora_unet_out": "out"}
    tensors: dict[str, Tensor] = {}
    for seed, stem in enumerate(stems):
        tensors.update(up_and_down(stem, seed))
    save_file(tensors, path)
    found = load(path, base=Nested())
    assert set(found.weights) == {f"{name}.weight" for name in stems.values()}
    for stem, name in stems.items():
        expected = tensors[f"{stem}.lora_up.weight"] @ tensors[f"{stem}.lora_down.weight"]
        assert torch.allclose(found.weights[f"{name}.weight"].dense(), expected, atol=1e-6)
    save_file(up_and_down("their_own_single_1_out", 0) | up_and_down("their_own_out", 1), path)
    assert set(load(path, base=Nested()).weights) == {"single.1.out.weight", "out.weight"}, "a prefix of their own"


MISLEADING = [
    (up_and_down("lora_unet_double_out", 0), "no weight of the base model has the key lora_unet_double_out"),
    (
        up_and_down("lora_te1_out", 0) | up_and_down("lora_te2_out", 1),
        "lora_te1_out and lora_te2_out are both out.w",
    ),
    (up_and_down("lora_unet_out", 0, out=3), r"out.weight has shape \(7, 5\) in the base model and \(3, 5\)"),
    (
        {**up_and_down("lora_unet_out", 0), "lora_unet_out.alpha": torch.ones(2)},
        "alpha has shape .2,. and numbers of type torch.float32, expected one real number",
    ),
    ({}, "has no tensors|is not an adapter"),
]


@pytest.mark.parametrize(("tensors", "message"), MISLEADING)
def test_a_key_that_is_not_sure_is_refused(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "a.safetensors", base=Nested())


def test_one_key_for_two_weights_is_refused(tmp_path: Path) -> None:
    model = nn.ModuleDict({"unet": nn.ModuleDict({"out": nn.Linear(5, 7)}), "out": nn.Linear(5, 7)})
    save_file(up_and_down("lora_unet_out", 0), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"could be out.weight or unet.out.weight"):
        load(tmp_path / "a.safetensors", base=model)


def test_a_prefix_of_the_users_own_is_read_back(tmp_path: Path) -> None:
    adapter = random_adapter(Nested(), weights)
    save(adapter, tmp_path / "a.safetensors", format="kohya", prefix="lora_mine")
    assert difference(adapter, load(tmp_path / "a.safetensors")) < 1e-6


def test_whole_tensors_and_name_clashes_are_refused(tmp_path: Path) -> None:
    adapter = conv_adapter((5, 3, 3, 2), (2, 2, 2, 2))
    adapter.extras["head.weight"] = torch.ones(2, 2)
    with pytest.raises(ValueError, match=r"full tensors \(first: head.weight\).*--drop-extras"):
        save(adapter, tmp_path / "a.safetensors", format="kohya")
    form, layout = random_form((5, 3), (2, 2)), Layout("linear", ("out", "in"))
    clash = Adapter({name: Entry(form, 1.0, layout) for name in ("a.b.weight", "a_b.weight")})
    with pytest.raises(ValueError, match=r"a.b.weight and a_b.weight would both have the key lycoris_a_b"):
        save(clash, tmp_path / "a.safetensors", format="kohya")
    assert not list(tmp_path.iterdir())


def test_layouts_of_the_models_are_what_they_are() -> None:
    layouts = of_module(Convs())
    assert layouts["grouped.weight"].groups == 3
    assert layouts["space.weight"].axes == ("out", "in", "kd", "kh", "kw")
