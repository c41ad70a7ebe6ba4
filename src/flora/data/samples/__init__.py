"""Small data sets and base models that the package makes itself, in the same formats as real ones.

A recipe reads what ``locate`` gives it, so a ``-tiny`` config runs the very code that a real one does, offline. Each
file of this folder has ``MAKERS``: name -> function that fills an empty folder. ``sample:vision/shapes`` is the folder
that ``MAKERS["shapes"]`` of ``vision.py`` fills; it is made once and kept in the cache.
"""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

from flora.errors import UserError, nearest
from flora.storage.atomic import cache_folder, staged_folder
from flora.storage.progress import hidden_bars

PREFIX = "sample:"
Maker = Callable[[Path], None]


def sample_names() -> list[str]:
    """Every ``file/name`` that a ``sample:`` may be."""
    files = sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    return [f"{file}/{name}" for file in files for name in _module(file).MAKERS]


def locate(where: str) -> str:
    """Where a data set or model is that a config names.

    Args:
        where: A path, in which ``~`` stands for the home folder; a hub id; or ``sample:file/name``.

    Returns:
        The path or hub id; for a sample, the folder that holds it.

    Raises:
        ValueError: There is no such sample.
    """
    if where.startswith("~"):
        return str(Path(where).expanduser())
    if not where.startswith(PREFIX):
        return where

    name = where.removeprefix(PREFIX)
    file, _, maker = name.partition("/")

    if name not in sample_names():
        near = nearest(name, sample_names())
        raise UserError(f"{where!r} is not a sample; there are {', '.join(sample_names())}{near}")

    module = _module(file)
    version = hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest()[:8]
    folder = cache_folder() / f"{file}-{maker}-{version}"
    if not folder.is_dir():
        # A run that makes it draws as one that finds it.
        with staged_folder(folder) as staged, torch.random.fork_rng(), hidden_bars():
            cast("Maker", module.MAKERS[maker])(staged)

    return str(folder)


def _module(file: str) -> Any:
    return importlib.import_module(f"{__name__}.{file}")
