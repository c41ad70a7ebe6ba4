"""``adapter_config.json``, as PEFT writes it: the fields that every format reads, checked."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flora.errors import UserError
from flora.storage.tensors import CONFIG, read_object


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_rows(value: object) -> bool:
    """Numbers of rows, for one embedding or by the embedding's name."""
    if isinstance(value, dict):
        return all(isinstance(name, str) and _is_rows(rows) for name, rows in value.items())
    return isinstance(value, list) and all(isinstance(row, int) and not isinstance(row, bool) for row in value)


CHECKS: dict[str, tuple[Callable[[object], bool], str]] = {
    "base_model_name_or_path": (lambda value: isinstance(value, str), "a name"),
    "layout": (lambda value: isinstance(value, dict), "a JSON object"),
    "modules_to_save": (_is_names, "a list of names"),
    "target_parameters": (_is_names, "a list of names"),
    "trainable_token_indices": (_is_rows, "row numbers, or names with row numbers"),
}


# The fields that this version knows: those that both methods have, then those of ours and of LoRA.
_OF_ALL = (
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "bias", "modules_to_save", "trainable_token_indices", "rank_pattern"),
    *("target_modules", "exclude_modules", "target_parameters", "layers_to_transform", "layers_pattern"),
)
FIELDS: dict[str, tuple[str, ...]] = {
    "TUCKER": (
        *_OF_ALL,
        *("kernel_r", "scale", "alpha", "scale_pattern", "fold", "budget", "layout", "dropout", "init"),
        *("init_weights", "freeze_batch_norm", "way", "path"),
    ),
    "LORA": (
        *_OF_ALL,
        *("lora_alpha", "alpha_pattern", "use_rslora", "fan_in_fan_out", "lora_dropout", "init_lora_weights"),
        *("lora_bias", "use_dora", "use_qalora", "qalora_group_size", "use_bdlora", "layer_replication"),
        *("alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "megatron_config"),
        *("megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"),
        *("runtime_config", "ensure_weight_tying"),
    ),
}


def read_config(folder: Path) -> dict[str, Any]:
    """The config of an adapter; warns of a field that this version does not know, as PEFT does.

    Raises:
        FileNotFoundError: the folder has none.
        UserError: it is not a JSON object, or a field has a value of another kind than PEFT writes; names it.
    """
    config = read_object(folder / CONFIG)
    for field, (holds, expected) in CHECKS.items():
        value = config.get(field)
        if value is not None and not holds(value):
            raise UserError(f"{folder / CONFIG}: {field} is {str(value)[:80]!r}, expected {expected}; it was edited")

    known = FIELDS.get(str(config.get("peft_type")), tuple(config))
    # A newer version that writes a field with an empty value has not made use of it.
    strange = sorted(field for field in config if field not in known and config[field])
    if strange:
        warnings.warn(
            f"{folder / CONFIG} has {', '.join(strange)[:200]}, which this version does not know and leaves out; if a "
            "newer version wrote the adapter, update flora-peft and read it again",
            stacklevel=2,
        )

    return config


@contextmanager
def naming(folder: Path) -> Iterator[None]:
    """Says of which config a value is that cannot be used."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{folder / CONFIG}: {error}") from None


def warn_of_lost_modules(config: Mapping[str, Any], extras: Mapping[str, object], folder: Path) -> None:
    """Warns where the config says that modules were trained in full, and the file has nothing of them."""
    listed = config.get("modules_to_save") or []
    if listed and not any(f".{name}." in f".{key}" for name in listed for key in extras):
        warnings.warn(
            f"{folder / CONFIG} names {', '.join(listed)[:200]} in modules_to_save, and the file of weights has none "
            "of them; those of the base model stay; copy the adapter again if they were trained",
            stacklevel=2,
        )
