"""``Settings``: one run, from a YAML file and ``key=value`` overrides, every key and type checked before it starts."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from flora.errors import UserError, user_errors
from flora.recipes import Recipe, config_path, load_recipe, optional
from flora.runs.config_file import Config
from flora.runs.run_folder import CONFIG as FILE
from flora.storage.atomic import write_text
from flora.tuner.config import FloraConfig

FLAGS = ("resume", "overwrite")
# adapter.start: as adapter.init says; one step along the task's gradient; that, with the ranks where the gradient is.
STARTS = ("init", "gradient", "gradient-ranks")
# The largest seed that NumPy takes.
LARGEST_SEED = 2**32 - 1


@dataclass
class Comparison:
    """Settings of ``flora compare``.

    Args:
        learning_rates: the grid that each method's learning rate is chosen from, on validation.
        budgets: trainable parameters that every adapter may spend, the head not counted; each is a comparison of its
            own. Empty: what LoRA of rank ``lora_r`` costs.
        lora_r: that rank.
        scale: alpha / r of the adapters other than FLoRA.
        probe_epochs: for how many epochs the head alone is trained first, on the frozen base, the same for every
            method. It is for new heads; 0 leaves it out.
    """

    learning_rates: list[float] = field(default_factory=lambda: [1e-4, 3e-4, 1e-3, 3e-3])
    budgets: list[int] = field(default_factory=list)
    lora_r: int = 8
    scale: float = 2.0
    probe_epochs: float = 0.0

    def __post_init__(self) -> None:
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise UserError(f"compare.learning_rates is {self.learning_rates}, expected one or more above 0")
        if self.budgets and min(self.budgets) < 1:
            raise UserError(f"compare.budgets is {self.budgets}, expected counts of parameters from 1")
        if self.lora_r < 1:
            raise UserError(f"compare.lora_r is {self.lora_r}, expected 1 or more")
        if not 0 <= self.probe_epochs < math.inf:
            raise UserError(f"compare.probe_epochs is {self.probe_epochs}, expected 0 or more")


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
        start: "init", as the adapter's config says, "gradient", along the gradient of the first training batches, or
            "gradient-ranks", with the ranks where that gradient is too.
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

    def text(self) -> str:
        """The ``config.yaml`` from which :func:`read` gives the same settings back."""
        return f"# flora train {FILE}\n{yaml.safe_dump(self.as_dict(), sort_keys=False)}"

    def save(self, folder: Path) -> None:
        """Writes ``config.yaml`` into a folder."""
        write_text(folder / FILE, self.text())


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
    given = Config(path, overrides)
    name = given.text("recipe")
    if not isinstance(name, str):
        raise UserError(f"{path} needs 'recipe: NAME'; `flora recipes` lists them")

    recipe = load_recipe(name)

    groups: dict[str, Any] = {
        "task": recipe.Task,
        "adapter": FloraConfig,
        "training": optional(recipe, "ARGUMENTS"),
        "compare": Comparison,
    }
    given.apply(groups)
    start = _take_start(given)
    given.check_keys(groups)
    checked = given.check_types(groups)
    adapter = _given_only(checked.adapter, given.values.get("adapter"))
    training = _given_only(checked.training, given.values.get("training"))

    # PEFT, and a recipe of the user's own, refuse values in this way.
    with user_errors(ValueError, TypeError):
        _checked_adapter(given, adapter)
        task = recipe.Task(**vars(checked.task))

    comparison = Comparison(**vars(checked.compare))

    if not 0 <= checked.seed <= LARGEST_SEED:
        raise UserError(f"seed is {checked.seed}, expected 0 to {LARGEST_SEED}")

    return Settings(name, _output(given, path), checked.seed, task, adapter, training, comparison, start)


def _checked_adapter(given: Config, adapter: dict[str, Any]) -> None:
    """Lets the adapter's own config refuse what does not go together, and says where it was given."""
    try:
        FloraConfig(**adapter)
    except UserError as error:
        field = re.split(r"\W", str(error))[0]
        if field in adapter:
            raise type(error)(f"{given.place_of(f'adapter.{field}')}: adapter.{error}") from None

        raise type(error)(f"{given.path}: adapter: {error}") from None


def _given_only(checked: Namespace, given: dict[str, Any] | None) -> dict[str, Any]:
    """Those settings of a group that were given, without its defaults."""
    return {key: _plain(value) for key, value in vars(checked).items() if key in (given or {})}


def _output(given: Config, path: Path) -> Path:
    text = given.text("output")
    if text is None:
        return Path("outputs") / path.stem
    if not isinstance(text, str) or text == "" or "\0" in text:
        raise UserError(f"output is {text!r}, expected the path of a folder")

    output = Path(text).expanduser() if text.startswith("~/") else Path(text)
    # A run that replaces another works beside it, under a name derived from the output's.
    if output.name in ("", ".."):
        output = output.resolve()
    if not output.name:
        raise UserError(f"output is {text!r}, expected the path of a folder that can be made")

    return output


def _take_start(given: Config) -> str:
    """Takes ``adapter.start`` out, which is about the run and no field of the adapter that is saved."""
    adapter = given.values.get("adapter")
    if not isinstance(adapter, dict):
        return STARTS[0]

    start = adapter.pop("start", STARTS[0])
    where = given.place_of("adapter.start")
    if start not in STARTS:
        raise UserError(f"{where}: adapter.start is {start!r}, expected one of {', '.join(STARTS)}")
    if start == "gradient-ranks" and adapter.get("budget") is None:
        raise UserError(
            f"{where}: the ranks go where the gradient is within adapter.budget, and there is none; add "
            "adapter.budget=0.01, a part of the model's parameters"
        )

    return str(start)


def split_flags(overrides: Iterable[str]) -> tuple[dict[str, bool], list[str]]:
    """Takes ``resume=true`` and ``overwrite=true``, as the flags were once written, out of the overrides.

    Raises:
        UserError: the value is neither true nor false.
    """
    flags, rest = {}, []
    for item in overrides:
        key, _, text = item.partition("=")
        if key not in FLAGS:
            rest.append(item)
        elif text.lower() in ("true", "false"):
            flags[key] = text.lower() == "true"
            print(f"flora: {item} is a flag now: --{key}", file=sys.stderr)
        else:
            raise UserError(f"{item!r}: {key} is a flag now; write --{key}")

    return flags, rest


def _plain(value: Any) -> Any:
    """Namespaces as dicts, so that the settings can be written."""
    if isinstance(value, Namespace):
        return value.as_dict()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
