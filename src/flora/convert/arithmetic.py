"""Sums of adapters, exactly, and the size of a change without its dense tensor.

The sum of two Tucker forms is a Tucker form (``flora.tucker.form.concatenate``), so sums and differences lose nothing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flora.convert.adapter import Adapter, Entry
from flora.errors import UserError
from flora.layers.entries import check_number
from flora.layers.layout import Layout
from flora.storage.size import size
from flora.tucker.form import Tucker, concatenate, mode_product


def scale(adapter: Adapter, factor: float) -> Adapter:
    """The adapter with its changes multiplied by ``factor``.

    Raises:
        ValueError: the adapter holds whole tensors (biases, modules_to_save), which cannot be scaled.
    """
    check_number(factor, "the factor of an adapter")

    if adapter.extras and factor != 1:
        raise UserError(
            f"{next(iter(adapter.extras))} is stored in full, instead of a change, and cannot be scaled; "
            "leave such tensors out first (adapter.extras.clear())"
        )

    weights = {name: replace(entry, scale=factor * entry.scale) for name, entry in adapter.weights.items()}

    return Adapter(weights, dict(adapter.extras), dict(adapter.config))


def add(adapters: Sequence[tuple[Adapter, float]]) -> Adapter:
    """The weighted sum of adapters, exactly: their forms concatenated; the config is the first one's.

    Raises:
        ValueError: none is given, a weight has two shapes, or two adapters hold different whole tensors.
    """
    if not adapters:
        raise UserError("there is no adapter to add; give at least one")

    total = scale(*adapters[0])
    numbers = {module: found for adapter, _ in adapters for module, found in _numbered_rows(adapter).items()}
    if numbers:
        total.config["trainable_token_indices"] = numbers

    for adapter, factor in adapters[1:]:
        other = scale(adapter, factor)
        for name, entry in other.weights.items():
            held = total.weights.get(name)
            total.weights[name] = entry if held is None else _add_entries(name, held, entry)

        for name, value in other.extras.items():
            if name in total.extras and not torch.equal(total.extras[name], value):
                raise UserError(f"{name} is stored in full and differs between the adapters; keep it in one of them")

            total.extras[name] = value

    return total


def _numbered_rows(adapter: Adapter) -> dict[str, list[int]]:
    """The embeddings with trained rows, and the numbers of those, as ``trainable_token_indices`` has them."""
    return {name.removesuffix(".weight"): numbers for name, (numbers, _) in adapter.token_rows.items()}


def _add_entries(name: str, first: Entry, second: Entry) -> Entry:
    if first.groups_of_modes != second.groups_of_modes:
        first, second = (Entry(each.stored_form(), each.scale, _unfolded(each.layout)) for each in (first, second))
    if first.form.shape != second.form.shape:
        raise UserError(f"{name} has shape {first.form.shape} in one adapter and {second.form.shape} in another")
    form = concatenate([first.form, second.form], [first.scale, second.scale])
    return Entry(form, 1.0, first.layout or second.layout)


def _unfolded(layout: Layout | None) -> Layout | None:
    if layout is None:
        return None
    return replace(layout, fold=None)


def dense_change(name: str, entry: Entry) -> Tensor:
    """The dense change of a weight, for formats that hold nothing smaller.

    Raises:
        UserError: the machine has not the memory for it, or its type of numbers not the range.
    """
    stored = entry.form.core.dtype
    # Sums of half-precision numbers are made in float32.
    dtype = torch.promote_types(stored, torch.float32)
    needed = math.prod(entry.shape) * dtype.itemsize
    if needed > _memory():
        raise UserError(
            f"the dense change of {name}, of shape {entry.shape}, has {size(needed)}, more than the memory of "
            "this machine; write a format that keeps the factors (--to flora or --to lora)"
        )

    return narrow(name, in_dtype(entry, dtype).dense(), stored)


def narrow(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """One part of a change as it is written: the scale is in it, which can make it too large for its numbers.

    Raises:
        UserError: it is.
    """
    made = value.to(dtype)
    if not torch.isfinite(made).all():
        raise UserError(
            f"{name}: its change, with the scale in it, is too large for {dtype}; save the adapter in a "
            "wider type first (model.float() before save_pretrained), or write --to flora, which keeps the scale apart"
        )

    return made


def _memory() -> float:
    """Bytes of memory of the machine, or infinity where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return math.inf


def in_dtype(entry: Entry, dtype: torch.dtype) -> Entry:
    """The entry with its form in another dtype."""
    factors = tuple(None if factor is None else factor.to(dtype) for factor in entry.form.factors)
    return replace(entry, form=Tucker(entry.form.core.to(dtype), factors))


def core_in_orthonormal_basis(form: Tucker) -> Tensor:
    """The core with each factor's QR triangle multiplied in: norm and singular values are those of the dense tensor.

    shape: (min(I1, J1), ..., min(IN, JN)), in float64.
    """
    core = form.core.double()
    for mode, factor in enumerate(form.factors):
        if factor is not None:
            core = mode_product(core, torch.linalg.qr(factor.double(), mode="r").R, mode)
    return core
