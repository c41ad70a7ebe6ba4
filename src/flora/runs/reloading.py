"""From an output folder back to models: the settings of its run, the base that it names, and the adapter on it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from transformers import PreTrainedModel

from flora.convert.base_model import adapted_class
from flora.data.pretrained import head_options
from flora.errors import UserError, user_errors
from flora.runs.run_folder import ADAPTER, ADAPTER_CONFIG, RunFolder
from flora.runs.settings import Settings, read
from flora.storage.parsing import read_yaml
from flora.storage.progress import hidden_bars
from flora.storage.tensors import read_object, read_tensors


def read_run(folder: Path, overrides: Iterable[str] = (), *, run_recipe_file: bool = False) -> Settings:
    """The settings of the run that wrote a folder.

    Args:
        folder: that ``train`` wrote.
        overrides: ``key=value`` items that replace what the folder says.
        run_recipe_file: runs the Python file that the folder names as its recipe. A folder that somebody sent can name
            any file, so this is only for your own; packaged recipes are found by name and do not need it.

    Raises:
        FileNotFoundError: the folder has no ``config.yaml``.
        UserError: the settings cannot be used, or name a Python file and ``run_recipe_file`` is not set.
    """
    run = RunFolder(folder)
    path = run.config

    if not run.is_begun:
        raise FileNotFoundError(f"{path} does not exist; give a folder that `flora train` wrote")

    if not run_recipe_file and (file := _recipe_file(path)) is not None:
        raise UserError(
            f"the recipe that {path} names is the Python file {file}, which flora does not run unasked: a folder "
            "that somebody sent can name any file. If it is yours, add --run-recipe-file"
        )

    return read(str(path), overrides)


def _recipe_file(path: Path) -> str | None:
    """The Python file that a config names as its recipe, or None where it goes by a packaged name."""
    try:
        given = read_yaml(path)
    except UserError:
        # The next reader reports what is wrong.
        return None

    name = given.get("recipe") if isinstance(given, dict) else None
    return name if isinstance(name, str) and name.endswith(".py") else None


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """What is in ``adapter_config.json``.

    Raises:
        FileNotFoundError: the folder, its config or its tensors are missing.
        UserError: the config is not a JSON object.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist; give the folder of an adapter")

    config = read_object(folder / ADAPTER_CONFIG)
    if not (folder / ADAPTER).is_file():
        raise FileNotFoundError(f"{folder} has no {ADAPTER}; the training that writes it has not finished")

    return config


def load_base(folder: Path, base: str | None = None, *, run_recipe_file: bool = False) -> PreTrainedModel:
    """The base model that an adapter was trained on.

    Args:
        folder: of the adapter. Its config names the base and, unless it has a task type, the class.
        base: a local folder or hub id to take instead of the one that is named.
        run_recipe_file: see :func:`read_run`; asked only where the recipe has to make its model again.

    Raises:
        FileNotFoundError: the base is neither a local folder nor known to the hub, and no recipe can make it again.
        UserError: the folder does not say which class the base has.
    """
    config = read_adapter_config(folder)
    where: str = base or config.get("base_model_name_or_path") or ""
    run = RunFolder(folder)
    if not where and not run.is_begun:
        raise UserError(f"{folder / ADAPTER_CONFIG} names no base model; give it with --base")

    # A recipe knows how its model is loaded: the size of the head, the part of a pipeline. One that makes its own base
    # makes it again where it has no name, where the cache was cleared, or on another machine.
    absent = base is None and (not where or (Path(where).is_absolute() and not Path(where).is_dir()))
    labels = run.labels()
    if run.is_begun and (absent or labels is None):
        settings = read_run(folder, run_recipe_file=run_recipe_file)
        if hasattr(settings.task, "model"):
            task = settings.task if base is None else replace(settings.task, model=base)
            return settings.load_recipe().load_base(task)

        if absent:
            return settings.load_recipe().load_base(settings.task)

    head = head_options(labels) if labels is not None else {}

    try:
        # Only a download shows a progress bar.
        with hidden_bars() if Path(where).is_dir() else nullcontext():
            return cast("PreTrainedModel", adapted_class(config, folder).from_pretrained(where, **head))
    except OSError as error:
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"the base model {where!r} of {folder} cannot be loaded ({reason}); give --base"
        ) from None


def load_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """The base model with the adapter of the folder on it, in evaluation mode.

    Raises:
        FileNotFoundError: the folder or a file is missing.
        UserError: a file is truncated or corrupt, a tensor has NaN or infinite entries, or the adapter does not fit;
            names the first layer that differs.
    """
    read_adapter_config(folder)
    read_tensors(folder / ADAPTER)
    return attach(base, folder)


def attach(base: PreTrainedModel, folder: Path) -> PeftModel:
    """:func:`load_adapter` of a folder that was checked before.

    Raises:
        UserError: the adapter does not fit; names the first layer that differs.
    """
    try:
        with user_errors(ValueError), warnings.catch_warnings():
            # That is said before training; here it can no longer be changed.
            warnings.filterwarnings("ignore", message="the adapter has more parameters")
            return PeftModel.from_pretrained(base, str(folder)).eval()
    except RuntimeError as error:
        # torch's own list of tensors that do not fit, one a line.
        lines = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
        if not lines:
            raise

        raise UserError(f"the adapter {folder} does not fit the base model: {lines[0]}") from None
