"""Tensor files in and out: reading without pickle and with clear errors, writing beside the target and renaming."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flora.errors import UserError, WrongTypeError, nearest_path
from flora.storage.atomic import is_text, read_json

CONFIG = "adapter_config.json"
# The most dimensions of a weight.
MOST_DIMS = 16
# Under which a checkpoint keeps the weights; the last is nnU-Net's.
NESTED = ("state_dict", "model", "module", "network_weights")
# Characters of a name.
LONGEST_KEY = 10_000
# The key of a file's metadata under which the layouts are recorded; readers ignore it.
NOTE = "flora"
WEIGHTS = "adapter_model.safetensors"
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_NAMES = {
    **DTYPES,
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 8),
}


def check_exists(path: Path, what: str) -> Path:
    """The path, or a FileNotFoundError that says what should be there."""
    if not path.exists():
        raise FileNotFoundError(f"{what} not found: {path} does not exist{nearest_path(path) or '; check the path'}")
    return path


def as_path(given: object, what: str) -> Path:
    """The path of something.

    Raises:
        WrongTypeError: It is no path, such as the model itself.
    """
    if isinstance(given, (str, os.PathLike)):
        return Path(given)
    raise WrongTypeError(
        f"{what} is given by its path, got a {type(given).__name__}; save it first and give the folder"
    )


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file, opened without reading its tensors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, corrupt or not a safetensors file.
    """
    check_exists(path, "tensor file")

    if not path.is_file():
        raise UserError(f"{path} is not a file of tensors; give the file itself")

    if not is_text(path):
        raise UserError(f"{path} has a name that is not UTF-8 text, which safetensors cannot open; rename it")

    try:
        # The system's own reason, which safetensors does not tell from a bad file.
        with path.open("rb") as stream:
            stream.read(1)

        handle = safe_open(str(path), framework="pt")
    except SafetensorError as error:
        if path.suffix != ".safetensors":
            raise UserError(
                f"{path} is not a safetensors file; give a model's folder, or a file .safetensors"
            ) from None

        raise UserError(f"{path} is truncated or corrupt: {error}; copy or download it again") from None
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error.strerror or error}") from None

    with handle:
        yield handle


