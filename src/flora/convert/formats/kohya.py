"""LyCORIS / Kohya files: ``<prefix>_<path_with_underscores>.lora_up.weight``, ``lora_down``, ``lora_mid``, ``alpha``.

``lora_mid`` holds the core of a Conv2d whose kernel is not 1x1 (LyCORIS, ComfyUI, A1111, InvokeAI take it there and
nowhere else); other matrices and convolutions, grouped ones too, become plain up and down; what is neither becomes
``diff``, the whole change. All three are exact. The scale is in lora_up and alpha is the rank, so that the reader's own
scale is exactly 1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from flora.convert.adapter import Adapter, Entry
from flora.convert.arithmetic import dense_change, narrow
from flora.convert.formats.pairs import columns, pad, split, trim
from flora.errors import UserError
from flora.layers.layout import Layout, layout_from_json
from flora.layers.names import GIVE_BASE
from flora.storage.tensors import NOTE, check_form_tensors, open_tensors, read_note, read_tensors, write_tensors
from flora.tucker.form import Tucker, mode_product

PREFIXES = (
    "lycoris",
    "lora_unet",
    "lora_te",
    "lora_te1",
    "lora_te2",
    "lora_te3",
    "lora_transformer",
    "lora_prior_unet",
    "lora_prior_te",
    "lora",
)
_PARTS = ("lora_up.weight", "lora_down.weight", "lora_mid.weight", "alpha", "diff")
_MATRICES = ("linear", "embedding", "embedding_bag", "attention", "recurrent")


def key_of(name: str, prefix: str) -> str:
    """The key that stands for a weight: ``conv_in.weight`` -> ``lora_unet_conv_in``."""
    return f"{prefix}_{name.removesuffix('.weight').replace('.', '_')}"


def write(adapter: Adapter, path: Path, *, prefix: str = "lycoris", mid: bool = True) -> list[str]:
    """Writes the file.

    Args:
        adapter: what to write.
        path: of the safetensors file (which must not exist).
        prefix: of every key: "lycoris", or "lora_unet", "lora_te" and the like for the programs that ask for it.
        mid: False writes plain up and down where ``lora_mid`` would be smaller: sd-scripts and diffusers read no
            ``lora_mid``.

    Returns:
        What the user should know, such as which readers will not take the file.

    Raises:
        ValueError: the adapter has whole tensors (biases, modules_to_save), or two weights would have one key.
    """
    if adapter.extras:
        raise UserError(
            f"the adapter holds {len(adapter.extras)} full tensors (first: {next(iter(adapter.extras))}), which Kohya "
            "files have no key for; merge the adapter (flora merge), or leave them out with --drop-extras"
        )

    tensors: dict[str, Tensor] = {}
    owners: dict[str, str] = {}
    remarks = []
    for name, entry in adapter.weights.items():
        stem = key_of(name, prefix)
        if stem in owners:
            raise UserError(
                f"{owners[stem]} and {name} would both have the key {stem}; Kohya names cannot tell them apart"
            )

        owners[stem] = name
        parts = _parts(name, entry, adapter.layout(name), mid)
        for part, value in parts.items():
            # A rank above 256 is not always a number of bfloat16.
            dtype = torch.float32 if part == "alpha" else entry.form.core.dtype
            tensors[f"{stem}.{part}"] = narrow(name, value, dtype)

        if "diff" in parts:
            remarks.append(f"{name}: the dense change as .diff (LyCORIS, ComfyUI)")

    if any(key.endswith("lora_mid.weight") for key in tensors):
        remarks.append(
            "lora_mid: read by LyCORIS, ComfyUI, A1111, InvokeAI; for sd-scripts and diffusers write --no-mid"
        )

    note = {name: replace(adapter.layout(name), fold=None).to_json() for name in adapter.weights}
    write_tensors(path, tensors, {NOTE: json.dumps(note, sort_keys=True)})

    return remarks


def _parts(name: str, entry: Entry, layout: Layout, mid: bool) -> dict[str, Tensor]:
    form = entry.stored_form()
    if layout.is_plain_conv and len(layout.axes) == 4 and form.shape[2:] != (1, 1) and mid:
        return _with_mid(form, entry.scale)

    if layout.is_plain_conv or (layout.kind in _MATRICES and len(layout.axes) == 2):
        up, down = split(form, entry.scale)
        alpha = torch.tensor(float(down.shape[0]))
        up = up.reshape(*up.shape, *(1,) * (down.ndim - 2))
        return {"lora_up.weight": up, "lora_down.weight": down, "alpha": alpha}

    return {"diff": dense_change(name, entry)}


def _with_mid(form: Tucker, scale: float) -> dict[str, Tensor]:
    core = form.core.double()
    for mode, factor in enumerate(form.factors[2:], start=2):
        if factor is not None:
            core = mode_product(core, factor.double(), mode)

    up, down = (
        torch.eye(core.shape[mode], dtype=torch.float64) if factor is None else factor.double()
        for mode, factor in enumerate(form.factors[:2])
    )
    rank = max(core.shape[:2])
    up, down = pad(scale * up, 1, rank), pad(down.T, 0, rank)

    return {
        "lora_up.weight": up[..., None, None],
        "lora_down.weight": down[..., None, None],
        "lora_mid.weight": pad(pad(core, 0, rank), 1, rank),
        "alpha": torch.tensor(float(rank)),
    }


def detect(path: Path) -> bool:
    """Whether the path is a safetensors file with Kohya's keys."""
    if not (path.is_file() and path.suffix == ".safetensors"):
        return False
    with open_tensors(path) as handle:
        return any(key.partition(".")[2] in _PARTS for key in handle.keys())  # noqa: SIM118 (not a dict)


