"""A config as plain values: what the YAML file says, and the ``key=value`` items of the command line over it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, cast, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser, Namespace

from flora.errors import UserError
from flora.storage.parsing import parse_yaml, read_yaml

# Set by PEFT, by the Trainer or at the top of the config.
HIDDEN = {
    "adapter": {
        "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision",
        "task_type",
    },
    "training": {"output_dir", "resume_from_checkpoint", "seed"},
}  # fmt: skip
# What people call a setting -> its name.
SPOKEN = {
    "batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "grad_accum": "gradient_accumulation_steps",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lr": "learning_rate",
    "rank": "r",
    "steps": "max_steps",
    "warmup_ratio": "warmup_steps",
    "workers": "dataloader_num_workers",
}
# A YAML file of a few hundred characters can expand to billions of values.
MOST_VALUES = 100_000


class Item(NamedTuple):
    """A ``key=value`` item of the command line."""

    key: str
    text: str

    def __str__(self) -> str:
        return f"{self.key}={self.text}"


class Config:
    """The values of a config, and where each one comes from.

    Args:
        path: of the YAML file.
        overrides: ``key=value`` items.

    Attributes:
        values: by group and key.

    Raises:
        UserError: the file is not a YAML mapping, or an item has no key or no equals sign.
    """

    def __init__(self, path: Path, overrides: Iterable[str] = ()) -> None:
        self.path = path
        self.items = [_item(text) for text in overrides]
        self.values = _load(path)

    def text(self, key: str) -> Any:
        """The value of a key at the top that is text: as it was typed where it comes from the command line."""
        given = [item.text for item in self.items if item.key == key]
        if given:
            return given[-1]
        return self.values.get(key)

    def apply(self, groups: Mapping[str, Any]) -> None:
        """Puts the items of the command line over the values of the file.

        A setting that is text, such as a path, is taken as it was typed; any other value is read as YAML.

        Args:
            groups: the class of the settings in each group.
        """
        for item in self.items:
            *parents, leaf = item.key.split(".")
            place = self.values
            for parent in parents:
                if place.get(parent) is None:
                    place[parent] = {}

                place = place[parent]
                if not isinstance(place, dict):
                    raise UserError(f"{item.key} cannot be set: {parent} is a value, not a group of settings")

            place[leaf] = _value(item, _type_of(item.key, groups))

    def place_of(self, key: str) -> str:
        """Where a key was given, for messages."""
        given = [str(item) for item in self.items if item.key == key or item.key.startswith(f"{key}.")]
        if given:
            return given[-1]
        return str(self.path)

    def check_keys(self, groups: Mapping[str, Any]) -> None:
        """Raises a UserError for the first key that no setting has; names the nearest one."""
        known = known_keys(groups)
        for key in _flatten(self.values, groups):
            if key not in known:
                where = "the command line" if key in [item.key for item in self.items] else self.path
                raise UserError(f"unknown key {key!r} in {where}{_nearest_key(key, known, groups)}")

    def check_types(self, groups: Mapping[str, Any]) -> Namespace:
        """The settings of each group, with their defaults.

        Raises:
            UserError: a value has another type than its setting.
        """
        parser = _type_checker(tuple(groups.items()))
        given = {key: value for key, value in self.values.items() if value is not None}

        try:
            return cast("Namespace", parser.parse_object(given))
        except Exception as error:
            # jsonargparse raises ArgumentError about a value, and errors of many other kinds.
            key = _key_in(str(error))
            if key is None:
                raise UserError(f"{self.path}: {' '.join(str(error).split())}") from None

            value = _lookup(self.values, key)
            expected = f"{_type_name(key, groups)}{_about(key, groups)}"
            raise UserError(f"{self.place_of(key)}: {key} is {_short(value)}, expected {expected}") from None


@lru_cache(maxsize=32)
def _type_checker(groups: tuple[tuple[str, Any], ...]) -> ArgumentParser:
    """Knows the type of each setting; building one takes longer than everything else that is checked."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--recipe", type=str)
    parser.add_argument("--output", type=str)
    parser.add_argument("--seed", type=int, default=0)

    for group, kind in groups:
        parser.add_class_arguments(kind, group, skip=HIDDEN.get(group, set()), instantiate=False)

    return parser


def known_keys(groups: Mapping[str, Any]) -> list[str]:
    """Every key that a config with these groups may have."""
    keys = ["recipe", "output", "seed"]
    for group, kind in groups.items():
        own = fields(kind) if is_dataclass(kind) else ()

        keys += [f"{group}.{item.name}" for item in own if item.name not in HIDDEN.get(group, ())]

    return keys


def _item(text: str) -> Item:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"{text!r} is not an override; write key=value, such as adapter.r=4")
    return Item(key, value)


