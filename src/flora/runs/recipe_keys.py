"""What the keys of a config mean: those of its task, of the adapter and of the training."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields
from typing import Any

from flora.recipes import optional
from flora.runs.config_file import HIDDEN
from flora.runs.settings import read
from flora.tuner.config import FloraConfig


def task_keys(config: str) -> str:
    """The keys of a config: what each ``task`` and ``adapter`` key means, and what the config sets.

    Args:
        config: The name of a packaged config, or the path of one.

    Raises:
        FileNotFoundError: There is no such config.
    """
    settings = read(config)
    recipe = settings.load_recipe()
    task: Any = recipe.Task
    given = settings.as_dict()
    arguments = optional(recipe, "ARGUMENTS")

    lines = [f"The task keys of {settings.recipe}, with their defaults:"]
    lines += [f"  task.{item.name} = {_default(item)}" for item in fields(task)]
    lines += ["", inspect.getdoc(task) or "", "", "The adapter keys, the fields of flora.FloraConfig:"]

    for item in fields(FloraConfig):
        if "help" in item.metadata and item.name not in HIDDEN["adapter"]:
            lines.append(f"  adapter.{item.name}: {item.metadata['help']}")

    lines += [
        "  adapter.start: 'init', 'gradient' to begin along the gradient of the first batches, or 'gradient-ranks'."
    ]
    lines += ["", f"The training keys are the arguments of {arguments.__name__}; {config} sets:"]
    lines += [f"  training.{key}={value}" for key, value in given["training"].items()]
    lines += ["", f"flora train {config} key=value ... replaces any of them; flora recipes copy gives a file to edit."]

    return "\n".join(lines)


def _default(item: Any) -> str:
    if item.default is not MISSING:
        return repr(item.default)
    if item.default_factory is not MISSING:
        return repr(item.default_factory())
    return "(must be given)"
