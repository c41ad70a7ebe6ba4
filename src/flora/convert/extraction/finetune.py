"""An adapter out of a full fine-tune: the change of each weight, decomposed, one layer in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from flora.convert.adapter import Adapter, Entry
from flora.convert.base_model import try_base
from flora.convert.extraction.pair import Pair
from flora.convert.extraction.store import Store
from flora.convert.report import table
from flora.errors import UserError
from flora.layers.axes import roles_of
from flora.layers.layout import Layout, is_raw
from flora.storage.checkpoint import Checkpoint
from flora.storage.tensors import as_path
from flora.tucker.allocation import FIRST, Choice, choices, for_energy, is_cut, spend
from flora.tucker.decomposition import decompose
from flora.tucker.form import Tucker, count_params
from flora.tucker.ranks import Ranks, resolve


@dataclass(frozen=True)
class Row:
    """What became of one weight: its shape, ranks and parameters, the norm of its change, the relative error."""

    name: str
    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    params: int
    norm: float
    error: float


@dataclass
class Extracted(Adapter):
    """An adapter with the account of its extraction. ``print(extracted.table())`` shows it.

    Attributes:
        rows: one per weight that changed and can be decomposed.
        whole: the biases, norms, bare parameters and new tensors that differ; in ``extras``, or adapted whole, if they
            were carried.
        unchanged: how many weights are the same in both models.
        carried: whether what is in ``whole`` was taken along.
    """

    rows: list[Row] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)
    unchanged: int = 0
    carried: bool = False

    @property
    def error(self) -> float:
        """``|change - adapter| / |change|`` over all weights together, in the Frobenius norm."""
        total = sum(row.norm**2 for row in self.rows)
        if total:
            return math.sqrt(sum((row.norm * row.error) ** 2 for row in self.rows) / total)
        return 0.0

    def table(self) -> str:
        """The errors, layer by layer, and what was not decomposed."""
        rows = [
            [row.name, str(row.shape), str(row.ranks), f"{row.params:,}", f"{row.norm:.3e}", f"{row.error:.3e}"]
            for row in self.rows
        ]
        lines = [table(rows, ["weight", "shape", "ranks", "parameters", "norm of change", "relative error"])]
        lines.append(
            f"total: {self.num_params:,} parameters, relative error {self.error:.3e}; unchanged: {self.unchanged}"
        )

        if self.whole:
            if self.carried:
                state = "carried whole"
            else:
                state = "NOT in the adapter (carry=True, --carry takes them along)"

            lines.append(
                f"also changed: {len(self.whole)} biases, norms or new tensors, {state}: {', '.join(self.whole[:5])}"
            )

        return "\n".join(lines)


def extract(
    base: str | Path,
    tuned: str | Path,
    *,
    rank: Ranks | None = None,
    energy: float | None = None,
    budget: int | None = None,
    kernel_r: int | None = None,
    carry: bool = False,
    work: str | Path | None = None,
    progress: bool = False,
) -> Extracted:
    """The adapter that turns ``base`` into ``tuned`` as nearly as its ranks allow.

    Args:
        base: a folder with safetensors (sharded or not), or a single file; read one layer at a time.
        tuned: the same, of the fine-tuned model.
        rank: one int for all weights, or one rank per dimension.
        energy: instead, the fraction of each change's squared norm to keep, such as 0.9.
        budget: instead, parameters to spend over all layers, where they lower the total error most.
        kernel_r: with ``rank``, the rank of the kernel modes; None keeps them whole.
        carry: takes along, whole, the biases, norms and new tensors that differ.
        work: a folder for finished layers: an interrupted extraction continues from there. It stays; remove it
            when the adapter is saved.
        progress: shows a progress bar.

    Raises:
        FileNotFoundError: a model, or one of its shards, is missing.
        ValueError: not exactly one of rank, energy and budget is given, a weight is missing, has another shape or NaN,
            or nothing differs.
    """
    check_request(rank, energy, budget)
    base, tuned = as_path(base, "the base model"), as_path(tuned, "the fine-tuned model")
    pair = Pair(Checkpoint(base), Checkpoint(tuned), try_base(Path(base)), progress)
    request = {"rank": rank, "energy": energy, "budget": budget, "kernel_r": kernel_r}

    store = None if work is None else Store(Path(work), pair.fingerprint(request))

    chosen: dict[str, Choice] | None = None

    if budget is not None:
        chosen = _spend(pair, store, budget)

    def ranks_for(name: str, delta: Tensor) -> Ranks:
        if chosen is not None:
            return chosen[name].ranks
        if energy is not None:
            return _for_energy(delta, energy)

        axes = pair.axes(name)

        return resolve(
            delta.shape, rank if rank is not None else 8, kernel_r, axes=axes, roles=roles_of(axes), name=name
        )

    result = Extracted(config={"base_model_name_or_path": str(base)})
    for name in pair.bar("layers"):
        _extract_layer(pair, store, result, name, ranks_for)

    _whole(pair, result, carry)

    if not result.weights and not result.extras:
        if budget is not None and result.rows:
            raise UserError(
                f"budget of {budget} parameters is too small for any layer of {tuned}; raise it, to thousands or more"
            )

        raise UserError(
            f"{tuned} does not differ from {base} in any weight that is decomposed, so there is nothing to extract; "
            "give the base model first and its fine-tune second"
        )

    return result


def check_request(rank: Ranks | None, energy: float | None, budget: int | None) -> None:
    """Raises unless exactly one of the three is given, and in range."""
    given = [name for name, value in (("rank", rank), ("energy", energy), ("budget", budget)) if value is not None]
    if len(given) != 1:
        got = " and ".join(given) or "none"
        raise UserError(f"give exactly one of rank, energy and budget (--rank, --energy, --budget), got {got}")
    if energy is not None and not 0 < energy <= 1:
        raise UserError(
            f"energy is the fraction of the squared norm to keep, above 0 and at most 1, got {energy}; 0.9 is usual"
        )
    if budget is not None and budget < 1:
        raise UserError(f"budget is a number of parameters, at least 1, got {budget}")


def _spend(pair: Pair, store: Store | None, budget: int) -> dict[str, Choice]:
    """The choice of every layer that changed. Large ranks are tried only in layers that take all the smaller ones."""
    most = dict.fromkeys(pair.places, FIRST)
    options: dict[str, list[Choice]] = {}
    while True:
        for name in pair.bar("spectra", [name for name in most if name not in options]):
            options[name] = _options(pair, store, name, most[name])

        chosen = spend({name: listed for name, listed in options.items() if listed[0].error}, budget)
        cut = [name for name, choice in chosen.items() if is_cut(choice, pair.form_shape(name), most[name])]
        if not cut:
            return chosen

        for name in cut:
            most[name] *= 4
            del options[name]


def _for_energy(delta: Tensor, energy: float) -> tuple[int, ...]:
    most = FIRST
    while is_cut(choice := for_energy(choices(delta, most=most), energy), delta.shape, most):
        most *= 4
    return choice.ranks


def _options(pair: Pair, store: Store | None, name: str, most: int) -> list[Choice]:
    """The choices of one layer, from the store if they are there."""
    if store is not None and (kept := store.read_choices(name, most)) is not None:
        return kept
    found = choices(pair.delta(name), most=most)
    if store is not None:
        store.write_choices(name, most, found)
    return found


def _extract_layer(
    pair: Pair,
    store: Store | None,
    result: Extracted,
    name: str,
    ranks_for: Callable[[str, Tensor], Ranks],
) -> None:
    layout = pair.layouts.get(name)

    kept = store.read_layer(name) if store is not None else None

    if kept is None:
        delta = pair.delta(name)
        norm = float(delta.norm(dtype=torch.float64))
        if norm:
            ranks = ranks_for(name, delta)
            form, error = _fit(delta, ranks)
        else:
            ranks = ()
            form, error = (None, 0.0)

        kept = (form, norm, error)

        if store is not None:
            store.write_layer(name, form, norm, error)

    form, norm, error = kept
    if not norm:
        result.unchanged += 1
        return

    if form is not None:
        result.weights[name] = Entry(form, 1.0, layout)

    ranks_kept: tuple[int, ...] = ()
    params = 0
    if form is not None:
        ranks_kept = form.ranks
        params = count_params(form.shape, form.ranks)

    result.rows.append(Row(name, pair.shape(name), ranks_kept, params, norm, error))


def _fit(delta: Tensor, ranks: Ranks) -> tuple[Tucker | None, float]:
    """The form and its error; no form where the budget left the layer out."""
    if isinstance(ranks, (list, tuple)) and 0 in ranks:
        return None, 1.0
    form = decompose(delta, ranks)
    # Then the change itself is smaller, and exact.
    if form.num_params >= delta.numel():
        return Tucker(delta.contiguous(), (None,) * delta.ndim), 0.0
    return form, form.error


def _whole(pair: Pair, result: Extracted, carry: bool) -> None:
    """Finds the other tensors that differ, and takes them along if asked."""
    decomposed = pair.parts
    others = {pair.files.name_of(key): key for key in pair.tuned if key not in decomposed}
    for name, key in others.items():
        if key not in pair.base or not _is_same(pair.base.get(key), pair.tuned.get(key)):
            result.whole.append(name)

    if carry:
        _carry(pair, result, others)
        result.carried = True


def _is_same(old: Tensor, new: Tensor) -> bool:
    """Whether two tensors hold the same numbers, whatever their types."""
    old, new = (
        value.float() if value.is_floating_point() and value.element_size() == 1 else value for value in (old, new)
    )
    return torch.equal(old, new)


def _carry(pair: Pair, result: Extracted, others: Mapping[str, str]) -> None:
    """Adds every tensor in ``result.whole`` to the adapter, in a form that an adapter can hold.

    * a bias goes by itself (``bias`` of the config);
    * the tensors of a module without others inside, such as a norm, replace that module's (``modules_to_save``), the
      unchanged ones too;
    * any other parameter, such as the class token of a ViT, is an adapted weight (``target_parameters``) whose form
      keeps every mode whole: its module holds adapted layers, and cannot be replaced.

    Args:
        pair: the two models.
        result: where they go.
        others: the name of each tensor that is not decomposed -> its file entry.

    Raises:
        UserError: a tensor is none of these, or has NaN.
    """
    adapted = {name.rpartition(".")[0] for name in result.weights if not _is_bare(name, pair.layouts.get(name))}
    layers = {name.rpartition(".")[0] for name in pair.places}
    holders = _holders({*pair.shapes, *others, *result.weights})
    replaced: set[str] = set()
    for name in result.whole:
        module, _, leaf = name.rpartition(".")
        new = others[name] not in pair.base

        if module in adapted and "bias" in leaf:
            result.extras[name] = pair.tuned_entry(name, others[name])
        elif module and module not in holders and module not in layers:
            replaced.add(module)
        elif leaf == "bias":
            result.extras[name] = pair.tuned_entry(name, others[name])
        elif module and module not in adapted and not new and _is_parameter(pair, name):
            delta = pair.tuned_entry(name, others[name]).float() - pair.base.get(others[name]).float()
            form = Tucker(delta, (None,) * delta.ndim)
            result.weights[name] = Entry(form, 1.0, pair.layouts.get(name))
        else:
            raise UserError(
                f"{name} differs, and no adapter can carry it: it is a buffer, a new tensor or a single number of a "
                "module that holds others; extract without --carry, or keep the tuned model"
            )

    for name, key in others.items():
        if name.rpartition(".")[0] in replaced:
            result.extras[name] = pair.tuned_entry(name, key)


def _holders(names: Iterable[str]) -> set[str]:
    """The modules that hold other modules: those of which a tensor is more than one step inside."""
    found: set[str] = set()
    for name in names:
        parts = name.split(".")
        found.update(".".join(parts[:end]) for end in range(len(parts) - 1))
    return found


def _is_bare(name: str, layout: Layout | None) -> bool:
    """Whether a weight is a parameter of a module that is no layer, such as the state matrix of a Mamba."""
    return is_raw(name, layout) and (layout is None or layout.kind not in ("attention", "recurrent"))


def _is_parameter(pair: Pair, name: str) -> bool:
    """Whether a tensor is a parameter of one dimension or more; a model that is not known may have it as a buffer."""
    shape = pair.shapes.get(name)
    return shape is not None and len(shape) > 0
