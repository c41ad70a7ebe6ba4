"""From an output folder back to models: the base it names, and the adapter on it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from flora.data.records import head_options
from flora.errors import UserError, user_errors
from flora.runs.run_folder import ADAPTER, ADAPTER_CONFIG, LABELS
from flora.runs.run_folder import CONFIG as FILE
from flora.runs.settings import read
from flora.storage.atomic import read_json
from flora.storage.progress import hidden_bars

AUTO_CLASSES = {  # task_type of an adapter config -> the class of transformers that PEFT pairs it with
    "CAUSAL_LM": "AutoModelForCausalLM",
    "FEATURE_EXTRACTION": "AutoModel",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}


def check_adapter(folder: Path) -> dict[str, Any]:
    """Checks that a folder holds a whole adapter of finite numbers.

    Returns:
        What is in ``adapter_config.json``.

    Raises:
        FileNotFoundError: the folder or a file is missing.
        ValueError: a file is truncated or corrupt, or a tensor has NaN or infinite entries; names it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist; give the folder of an adapter")
    config = cast("dict[str, Any]", read_json(folder / ADAPTER_CONFIG))
    if not (folder / ADAPTER).is_file():
        raise FileNotFoundError(f"{folder} has no {ADAPTER}; the training that writes it has not ended")
    for key, tensor in read_safetensors(folder / ADAPTER).items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{folder / ADAPTER}: {key} has NaN or infinite entries; the training diverged")
    return config


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a file.

    Raises:
        ValueError: the file is truncated or corrupt.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
    except SafetensorError as error:
        raise UserError(f"{path} is truncated or corrupt ({error}); copy it again, or train again") from None


def load_base(folder: Path, base: str | None = None) -> PreTrainedModel:
    """The base model that an adapter was trained on.

    Args:
        folder: of the adapter. Its config names the base and, unless it has a task type, the class.
        base: a local folder or hub id to take instead of the one that is named.

    Raises:
        FileNotFoundError: the base is neither a local folder nor known to the hub, and no recipe can make it again.
        ValueError: the folder does not say which class the base has.
    """
    config = check_adapter(folder)
    where = base or config.get("base_model_name_or_path")
    if not where:
        raise UserError(f"{folder / ADAPTER_CONFIG} names no base model; give it with --base")
    absent = base is None and Path(where).is_absolute() and not Path(where).is_dir()
    if (folder / FILE).is_file() and (absent or not (folder / LABELS).is_file()):
        settings = read(str(folder / FILE))
        # A recipe knows how its model is loaded: the size of the head, the part of a pipeline. One that makes its own
        # base makes it again where the cache was cleared, or on another machine.
        if hasattr(settings.task, "model"):
            task = settings.task if base is None else replace(settings.task, model=base)
            return settings.load_recipe().load_base(task)
        if absent:
            return settings.load_recipe().load_base(settings.task)
    try:
        with hidden_bars() if Path(where).is_dir() else nullcontext():  # a download has a bar
            head = head_options(read_json(folder / LABELS)) if (folder / LABELS).is_file() else {}
            return cast("PreTrainedModel", model_class(config, folder).from_pretrained(where, **head))
    except OSError as error:
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"the base model {where!r} of {folder} cannot be loaded ({reason}); give --base"
        ) from None


def model_class(config: Mapping[str, Any], folder: Path) -> Any:
    """The class of the base model, or an auto class of transformers, that an adapter config names.

    Raises:
        ValueError: it names none.
    """
    mapping, task = config.get("auto_mapping"), config.get("task_type")
    if mapping:
        return getattr(importlib.import_module(mapping["parent_library"]), mapping["base_model_class"])
    if task in AUTO_CLASSES:
        return getattr(importlib.import_module("transformers"), AUTO_CLASSES[task])
    raise UserError(
        f"{folder / ADAPTER_CONFIG} says neither the class (auto_mapping) nor a task_type of "
        f"{', '.join(AUTO_CLASSES)}; save the adapter with save_pretrained from its PeftModel"
    )


def load_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """The base model with the adapter of the folder on it, in evaluation mode.

    Raises:
        ValueError: a file is corrupt, or the adapter does not fit; names the first layer that differs.
    """
    check_adapter(folder)
    try:
        with user_errors(ValueError):
            return PeftModel.from_pretrained(base, str(folder)).eval()
    except RuntimeError as error:  # torch's own list of tensors that do not fit, one a line
        lines = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
        if not lines:
            raise
        raise UserError(f"the adapter {folder} does not fit the base model: {lines[0]}") from None
