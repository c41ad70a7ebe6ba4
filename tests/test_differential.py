"""Random configs on a zoo of modules: the live model, what is saved, and every export hold the same change.

The truth is computed here, by rules written down once more and in the plainest way: which modules a config targets,
which entry of a table holds for a weight, and ``W + s dW`` from the live parameters.
"""

from __future__ import annotations

import copy
import math
import random
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_model
from torch import Tensor, nn

import flora
from flora.convert.streaming import stream_merged

DEFAULT_CONFIGS, SLOW_CONFIGS = 40, 320
LINEAR = {"fc", "block.0.fc", "block.1.fc"}
IN_LORA, IN_KOHYA = {*LINEAR, "patch", "emb"}, {*LINEAR, "patch"}


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 4, 6)), nn.Parameter(torch.randn(3, 6, 4))


class Zoo(nn.Module):
    """Modules of every kind, two of them at names that are the ends of others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.patch, self.up = nn.Conv2d(3, 4, (3, 2)), nn.ConvTranspose1d(3, 5, 3)
        grouped = nn.ModuleDict({"fc": nn.Linear(6, 8), "conv": nn.Conv1d(4, 6, 3, groups=2)})
        self.block = nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(6, 8)}), grouped])
        self.fc, self.bil = nn.Linear(5, 7), nn.Bilinear(3, 4, 5)
        self.attn, self.lstm = nn.MultiheadAttention(6, 2), nn.LSTM(5, 6)
        self.cross = nn.MultiheadAttention(6, 3, kdim=5, vdim=7)
        self.emb, self.norm, self.experts = nn.Embedding(11, 6), nn.LayerNorm(6), Experts()


WEIGHTS: dict[str, list[str]] = {  # module -> its weights that are adapted
    "patch": ["weight"],
    "up": ["weight"],
    "block.0.fc": ["weight"],
    "block.1.fc": ["weight"],
    "block.1.conv": ["weight"],
    "fc": ["weight"],
    "bil": ["weight"],
    "attn": ["in_proj_weight", "out_proj.weight"],
    "cross": ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"],
    "lstm": ["weight_ih_l0", "weight_hh_l0"],
    "emb": ["weight"],
    "norm": ["weight"],
}
EXPERTS = {"experts": ["up", "down"]}
TARGETS: list[Any] = [
    ["fc"],
    ["fc", "conv", "patch"],
    ["block.1.fc", "attn", "lstm"],
    ["emb", "bil", "up", "norm"],
    ["cross", "attn", "^fc"],
    list(WEIGHTS),
    r"block\.\d\..*",
    r"(.*\.)?(fc|conv|patch)",
    ["fc", "patch", "emb"],
    ["patch", "block.1.fc"],
    "patch|emb|fc",
    "all",
]
EXCLUDED: list[Any] = [None, None, ["block.1.fc"], ["conv"], r"block\.0\..*", ["lstm", "cross"]]
KEYS = [
    "fc", "block.1.fc", r"block\.\d\..*", ".*", "attn", "attn.out_proj", "out_proj", "out_proj.weight",
    "in_proj_weight", "lstm", r".*_hh_l0", "emb.weight", "experts.up", "experts", "^fc", "patch|up", "bil",
    r"cross\..*", r"(attn|cross)",
]  # fmt: skip
LISTS = {r"^patch\.weight": [2, 3, 2, 1], r"^bil": [2, 2, 3], r"^emb\.weight": [3, 2], "experts.down": [2, 3, 2]}
FOLDS = {
    r"block.*fc": "(a b) c, a=2",
    "attn": "(heads x) c, heads=2",
    "out_proj": "(a b) in, a=3",
    r"cross\.q.*": "(a b) c, a=2",
    "lstm": "(a b) c, a=8",
    r"lstm.*_hh_l0": "(a b) (c d), a=4 c=2",
    "emb.weight": "v (a b), a=3",
    "experts.up": "e (a b) c, a=2",
}


def random_fields(draw: random.Random) -> dict[str, Any]:
    """The fields of a config, with overlapping tables in any order."""

    def some(pool: list[Any], most: int) -> list[Any]:
        return draw.sample(pool, draw.randint(0, most))

    fields: dict[str, Any] = {"r": draw.choice([1, 2, 3]), "kernel_r": draw.choice([1, 2, None])}
    fields["target_modules"] = draw.choice(TARGETS)
    fields["exclude_modules"] = None if fields["target_modules"] == "all" else draw.choice(EXCLUDED)
    if draw.random() < 0.4:
        fields["target_parameters"] = draw.choice([["experts.up", "experts.down"], ["down"]])
    ranks: dict[str, Any] = {key: draw.choice([1, 2, 3, fields["r"]]) for key in some(KEYS, 3)}
    how = draw.choice(["scale", "alpha", "none", "budget", "lists"])
    if how == "scale":
        fields["scale"] = draw.choice([0.5, 3, 0.125])
    if how == "alpha":
        fields["alpha"] = draw.choice([1, 7.0])
    if how == "budget":
        fields["budget"] = draw.choice([1500, 2500])
    if how == "lists":
        ranks.update({key: LISTS[key] for key in some(list(LISTS), 3)})
    fields["rank_pattern"] = dict(draw.sample(list(ranks.items()), len(ranks)))
    fields["scale_pattern"] = {key: draw.choice([0.25, 2.0, 5]) for key in some(KEYS, 3)}
    # A list of ranks needs the dimensions that it was written for.
    fields["fold"] = {} if how == "lists" else {key: FOLDS[key] for key in some(list(FOLDS), 3)}
    return fields


# ---- the truth -------------------------------------------------------------------------------------------------------


def is_meant(name: str, given: Any) -> bool:
    if isinstance(given, str):
        return re.fullmatch(given, name) is not None
    return any(name == key.lstrip("^") or (key[0] != "^" and name.endswith(f".{key}")) for key in given or ())


def targets_of(fields: dict[str, Any]) -> list[tuple[str, str]]:
    """(module, weight) of everything the config targets."""
    places = []
    for module, weights in WEIGHTS.items():
        wanted = module != "norm" if fields["target_modules"] == "all" else is_meant(module, fields["target_modules"])
        if wanted and not is_meant(module, fields["exclude_modules"]):
            places += [(module, weight) for weight in weights]
    for weight in EXPERTS["experts"]:
        if is_meant(f"experts.{weight}", fields.get("target_parameters")):
            places.append(("experts", weight))
    return places


def entry_for(table: dict[str, Any], module: str, weight: str, default: Any) -> Any:
    """The value of the table for a weight: the closest of its names, and of its matches the first."""
    full = f"{module}.{weight}"
    for name in (full, full.rpartition(".")[0], module):
        for key, value in table.items():
            if re.fullmatch(rf"(?:.*\.)?(?:{key})", name) or (key[0] == "^" and re.fullmatch(key[1:], name)):
                return value
    return default


def default_fold(module: str, weight: str) -> str | None:
    if module == "lstm":
        return "(gates hidden) input, gates=4"
    if weight == "in_proj_weight":
        return "(qkv heads dim) embed, qkv=3 heads=2"
    return "(heads dim) embed, heads=3" if module == "cross" and weight != "out_proj.weight" else None


def folded(shape: tuple[int, ...], fold: str | None) -> tuple[int, ...]:
    """The sizes of the N-d tensor that the Tucker form lives in."""
    if fold is None:
        return shape
    stored, _, given = fold.partition(",")
    sizes = {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", given)}
    found: list[int] = []
    for size, group in zip(shape, re.findall(r"\(([^)]*)\)|(\w+)", stored), strict=True):
        names = (group[0] or group[1]).split()
        open_size = size // math.prod(sizes.get(name, 1) for name in names)
        found += [sizes.get(name, open_size) for name in names]
    return tuple(found)


class Truth(NamedTuple):
    changes: dict[str, Tensor]  # full name of the weight -> s dW
    modules: set[str]


def truth_of(model: PeftModel, adapter: str, fields: dict[str, Any], base: dict[str, Tensor]) -> Truth:
    """``s dW`` of every weight, from the live parameters by einsum; checks their ranks on the way."""
    live = {name.removeprefix("base_model.model."): value for name, value in model.named_parameters()}
    changes = {}
    for module, weight in targets_of(fields):
        stem = f"tucker_{weight.replace('.', '_')}.{adapter}."
        wrapped = re.compile(rf"{re.escape(module)}(\.base_layer)*\.{re.escape(stem)}(core|factor_\d)")
        parts = {name.rpartition(".")[2]: value.detach() for name, value in live.items() if wrapped.fullmatch(name)}
        shape = tuple(base[f"{module}.{weight}"].shape)
        sizes = folded(shape, entry_for(fields["fold"], module, weight, default_fold(module, weight)))

        dense = parts["core"].double()
        check_ranks(tuple(dense.shape), sizes, entry_for(fields["rank_pattern"], module, weight, None), module)
        for mode, size in enumerate(sizes):
            factor = parts.get(f"factor_{mode}")
            assert (factor is None) == (dense.shape[mode] == size)
            if factor is not None:
                dense = torch.einsum("ia,...a->...i", factor.double(), dense.movedim(mode, -1)).movedim(-1, mode)

        rank = entry_for(fields["rank_pattern"], module, weight, fields["r"])
        plain = fields["alpha"] / rank if "alpha" in fields else fields.get("scale", 1.0)
        scale = entry_for(fields["scale_pattern"], module, weight, plain)
        changes[f"{module}.{weight}"] = scale * dense.reshape(shape)
    return Truth(changes, {module for module, _ in targets_of(fields)})


def check_ranks(ranks: tuple[int, ...], sizes: tuple[int, ...], asked: Any, module: str) -> None:
    """What the user asked for holds, with a budget too; a weight as cheap as its form is kept whole."""
    if isinstance(asked, list):
        assert list(ranks) == asked, module
    elif asked is not None and ranks != sizes:
        kernel = {"patch": 2, "up": 1, "block.1.conv": 1}.get(module, 0)
        assert max(ranks[: len(ranks) - kernel]) <= asked, module


# ---- the test --------------------------------------------------------------------------------------------------------


def check_same(found: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    assert found.keys() == expected.keys(), what
    for name, value in expected.items():
        error = float((found[name].double() - value).abs().max())
        assert error <= 2e-5 * max(1.0, float(value.abs().max())), f"{what}, {name}: off by {error:g}"


def kohya_changes(file: Path) -> dict[str, Tensor]:
    """What Kohya's own formula makes of a file: up (mid) down, times alpha over their rank."""
    tensors = load_file(file)
    changes = {}
    for stem in {key.partition(".")[0] for key in tensors}:
        parts = {key.partition(".")[2]: value.double() for key, value in tensors.items() if key.startswith(f"{stem}.")}
        if "diff" in parts:
            changes[stem] = parts["diff"]
            continue
        up, down = parts["lora_up.weight"].flatten(1), parts["lora_down.weight"]
        if "lora_mid.weight" in parts:
            down = torch.einsum("ra...,ai->ri...", parts["lora_mid.weight"], down.flatten(1))
        factor = float(parts["alpha"]) / up.shape[1] if "alpha" in parts else 1.0
        changes[stem] = factor * torch.einsum("or,r...->o...", up, down)
    return changes


