"""PEFT LoRA: exact for linear layers, embeddings, ungrouped convolutions and stacks of experts, with no SVD.

What is written keeps the rule that PEFT, vLLM, SGLang, TGI, LoRAX and llama.cpp all accept: one rank R everywhere (zero
padded), every scale in lora_B, ``r = lora_alpha = R``, nothing else switched on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from flora.convert.adapter import Adapter, Entry
from flora.convert.arithmetic import narrow
from flora.convert.formats.adapter_config import naming, read_config, warn_of_lost_modules
from flora.convert.formats.native import lone_biases, saved_modules, whole_tensors
from flora.convert.formats.pairs import columns, join_stack, pad, split, split_stack, swap, trim
from flora.errors import UserError
from flora.layers.axes import KERNELS
from flora.layers.entries import DEFAULT_RANK, check_number
from flora.layers.layout import Layout, is_raw, layout_from_json
from flora.layers.names import (
    GIVE_BASE,
    PREFIX,
    TOKEN_ROWS,
    check_prefix,
    module_of,
    nested,
    wrapped_modules,
)
from flora.layers.patterns import Patterns
from flora.storage.atomic import write_json
from flora.storage.tensors import (
    CONFIG,
    NOTE,
    WEIGHTS,
    check_form_tensors,
    read_note,
    read_object,
    read_tensors,
    write_tensors,
)
from flora.tucker.form import Tucker

# Fields that make an adapter something other than a fixed change of the weights.
_REFUSED = (
    "use_dora",
    "lora_bias",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "megatron_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
)
# These leave the base weight untouched.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class _Pair:
    """lora_B and lora_A of one weight: up (O, R, ...) and down (R, I, ...), or (E, O, R) and (E, R, I) of a stack."""

    kind: str
    up: Tensor
    down: Tensor

    @property
    def rank(self) -> int:
        return self.down.shape[1 if self.kind == "experts" else 0]


def refusal(name: str, layout: Layout) -> str | None:
    """Why PEFT LoRA cannot hold a weight exactly, or None if it can."""
    if layout.kind == "conv" and layout.groups != 1:
        return f"its convolution has {layout.groups} groups, which PEFT's LoRA has no exact form for"
    if layout.is_plain_conv or _is_matrix(layout) or (layout.kind == "experts" and len(layout.axes) == 3):
        return None
    if layout.kind == "attention" and name.endswith(".weight"):
        return "PEFT's LoRA does not reach the output projection inside nn.MultiheadAttention"
    if len(layout.axes) == 2 and layout.kind in ("attention", "recurrent", "other"):
        return None

    kind = layout.kind if layout.axes[:1] != ("in",) else f"transposed {layout.kind}"

    return f"PEFT's LoRA has no form for a {len(layout.axes)}-dimensional weight of kind '{kind}'"


def _is_matrix(layout: Layout) -> bool:
    return len(layout.axes) == 2 and layout.kind in ("linear", "embedding")


def write(adapter: Adapter, folder: Path) -> list[str]:
    """Writes the folder (which must not exist).

    Returns:
        What the user should know, such as which readers will not take the file.

    Raises:
        ValueError: a weight, or an extra tensor, has no place in PEFT LoRA; names it and says what to do.
    """
    layouts = {name: adapter.layout(name) for name in adapter.weights}
    _check(adapter, layouts)
    pairs = {name: _pair(entry, layouts[name]) for name, entry in adapter.weights.items()}
    rank = max(pair.rank for pair in pairs.values())
    tensors = {PREFIX + name: value for name, value in adapter.extras.items()}
    for name, pair in pairs.items():
        dtype = adapter.weights[name].form.core.dtype
        stem = PREFIX + _stem(name, layouts)
        for key, value in _tensors(pair, rank).items():
            tensors[f"{stem}.{key}"] = narrow(name, value, dtype)

    folder.mkdir()
    note = {name: layout.to_json() for name, layout in layouts.items()}
    write_tensors(folder / WEIGHTS, tensors, {NOTE: json.dumps(note, sort_keys=True)})
    write_json(folder / CONFIG, _config(adapter, layouts, rank), sort_keys=True)

    return _remarks(adapter, rank)


def _check(adapter: Adapter, layouts: Mapping[str, Layout]) -> None:
    for name, layout in layouts.items():
        if (reason := refusal(name, layout)) is not None:
            raise UserError(
                f"{name} cannot become LoRA: {reason}; merge the adapter (flora merge), or write --to kohya or "
                "--to dense"
            )

    biases = lone_biases(adapter) + [name for name in adapter.extras if name.endswith(TOKEN_ROWS)]
    if biases:
        more = f" and {len(biases) - 1} more" if biases[1:] else ""

        raise UserError(
            f"the adapter also trained {biases[0]}{more}, which portable "
            "LoRA (bias='none') cannot hold; merge the adapter (flora merge), or leave them out with --drop-extras"
        )

    transposed = [name for name, layout in layouts.items() if _is_transposed(layout)]
    raw = [name for name, layout in layouts.items() if is_raw(name, layout)]
    if transposed and raw:
        raise UserError(
            f"{transposed[0]} is stored as (in, out) and {raw[0]} is a raw parameter; PEFT's LoRA cannot hold both "
            "in one adapter; merge the adapter (flora merge)"
        )


def _is_transposed(layout: Layout) -> bool:
    return layout.kind == "linear" and layout.axes == ("in", "out")


def _pair(entry: Entry, layout: Layout) -> _Pair:
    form = entry.stored_form()

    if layout.kind == "experts":
        if layout.axes != ("expert", "out", "in"):
            form = swap(form, 1, 2)

        return _Pair("experts", *split_stack(form, entry.scale))

    # (vocab, dim) is A^T B^T, and the scale belongs to B.
    if layout.kind == "embedding":
        return _Pair("embedding", *split(swap(form, 0, 1), entry.scale))

    return _Pair("plain", *split(swap(form, 0, 1) if _is_transposed(layout) else form, entry.scale))


def _tensors(pair: _Pair, rank: int) -> dict[str, Tensor]:
    if pair.kind == "experts":
        up, down = pad(pair.up, 2, rank), pad(pair.down, 1, rank)
        # The expert fastest.
        packed = up.permute(1, 2, 0).reshape(up.shape[1], -1)
        return {"lora_A.weight": down.reshape(-1, down.shape[2]), "lora_B.weight": packed}

    up, down = pad(pair.up, 1, rank), pad(pair.down, 0, rank)

    if pair.kind == "embedding":
        return {"lora_embedding_A": down, "lora_embedding_B": up}

    return {"lora_A.weight": down, "lora_B.weight": up.reshape(*up.shape, *(1,) * (down.ndim - 2))}


def _stem(name: str, layouts: Mapping[str, Layout]) -> str:
    """Where PEFT keeps the pair."""
    if not is_raw(name, layouts[name]):
        return name.removesuffix(".weight")
    return nested(name, {other: layout.place for other, layout in layouts.items() if is_raw(other, layout)})


def _config(adapter: Adapter, layouts: Mapping[str, Layout], rank: int) -> dict[str, Any]:
    raw = sorted(name for name, layout in layouts.items() if is_raw(name, layout))
    kept = {
        key: adapter.config.get(key) for key in ("task_type", "base_model_name_or_path", "revision", "auto_mapping")
    }
    return {
        **kept,
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
        "inference_mode": True,
        "fan_in_fan_out": any(_is_transposed(layout) for layout in layouts.values()),
        "modules_to_save": saved_modules(adapter) or None,
        "target_modules": sorted(name.removesuffix(".weight") for name in layouts if name not in raw),
        "target_parameters": raw or None,
    }


def _remarks(adapter: Adapter, rank: int) -> list[str]:
    remarks = []
    if adapter.extras:
        remarks.append("modules_to_save: read by PEFT only; servers need --drop-extras or a merged model")
    if rank > 16:
        remarks.append(f"rank {rank}: start vLLM with --max-lora-rank {max(32, 1 << (rank - 1).bit_length())}")
    return remarks


# ---- reading ----


def detect(path: Path) -> bool:
    """Whether the path is a folder with a PEFT LoRA adapter."""
    return (path / CONFIG).is_file() and read_object(path / CONFIG).get("peft_type") == "LORA"


def read(path: Path, layouts: Mapping[str, Layout] | None = None) -> Adapter:
    """Reads any PEFT LoRA adapter as Tucker forms, exactly: lora_B is the factor of the output mode, lora_A the core.

    Args:
        path: the folder.
        layouts: of the base model; only several raw parameters in one module, and stacks of experts, need it.

    Raises:
        ValueError: a file is corrupt or foreign, the config asks for more than LoRA (DoRA), or a layout is missing.
    """
    config = read_config(path)
    used = next((key for key in _REFUSED if config.get(key)), None)
    if used is not None:
        raise UserError(
            f"{path / CONFIG} has {used}={config[used]!r}, which is not a fixed change of the weights; merge it"
        )

    start = config.get("init_lora_weights", True)
    if not any(start is plain or start == plain for plain in _PLAIN_STARTS):
        raise UserError(
            f"{path / CONFIG} has init_lora_weights={start!r}: when PEFT loads such an adapter it also changes the "
            "base weights, so lora_A and lora_B alone are not the change; save it with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...), or merge it with PEFT"
        )

    tensors, metadata = read_tensors(path / WEIGHTS)
    check_prefix(tensors, path / WEIGHTS)
    noted = read_note(metadata, NOTE, path / WEIGHTS)
    if layouts is None and noted is not None:
        layouts = {name: layout_from_json(name, value) for name, value in noted.items()}

    wrapped = wrapped_modules(tensors)
    ups, downs, others = _sort(tensors)
    for pair in (ups, downs):
        check_form_tensors(pair, path / WEIGHTS)

    if not ups or ups.keys() != downs.keys():
        odd = sorted(ups.keys() ^ downs.keys())
        raise UserError(
            f"{path / WEIGHTS}: {f'{odd[0]} lacks lora_A or lora_B' if odd else 'it has no lora_A and lora_B'}"
        )

    with naming(path):
        scales = _Scales(config)

    weights: dict[str, Entry] = {}
    stems = {stem: module_of(stem.lstrip("*"), wrapped) for stem in sorted(ups)}
    for stem in stems:
        name, layout = _identify(stem, stems, config, layouts, downs[stem].ndim)
        if name in weights:
            raise UserError(f"{path / WEIGHTS} has two pairs for {name}; the file was edited, copy it again")

        weights[name] = _join(name, ups[stem], downs[stem], layout, scales)

    extras = whole_tensors(others, wrapped, path)
    warn_of_lost_modules(config, extras, path)

    return Adapter(weights, extras, config)


def _sort(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Module path (an embedding's marked by a leading ``*``) -> lora_B and lora_A; and the other tensors."""
    ups: dict[str, Tensor] = {}
    downs: dict[str, Tensor] = {}
    others = {}
    for key, value in tensors.items():
        path = key.removeprefix(PREFIX)
        for suffix, sink, mark in (
            (".lora_A.weight", downs, ""),
            (".lora_B.weight", ups, ""),
            (".lora_embedding_A", downs, "*"),
            (".lora_embedding_B", ups, "*"),
        ):
            if path.endswith(suffix):
                sink[mark + path.removesuffix(suffix)] = value
                break
        else:
            if ".lora_" in path:
                raise UserError(f"{key} is not a tensor of plain LoRA; merge this adapter with PEFT instead")
            others[key] = value

    return ups, downs, others


