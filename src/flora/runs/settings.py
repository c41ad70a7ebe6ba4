"""``Settings``: one run, from a YAML file and ``key=value`` overrides, every key and type checked before it starts."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from jsonargparse import ArgumentParser, Namespace

from flora.errors import UserError
from flora.recipes import Recipe, config_path, load_recipe, optional
from flora.storage.atomic import write_text
from flora.tuner.config import FloraConfig

FILE = "config.yaml"
FLAGS = ("resume", "overwrite")
STARTS = ("init", "gradient")  # adapter.start: as adapter.init says, or one step along the task's gradient
# Set by PEFT, by the Trainer or at the top of the config.
HIDDEN = {
    "adapter": {
        "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision",
        "task_type",
    },
    "training": {"output_dir", "resume_from_checkpoint", "seed"},
}  # fmt: skip


@dataclass
class Comparison:
    """Settings of ``flora compare``.

    Args:
        learning_rates: the grid that each method's learning rate is chosen from, on validation.
        budgets: trainable parameters that every adapter may spend, the head not counted; each is a comparison of its
            own. Empty: what LoRA of rank ``lora_r`` costs.
        lora_r: that rank.
        scale: alpha / r of the adapters other than FLoRA.
    """

    learning_rates: list[float] = field(default_factory=lambda: [1e-4, 3e-4, 1e-3, 3e-3])
    budgets: list[int] = field(default_factory=list)
    lora_r: int = 8
    scale: float = 2.0

    def __post_init__(self) -> None:
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise UserError(f"compare.learning_rates is {self.learning_rates}, expected one or more above 0")
        if self.budgets and min(self.budgets) < 1:
            raise UserError(f"compare.budgets is {self.budgets}, expected counts of parameters from 1")
        if self.lora_r < 1:
            raise UserError(f"compare.lora_r is {self.lora_r}, expected 1 or more")


@dataclass(frozen=True)
class Settings:
    """One run, checked.

    Attributes:
        recipe: the name of the recipe.
        output: the output folder.
        seed: of everything random.
        task: the recipe's ``Task``.
        adapter: keyword arguments of ``FloraConfig``.
        training: keyword arguments of ``TrainingArguments``, only those that were given.
        comparison: of ``flora compare``.
        start: "init", as the adapter's config says, or "gradient", along the gradient of the first training batches.
    """

    recipe: str
    output: Path
    seed: int
    task: Any
    adapter: dict[str, Any]
    training: dict[str, Any]
    comparison: Comparison
    start: str = "init"

    def load_recipe(self) -> Recipe:
        """The recipe's module."""
        return load_recipe(self.recipe)

    def as_dict(self) -> dict[str, Any]:
        """Every setting as plain values, in the layout of a config."""
        return {
            "recipe": self.recipe,
            "output": str(self.output),
            "seed": self.seed,
            "task": asdict(self.task),
            "adapter": {**self.adapter, "start": self.start},
            "training": self.training,
            "compare": asdict(self.comparison),
        }

    def save(self, folder: Path) -> None:
        """Writes ``config.yaml``, from which :func:`read` gives the same settings back."""
        text = f"# flora train {FILE}\n" + yaml.safe_dump(self.as_dict(), sort_keys=False)
        write_text(folder / FILE, text)


def read(config: str, overrides: Iterable[str] = ()) -> Settings:
    """Reads and checks the settings of a run.

    Args:
        config: a YAML file, or the name of a packaged config.
        overrides: ``key=value`` items that replace what the file says, such as ``adapter.r=4``.

    Raises:
        FileNotFoundError: there is no such config.
        ValueError: a key is unknown, or a value has the wrong type or is out of range; the message names key and file.
    """
    path = config_path(config)
    given = _load(path)
    for item in overrides:
        _override(given, item)
    name = given.get("recipe")
    if not isinstance(name, str):
        raise UserError(f"{path} needs 'recipe: NAME'; `flora recipes` lists them")
    recipe = load_recipe(name)
    start = _take_start(given, path)
    groups: dict[str, Any] = {
        "task": recipe.Task,
        "adapter": FloraConfig,
        "training": optional(recipe, "ARGUMENTS"),
        "compare": Comparison,
    }
    _check_keys(given, groups, path)
    checked = _check_types(given, groups, path)
    adapter = {key: value for key, value in vars(checked.adapter).items() if key in given.get("adapter", {})}
    training = {key: value for key, value in vars(checked.training).items() if key in given.get("training", {})}
    try:
        FloraConfig(**adapter)
        task = recipe.Task(**vars(checked.task))
        comparison = Comparison(**vars(checked.compare))
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None
    output = Path(checked.output or f"outputs/{path.stem}")
    return Settings(name, output, checked.seed, task, _plain(adapter), _plain(training), comparison, start)


