"""Finished layers of an extraction on disk, so that one that was interrupted continues where it stopped."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path

import torch

from flora.errors import UserError
from flora.storage.atomic import staged, write_json
from flora.storage.tensors import read_object, read_tensors, write_tensors
from flora.tucker.allocation import Choice
from flora.tucker.form import Tucker


class Store:
    """Finished layers on disk, each complete or absent; valid for one request on the same files.

    Raises:
        ValueError: the folder holds layers of another request.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        mark = folder / "request.json"
        if not mark.exists():
            write_json(mark, {"fingerprint": fingerprint})
        elif read_object(mark).get("fingerprint") != fingerprint:
            raise UserError(
                f"{folder} holds the finished layers of another extraction (other models or ranks); remove it, or "
                "repeat that request to continue it"
            )

    def _path(self, name: str, suffix: str) -> Path:
        return self.folder / (hashlib.sha256(name.encode()).hexdigest()[:24] + suffix)

    def read_choices(self, name: str, most: int) -> list[Choice] | None:
        """The choices of a layer with ranks up to ``most``, or None if it is not there yet."""
        path = self._path(name, f".{most}.json")
        if not path.exists():
            return None
        return [Choice(tuple(item["ranks"]), item["params"], item["error"]) for item in read_object(path)["choices"]]

    def write_choices(self, name: str, most: int, found: list[Choice]) -> None:
        """Keeps the choices of a layer."""
        write_json(self._path(name, f".{most}.json"), {"choices": [asdict(choice) for choice in found]})

    def read_layer(self, name: str) -> tuple[Tucker | None, float, float] | None:
        """Form, norm of the change and relative error of a layer, or None if it is not there yet."""
        path = self._path(name, ".safetensors")
        if not path.exists():
            return None

        tensors, metadata = read_tensors(path)
        core = tensors.get("core")
        if core is None:
            form = None
        else:
            form = Tucker(core, tuple(tensors.get(f"factor_{mode}") for mode in range(core.ndim)))

        return form, float(metadata["norm"]), float(metadata["error"])

    def write_layer(self, name: str, form: Tucker | None, norm: float, error: float) -> None:
        """Keeps a layer; its form is None where it did not change or the budget left it out."""
        if form is None:
            tensors = {"empty": torch.zeros(1)}
        else:
            tensors = {f"factor_{mode}": f for mode, f in enumerate(form.factors) if f is not None}
            tensors["core"] = form.core

        with staged(self._path(name, ".safetensors")) as path:
            write_tensors(path, tensors, {"norm": repr(norm), "error": repr(error)})
