"""Every format to and from one in-memory :class:`Adapter`. Key names and shapes only: nothing here needs PEFT.

>>> list(FORMATS)
['flora', 'lora', 'kohya', 'dense', 'official']
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from torch import nn

from flora.convert.adapter import Adapter, Entry
from flora.convert.base_model import Base, open_base
from flora.convert.formats import dense, kohya, lora, native, official
from flora.convert.report import Report, compare, size_of
from flora.errors import UserError, WrongTypeError, nearest
from flora.layers.layout import Layout
from flora.storage.atomic import check_target, staged
from flora.storage.card import complete_card, results_in
from flora.storage.replacing import ADAPTER, TENSORS, Kind
from flora.storage.tensors import CONFIG, DTYPES, WEIGHTS, as_path, check_exists, read_object

FORMATS: dict[str, ModuleType] = {"flora": native, "lora": lora, "kohya": kohya, "dense": dense, "official": official}
Target = Literal["flora", "lora", "kohya", "dense"]
FOLDERS = ("flora", "lora")
OLD_WEIGHTS = "adapter_model.bin"
# Endings of the files that can be an adapter.
READ = (".safetensors", ".pt", ".pth", ".bin")

__all__ = ["FORMATS", "Adapter", "Base", "Entry", "Layout", "Report", "convert", "detect", "load", "open_base", "save"]


def detect(path: str | Path) -> str:
    """Which of :data:`FORMATS` a path is.

    Raises:
        FileNotFoundError: it does not exist, or is a folder without adapter_config.json.
        ValueError: it is none of them; says what it looks like.
    """
    path = check_exists(Path(path), "adapter")
    _check_kind(path)

    # Dense files are recognised by their metadata, so they come before the formats that are recognised by key names.
    for name in ("flora", "lora", "dense", "official", "kohya"):
        if FORMATS[name].detect(path):
            return name

    if path.is_file():
        raise UserError(
            f"{path} is not an adapter that can be read: none of its keys belong to {', '.join(FORMATS)}. Whole "
            "models are for `flora extract BASE TUNED`"
        )

    kind = read_object(path / CONFIG).get("peft_type")
    raise UserError(
        f"{path / CONFIG} has peft_type {kind!r}; only TUCKER (ours) and LORA can be read, merge others with PEFT"
    )


def _check_kind(path: Path) -> None:
    """Refuses what is clearly not an adapter: weights without their folder, another kind of file, a whole model."""
    if path.is_file():
        if path.suffix not in READ:
            raise UserError(f"{path} is not a file of tensors ({', '.join(READ)}); give an adapter's folder or file")
        if path.suffix == ".safetensors" and (path.parent / CONFIG).is_file():
            raise UserError(
                f"{path} is only the weights of an adapter; give its folder, {path.parent}, which has {CONFIG}"
            )
    elif not (path / CONFIG).is_file() and (path / "config.json").is_file():
        raise UserError(
            f"{path} is the folder of a whole model, expected that of an adapter, with {CONFIG}; `flora extract` "
            "makes an adapter of a model that was fine-tuned in full"
        )
    elif not (path / CONFIG).is_file():
        # PEFT keeps an adapter of another name than "default" in a folder of that name.
        inside = sorted(each.parent for each in path.glob(f"*/{CONFIG}"))
        hint = f"; did you mean {str(inside[0])!r}?" if inside else "; give the folder that save_pretrained wrote"
        raise FileNotFoundError(f"{path} is no adapter's folder: it has no {CONFIG}{hint}")
    elif not (path / WEIGHTS).is_file() and (path / OLD_WEIGHTS).is_file():
        raise FileNotFoundError(
            f"{path} has {OLD_WEIGHTS}, as PEFT once saved, and no {WEIGHTS}; load it with PEFT and save it again"
        )


def load(path: str | Path, *, base: Base | nn.Module | str | Path | None = None, scale: float | None = None) -> Adapter:
    """Reads an adapter of any format, which is detected from its files.

    Args:
        path: a folder that PEFT saved, or a tensor file (Kohya, dense, the authors' checkpoints).
        base: the base model (a module, or a folder with its config), for formats that do not record what kind of layer
            a weight belongs to. By default, of our own format, the folder that the adapter's config names, where it
            exists.
        scale: the scale of an authors' checkpoint, which does not store it.

    Returns:
        The adapter, exactly as stored.

    Raises:
        FileNotFoundError: the path, or a file of the folder, does not exist.
        ValueError: no format matches, or the file is truncated, corrupt, foreign, has NaN or does not fit together.
    """
    path = as_path(path, "an adapter")
    kind = detect(path)
    if scale is not None and kind != "official":
        raise UserError(f"{path} has the format {kind!r}, which stores the scale; leave scale out")

    known = open_base(base) if base is not None else None

    layouts = known.layouts if known is not None else None

    if kind == "official":
        adapter = official.read(path, layouts, scale=scale)
    elif kind == "flora":
        adapter = native.read(path)
        named = adapter.config.get("base_model_name_or_path")
        if known is None and named and adapter.recorded_layouts() is None and (Path(named) / "config.json").is_file():
            known = open_base(named)

        if known is not None:
            adapter = adapter.with_layouts(known.layouts)
    else:
        adapter = FORMATS[kind].read(path, layouts)

    _check_entries(adapter, path, known)

    return adapter


def _check_entries(adapter: Adapter, path: Path, base: Base | None) -> None:
    """Checks that the parts of each change fit together, and fit the base model as far as that is known."""
    for name, entry in adapter.weights.items():
        parts = (entry.form.core, *(factor for factor in entry.form.factors if factor is not None))
        for part in parts:
            if part.dtype not in DTYPES:
                raise UserError(f"{path}: {name} is stored as {part.dtype}, expected a floating-point type")

        if not math.isfinite(entry.scale):
            raise UserError(f"{path}: {name} has the scale {entry.scale}, expected a finite number")
        if len({part.dtype for part in parts}) > 1:
            raise UserError(f"{path}: the tensors of {name} have different types of numbers; the file was edited")

        if entry.layout is not None and len(entry.layout.axes) != len(entry.shape):
            raise UserError(
                f"{path}: {name} has the shape {entry.shape} and the axes {', '.join(entry.layout.axes)}; the file was "
                "edited, or the base model is another"
            )

        # a parametrised weight is no parameter
        expected = base.shapes.get(name) if base is not None else None

        if expected is not None and entry.shape != expected:
            raise UserError(
                f"{name} has shape {expected} in the base model and {entry.shape} in the adapter; give the base model "
                "that the adapter was trained on"
            )


def save(
    adapter: Adapter,
    path: str | Path,
    *,
    format: Target = "flora",
    prefix: str | None = None,
    mid: bool = True,
    drop_extras: bool = False,
    overwrite: bool = False,
) -> Report:
    """Writes an adapter, reads it back and compares; the output appears only once that has passed.

    Args:
        adapter: what to write.
        path: a folder for "flora" and "lora", a ``.safetensors`` file for "kohya" and "dense".
        format: "flora" (ours), "lora" (PEFT's, read by the LLM servers), "kohya" (LyCORIS, ComfyUI) or "dense".
        prefix: of Kohya keys; "lycoris" by default.
        mid: False writes Kohya files without ``lora_mid``, for sd-scripts and diffusers.
        drop_extras: leaves out biases and modules_to_save, for formats that cannot hold them.
        overwrite: replaces what is at ``path``.

    Raises:
        FileExistsError: ``path`` exists and ``overwrite`` is not set.
        ValueError: the format cannot hold the adapter; names the weight, the reason and the remedy.
        OSError: it cannot be written; nothing is left behind.
    """
    return _save(adapter, path, format, prefix, mid, drop_extras, overwrite, [])


def _save(
    adapter: Adapter,
    path: str | Path,
    format: Target,
    prefix: str | None,
    mid: bool,
    drop_extras: bool,
    overwrite: bool,
    results: Sequence[Any],
) -> Report:
    """:func:`save`; a folder's card gets the measurements ``results``."""
    if not isinstance(adapter, Adapter):
        raise WrongTypeError(
            f"save needs an Adapter, as load and extract give it, got a {type(adapter).__name__}; an adapted model is "
            "saved with model.save_pretrained(folder), a file or folder is converted with flora convert"
        )

    path = as_path(path, "the output")
    _check_options(adapter, path, format, prefix, mid)

    if drop_extras:
        bare = {**adapter.config, "modules_to_save": None, "trainable_token_indices": None, "bias": "none"}
        adapter = Adapter(adapter.weights, {}, bare)

    with staged(path, _kind(format), overwrite=overwrite) as work:
        if format == "kohya":
            remarks = kohya.write(adapter, work, prefix=prefix or "lycoris", mid=mid)
        else:
            remarks = FORMATS[format].write(adapter, work)

        layouts = {name: entry.layout for name, entry in adapter.weights.items() if entry.layout is not None}

        # What a config lacks or has too much of was said when the source was read.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            written = native.read(work) if format == "flora" else FORMATS[format].read(work, layouts or None)

        largest, relative, worst = compare(adapter, written)
        count = size_of(work)

        if work.is_dir():
            complete_card(work, read_object(work / CONFIG), results)

    return Report(path, format, len(adapter.weights), largest, relative, worst, count, None, tuple(remarks or ()))


def _check_options(adapter: Adapter, path: Path, format: str, prefix: str | None, mid: bool) -> None:
    if format not in FORMATS or format == "official":
        near = nearest(format, ("flora", "lora", "kohya", "dense"))
        raise UserError(f"format is {format!r}, expected one of flora, lora, kohya, dense{near}")
    if format != "kohya" and (prefix is not None or not mid):
        raise UserError(f"prefix and mid belong to the format 'kohya'; leave them out for {format!r}")
    if format not in FOLDERS and path.suffix != ".safetensors":
        raise UserError(f"{format!r} is one file; give a path that ends in .safetensors, got {path}")
    if format in FOLDERS and path.suffix == ".safetensors":
        raise UserError(f"{format!r} is a folder with {CONFIG}; give a path without .safetensors, got {path}")
    if not adapter.weights:
        raise UserError("the adapter changes no weight; there is nothing to write")


def _kind(format: str) -> Kind:
    """What an output of a format looks like, which alone is ever replaced."""
    if format in FOLDERS:
        return ADAPTER
    return TENSORS


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: Target,
    base: nn.Module | str | Path | None = None,
    scale: float | None = None,
    prefix: str | None = None,
    mid: bool = True,
    drop_extras: bool = False,
    overwrite: bool = False,
) -> Report:
    """Reads ``source`` with :func:`load` and writes it with :func:`save`; raises what they raise.

    Returns:
        The report, with both sizes.
    """
    check_target(Path(target), _kind(to), overwrite=overwrite, sources=[source])
    adapter = load(source, base=base, scale=scale)
    results = results_in(Path(source)) if Path(source).is_dir() else []
    report = _save(adapter, target, to, prefix, mid, drop_extras, overwrite, results)
    return replace(report, source_bytes=size_of(Path(os.fspath(source))))
