"""A model's weights on disk, one tensor at a time: one safetensors file, or shards with their index."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from flora.errors import UserError
from flora.storage.tensors import check_exists, open_tensors, read_object

INDEX = ".safetensors.index.json"
NAMES = ("model", "diffusion_pytorch_model")


class Checkpoint:
    """The weights of a model, opened without being read.

    Args:
        path: a safetensors file, or a folder with one, or with shards and their ``*.safetensors.index.json``.

    Attributes:
        shards: the name of each file -> the names of its tensors, in the order of the files.
        index: the path of the index, or None.

    Raises:
        FileNotFoundError: there are no weights, or a shard that the index names is missing.
        ValueError: a file is truncated or corrupt, or the index names a tensor that its shard lacks.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = check_exists(Path(path), "model")
        self.index: Path | None = None

        files = [self.path] if self.path.is_file() else self._find_files()

        self.folder = files[0].parent
        self.shards: dict[str, list[str]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, str] = {}
        self._dtypes: dict[str, str] = {}
        for file in files:
            with open_tensors(file) as handle:
                self.shards[file.name] = list(handle.keys())
                for name in self.shards[file.name]:
                    view = handle.get_slice(name)
                    self._shapes[name], self._dtypes[name] = tuple(view.get_shape()), view.get_dtype()
                    self._files[name] = file.name

        self._check_index()

    def _find_files(self) -> list[Path]:
        indexes = sorted(self.path.glob(f"*{INDEX}"))
        if indexes:
            self.index = next((path for path in indexes if path.name == f"model{INDEX}"), indexes[0])
            names = sorted(set(self._weight_map().values()))
            missing = [name for name in names if not (self.path / name).is_file()]
            if missing:
                raise FileNotFoundError(
                    f"{self.path} lacks {len(missing)} of {len(names)} shards that {self.index.name} names (first: "
                    f"{missing[0]}); copy or download them"
                )

            return [self.path / name for name in names]

        usual = [self.path / f"{name}.safetensors" for name in NAMES]
        found = next((path for path in usual if path.is_file()), None)
        others = sorted(self.path.glob("*.safetensors"))
        if found is None and len(others) != 1:
            if others:
                reason = f"{len(others)} safetensors files and no index"
            else:
                reason = "no safetensors file"

            raise FileNotFoundError(
                f"{self.path} has {reason}; save the model with save_pretrained, which writes model.safetensors"
            )

        return [found or others[0]]

    def _weight_map(self) -> dict[str, str]:
        if self.index is None:
            return {}

        found = read_object(self.index).get("weight_map")
        if not isinstance(found, dict) or not found or not all(isinstance(file, str) for file in found.values()):
            raise UserError(f"{self.index} has no weight_map of names to files; copy or download it again")
        if strange := next((file for file in found.values() if Path(file).name != file), None):
            raise UserError(f"{self.index} names the shard {strange!r}, which is not a file beside it")

        return found

    def _check_index(self) -> None:
        for name, file in self._weight_map().items():
            if self._files.get(name) != file:
                raise UserError(
                    f"{self.index} says that {name} is in {file}, which lacks it; copy or download it again"
                )

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, without reading it."""
        return self._shapes[name]

    def dtype(self, name: str) -> str:
        """Of a tensor, as safetensors calls it: "F32", "BF16"."""
        return self._dtypes[name]

    def metadata(self, file: str) -> dict[str, str]:
        """Of one of the files."""
        with open_tensors(self.folder / file) as handle:
            return dict(handle.metadata() or {})

    def get(self, name: str) -> Tensor:
        """Reads one tensor. The file is opened for it alone, so that its mapped pages go when the tensor goes.

        Raises:
            KeyError: there is no such tensor.
            ValueError: its file is truncated.
        """
        path = self.folder / self._files[name]
        with open_tensors(path) as handle:
            try:
                return handle.get_tensor(name)  # type: ignore[no-any-return]
            except SafetensorError as error:
                raise UserError(f"{path}: {name} cannot be read: {error}; copy or download it again") from None