def read(path: Path, layouts: Mapping[str, Layout] | None = None) -> Adapter:
    """Reads LoRA, LoCon with or without Tucker, and ``diff``, exactly.

    Args:
        path: of the safetensors file.
        layouts: of the base model, to turn its keys back into names; a file that we wrote records them.

    Raises:
        ValueError: the file is corrupt, has keys of another method (LoHa, LoKr, DoRA), or the names cannot be told.
    """
    tensors, metadata = read_tensors(path)

    # A file that we wrote notes every name, so any one prefix will do there.
    noted = read_note(metadata, NOTE, path)
    if layouts is None and noted is not None:
        layouts = {name: layout_from_json(name, value) for name, value in noted.items()}
    if layouts is None:
        raise UserError(f"{path}: Kohya keys have underscores for dots, so the names are ambiguous; {GIVE_BASE}")

    stems: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        stem, _, part = key.partition(".")
        if part not in _PARTS:
            raise UserError(
                f"{path} has a foreign key: {key}; only LoRA and LoCon ({', '.join(_PARTS)}) can be read; merge "
                "others with their own program"
            )

        stems.setdefault(stem, {})[part] = value

    if not stems:
        raise UserError(f"{path} has no tensors; copy or download it again")

    check_form_tensors({key: value for key, value in tensors.items() if not key.endswith(".alpha")}, path)
    names = _names(list(stems), list(layouts if noted is None else noted), PREFIXES if noted is None else (), path)
    if lacking := [name for name in names.values() if name not in layouts]:
        raise UserError(f"the base model has no weight {lacking[0]!r}; give the base model the adapter was trained on")

    weights = {names[stem]: _entry(stem, parts, layouts[names[stem]]) for stem, parts in stems.items()}

    return Adapter(dict(sorted(weights.items())))


