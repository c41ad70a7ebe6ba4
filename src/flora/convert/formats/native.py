"""Our own folder: adapter_config.json and adapter_model.safetensors, as PEFT saves a FLoRA adapter."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flora.convert.adapter import Adapter, Entry
from flora.convert.formats.adapter_config import naming, read_config, warn_of_lost_modules
from flora.errors import UserError
from flora.layers.axes import roles_of
from flora.layers.entries import Entries
from flora.layers.layout import Layout, from_shape, is_raw, layout_from_json
from flora.layers.names import PREFIX, TOKEN_ROWS, check_prefix, in_file, module_of, nested, wrapped_modules
from flora.layers.patterns import exact_pattern, names_of
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
from flora.tucker.fold import parse_fold
from flora.tucker.form import Tucker, mode_product
from flora.tucker.ranks import resolve

_KEY = re.compile(r"(?:(?P<module>.*)\.)?tucker_(?P<weight>[^.]+)\.(?P<part>core|factor_(?P<mode>\d+))")
# The one adapted weight of a layer that is not the layer's own, and its name in a file.
_ATTENTION_OUT = "out_proj.weight"
_ATTENTION_OUT_KEY = "out_proj_weight"


def detect(path: Path) -> bool:
    """Whether the path is a folder with a FLoRA adapter."""
    return (path / CONFIG).is_file() and read_object(path / CONFIG).get("peft_type") == "TUCKER"


def read(path: Path) -> Adapter:
    """Reads a folder that ``save_pretrained`` wrote.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is truncated or corrupt, has foreign keys or NaN, or its factors do not fit their core.
    """
    config = read_config(path)
    if config.get("peft_type") != "TUCKER":
        raise UserError(f"{path / CONFIG} has peft_type {config.get('peft_type')!r}, expected 'TUCKER'")

    tensors, metadata = read_tensors(path / WEIGHTS)
    noted = read_note(metadata, NOTE, path / WEIGHTS)
    recorded = config.get("layout") if noted is None else noted

    check_prefix(tensors, path / WEIGHTS)
    check_form_tensors({key: value for key, value in tensors.items() if _KEY.search(key)}, path / WEIGHTS)
    wrapped = wrapped_modules(tensors)
    parts: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    names: dict[str, tuple[str, ...]] = {}
    stems = set()
    for key, value in tensors.items():
        found = _KEY.fullmatch(key.removeprefix(PREFIX))
        if found is None:
            others[key] = value
            continue

        leaf = _ATTENTION_OUT if found["weight"] == _ATTENTION_OUT_KEY else found["weight"]

        spoken = names_of(module_of(found["module"] or "", wrapped), leaf)
        names[spoken[0]] = spoken
        stems.add(key.removesuffix(found["part"]))
        add_once(parts.setdefault(spoken[0], {}), found["part"], value, f"{path / WEIGHTS}: {key}")

    if not parts:
        raise UserError(
            f"{path / WEIGHTS} has no Tucker tensors (keys with '.tucker_<weight>.core'); it begins with "
            f"{next(iter(tensors), 'nothing')!r}; save the adapter with model.save_pretrained(folder)"
        )

    for key in others:
        if any(key.startswith(stem) for stem in stems):
            raise UserError(
                f"{path / WEIGHTS}: {key} is no part of an adapter that this version knows (core, factor_0, ...); "
                "update flora-peft if a newer version wrote it, else copy the file again"
            )

    with naming(path):
        entries = Entries(config)

    weights = {name: _entry(names[name], tensors, entries, recorded) for name, tensors in sorted(parts.items())}
    extras = whole_tensors(others, wrapped, path)
    warn_of_lost_modules(config, extras, path)

    return Adapter(weights, extras, config)


def whole_tensors(tensors: Mapping[str, Tensor], wrapped: Collection[str], folder: Path) -> dict[str, Tensor]:
    """What a file holds beside its adapter: the name in the base model -> what takes its place.

    Args:
        tensors: of the file, by key, without those of the adapter.
        wrapped: where the file has PEFT's wrappers.
        folder: of the adapter, for messages.
    """
    found: dict[str, Tensor] = {}
    for key, value in tensors.items():
        # bias="all" also saves the frozen twin of a module in modules_to_save.
        if ".original_module." not in key:
            add_once(found, module_of(key, wrapped), value, f"{folder / WEIGHTS}: {key}")

    return found


def add_once(found: dict[str, Tensor], name: str, value: Tensor, about: str) -> None:
    """Raises a UserError if the file has two tensors for one name: either could be the right one."""
    # PEFT saves the bias of a module that is trained whole twice where bias="all".
    if name in found and not torch.equal(found[name], value):
        raise UserError(f"{about} stands there twice, with different numbers; the file was edited, copy it again")
    found[name] = value


def _entry(
    names: tuple[str, ...], parts: Mapping[str, Tensor], entries: Entries, recorded: Mapping[str, Any] | None
) -> Entry:
    name = names[0]

    if "core" not in parts:
        raise UserError(f"{name} has factors but no core in {WEIGHTS}; the file is incomplete, copy it again")

    core = parts["core"]
    modes = {int(part.removeprefix("factor_")): value for part, value in parts.items() if part != "core"}
    if modes and max(modes) >= core.ndim:
        raise UserError(
            f"{name} has factor_{max(modes)} but a core of {core.ndim} dimensions {tuple(core.shape)}; the file is "
            "mixed up, copy it again"
        )

    is_inner = name == f"{names[-1]}.{_ATTENTION_OUT}"

    try:
        form = Tucker(core, tuple(modes.get(mode) for mode in range(core.ndim)))
        layout = _layout(names, form, entries, recorded, is_inner=is_inner)
        entry = Entry(form, entries.scale(names), layout)
        expected = _ranks(entry, names, entries)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None

    # The scale can be alpha over the rank of the config, so with another rank than the tensors' it would be another.
    if expected != form.ranks:
        raise UserError(
            f"{name} has the shape {form.shape} and the ranks {form.ranks} in {WEIGHTS}, and by {CONFIG} it would have "
            f"the ranks {expected}; copy both files again, from one save"
        )

    return entry


def _ranks(entry: Entry, names: tuple[str, ...], entries: Entries) -> tuple[int, ...]:
    """The ranks that the config gives a weight of this shape; those it has where it is not known what its modes are."""
    wanted, layout = entries.rank(names), entry.layout

    if not isinstance(wanted, int):
        return tuple(wanted)
    if layout is None or len(layout.axes) != len(entry.shape):
        return entry.ranks

    fold = None
    if layout.fold is not None:
        fold = parse_fold(layout.fold, entry.shape, names[0])

    roles = roles_of(layout.axes, fold)

    return resolve(entry.form.shape, wanted, entries.kernel_r, roles=roles, name=names[0])


def _layout(
    names: tuple[str, ...], form: Tucker, entries: Entries, recorded: Mapping[str, Any] | None, *, is_inner: bool
) -> Layout | None:
    """What the file's metadata or the config record (the usual layouts are left out), and the fold of the config."""
    name, fold = names[0], entries.fold(names)

    if is_inner:
        return Layout("attention", ("out", "in"), fold=fold)

    if recorded is not None and name in recorded:
        layout = layout_from_json(name, recorded[name])

        if fold is None:
            return layout
        return replace(layout, fold=fold)

    if recorded is None and fold is None:
        return None

    return replace(from_shape(name, Entry(form, layout=Layout("", (), fold=fold)).shape), fold=fold)