def _identify(
    stem: str, stems: Mapping[str, str], config: Mapping[str, Any], layouts: Mapping[str, Layout] | None, ndim: int
) -> tuple[str, Layout]:
    """The weight that a pair belongs to, and its layout; ``stems`` has the module of each pair."""
    module = stems[stem]

    if stem.startswith("*"):
        return f"{module}.weight", Layout("embedding", ("vocab", "dim"))

    raw = [name for name in config.get("target_parameters") or [] if _names_parameter(module, name)]
    if not raw or any(f"{module}.weight".endswith(name) for name in raw if name.endswith(".weight")):
        if layouts is not None and f"{module}.weight" in layouts:
            return f"{module}.weight", layouts[f"{module}.weight"]
        if ndim - 2 in KERNELS:
            return f"{module}.weight", Layout("conv", ("out", "in", *KERNELS[ndim - 2]))
        return f"{module}.weight", Layout("linear", ("in", "out") if config.get("fan_in_fan_out") else ("out", "in"))

    names = [f"{module}.{name.rpartition('.')[2]}" for name in raw]
    if layouts is None or any(name not in layouts for name in names):
        raise UserError(f"{names[0]}: LoRA files do not record how raw parameters are laid out; {GIVE_BASE}")

    names.sort(key=lambda name: layouts[name].place)
    wrappers = sorted(
        (other for other, owner in stems.items() if owner == module), key=len, reverse=True
    )  # innermost first
    if len(wrappers) > len(names):
        raise UserError(
            f"{module} has {len(wrappers)} pairs, and target_parameters names {len(names)} of its parameters"
        )

    name = names[wrappers.index(stem)]

    return name, layouts[name]


