"""The checkpoints of the paper's authors, in their three layouts; the scale is not stored and has to be given.

The convolution code keeps ``<module>.flora_layer.param_G`` and ``param_0 ..`` in the order (in, out, *kernel); the NLU
code ``<module>.lora_A (r, in)``, ``lora_E (r, r)``, ``lora_B (out, r)``; the LLM code the same with ``.weight``.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from flora.convert.adapter import Adapter, Entry
from flora.convert.formats.pairs import swap
from flora.errors import UserError
from flora.layers.entries import check_number
from flora.layers.layout import Layout
from flora.storage.tensors import check_form_tensors, open_tensors, read_pickled, read_tensors
from flora.tucker.form import Tucker

_CONV = re.compile(r"(?P<module>.+)\.flora_layer\.param_(?P<part>G|\d+)")
_MATRIX = re.compile(r"(?P<module>.+)\.lora_(?P<part>A|E|B)(?:\.weight)?")
PICKLED = (".pt", ".pth", ".bin", ".ckpt")


def detect(path: Path) -> bool:
    """Whether the path is a file with the authors' keys."""
    if not path.is_file():
        return False
    if path.suffix in PICKLED:
        return _is_official(list(read_pickled(path)))
    if path.suffix != ".safetensors":
        return False

    with open_tensors(path) as handle:
        return _is_official(list(handle.keys()))


def _is_official(keys: list[str]) -> bool:
    return any(key.endswith((".param_G", ".lora_E", ".lora_E.weight")) for key in keys)


def read(path: Path, layouts: Mapping[str, Layout] | None = None, *, scale: float | None = None) -> Adapter:
    """Reads a checkpoint of any of the three layouts, exactly.

    Args:
        path: a ``.pt``, ``.pth``, ``.bin`` or ``.safetensors`` file.
        layouts: of the base model, for the kinds of layers and their groups.
        scale: the constant s that it was trained with, or alpha / r for the NLU and LLM code.

    Raises:
        ValueError: no scale is given, the file is corrupt, or a layer's tensors are incomplete or do not fit.
    """
    if scale is None:
        raise UserError(
            f"{path}: the authors' checkpoints do not store the scale; give it (scale=..., --scale): the constant s of "
            "the convolution code, alpha / r of the NLU and LLM code"
        )

    check_number(scale, "scale")

    tensors = read_pickled(path) if path.suffix in PICKLED else read_tensors(path)[0]

    parts: dict[str, dict[str, Tensor]] = {}
    passed = []
    for key, value in tensors.items():
        found = _CONV.fullmatch(key) or _MATRIX.fullmatch(key)
        if found is None:
            passed.append(key)
        else:
            check_form_tensors({key: value}, path)
            parts.setdefault(found["module"].removeprefix("base_model.model."), {})[found["part"]] = value

    others = [key for key in passed if ".base_layer." not in key]
    if others:
        warnings.warn(
            f"{path}: {len(others)} tensors that belong to no adapter were ignored (first: {others[0]}); load what of "
            "them was trained, such as a head, yourself",
            stacklevel=3,
        )

    forms = {f"{module}.weight": _form(module, found) for module, found in sorted(parts.items())}
    adapter = Adapter({name: Entry(form, scale) for name, form in forms.items()})

    if layouts is not None:
        return adapter.with_layouts(layouts)

    return _assume(adapter)


def _form(module: str, parts: Mapping[str, Tensor]) -> Tucker:
    if "G" not in parts:
        needed = {"A", "E", "B"}
    else:
        needed = {"G", *(str(mode) for mode in range(parts["G"].ndim))}

    if parts.keys() != needed:
        raise UserError(
            f"{module} has the parts {', '.join(sorted(parts))}, expected {', '.join(sorted(needed))}; the file "
            "is incomplete"
        )

    try:
        if "G" not in parts:
            return Tucker(parts["E"], (parts["B"], parts["A"].T))

        core = parts["G"]
        form = Tucker(core, tuple(parts[str(mode)] for mode in range(core.ndim)))
    except ValueError as error:
        raise UserError(f"{module}: {error}") from None

    return swap(form, 0, 1)


def _assume(adapter: Adapter) -> Adapter:
    """Their code adapts only nn.Linear and ungrouped nn.Conv2d, so the shape determines the layout."""
    kinds = {2: Layout("linear", ("out", "in")), 4: Layout("conv", ("out", "in", "kh", "kw"))}
    weights = {name: replace(entry, layout=kinds.get(len(entry.shape))) for name, entry in adapter.weights.items()}
    return Adapter(weights)