def _names(stems: Sequence[str], names: Sequence[str], prefixes: Sequence[str], path: Path) -> dict[str, str]:
    """Key stem -> name of the weight.

    A key gives a name in full or not at all: ``lora_unet_down_fc`` is ``down.fc``, and where the model has no such
    weight it is not ``fc`` under some longer prefix. A prefix that we do not know is therefore accepted only as the
    one prefix of every key in the file.

    Raises:
        ValueError: a key is no weight's, or could be two weights', or two keys are one weight's.
    """
    meanings: dict[str, set[str]] = {}
    for prefix in (*prefixes, *_foreign_prefix(stems, names, prefixes)):
        for name in names:
            meanings.setdefault(key_of(name, prefix), set()).add(name)

    found: dict[str, str] = {}
    for stem in stems:
        meant = sorted(meanings.get(stem, ()))
        if not meant:
            raise UserError(f"{path}: no weight of the base model has the key {stem}; give the base it was trained on")

        if len(meant) > 1:
            raise UserError(
                f"{path}: the key {stem} could be {' or '.join(meant)} of the base model; convert the adapter from the "
                "file it was made from, in a format with full names"
            )

        found[stem] = meant[0]

    owners = {name: stem for stem, name in found.items()}
    for stem, name in found.items():
        if owners[name] != stem:
            raise UserError(
                f"{path}: the keys {stem} and {owners[name]} are both {name} of the base model; the file is for "
                "several models, split it first"
            )

    return found


def _foreign_prefix(stems: Sequence[str], names: Sequence[str], prefixes: Sequence[str]) -> list[str]:
    """The prefix of a file that uses none of ``prefixes``: the shortest that gives every key a weight; or nothing."""
    first = stems[0]
    if any(first.startswith(f"{prefix}_") for prefix in prefixes):
        return []

    ends = {key_of(name, "") for name in names}
    for length in (place for place, letter in enumerate(first) if letter == "_"):
        prefix = first[:length]
        if all(stem.startswith(f"{prefix}_") and stem[length:] in ends for stem in stems):
            return [prefix]

    return []


def _entry(stem: str, parts: Mapping[str, Tensor], layout: Layout) -> Entry:
    layout = replace(layout, fold=None)

    if "diff" in parts:
        diff = parts["diff"]
        if more := sorted(parts.keys() - {"diff", "alpha"}):
            raise UserError(
                f"{stem} has diff and {more[0]}, and programs differ in which of the two they take; leave one out"
            )

        return Entry(Tucker(diff, (None,) * diff.ndim), 1.0, layout)

    missing = [part for part in ("lora_up.weight", "lora_down.weight") if part not in parts]
    if missing:
        raise UserError(f"{stem} lacks {missing[0]}; the file is incomplete, copy or download it again")

    up, down, mid = parts["lora_up.weight"], parts["lora_down.weight"], parts.get("lora_mid.weight")
    rank = down.shape[0]
    alpha = parts.get("alpha", torch.tensor(0.0))
    if alpha.numel() != 1 or alpha.is_complex():
        raise UserError(
            f"{stem}.alpha has shape {tuple(alpha.shape)} and numbers of type {alpha.dtype}, expected one real number; "
            "the file was edited"
        )

    scale = float(alpha) / rank if float(alpha) else 1.0

    matrix = columns(up)
    fits = min(up.ndim, down.ndim) >= 2 and up.shape[1] == rank and matrix is not None
    if mid is not None:
        fits = fits and tuple(mid.shape[:2]) == (rank, rank) and columns(down) is not None
    if not fits:
        shapes = ", ".join(f"{part.removesuffix('.weight')} {tuple(value.shape)}" for part, value in parts.items())
        raise UserError(f"{stem}: {shapes} do not fit each other; the file is mixed up, copy or download it again")

    if mid is not None:
        form = Tucker(mid, (matrix, columns(down.transpose(0, 1)), *(None,) * (mid.ndim - 2)))
    else:
        if _is_pointwise(down, layout):
            down = down.reshape(*down.shape[:2], *(1,) * (len(layout.axes) - 2))

        form = Tucker(down, (matrix, *(None,) * (down.ndim - 1)))

    return Entry(trim(form), scale, layout)


def _is_pointwise(down: Tensor, layout: Layout) -> bool:
    """Whether a 1x1 kernel is written with other dimensions than the model's: some programs flatten it."""
    return down.ndim != len(layout.axes) and down.shape[2:].numel() == 1