def values_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.double() for name, value in model.state_dict().items()}


def merged(base: dict[str, Tensor], *truths: Truth) -> dict[str, Tensor]:
    total = dict(base)
    for truth in truths:
        for name, change in truth.changes.items():
            total[name] = total[name] + change
    return total


def check_config(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    fields = random_fields(draw)
    while not targets_of(fields):
        fields = random_fields(draw)
    base = Zoo()
    before = values_of(base)
    torch.manual_seed(seed)
    bias = draw.choice(["none", "none", "none", "all", "tucker_only"])
    config = flora.FloraConfig(init_weights=False, bias=bias, **copy.deepcopy(fields))
    model = get_peft_model(copy.deepcopy(base), config)
    trained = {
        name.removeprefix("base_model.model.").replace("base_layer.", ""): v for name, v in model.named_parameters()
    }
    for name, value in trained.items():
        if name.endswith("bias") and value.requires_grad:
            value.data += torch.randn_like(value)
    before.update({name: trained[name].detach().double() for name in before if name.endswith("bias")})
    truth = truth_of(model, "default", fields, before)
    expected = merged(before, truth)

    folder = tmp_path / "adapter"
    check_same(values_of(copy.deepcopy(model).merge_and_unload()), expected, "merged")
    model.save_pretrained(folder)
    again = PeftModel.from_pretrained(Zoo(), folder, adapter_name="other")
    check_same(values_of(again.merge_and_unload()), expected, "loaded")

    adapter = flora.load(folder)
    check_same({name: entry.dense() for name, entry in adapter.weights.items()}, truth.changes, "flora.load")
    flora.save(adapter, tmp_path / "converted")
    converted = PeftModel.from_pretrained(Zoo(), tmp_path / "converted")
    check_same(values_of(converted.merge_and_unload()), expected, "converted")

    (tmp_path / "base").mkdir()
    save_model(Zoo(), str(tmp_path / "base" / "model.safetensors"))
    stream_merged(tmp_path / "base", adapter, tmp_path / "merged")
    check_same(load_file(tmp_path / "merged" / "model.safetensors"), expected, "flora merge")

    flora.save(adapter, tmp_path / "dense.safetensors", format="dense")
    dense = {name: value for name, value in load_file(tmp_path / "dense.safetensors").items() if name in truth.changes}
    check_same(dense, truth.changes, "dense")
    # In a list of LoRA's targets ``fc`` also means every deeper module of that name.
    listed = truth.modules if "fc" not in truth.modules else truth.modules | LINEAR
    if listed == truth.modules <= IN_LORA and bias == "none":
        flora.save(flora.load(folder, base=Zoo()), tmp_path / "lora", format="lora")
        lora = PeftModel.from_pretrained(Zoo(), tmp_path / "lora")
        check_same(values_of(lora.merge_and_unload()), expected, "lora")
    if truth.modules <= IN_KOHYA and bias == "none":
        flora.save(flora.load(folder, base=Zoo()), tmp_path / "kohya.safetensors", format="kohya")
        stems = {f"lycoris_{name.removesuffix('.weight').replace('.', '_')}": v for name, v in truth.changes.items()}
        check_same(kohya_changes(tmp_path / "kohya.safetensors"), stems, "kohya")

    if bias == "none" and draw.random() < 0.4:
        second = random_fields(draw)
        if targets_of(second):
            model.add_adapter("second", flora.FloraConfig(init_weights=False, **copy.deepcopy(second)))
            other = truth_of(model, "second", second, before)
            both = copy.deepcopy(model).merge_and_unload(adapter_names=["default", "second"])
            check_same(values_of(both), merged(before, truth, other), "two adapters")
            alone = copy.deepcopy(model).merge_and_unload(adapter_names=["second"])
            check_same(values_of(alone), merged(before, other), "the second alone")


pytestmark = [
    pytest.mark.filterwarnings("ignore:the adapter has more parameters than the weight itself"),
    pytest.mark.filterwarnings("ignore:the budget of .* is more than the targeted weights take"),
    pytest.mark.filterwarnings("ignore:(rank_pattern|scale_pattern|fold) keys .* match no adapted weight"),
    pytest.mark.filterwarnings("ignore:target_modules"),
    pytest.mark.filterwarnings("ignore:You have passed exclude_modules"),
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
]


@pytest.mark.parametrize("seed", range(DEFAULT_CONFIGS))
def test_every_reader_agrees(seed: int, tmp_path: Path) -> None:
    check_config(seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(DEFAULT_CONFIGS, DEFAULT_CONFIGS + SLOW_CONFIGS))
def test_every_reader_agrees_on_many_more(seed: int, tmp_path: Path) -> None:
    check_config(seed, tmp_path)


def test_the_configs_differ() -> None:
    drawn = [random_fields(random.Random(seed)) for seed in range(DEFAULT_CONFIGS)]
    assert sum(len(fields["rank_pattern"]) > 1 for fields in drawn) > DEFAULT_CONFIGS // 4
    assert sum(len(fields["fold"]) > 0 for fields in drawn) > DEFAULT_CONFIGS // 4
    assert {module for fields in drawn for module, _ in targets_of(fields)} == {*WEIGHTS, *EXPERTS}
    for field in ("alpha", "budget", "scale", "target_parameters"):
        assert sum(field in fields for fields in drawn) > 3
