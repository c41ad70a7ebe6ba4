"""Base + adapters as one model folder, one weight in memory at a time; each merged layer is compared as it is written.

What an adapter says of a weight of the model becomes a change of file entries (:class:`FileMap`); the files are then
copied entry by entry, with the changes.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from flora.convert.adapter import Adapter, Entry
from flora.convert.arithmetic import in_dtype
from flora.convert.base_model import Base, try_base
from flora.convert.formats.filemap import FileMap
from flora.convert.report import ROUNDING
from flora.errors import REPORT, UserError
from flora.layers.entries import check_number
from flora.layers.names import TOKEN_ROWS
from flora.storage.atomic import staged, write_json
from flora.storage.checkpoint import Checkpoint
from flora.storage.replacing import MODEL
from flora.storage.tensors import DTYPES, read_object, stored_as, stream_tensors
from flora.tucker.form import Tucker, mode_product

TORCH_DTYPES = {stored: dtype for dtype, stored in DTYPES.items()}
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")


@dataclass(frozen=True)
class Streamed:
    """What was written.

    Attributes:
        folder: where the model was written.
        changed: how many weights were changed, and tensors replaced.
        difference: the largest difference, relative to the largest output, between a merged layer and the layer with
            its adapters beside it, on random inputs.
        worst: the weight with that difference.
    """

    folder: Path
    changed: int
    difference: float
    worst: str

    def __str__(self) -> str:
        return (
            f"{self.folder}: {self.changed} tensors changed; merged and unmerged layers agree on random inputs to "
            f"{self.difference:.1e} of the largest output (worst: {self.worst})"
        )


def stream_merged(
    base: str | Path,
    adapters: Adapter | Sequence[tuple[Adapter, float]],
    out: str | Path,
    *,
    known: Base | None = None,
    overwrite: bool = False,
    progress: bool = False,
    check: Callable[[Path], None] | None = None,
    companions: Iterable[Path] = (),
) -> Streamed:
    """Writes ``base + sum of weight * adapter`` as a model folder, complete or not at all; ``base`` is only read.

    Args:
        base: a folder with safetensors, sharded or not.
        adapters: one, or several with their weights.
        out: the folder to write; config, tokenizer, index and whatever else lies beside the weights is copied.
        known: the base model on the meta device; by default built from its config, where that names an installed class.
        overwrite: replaces ``out``.
        progress: shows a progress bar.
        check: called with the finished folder before it gets its name; what it raises prevents that.
        companions: more files to copy, such as the tokenizer of an adapter; they replace those of the base.

    Raises:
        FileExistsError: ``out`` exists.
        FileNotFoundError: the base, or a shard of it, is missing.
        UserError: an adapter does not fit the base, a result is not finite, or a merged layer computes something else.
        OSError: no space left; nothing is left behind.
    """
    base, out = Path(base), Path(out)

    pairs = [(adapters, 1.0)] if isinstance(adapters, Adapter) else list(adapters)
    for _, weight in pairs:
        check_number(weight, "the weight of an adapter")

    # A merged model may hold whatever lies beside the base's weights, since a merge copies it.
    names = [path.name for path in base.iterdir()] if base.is_dir() else []

    if out.resolve() == base.resolve() or base.resolve() in out.resolve().parents:
        raise UserError(f"{out} is in the base model's own folder, which is never written to; give another output")

    source = Checkpoint(base)

    if known is None:
        known = try_base(base)

    plan = _Plan(FileMap(source, None if known is None else known.model), pairs)

    with staged(out, MODEL, overwrite=overwrite, sources=[base], also=names) as work:
        work.mkdir()
        _copy_companions(source, work)

        for path in companions:
            shutil.copyfile(path, work / path.name)

        _extend_index(source, work, plan)

        for file in tqdm(source.shards, desc="shards", unit="shard", disable=not progress):
            stream_tensors(work / file, plan.contents(file), plan.tensor, source.metadata(file))

        difference, worst = _verify(plan, Checkpoint(work))

        if check is not None:
            check(work)

    return Streamed(out, plan.count, difference, worst)


class _Rows(NamedTuple):
    """Rows of an embedding that replace those of the base: their numbers, and what they become."""

    # shape: (rows,)
    numbers: Tensor
    # shape: (rows, width)
    values: Tensor


class _Plan:
    """What happens to which file entry.

    Attributes:
        changes: a weight of the model -> its changes, each with the weight of its adapter.
        places: the same weights -> the file entries that they are made of.
        replaced: a file entry -> the whole tensor that takes its place; entries that the base lacks are added.
        rows: a file entry -> the rows of it that are replaced.
    """

    def __init__(self, files: FileMap, adapters: Sequence[tuple[Adapter, float]]) -> None:
        self.files = files
        self.source = files.checkpoint
        self.changes: dict[str, list[tuple[Entry, float]]] = {}
        self.replaced: dict[str, Tensor] = {}
        self.rows: dict[str, _Rows] = {}
        self.count = 0

        for adapter, weight in adapters:
            for name, entry in adapter.weights.items():
                self.changes.setdefault(name, []).append((entry, weight))

        self.places = {name: self._check_change(name) for name in self.changes}
        self._owner = {key: name for name, keys in self.places.items() for key in keys}
        self._latest: tuple[str, dict[str, Tensor]] = ("", {})

        for adapter, weight in adapters:
            for name, value in adapter.extras.items():
                tied = adapter.extras.get(files.tied_to(name) or "")
                if name.endswith(TOKEN_ROWS) or (tied is not None and torch.equal(tied, value)):
                    # Rows come below; of two tied tensors the files have one.
                    continue

                self._replace(name, value, weight)

            for name, (numbers, values) in adapter.token_rows.items():
                self._replace_rows(name, _Rows(torch.tensor(numbers), values), weight)

        self.new = {key: value for key, value in self.replaced.items() if key not in self.source}
        self.last = list(self.source.shards)[-1]
        self.count = len(self.changes) + len(self.replaced) + len(self.rows)

    def _check_change(self, name: str) -> list[str]:
        """The file entries of a weight that changes."""
        shapes = {entry.shape for entry, _ in self.changes[name]}
        if len(shapes) > 1:
            raise UserError(f"{name} has the shapes {', '.join(map(str, sorted(shapes)))} in the adapters")

        keys = self.files.find(name, shapes.pop())
        for key in keys:
            dtype = self.source.dtype(key)
            if dtype not in DTYPES.values():
                raise UserError(f"{key} is stored as {dtype}; merge into the unquantised model instead")

        return keys

    def _replace(self, name: str, value: Tensor, weight: float) -> None:
        """A tensor that the adapter stores in full, under the names of its file entries."""
        shape = tuple(value.shape)
        key = self.files.entry(name)
        if key is not None and self.source.shape(key) != shape:
            raise UserError(
                f"{name} has shape {self.source.shape(key)} in {self.source.path} and {shape} in the adapter, which "
                "replaces it as a whole; give the base model with that head, as it was trained on"
            )

        if self.files.model is None and key is None:
            self._check_no_other_name(name)

        for key, part in self.files.split(name, value).items():
            before = self.replaced.get(key)
            if weight != 1 or (before is not None and not torch.equal(before, part)):
                raise UserError(
                    f"{name} is stored in full and replaces the base model's tensor: it can be taken from one adapter "
                    "only, with weight 1; leave it out of the others (--drop-extras)"
                )

            if key in self._owner:
                # PEFT saves the frozen embedding beside the adapter on it.
                old = self.source.get(key)
                if torch.equal(part.to(old.dtype), old):
                    continue

                raise UserError(
                    f"{name} is both changed by an adapter and replaced by another tensor than {self.source.path} has; "
                    "give the base model with that tensor (its embedding may have been resized), or leave it out "
                    "(flora convert --drop-extras)"
                )

            self.replaced[key] = part

    def _check_no_other_name(self, name: str) -> None:
        """Without the model, a tensor that the files lack could be in them under a longer or shorter name."""
        near = [key for key in self.source if key.endswith(f".{name}") or name.endswith(f".{key}")]
        if near:
            raise UserError(
                f"{self.source.path} has no tensor {name!r} and may have it as {near[0]!r}; its config.json names no "
                "installed class that could tell"
            )

    def _replace_rows(self, name: str, rows: _Rows, weight: float) -> None:
        key = self.files.entry(name)
        if weight != 1 or (key is not None and key in self.rows):
            raise UserError(
                f"{name}: trained token rows replace those of the base model, so they can be taken from one "
                "adapter only, with weight 1"
            )

        if key is None:
            raise UserError(f"{self.source.path} has no weight {name!r}, of which the adapter trained token rows")
        if key in self._owner or key in self.replaced:
            raise UserError(f"{name} has both a change and trained token rows; merge it with PEFT instead")

        shape = self.source.shape(key)
        if rows.values.shape[1:] != shape[1:] or not 0 <= int(rows.numbers.min()) <= int(rows.numbers.max()) < shape[0]:
            raise UserError(
                f"{name} has shape {shape} in {self.source.path}, and the adapter trained its rows "
                f"{rows.numbers.tolist()} of shape {tuple(rows.values.shape)}; give the base model that the adapter "
                "was trained on"
            )

        self.rows[key] = rows

    def contents(self, file: str) -> list[tuple[str, str, tuple[int, ...]]]:
        """Name, dtype and shape of what goes into a file: what was there, and new tensors in the last one."""
        listed = [(key, self.source.dtype(key), self.source.shape(key)) for key in self.source.shards[file]]
        if file == self.last:
            listed += [(key, stored_as(value.dtype), tuple(value.shape)) for key, value in self.new.items()]
        return listed

    def tensor(self, key: str) -> Tensor:
        """One file entry as it is written."""
        if key in self.new:
            return self.new[key]
        if key in self._owner:
            return self._merged(self._owner[key])[key]

        old = self.source.get(key)

        if key in self.replaced:
            return _as_stored(self.replaced[key], key, old.dtype)

        if key in self.rows:
            rows = self.rows[key]
            return old.index_copy(0, rows.numbers, _as_stored(rows.values, key, old.dtype))

        return old

    def _merged(self, name: str) -> dict[str, Tensor]:
        """The entries of a merged weight; kept until the next weight, since entries of one weight follow each other."""
        if self._latest[0] != name:
            # The one before goes first.
            self._latest = ("", {})
            self._latest = (name, self._merge(name))
        return self._latest[1]

    def _merge(self, name: str) -> dict[str, Tensor]:
        weight = self.files.read(name, self.changes[name][0][0].shape)
        merged = _add(weight, self.changes[name])
        written = {
            key: value.to(TORCH_DTYPES[self.source.dtype(key)]) for key, value in self.files.split(name, merged).items()
        }
        for key, value in written.items():
            if not torch.isfinite(value).all():
                raise UserError(
                    f"{key} would have NaN or infinite entries after the merge; nothing was written; "
                    f"{_remedy(weight, value.dtype)}"
                )

        return written


def _as_stored(value: Tensor, key: str, dtype: torch.dtype) -> Tensor:
    """A tensor that takes the place of the base model's, in its type of numbers; what that cannot hold is refused."""
    made = value
    if value.is_complex() == dtype.is_complex:
        made = value.to(dtype)

    exact = dtype.is_floating_point or dtype.is_complex or torch.equal(made.to(value.dtype), value)
    if made.dtype != dtype or not exact or not torch.isfinite(made).all():
        raise UserError(
            f"{key} is {dtype} in the base model, which cannot hold the numbers of type {value.dtype} that the adapter "
            "has in its place; nothing was written; give the base model that the adapter was trained on"
        )

    return made


