"""Dense deltas: one safetensors file, the full name of each weight -> its dense change. Holds every adapter exactly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from flora.convert.adapter import Adapter, Entry
from flora.convert.arithmetic import dense_change
from flora.errors import UserError
from flora.layers.layout import Layout, layout_from_json
from flora.storage.tensors import check_form_tensors, open_tensors, read_note, read_tensors, write_tensors
from flora.tucker.form import Tucker

# The key of the metadata that holds the layouts that are known.
MARK = "flora_dense"
# Stands before the name of a tensor that replaces the base model's, instead of being added to it.
_WHOLE = "whole."


def write(adapter: Adapter, path: Path) -> list[str]:
    """Writes the file (which must not exist): ``<name>`` is added to the weight, ``whole.<name>`` replaces it.

    Raises:
        ValueError: the adapter trained rows of an embedding, which are neither.
    """
    if adapter.token_rows:
        raise UserError(
            f"the adapter trained token rows of {next(iter(adapter.token_rows))}, which are neither a change nor a "
            "whole tensor; merge the adapter (flora merge), or leave them out with --drop-extras"
        )

    tensors = {name: dense_change(name, entry) for name, entry in adapter.weights.items()}
    tensors.update({_WHOLE + name: value for name, value in adapter.extras.items()})
    note = {
        name: replace(entry.layout, fold=None).to_json()
        for name, entry in adapter.weights.items()
        if entry.layout is not None
    }
    write_tensors(path, tensors, {MARK: json.dumps(note, sort_keys=True)})

    return []


def detect(path: Path) -> bool:
    """Whether the path is a file that :func:`write` made."""
    if not (path.is_file() and path.suffix == ".safetensors"):
        return False
    with open_tensors(path) as handle:
        return MARK in (handle.metadata() or {})


def read(path: Path, layouts: Mapping[str, Layout] | None = None) -> Adapter:
    """Reads the file; every change is a form whose modes are all kept whole."""
    tensors, metadata = read_tensors(path)
    check_form_tensors({name: value for name, value in tensors.items() if not name.startswith(_WHOLE)}, path)
    noted = read_note(metadata, MARK, path) or {}
    known = {name: layout_from_json(name, value) for name, value in noted.items()}

    if layouts is not None:
        known = dict(layouts)

    weights, extras = {}, {}
    for name, value in tensors.items():
        if name.startswith(_WHOLE):
            extras[name.removeprefix(_WHOLE)] = value
        else:
            layout = known.get(name)
            plain = replace(layout, fold=None) if layout is not None else None

            weights[name] = Entry(Tucker(value, (None,) * value.ndim), 1.0, plain)

    return Adapter(weights, extras)
