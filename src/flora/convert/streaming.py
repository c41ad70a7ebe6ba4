"""Base + adapters as one model folder: streamed shard by shard, compared with the unmerged layers, then renamed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from tqdm import tqdm

from flora.convert.adapter import Adapter, Entry
from flora.convert.base_model import open_base
from flora.convert.formats.filemap import FileMap
from flora.errors import UserError
from flora.layers.names import TOKEN_ROWS
from flora.storage.atomic import check_target, staged
from flora.storage.checkpoint import Checkpoint
from flora.storage.replacing import MODEL
from flora.storage.tensors import DTYPES, read_json, stream_tensors, write_json
from flora.tucker.form import Tucker, mode_product

WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")
TOLERANCE = {
    torch.float64: 1e-6,  # adapters are float32
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 2e-2,
}  # of the largest output


@dataclass(frozen=True)
class Merged:
    """What a merge did.

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


def merge(
    base: str | Path,
    adapters: Adapter | Sequence[tuple[Adapter, float]],
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: bool = False,
    check: Callable[[Path], None] | None = None,
    companions: Iterable[Path] = (),
) -> Merged:
    """Writes ``base + sum of weight * adapter`` as a model folder, whole or not at all; ``base`` is only read.

    Args:
        base: a folder with safetensors, sharded or not.
        adapters: one, or several with their weights.
        out: the folder to write; config, tokenizer, index and whatever else lies beside the weights is copied.
        overwrite: replaces ``out``.
        progress: shows a progress bar.
        check: called with the finished folder before it gets its name; what it raises prevents that.
        companions: files to copy besides, such as the tokenizer of an adapter; they replace those of the base.

    Raises:
        FileExistsError: ``out`` exists.
        FileNotFoundError: the base, or a shard of it, is missing.
        ValueError: an adapter does not fit the base, a result is not finite, or a merged layer computes something else.
        OSError: no space left; nothing is left behind.
    """
    base, out = Path(base), Path(out)
    pairs = [(adapters, 1.0)] if isinstance(adapters, Adapter) else list(adapters)
    names = [path.name for path in base.iterdir()] if base.is_dir() else []  # what a merge copies from there
    check_target(out, MODEL, overwrite=overwrite, sources=[base], also=names)
    if out.resolve() == base.resolve() or base.resolve() in out.resolve().parents:
        raise UserError(f"{out} is in the base model's own folder, which is never written to; give another output")
    source = Checkpoint(base)
    plan = _Plan(source, _file_map(source, base), pairs)
    with staged(out, MODEL, overwrite=overwrite, sources=[base], also=names) as work:
        work.mkdir()
        _copy_companions(source, work)
        for path in companions:
            shutil.copy(path, work)
        _extend_index(source, work, plan)
        for file in tqdm(source.shards, desc="shards", unit="shard", disable=not progress):
            stream_tensors(work / file, plan.layout(file), plan.tensor, source.metadata(file))
        difference, worst = _verify(plan, Checkpoint(work))
        if check is not None:
            check(work)
    return Merged(out, len(plan.entries) + len(plan.whole) + len(plan.rows), difference, worst)


def _file_map(source: Checkpoint, base: Path) -> FileMap:
    if not (base / "config.json").is_file():
        return FileMap(source, None)
    try:
        return FileMap(source, open_base(base).model)
    except ValueError:  # an architecture that is not installed: then the names in the files are all there is
        return FileMap(source, None)