def whole_modes(form: Tucker) -> Tucker:
    """The same tensor with every factor that is not smaller than its mode multiplied into the core."""
    core, factors = form.core, list(form.factors)
    for mode, factor in enumerate(form.factors):
        if factor is not None and factor.shape[1] >= factor.shape[0]:
            core, factors[mode] = mode_product(core, factor, mode), None
    return Tucker(core.contiguous(), tuple(factors))


def write(adapter: Adapter, folder: Path) -> None:
    """Writes the folder (which must not exist); the config states the ranks and the scale of every weight.

    Raises:
        OSError: the folder cannot be written.
    """
    layouts = {name: entry.layout for name, entry in adapter.weights.items()}
    raw = _raw_places(layouts)
    wrappers = _wrappers(layouts, raw)
    tensors: dict[str, Tensor] = {PREFIX + in_file(name, wrappers): value for name, value in adapter.extras.items()}
    forms = {name: whole_modes(entry.form) for name, entry in adapter.weights.items()}
    for name, form in forms.items():
        stem = PREFIX + _stem(name, layouts, raw, wrappers)
        tensors[f"{stem}.core"] = form.core
        tensors.update({f"{stem}.factor_{mode}": f for mode, f in enumerate(form.factors) if f is not None})

    folder.mkdir()
    recorded = adapter.recorded_layouts()
    note = {} if recorded is None else {NOTE: json.dumps(recorded, sort_keys=True)}

    write_tensors(folder / WEIGHTS, tensors, note)
    write_json(folder / CONFIG, _config(adapter, forms), sort_keys=True)


# Fields of a config that the names, ranks and scales of its weights stand for.
_RESOLVED = (
    "alpha",
    "budget",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
)
# Kinds of modules that hold several adapted parameters in one wrapper.
_ROWS = ("attention", "recurrent")


def _raw_places(layouts: Mapping[str, Layout | None]) -> dict[str, int]:
    """Each raw parameter -> its place among those of its module."""
    return {
        name: 0 if layout is None else layout.place
        for name, layout in layouts.items()
        if "." in name and is_raw(name, layout) and (layout is None or layout.kind not in _ROWS)
    }


def _wrappers(layouts: Mapping[str, Layout | None], raw: Mapping[str, int]) -> Counter[str]:
    """How many wrappers PEFT puts around each module: one around a layer, one for each raw parameter of a module."""
    layers = {_owner_module(name, layout) for name, layout in layouts.items() if name not in raw}
    return Counter([*layers, *(name.rpartition(".")[0] for name in raw)])