def _names_parameter(module: str, target: str) -> bool:
    """Whether a target parameter may belong to this module: its owner's path is a suffix of the module's."""
    owner = target.rpartition(".")[0]
    return bool(owner) and (module == owner or module.endswith(f".{owner}"))


class _Scales:
    """The rank and the scale of each weight, as the config says.

    PEFT asks for a layer by the name of its module, and for a raw parameter by the parameter's own.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.rank_of_all, self.ranks = _numbers_of(config, "rank_pattern", "r")
        self.alpha_of_all, self.alphas = _numbers_of(config, "alpha_pattern", "lora_alpha")
        self.by_root = bool(config.get("use_rslora"))

    def rank(self, name: str, layout: Layout) -> int:
        """Of the pair of a weight."""
        found = self.ranks.find([_spoken(name, layout)])
        if found is None:
            return int(self.rank_of_all)
        return int(found.value)

    def scale(self, name: str, layout: Layout) -> float:
        """What PEFT multiplies the product of a pair with."""
        found = self.alphas.find([_spoken(name, layout)])
        alpha = self.alpha_of_all
        if found is not None:
            alpha = found.value

        rank = self.rank(name, layout)
        if self.by_root:
            return float(alpha) / math.sqrt(rank)
        return float(alpha) / rank


def _spoken(name: str, layout: Layout) -> str:
    """What the patterns of a config call a weight."""
    if is_raw(name, layout):
        return name
    return name.rpartition(".")[0]


def _join(name: str, up: Tensor, down: Tensor, layout: Layout, scales: _Scales) -> Entry:
    rank, scale = scales.rank(name, layout), scales.scale(name, layout)

    if layout.kind == "experts":
        count = down.shape[0] // rank
        fits = up.ndim == down.ndim == 2 and count * rank == down.shape[0] == up.shape[1]
        if not fits:
            raise UserError(f"{name}: lora_A {tuple(down.shape)} and lora_B {tuple(up.shape)} do not fit rank {rank}")

        form = join_stack(up.reshape(up.shape[0], -1, count).permute(2, 0, 1), down.reshape(count, -1, down.shape[1]))
        return Entry(
            form if layout.axes == ("expert", "out", "in") else swap(form, 1, 2), scale, replace(layout, fold=None)
        )

    if up.ndim < 2 or down.ndim < 2 or up.shape[1] != down.shape[0] or columns(up) is None:
        raise UserError(
            f"{name}: lora_A {tuple(down.shape)} and lora_B {tuple(up.shape)} do not fit; the file is mixed up, "
            "copy it again"
        )

    # The scale is alpha over the rank of the config, so another rank than the tensors' would be another change.
    if down.shape[0] != rank:
        raise UserError(
            f"{name}: lora_A {tuple(down.shape)} has the rank {down.shape[0]}, and {CONFIG} says {rank}; copy both "
            "files again, from one save"
        )

    form = Tucker(down, (columns(up), *(None,) * (down.ndim - 1)))

    if layout.kind == "embedding" or _is_transposed(layout):
        form = swap(form, 0, 1)

    return Entry(trim(form), scale, replace(layout, fold=None))


def _numbers_of(config: Mapping[str, Any], pattern: str, field: str) -> tuple[float, Patterns[float]]:
    """What a config says of all layers, and of single ones.

    Raises:
        UserError: a value is no positive number.
    """
    common = config.get(field, DEFAULT_RANK)
    listed = config.get(pattern) or {}
    if not isinstance(listed, Mapping):
        raise UserError(f"{pattern} is {listed!r}, expected names and numbers; the file was edited")

    for key, value in {field: common, **listed}.items():
        check_number(value, str(key))

        if field == "r" and (value < 1 or value != int(value)):
            raise UserError(f"{key} has the rank {value!r}, expected a whole number from 1")

    return common, Patterns(listed, pattern)