def _remedy(base: Tensor, stored: torch.dtype) -> str:
    """What to do about a merged weight that is not finite; an adapter that is not finite is refused when it is read."""
    if not torch.isfinite(base).all():
        return "the base model has them already: take another copy of it"

    if stored == torch.float16:
        return "the sum is too large for float16: save the base in bfloat16 or float32, and merge into that"
    return f"the sum is too large for {str(stored).removeprefix('torch.')}: lower --weights"


def _add(weight: Tensor, changes: Sequence[tuple[Entry, float]]) -> Tensor:
    """``weight + sum of the changes``, in float64 for a weight in float64, else in float32."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32

    total = weight.to(dtype)
    for entry, factor in changes:
        total = total + factor * in_dtype(entry, dtype).dense()

    return total


def _copy_companions(source: Checkpoint, work: Path) -> None:
    """Whatever lies beside the weights: config, tokenizer, index, generation settings."""
    if source.path.is_file():
        return

    paths = [path for path in sorted(source.folder.rglob("*")) if path.suffix not in WEIGHT_FILES]
    for path in files_inside(source.folder, paths):
        inside = path.relative_to(source.folder)
        if not any(part.startswith(".") for part in inside.parts):
            (work / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, work / inside)


def files_inside(folder: Path, paths: Iterable[Path]) -> list[Path]:
    """The files among the paths that are in the folder for real: a link out of it is passed over with a warning.

    Otherwise the author of a model or an adapter could have a private file copied into what its reader publishes. The
    cache of the Hugging Face hub keeps its files beside its snapshots and links to them, which is allowed.
    """
    homes = [folder.resolve()]

    if folder.resolve().parent.name == "snapshots":
        homes.append(folder.resolve().parents[1] / "blobs")

    kept, outside = [], []
    for path in paths:
        if not path.is_file():
            continue

        if any(path.resolve().is_relative_to(home) for home in homes):
            kept.append(path)
        else:
            outside.append(path)

    if outside:
        warnings.warn(
            f"{outside[0]} links to a file outside {folder} and is not copied ({len(outside)} such files); put the "
            "file itself there if the merged model needs it",
            stacklevel=3,
        )

    return kept


def _extend_index(source: Checkpoint, work: Path, plan: _Plan) -> None:
    """Names the new tensors in the copied index."""
    if source.index is not None and plan.new:
        index = read_object(work / source.index.name)
        index["weight_map"].update(dict.fromkeys(plan.new, plan.last))
        write_json(work / source.index.name, index, sort_keys=True)


def _verify(plan: _Plan, written: Checkpoint) -> tuple[float, str]:
    """Every changed weight, read back, against the base weight with the factored update beside it, on random inputs."""
    largest, worst = 0.0, next(iter(plan.changes), "")
    generator = torch.Generator().manual_seed(0)
    for name, listed in plan.changes.items():
        shape = listed[0][0].shape
        old, new = plan.files.read(name, shape), plan.files.read(name, shape, written)

        inputs = [torch.randn(4, size, generator=generator, dtype=torch.float64) for size in shape[1:]]
        expected = _apply(Tucker(old.double(), (None,) * old.ndim), inputs)
        for entry, weight in listed:
            expected = expected + weight * entry.scale * _apply(entry.stored_form(), inputs)

        difference = float((_apply(Tucker(new.double(), (None,) * new.ndim), inputs) - expected).abs().max())

        relative = difference / max(float(expected.abs().max()), 1e-30)
        stored = TORCH_DTYPES[written.dtype(plan.places[name][0])]
        if not relative <= ROUNDING[stored].weight:
            raise UserError(
                f"{name}: the merged layer differs from the unmerged by {relative:.1e}; nothing was written; {REPORT}"
            )

        largest, worst = max((largest, worst), (relative, name))

    for key, value in plan.replaced.items():
        if not torch.equal(written.get(key), value.to(written.get(key).dtype)):
            raise UserError(f"{key} was not written as the adapter has it; nothing was written; {REPORT}")

    for key, rows in plan.rows.items():
        if not torch.equal(written.get(key)[rows.numbers], rows.values.to(written.get(key).dtype)):
            raise UserError(f"{key} was not written with the rows of the adapter; nothing was written; {REPORT}")

    return largest, worst


def _apply(form: Tucker, inputs: Sequence[Tensor]) -> Tensor:
    """The form as a map: every mode but the first contracted with four vectors, one after the other. -> (I1, 4, ..)."""
    core = form.core.double()
    for mode, vectors in enumerate(inputs, start=1):
        factor = form.factors[mode]
        core = mode_product(core, vectors if factor is None else vectors @ factor.double(), mode)

    first = form.factors[0]
    if first is None:
        return core

    return mode_product(core, first.double(), 0)
