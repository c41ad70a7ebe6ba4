"""A base model and its fine-tune on disk, compared by name and shape, and read one weight at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from tqdm import tqdm

from flora.convert.base_model import Base
from flora.convert.formats.filemap import FileMap
from flora.errors import UserError
from flora.layers.layout import Layout, from_shape
from flora.storage.checkpoint import Checkpoint
from flora.storage.tensors import CONFIG
from flora.tucker.fold import parse_fold


@dataclass(frozen=True)
class Pair:
    """The two models, opened and compared by name and shape."""

    base: Checkpoint
    tuned: Checkpoint
    model: Base | None
    progress: bool

    def __post_init__(self) -> None:
        missing = [name for name in self.base if name not in self.tuned]
        for model in (self.base, self.tuned):
            if missing and (model.path / CONFIG).is_file():
                raise UserError(
                    f"{model.path} is an adapter, expected a whole model; flora extract compares a base model with its "
                    "fine-tune (flora merge turns an adapter into one)"
                )

        if missing:
            raise UserError(
                f"{self.tuned.path} lacks {len(missing)} tensors of {self.base.path} (first: {missing[0]}); it is not "
                "a fine-tune of that model, or has other names; give the model that it was fine-tuned from"
            )

        for name in self.base:
            if self.base.shape(name) != self.tuned.shape(name):
                raise UserError(
                    f"{name} has shape {self.base.shape(name)} in {self.base.path} and {self.tuned.shape(name)} in "
                    f"{self.tuned.path}; it is not a fine-tune of that model, or was resized; give the "
                    "model that it was fine-tuned from, resized alike"
                )

    @cached_property
    def layouts(self) -> Mapping[str, Layout]:
        """Of the base model, where its config can be read; the extraction itself does not need them."""
        if self.model is None:
            return {}
        return self.model.layouts

    @cached_property
    def files(self) -> FileMap:
        """Where the weights are in the base's files; the tuned model has the same."""
        return FileMap(self.base, None if self.model is None else self.model.model)

    @cached_property
    def places(self) -> dict[str, list[str]]:
        """The weights that are decomposed, by the model's names, and the file entries they are made of.

        They have two dimensions or more, belong to a module, and are not a single token or a table of buffers.
        """
        apart = {}
        for name, shape in self.shapes.items():
            inside = "." in name and ".parametrizations." not in name
            if name not in self.base and inside and _is_matrix_like(name, shape):
                # Tied to another, which is there.
                with suppress(UserError):
                    apart[name] = self.files.find(name, shape)

        taken = {key for keys in apart.values() for key in keys}
        plain = [key for key in self.base if key not in taken and "." in key]

        return {**{key: [key] for key in plain if _is_matrix_like(key, self.base.shape(key))}, **apart}

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of every weight of the model, parametrised ones too; empty where the model is not known."""
        if self.model is None:
            return {}
        return {**self.model.shapes, **self.files.parametrised()}

    @property
    def parts(self) -> set[str]:
        """The file entries of the weights that are decomposed."""
        return {key for keys in self.places.values() for key in keys}

    def bar(self, what: str, names: Iterable[str] | None = None) -> Iterator[str]:
        """The names, by default all, with a progress bar."""
        listed: Iterable[str] = self.places
        if names is not None:
            listed = names

        return iter(tqdm(listed, desc=what, unit="layer", disable=not self.progress))

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a weight as the model has it."""
        if name in self.base:
            return self.base.shape(name)
        return self.shapes[name]

    def form_shape(self, name: str) -> tuple[int, ...]:
        """Of the N-d tensor that is decomposed."""
        layout = self.layouts.get(name)
        shape = self.shape(name)
        if layout is None or layout.fold is None:
            return shape
        return parse_fold(layout.fold, shape).shape

    def delta(self, name: str) -> Tensor:
        """``tuned - base`` in float32, folded to the N-d tensor that is decomposed."""
        shape = self.shape(name)
        old, new = (self.files.read(name, shape, source) for source in (self.base, self.tuned))
        if new.is_floating_point():
            delta = new.float() - old.float()
        else:
            delta = torch.zeros(shape)

        if not torch.isfinite(delta).all():
            raise UserError(f"{name} has NaN or infinite entries in {self.base.path} or {self.tuned.path}")

        return delta.reshape(self.form_shape(name))

    def axes(self, name: str) -> tuple[str, ...]:
        """What the dimensions of ``delta(name)`` are."""
        layout, shape = self.layouts.get(name), self.form_shape(name)
        if layout is None:
            return from_shape(name, shape).axes
        if layout.fold is None:
            return layout.axes
        return tuple(f"d{mode}" for mode in range(len(shape)))

    def tuned_entry(self, name: str, key: str) -> Tensor:
        """An entry of the tuned model's files, which holds the tensor ``name``."""
        value = self.tuned.get(key)
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise UserError(f"{name} has NaN or infinite entries in {self.tuned.path}")
        return value.clone()

    def fingerprint(self, request: Mapping[str, object]) -> str:
        """Changes when the request or any of the files does."""
        files = [
            (file, (stat := (model.folder / file).stat()).st_size, stat.st_mtime_ns)
            for model in (self.base, self.tuned)
            for file in model.shards
        ]
        return hashlib.sha256(json.dumps([files, request]).encode()).hexdigest()


def _is_matrix_like(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) > 1 and ("weight" in name.rpartition(".")[2] or min(shape) > 1)