def _take_start(given: dict[str, Any], path: Path) -> str:
    """Takes ``adapter.start`` out, which is about the run and no field of the adapter that is saved."""
    adapter = given.get("adapter")
    start = adapter.pop("start", STARTS[0]) if isinstance(adapter, dict) else STARTS[0]
    if start not in STARTS:
        raise UserError(f"{path}: adapter.start is {start!r}, expected one of {', '.join(STARTS)}")
    return str(start)


def split_flags(overrides: Iterable[str]) -> tuple[dict[str, bool], list[str]]:
    """Takes ``resume=`` and ``overwrite=``, which are about this start of the run, out of the overrides.

    Raises:
        ValueError: the value is neither true nor false.
    """
    flags, rest = {}, []
    for item in overrides:
        key, _, text = item.partition("=")
        if key not in FLAGS:
            rest.append(item)
        elif text.lower() in ("true", "false"):
            flags[key] = text.lower() == "true"
        else:
            raise UserError(f"{item!r}: expected {key}=true or {key}=false")
    return flags, rest


def _plain(value: Any) -> Any:
    """Namespaces as dicts, so that the settings can be written."""
    if isinstance(value, Namespace):
        return value.as_dict()
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def _load(path: Path) -> dict[str, Any]:
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(given, dict):
        raise UserError(f"{path} must be a mapping of settings, got {type(given).__name__}")
    return given


def _override(given: dict[str, Any], item: str) -> None:
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise UserError(f"{item!r} is not an override; write key=value, such as adapter.r=4")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"the value of {key}={text} is not valid YAML") from None
    *parents, leaf = key.split(".")
    for parent in parents:
        given = given.setdefault(parent, {})
        if not isinstance(given, dict):
            raise UserError(f"{key} cannot be set: {parent} is a value, not a group of settings")
    given[leaf] = value


def known_keys(groups: dict[str, Any]) -> list[str]:
    """Every key that a config with these groups may have."""
    keys = ["recipe", "output", "seed", "adapter.start"]
    for group, kind in groups.items():
        own = fields(kind) if is_dataclass(kind) else ()
        keys += [f"{group}.{item.name}" for item in own if item.name not in HIDDEN.get(group, ())]
    return keys


def _check_keys(given: dict[str, Any], groups: dict[str, Any], path: Path) -> None:
    known = known_keys(groups)
    for key in _flatten(given, groups):
        if key not in known:
            raise UserError(f"unknown key {key!r} in {path}{_nearest_key(key, known, groups)}")


def _flatten(given: dict[str, Any], groups: dict[str, Any]) -> Iterator[str]:
    for key, value in given.items():
        if key in groups and isinstance(value, dict):
            yield from (f"{key}.{name}" for name in value)
        elif key not in groups or value is not None:
            yield str(key) if key not in groups else f"{key} (expected a group of settings)"


def _nearest_key(key: str, known: list[str], groups: dict[str, Any]) -> str:
    """Prefers the same name in another group, then the nearest spelling in the same group, then anywhere."""
    group, _, leaf = key.rpartition(".")
    same = [name for name in known if name.rpartition(".")[2] == leaf]
    inside = [name for name in known if name.startswith(f"{group}.")] if group in groups else known
    near = same or difflib.get_close_matches(key, inside, n=1) or difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _check_types(given: dict[str, Any], groups: dict[str, Any], path: Path) -> Namespace:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--recipe", type=str)
    parser.add_argument("--output", type=str)
    parser.add_argument("--seed", type=int, default=0)
    for group, kind in groups.items():
        parser.add_class_arguments(kind, group, skip=HIDDEN.get(group, set()), instantiate=False)
    try:
        checked = parser.parse_object({key: value for key, value in given.items() if value is not None})
    except argparse.ArgumentError as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None
    return cast("Namespace", checked)