def _load(path: Path) -> dict[str, Any]:
    given = read_yaml(path)
    if not isinstance(given, dict):
        raise UserError(f"{path} must be a mapping of settings, got {type(given).__name__}")
    if not all(isinstance(key, str) for key in given):
        raise UserError(f"{path} has keys that are not words: {_short(list(given))}")
    if _count(given, MOST_VALUES) > MOST_VALUES:
        raise UserError(f"{path} has more than {MOST_VALUES:,} values; its parts refer to each other")

    return given


def _count(value: Any, most: int) -> int:
    """How many values there are inside, counted up to ``most``; what is referred to twice counts twice."""
    waiting, found = [value], 0
    while waiting and found <= most:
        item = waiting.pop()
        found += 1

        if isinstance(item, dict):
            waiting += [*item, *item.values()]
        elif isinstance(item, list):
            waiting += item

    return found


def _type_of(key: str, groups: Mapping[str, Any]) -> Any:
    """The type of a setting, or None where it is not known."""
    group, _, name = key.rpartition(".")
    if not group:
        return {"recipe": str, "output": str, "seed": int}.get(name)
    if group not in groups:
        return None

    try:
        return get_type_hints(groups[group]).get(name)
    except (NameError, TypeError):
        # Hints that only their own file can read.
        return next((item.type for item in fields(groups[group]) if item.name == name), None)


def _value(item: Item, kind: Any) -> Any:
    choices = _choices(kind)
    if set(choices) == {str, type(None)} and item.text == "null":
        return None
    if set(choices) <= {str, type(None)}:
        return item.text

    text = item.text
    # On a command line people leave the space out that YAML needs behind a colon.
    if text.startswith("{"):
        text = re.sub(r":(?=[^\s/])", ": ", text)

    value = parse_yaml(text, f"the value of {_short(str(item))}")
    # A path may look like something else: `run #2.json` has no comment, and 2024-01-01 is a name.
    if str in choices and not _is_one_of(value, choices) and not item.text.startswith(("'", '"')):
        return item.text

    return value


def _choices(kind: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type that it is; ``(None,)`` where it is not known."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _is_one_of(value: Any, choices: Iterable[Any]) -> bool:
    """Whether a value has one of the types that are no text: a list, a group, a number, null."""
    kinds = tuple(get_origin(choice) or choice for choice in choices if choice is not str)
    return isinstance(value, tuple(kind for kind in kinds if isinstance(kind, type)))


def _flatten(given: Mapping[str, Any], groups: Mapping[str, Any]) -> Iterator[str]:
    for key, value in given.items():
        if key in groups and isinstance(value, dict):
            yield from (f"{key}.{name}" for name in value)
        elif key not in groups:
            yield key
        elif value is not None:
            yield f"{key} (expected a group of settings)"


def _nearest_key(key: str, known: list[str], groups: Mapping[str, Any]) -> str:
    """What people call it, a slip of the pen, the same name in another group, or the nearest spelling."""
    group, _, leaf = key.rpartition(".")
    spoken = [name for name in known if name.rpartition(".")[2] == SPOKEN.get(leaf)]
    same = [name for name in known if name.rpartition(".")[2] == leaf]
    inside = known

    if group in groups:
        inside = [name for name in known if name.startswith(f"{group}.")]

    slip = difflib.get_close_matches(key, inside, n=1, cutoff=0.9)
    spelt = difflib.get_close_matches(key, inside, n=1) or difflib.get_close_matches(key, known, n=1)
    near = spoken or slip or same or spelt
    return f"; did you mean {near[0]!r}?" if near else ""


def _key_in(message: str) -> str | None:
    """The key that jsonargparse complains about."""
    found = re.search(r'key "([\w.]+)"', message)
    if found is None:
        return None
    return found[1]


def _lookup(values: Mapping[str, Any], key: str) -> Any:
    value: Any = values
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None

    return value


def _type_name(key: str, groups: Mapping[str, Any]) -> str:
    """``Optional[Union[list[str], str]]`` as "list[str] or str or null"."""
    kind = _type_of(key, groups)
    names = []
    for choice in _choices(kind):
        if choice is type(None):
            names.append("null")
        elif get_origin(choice) is Literal:
            names += [str(word) for word in get_args(choice)]
        else:
            names.append(_plain_name(choice))

    return " or ".join(dict.fromkeys(names))


def _about(key: str, groups: Mapping[str, Any]) -> str:
    """What a setting is, where its field says so: the first sentence of that."""
    group, _, name = key.rpartition(".")
    kind = groups.get(group)
    if kind is None or not is_dataclass(kind):
        return ""

    told = next((str(item.metadata.get("help", "")) for item in fields(kind) if item.name == name), "")
    sentence = " ".join(told.split()).partition(". ")[0].rstrip(".")
    return sentence and f" ({sentence})"


def _plain_name(kind: Any) -> str:
    if kind is None:
        return "another type"
    if isinstance(kind, type) and get_origin(kind) is None:
        return kind.__name__
    return str(kind).replace("typing.", "")


def _short(value: Any) -> str:
    text = repr(value)
    if len(text) <= 80:
        return text
    return f"{text[:77]}..."