class _Plan:
    """Which weights change by what, and in which file entries they are."""

    def __init__(self, source: Checkpoint, files: FileMap, adapters: Sequence[tuple[Adapter, float]]) -> None:
        self.source = source
        self.files = files
        self.entries: dict[str, list[tuple[Entry, float]]] = {}
        self.whole: dict[str, Tensor] = {}
        self.rows: dict[str, tuple[Tensor, Tensor]] = {}
        self._recent: tuple[str, dict[str, Tensor]] = ("", {})
        for adapter, weight in adapters:
            for name, entry in adapter.weights.items():
                self.entries.setdefault(name, []).append((entry, weight))
            self._replace(adapter, weight)
        self.places = {name: files.find(name, listed[0][0].shape) for name, listed in self.entries.items()}
        self.owner = {key: name for name, keys in self.places.items() for key in keys}
        for name, listed in self.entries.items():
            self._check(name, listed)
        for name in self.rows:
            self._check_rows(name)

    def _replace(self, adapter: Adapter, weight: float) -> None:
        for name, (numbers, rows) in adapter.token_rows.items():
            if weight != 1 or name in self.rows:
                raise UserError(
                    f"{name}: trained token rows replace those of the base model, so they can be taken from one "
                    "adapter only, with weight 1"
                )
            self.rows[name] = torch.tensor(numbers), rows
        for name, value in adapter.extras.items():
            if name.endswith(TOKEN_ROWS):
                continue
            if weight != 1 or (name in self.whole and not torch.equal(self.whole[name], value)):
                raise UserError(
                    f"{name} is a whole tensor, which replaces the base model's: it can be taken from one adapter "
                    "only, with weight 1; leave it out of the others (--drop-extras)"
                )
            if name in self.source and self.source.shape(name) != value.shape:
                raise UserError(
                    f"{name} has shape {self.source.shape(name)} in {self.source.path} and {tuple(value.shape)} in the "
                    "adapter, which replaces it as a whole; give the base model with that head, as it was trained on"
                )
            self.whole[name] = value

    def _check(self, name: str, listed: Sequence[tuple[Entry, float]]) -> None:
        shapes = {entry.shape for entry, _ in listed}
        if len(shapes) > 1:
            raise UserError(f"{name} has the shapes {', '.join(map(str, sorted(shapes)))} in the adapters")
        for key in self.places[name]:
            dtype = self.source.dtype(key)
            if dtype not in DTYPES.values():
                raise UserError(f"{key} is stored as {dtype}; merge into the unquantised model instead")

    def _check_rows(self, name: str) -> None:
        numbers, rows = self.rows[name]
        if name in self.entries or name in self.whole:
            raise UserError(f"{name} is changed as a whole and has trained token rows; merge it with PEFT instead")
        if name not in self.source:
            raise UserError(f"{self.source.path} has no weight {name!r}, of which the adapter trained token rows")
        shape = self.source.shape(name)
        if rows.shape[1:] != shape[1:] or int(numbers.max()) >= shape[0]:
            raise UserError(
                f"{name} has shape {shape} in {self.source.path}, and the adapter trained its rows {numbers.tolist()} "
                f"of shape {tuple(rows.shape)}; give the base model that the adapter was trained on"
            )

    def change(self, name: str) -> Tensor:
        """The sum of the changes of a weight."""
        return cast("Tensor", sum(weight * entry.dense().float() for entry, weight in self.entries[name]))

    def layout(self, file: str) -> list[tuple[str, str, tuple[int, ...]]]:
        """Name, dtype and shape of what goes into a file: what was there, and new whole tensors in the last one."""
        listed = [(name, self.source.dtype(name), self.source.shape(name)) for name in self.source.shards[file]]
        if file == self.last:
            listed += [(name, DTYPES[value.dtype], tuple(value.shape)) for name, value in self.new.items()]
        return listed

    @property
    def last(self) -> str:
        """The last file."""
        return list(self.source.shards)[-1]

    @property
    def new(self) -> dict[str, Tensor]:
        """The whole tensors that the base does not have."""
        return {name: value for name, value in self.whole.items() if name not in self.source}

    def tensor(self, key: str) -> Tensor:
        """One file entry, with the changes added."""
        if key not in self.source:
            return self.whole[key]
        old = self.source.get(key)
        if key in self.whole:
            return self.whole[key].to(old.dtype)
        if key in self.rows:
            numbers, rows = self.rows[key]
            return old.index_copy(0, numbers, rows.to(old.dtype))
        if key not in self.owner:
            return old
        name = self.owner[key]
        if self._recent[0] != name:  # the entries of one weight follow each other
            self._recent = (name, self.files.split(name, self.change(name)))
        result = _add(old, self._recent[1][key])
        if not torch.isfinite(result).all():
            raise UserError(f"{key} would have NaN or infinite entries after the merge; nothing was written")
        return result


def _add(old: Tensor, change: Tensor) -> Tensor:
    return old + change if old.dtype == torch.float64 else (old.float() + change).to(old.dtype)


def _copy_companions(source: Checkpoint, work: Path) -> None:
    """Whatever lies beside the weights: config, tokenizer, index, generation settings."""
    if source.path.is_file():
        return
    for path in source.folder.rglob("*"):
        inside = path.relative_to(source.folder)
        hidden = any(part.startswith(".") for part in inside.parts)
        if path.is_file() and not hidden and path.suffix not in WEIGHT_FILES:
            (work / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, work / inside)


def _extend_index(source: Checkpoint, work: Path, plan: _Plan) -> None:
    """Names the new whole tensors in the copied index."""
    if source.index is not None and plan.new:
        index = read_json(work / source.index.name)
        index["weight_map"].update(dict.fromkeys(plan.new, plan.last))
        write_json(work / source.index.name, index)


def _verify(plan: _Plan, written: Checkpoint) -> tuple[float, str]:
    """Every changed weight, read back, against the base weight with the factored update beside it, on random inputs."""
    largest, worst = 0.0, next(iter(plan.entries), "")
    generator = torch.Generator().manual_seed(0)
    for name, listed in plan.entries.items():
        shape = listed[0][0].shape
        old = plan.files.join(name, shape, {key: plan.source.get(key) for key in plan.places[name]})
        new = plan.files.join(name, shape, {key: written.get(key) for key in plan.places[name]})
        inputs = [torch.randn(4, size, generator=generator, dtype=torch.float64) for size in shape[1:]]
        expected = _apply(Tucker(old.double(), (None,) * old.ndim), inputs)
        for entry, weight in listed:
            expected = expected + weight * entry.scale * _apply(entry.stored_form(), inputs)
        difference = float((_apply(Tucker(new.double(), (None,) * new.ndim), inputs) - expected).abs().max())
        relative = difference / max(float(expected.abs().max()), 1e-30)
        if not relative <= TOLERANCE[old.dtype]:
            raise UserError(
                f"{name}: the merged layer differs from the unmerged by {relative:.1e}; nothing was written"
            )
        largest, worst = max((largest, worst), (relative, name))
    for name, value in plan.whole.items():
        if not torch.equal(written.get(name), value.to(written.get(name).dtype)):
            raise UserError(f"{name} was not written as the adapter has it; nothing was written")
    for name, (numbers, rows) in plan.rows.items():
        if not torch.equal(written.get(name)[numbers], rows.to(written.get(name).dtype)):
            raise UserError(f"{name} was not written with the rows of the adapter; nothing was written")
    return largest, worst


def _apply(form: Tucker, inputs: Sequence[Tensor]) -> Tensor:
    """The form as a map: every mode but the first contracted with four vectors, one after the other. -> (I1, 4, ..)."""
    core = form.core.double()
    for mode, vectors in enumerate(inputs, start=1):
        factor = form.factors[mode]
        core = mode_product(core, vectors if factor is None else vectors @ factor.double(), mode)
    first = form.factors[0]
    return core if first is None else mode_product(core, first.double(), 0)
