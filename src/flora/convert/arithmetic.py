"""Sums of adapters, exactly, and their recompression to smaller ranks, with the error.

The sum of two Tucker forms is a Tucker form (``flora.tucker.form.concatenate``), so sums and differences lose nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flora.convert.adapter import Adapter, Entry
from flora.convert.extraction.allocation import Choice, choices, for_energy, spend
from flora.convert.extraction.finetune import Extracted, Row, check_request
from flora.errors import UserError
from flora.layers.layout import Layout
from flora.tucker.decomposition import decompose
from flora.tucker.form import Tucker, concatenate, mode_product
from flora.tucker.ranks import Ranks


def scale(adapter: Adapter, factor: float) -> Adapter:
    """The adapter with its changes multiplied by ``factor``.

    Raises:
        ValueError: the adapter holds whole tensors (biases, modules_to_save), which cannot be scaled.
    """
    if adapter.extras and factor != 1:
        raise UserError(
            f"{next(iter(adapter.extras))} is a whole tensor that replaces the base model's and cannot be scaled; "
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
                raise UserError(f"{name} is a whole tensor and differs between the adapters; keep it in one of them")
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
    return None if layout is None else replace(layout, fold=None)


def recompress(
    adapter: Adapter, *, rank: Ranks | None = None, energy: float | None = None, budget: int | None = None
) -> Extracted:
    """The nearest adapter of smaller ranks, with its errors; no dense weight is formed.

    Args:
        adapter: to be made smaller.
        rank: one int for all modes, or one per dimension; at most what a form has.
        energy: instead, the fraction of each change's squared norm to keep.
        budget: instead, parameters to spend over all layers, where they lower the total error most.

    Returns:
        The adapter, with ``.rows`` and ``.error`` as :func:`flora.extract` gives them.

    Raises:
        ValueError: not exactly one of rank, energy and budget is given.
    """
    check_request(rank, energy, budget)
    result = Extracted(extras=dict(adapter.extras), config=dict(adapter.config))
    small = {name: orthonormal(entry) for name, entry in adapter.weights.items()}
    changed = {name: form for name, form in small.items() if float(form.core.norm())}
    result.unchanged = len(small) - len(changed)
    wanted = _wanted(changed, rank, energy, budget)
    for name, form in changed.items():
        entry, norm = adapter.weights[name], float(form.core.norm())
        if 0 in wanted[name]:  # the budget leaves the layer out
            result.rows.append(Row(name, entry.shape, (), 0, norm, 1.0))
            continue
        fitted = decompose(form.core, wanted[name])
        factors = map(_chain, form.factors, fitted.factors)
        dtype = entry.form.core.dtype
        kept = Tucker(fitted.core.to(dtype), tuple(None if factor is None else factor.to(dtype) for factor in factors))
        result.weights[name] = Entry(kept, 1.0, entry.layout)
        result.rows.append(Row(name, entry.shape, kept.ranks, kept.num_params, norm, fitted.error))
    return result


def _wanted(
    forms: Mapping[str, Tucker], rank: Ranks | None, energy: float | None, budget: int | None
) -> dict[str, tuple[int, ...]]:
    """The ranks of each layer; zeros where it is left out."""
    if rank is not None:
        return {name: _lowered(rank, form) for name, form in forms.items()}
    options: dict[str, list[Choice]] = {name: choices(form.core, form.shape) for name, form in forms.items()}
    if budget is not None:
        return {name: choice.ranks for name, choice in spend(options, budget).items()}
    return {name: for_energy(listed, energy or 1.0).ranks for name, listed in options.items()}


def _lowered(rank: Ranks, form: Tucker) -> tuple[int, ...]:
    """The rank request, at most what the form has."""
    listed = [rank] * len(form.ranks) if isinstance(rank, int) else list(rank)
    if len(listed) != len(form.ranks):
        raise UserError(f"ranks {tuple(listed)} have {len(listed)} entries but the form has the ranks {form.ranks}")
    return tuple(map(min, listed, form.ranks))


def _chain(outer: Tensor | None, inner: Tensor | None) -> Tensor | None:
    if outer is None or inner is None:
        return inner if outer is None else outer
    return outer @ inner


def orthonormal(entry: Entry) -> Tucker:
    """``scale * form`` in float64 with orthonormal factors (QR), so that errors of the core are those of the tensor."""
    core = entry.scale * entry.form.core.double()
    factors: list[Tensor | None] = []
    for mode, factor in enumerate(entry.form.factors):
        if factor is None:
            factors.append(None)
            continue
        basis, upper = torch.linalg.qr(factor.double())
        core = mode_product(core, upper, mode)
        factors.append(basis)
    return Tucker(core, tuple(factors))