def is_whole(path: Path) -> bool:
    """Whether a file of tensors, of safetensors or torch, has its end; nothing in it is read but what says so."""
    if path.suffix != ".safetensors":
        # torch writes archives, whose list of contents stands at their end.
        return is_zipfile(path)

    try:
        with safe_open(str(path), framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor of a safetensors file, and its metadata; raises as :func:`open_tensors`, and on NaN entries."""
    with open_tensors(path) as handle:
        tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 (not a dict)
        metadata = handle.metadata() or {}
    check_names(tensors, path)
    check_finite(tensors, path)
    return tensors, metadata


def read_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.pt`` or ``.bin`` file, read by torch's restricted unpickler (``weights_only``).

    Raises:
        ValueError: it is corrupt, or holds objects other than tensors.
    """
    check_exists(path, "tensor file")

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception:
        # torch raises errors of many kinds, and their texts advise loading without the restriction.
        raise UserError(
            f"{path} is truncated, corrupt, or holds objects other than tensors; nothing in it was run. Copy it again, "
            "or ask its author for the weights as safetensors"
        ) from None

    found = _state_dict_in(loaded, path)
    tensors = {str(key): value for key, value in found.items() if isinstance(value, Tensor)}
    check_names(tensors, path)
    _check_plain(tensors, path)
    check_finite(tensors, path)

    return tensors


def _state_dict_in(loaded: Any, path: Path) -> Mapping[Any, Any]:
    """The dict with the tensors, which a checkpoint may keep inside others."""
    # A dict can hold itself, so the search ends after as many steps as there are names.
    for _ in range(1 + len(NESTED)):
        if not isinstance(loaded, Mapping):
            raise UserError(f"{path} holds a {type(loaded).__name__}, expected a dict of tensors; save the state_dict")
        if any(isinstance(value, Tensor) for value in loaded.values()):
            return loaded

        inner = [key for key in NESTED if key in loaded]
        if not inner:
            break

        loaded = loaded[inner[0]]

    raise UserError(f"{path} has no tensors; its keys are {', '.join(map(repr, list(loaded)[:5]))}")


def _check_plain(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuses what only looks like a weight: sparse, quantised or nested tensors, and those without their numbers.

    A tensor of torch can also repeat the numbers of its file, through strides of zero, beyond any memory.
    """
    size = path.stat().st_size
    for key, value in tensors.items():
        if value.layout is not torch.strided or value.is_quantized or value.is_nested or value.is_meta:
            raise UserError(f"{path}: {key} is not a plain tensor of numbers; save the state_dict of the model itself")
        if value.numel() > size:
            raise UserError(f"{path}: {key} has {value.numel():,} entries, more than the file can hold; it was edited")


def check_names(tensors: Mapping[str, Tensor], source: Path) -> None:
    """Raises a UserError for a name that no parameter has: with control characters, which could steer a terminal."""
    for key in tensors:
        if not key.isprintable() or len(key) > LONGEST_KEY:
            raise UserError(f"{source}: {key[:80]!r} is no name of a parameter; the file is corrupt or was edited")


def check_finite(tensors: Mapping[str, Tensor], source: Path | str) -> None:
    """Raises a ValueError that names the first tensor with NaN or infinite entries."""
    for key, value in tensors.items():
        if value.ndim > MOST_DIMS:
            raise UserError(f"{source}: {key} has {value.ndim} dimensions; no weight has more than {MOST_DIMS}")
        # Of 8 bits, which torch cannot ask.
        if value.is_floating_point() and value.element_size() == 1:
            value = value.float()
        if (value.is_floating_point() or value.is_complex()) and not torch.isfinite(value).all():
            raise UserError(
                f"{source}: {key} has NaN or infinite entries; the training that wrote it diverged; "
                "take an earlier checkpoint"
            )


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it is not a JSON object.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def read_note(metadata: Mapping[str, str], key: str, path: Path) -> dict[str, Any] | None:
    """What flora has noted in the metadata of a tensor file, or None where it has noted nothing.

    Raises:
        UserError: it is not what flora writes there.
    """
    if key not in metadata:
        return None

    try:
        note = json.loads(metadata[key])
    except (ValueError, RecursionError):
        note = None

    if not isinstance(note, dict):
        raise UserError(f"{path}: the metadata {key!r} is not the JSON object that flora writes; the file was edited")

    return note


def check_form_tensors(tensors: Mapping[str, Tensor], source: Path | str) -> None:
    """Checks that tensors can be cores and factors.

    Raises:
        UserError: one is empty, has no or too many dimensions, or numbers of a kind that is not trained; names it.
    """
    for key, value in tensors.items():
        if value.dtype not in (*DTYPES, torch.complex64, torch.complex128):
            raise UserError(
                f"{source}: {key} has numbers of type {value.dtype}, expected float32, bfloat16 or another float of 16 "
                "bits or more; save the adapter in one of these (model.float() before save_pretrained)"
            )
        if not 0 < value.ndim <= MOST_DIMS or not value.numel():
            raise UserError(
                f"{source}: {key} has the shape {tuple(value.shape)}, which no part of an adapter has; copy "
                "the file again"
            )


def stored_as(dtype: torch.dtype) -> str:
    """What safetensors calls a type of numbers.

    Raises:
        UserError: it has no name for it.
    """
    if dtype not in _NAMES:
        raise UserError(f"{dtype} is a type of numbers that a safetensors file cannot hold; save the tensor in float32")
    return _NAMES[dtype]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file; the same tensors and metadata give the same bytes.

    Raises:
        OSError: it cannot be written (no space left).
        ValueError: a tensor has a dtype that the format does not know.
    """
    ready = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    for key, value in ready.items():
        if value.dtype not in _NAMES:
            raise UserError(f"{key} has dtype {value.dtype}, which a safetensors file cannot hold")

    # The widest numbers first, as safetensors does, so that each tensor starts at a multiple of its own size.
    order = sorted(ready, key=lambda key: (-ready[key].element_size(), key))
    layout = [(key, _NAMES[ready[key].dtype], tuple(ready[key].shape)) for key in order]
    stream_tensors(path, layout, ready.__getitem__, {"format": "pt", **(metadata or {})})


def stream_tensors(
    path: Path,
    layout: Sequence[tuple[str, str, tuple[int, ...]]],
    get: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """A safetensors file written one tensor at a time, so that it need not fit into memory.

    Args:
        path: of the file.
        layout: name, dtype as safetensors calls it, and shape of each tensor, in the order in which they are written.
        get: a tensor by its name.
        metadata: of the file.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name, dtype, shape in layout:
        start, end = end, end + math.prod(shape) * _BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}

    text = json.dumps(header, separators=(",", ":")).encode()
    # The tensors begin at a multiple of 8 bytes.
    text += b" " * (-len(text) % 8)

    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)

        for name, dtype, shape in layout:
            tensor = get(name)
            if tuple(tensor.shape) != shape or tensor.element_size() * 8 != _BITS[dtype]:
                raise UserError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {shape}")

            stream.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
