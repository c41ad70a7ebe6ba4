"""Recipes: each file of this folder says what a task's data, base model and metric are; ``training`` runs any of them.

A recipe is a module with the names of :class:`Recipe`. It is found by listing the folder; configs, one YAML file each,
lie in ``configs/``.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Sized
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
from torch import nn
from torch.utils.data import Dataset
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainingArguments

from flora.errors import UserError, nearest

CONFIGS = Path(__file__).parent / "configs"
SPLITS = ("train", "validation", "test")
# The names of modules that are files of the user's begin with it.
OWN_CODE = "flora_own_"


@dataclass(frozen=True)
class Data:
    """What a recipe trains on and is measured on.

    Attributes:
        train, validation, test: datasets of dicts that the model takes as keyword arguments.
        collate: a list of samples -> a batch; None is transformers' default collator.
        processor: the tokenizer or image processor, saved beside the adapter.
        labels: the names of the classes, where the base model gets a head for them: saved beside the adapter too.
    """

    train: Dataset[Any]
    validation: Dataset[Any]
    test: Dataset[Any]
    collate: Callable[[list[Any]], dict[str, Any]] | None = None
    processor: Any = None
    labels: list[str] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.train, Sized) and len(self.train) == 0:
            raise UserError("the recipe gives no examples to train on; check its settings under `task`")

    def split(self, name: str) -> Dataset[Any]:
        """The dataset of that name.

        Raises:
            ValueError: there is no such split.
        """
        if name not in SPLITS:
            raise UserError(f"split is {name!r}, expected one of {', '.join(SPLITS)}")
        return cast("Dataset[Any]", getattr(self, name))


class Request(NamedTuple):
    """One input to predict on.

    Attributes:
        given: A file or a text, as the recipe takes it.
        number: Of the input, from 0.
        name: For files that are written, without an ending; no two inputs have the same.
        out: The folder to write files to.
        prompt: The question or instruction that belongs to the input, if the user gave one.
    """

    given: str
    number: int
    name: str
    out: Path
    prompt: str | None

    def file(self, ending: str) -> Path:
        """The file to write for this input."""
        return self.out / f"{self.name}{ending}"


class Tested(NamedTuple):
    """A trained model and its test set.

    Attributes:
        task: The settings of the data and the base model.
        data: The data.
        predictions, labels: What the evaluation of the test set gave ``compute_metrics``, in the order of the set.
        model: In evaluation mode, on its device; None where it is spread over several processes.
    """

    task: Any
    data: Data
    predictions: np.ndarray
    labels: np.ndarray
    model: nn.Module | None


class Recipe(Protocol):
    """The names that a recipe's module has, and those that it may have (``OPTIONAL``).

    Attributes:
        Task: a dataclass, the settings of data and base model; its fields are the ``task`` keys of a config.
        METRIC: the key of ``compute_metrics`` that methods are compared by; larger is better.
        TRAINER: optional, a subclass of Trainer where its own loss or optimiser is not what the task needs.
        ARGUMENTS: optional, the class of that Trainer's arguments; its fields are the ``training`` keys of a config.
        preprocess_logits: optional, ``(logits, labels) -> what is kept of them`` for ``compute_metrics``.
        predictor: optional, ``(task, model, folder) -> (Request -> result)`` for ``flora predict``.
        findings: optional, ``(Tested) -> Findings``, what the page of a run shows of its test set.
        notes: optional, ``(task) -> sentences`` that are printed before training.
        INPUT_FILES: optional, the endings of the files that it predicts on; none where it takes text.
        TAKES_PROMPT: optional, whether a question belongs to each input.
    """

    Task: Callable[..., Any]
    METRIC: str

    @staticmethod
    def load_base(task: Any) -> PreTrainedModel:
        """The base model, pretrained, with ``name_or_path`` saying where it can be loaded from again."""

    @staticmethod
    def load_data(task: Any, seed: int) -> Data:
        """The data; ``seed`` draws what is random in the training set, and nothing else."""

    @staticmethod
    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        """The metrics of a split from the model's predictions and the labels."""


REQUIRED = ("Task", "METRIC", "load_base", "load_data", "compute_metrics")
OPTIONAL: dict[str, Any] = {
    "TRAINER": Trainer,
    "ARGUMENTS": TrainingArguments,
    "preprocess_logits": None,
    "predictor": None,
    "findings": None,
    "notes": lambda task: (),
    "INPUT_FILES": (),
    "TAKES_PROMPT": False,
}


def optional(recipe: Recipe, name: str) -> Any:
    """What the recipe has under one of the names of ``OPTIONAL``, or the default."""
    return getattr(recipe, name, OPTIONAL[name])


def recipe_names() -> list[str]:
    """The names of the recipes, by listing the folder."""
    return sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))


def config_names() -> list[str]:
    """The names of the packaged configs."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def load_recipe(name: str) -> Recipe:
    """Imports a recipe: a packaged one by its name, or one of the user's own by the path of its file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: no recipe has this name (the message names the nearest), or the file lacks a name of ``Recipe``.
    """
    if name.endswith(".py"):
        return _load_file(Path(name))

    names = recipe_names()
    if name not in names:
        raise UserError(
            f"recipe is {name!r}, expected one of {', '.join(names)}, or a file my_recipe.py{nearest(name, names)}"
        )

    return cast("Recipe", importlib.import_module(f"{__name__}.{name}"))


def _load_file(path: Path) -> Recipe:
    if not path.is_file():
        raise FileNotFoundError(f"the recipe {path} does not exist")

    module = run_file(path, f"recipe_{path.stem}", f"the recipe {path}")

    if missing := [item for item in REQUIRED if not hasattr(module, item)]:
        raise UserError(f"the recipe {path} has no {', '.join(missing)}; see flora.recipes.Recipe for the contract")

    return cast("Recipe", module)


def run_file(path: Path, name: str, what: str) -> ModuleType:
    """The module that a Python file of the user's makes.

    Args:
        path: of the file.
        name: of the module, after ``OWN_CODE``: random.py must not take the place of Python's own.
        what: the file is, for messages.

    Raises:
        UserError: running it fails.
    """
    spec = cast("Any", importlib.util.spec_from_file_location(f"{OWN_CODE}{name}", path))
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their own module up there.
    sys.modules[spec.name] = module

    try:
        spec.loader.exec_module(module)
    except (ModuleNotFoundError, UserError):
        raise
    except Exception as error:
        # Whatever somebody's own code may raise.
        raise UserError(f"{what} cannot be run: {type(error).__name__}: {error}") from error

    return module


def config_path(config: str) -> Path:
    """The file of a config: a path, or the name of a packaged one.

    Raises:
        FileNotFoundError: neither exists; the message names the nearest packaged config.
    """
    path = Path(config)
    if path.is_file():
        return path

    packaged = CONFIGS / f"{config}.yaml"
    if packaged.is_file() and packaged.parent == CONFIGS:
        return packaged

    names = config_names()
    if path.is_dir():
        raise UserError(
            f"{config!r} is a folder, expected a YAML file or a packaged config. Data are given to a config, as in "
            f"`flora train vision_classify task.data={config}`; `flora eval` and `flora predict` take a trained folder"
        )

    hint = nearest(config, names) or "."
    raise FileNotFoundError(
        f"no config {config!r}{hint} It is neither a file nor a packaged config ({', '.join(names)})"
    )