def _stem(name: str, layouts: Mapping[str, Layout | None], raw: Mapping[str, int], wrappers: Mapping[str, int]) -> str:
    """The path of a weight's tensors in the file."""
    layout, leaf = layouts[name], name.rpartition(".")[2]
    if layout is not None and layout.kind == "attention" and leaf == "weight":
        return f"{_dotted(in_file(_owner_module(name, layout), wrappers))}tucker_{_ATTENTION_OUT_KEY}"

    module = in_file(name.rpartition(".")[0], wrappers)

    if name in raw:
        module += nested(name, raw).removeprefix(name.rpartition(".")[0])

    return f"{_dotted(module)}tucker_{leaf}"


def _dotted(module: str) -> str:
    if module:
        return f"{module}."
    return ""


def _owner_module(name: str, layout: Layout | None) -> str:
    """The module that is adapted: of an attention's output projection, the attention."""
    module = name.rpartition(".")[0]
    if layout is not None and layout.kind == "attention" and name.endswith(".weight"):
        module = module.rpartition(".")[0]
    return module


def _config(adapter: Adapter, forms: Mapping[str, Tucker]) -> dict[str, Any]:
    kept = adapter.config if adapter.config.get("peft_type") == "TUCKER" else {}

    scales = {name: entry.scale for name, entry in adapter.weights.items()}
    common = Counter(scales.values()).most_common(1)[0][0] if scales else 1.0

    layouts = {name: entry.layout for name, entry in adapter.weights.items()}
    rows = {name for name, layout in layouts.items() if layout is not None and layout.kind in _ROWS}
    layered = {name for name in forms if name in rows or not is_raw(name, layouts[name])}
    modules = sorted({_owner_module(name, layouts[name]) for name in layered})
    parameters = sorted(forms.keys() - layered)
    folds = {exact_pattern(name): fold for name, layout in layouts.items() if (fold := _stated_fold(name, layout))}

    return {
        "task_type": adapter.config.get("task_type"),
        "base_model_name_or_path": adapter.config.get("base_model_name_or_path"),
        "trainable_token_indices": adapter.config.get("trainable_token_indices"),
        "modules_to_save": saved_modules(adapter) or None,
        "bias": _bias(adapter),
        "r": 8,
        "kernel_r": None,
        **{key: value for key, value in kept.items() if key not in _RESOLVED},
        # A name without a dot would also mean every deeper module of that name.
        "target_modules": [name if "." in name else exact_pattern(name) for name in modules] or None,
        "target_parameters": parameters or None,
        "peft_type": "TUCKER",
        "inference_mode": True,
        "scale": common,
        "scale_pattern": {_owner(name): scale for name, scale in scales.items() if scale != common},
        "rank_pattern": {_owner(name): list(form.ranks) for name, form in forms.items()},
        **({"fold": folds} if folds else {}),
    }


def _stated_fold(name: str, layout: Layout | None) -> str | None:
    """The fold that the config has to state: without a word, heads and gates are folded out."""
    if layout is None:
        return None
    if layout.fold is not None:
        return layout.fold
    # One axis for each dimension is no fold; a weight has come so from a format that knows none.
    if layout.kind in _ROWS and not name.endswith(".weight"):
        return " ".join(layout.axes)

    return None


def _owner(name: str) -> str:
    """The pattern for a weight: its module's name, but for the inner weight of an attention."""
    return exact_pattern(name if name.endswith("out_proj.weight") else name.removesuffix(".weight"))


def _bias(adapter: Adapter) -> str:
    """The word of the config for the biases in ``extras``: of adapted layers only, of others too, or none."""
    adapted = {name.rpartition(".")[0] for name in adapter.weights}
    lone = lone_biases(adapter)
    if any(name.rpartition(".")[0] not in adapted for name in lone):
        return "all"
    if lone:
        return "tucker_only"

    return "none"


def lone_biases(adapter: Adapter) -> list[str]:
    """The tensors in ``extras`` that are not part of a whole module: biases, and what adapted layers have."""
    adapted = {name.rpartition(".")[0] for name in adapter.weights}
    leaves: dict[str, set[str]] = {}
    for name in adapter.extras:
        leaves.setdefault(name.rpartition(".")[0], set()).add(name.rpartition(".")[2])

    listed = set(adapter.config.get("modules_to_save") or ())

    return [
        name
        for name in adapter.extras
        if (owner := name.rpartition(".")[0]) in adapted
        or (leaves[owner] == {"bias"} and not any(owner == key or owner.endswith(f".{key}") for key in listed))
    ]


def saved_modules(adapter: Adapter) -> list[str]:
    """The modules whose whole tensors are in ``extras``; those of a bias belong to ``bias``, as PEFT has it."""
    listed = adapter.config.get("modules_to_save")
    if listed:
        return list(listed)
    lone = set(lone_biases(adapter))
    whole = [name for name in adapter.extras if name not in lone and not name.endswith(TOKEN_ROWS)]
    return sorted({name.rpartition(".")[0] for name in whole})
