"""``flora recipes``: the packaged configs, and the settings of a recipe's task."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields
from typing import Any

from tabulate import tabulate

from flora.recipes import CONFIGS, config_names, config_path, load_recipe


def recipe_table() -> str:
    """Every packaged config with the first sentence of its head."""
    rows = [(name, _description(name)) for name in config_names()]
    return str(tabulate(rows, tablefmt="plain"))


def _description(config: str) -> str:
    """The comment at the head of a config, up to the end of its first sentence."""
    lines = (CONFIGS / f"{config}.yaml").read_text(encoding="utf-8").splitlines()
    comment = [line.removeprefix("#").strip() for line in lines if line.startswith("#")]
    paragraph = " ".join(line for line in comment[1:] if line)
    end = paragraph.find(". ")
    if end < 0:
        return paragraph

    return paragraph[: end + 1]


def task_keys(config: str) -> str:
    """The ``task`` keys of a config's recipe: what each means, and its default.

    Args:
        config: The name of a packaged config, or of a recipe.

    Raises:
        FileNotFoundError: There is no such config.
    """
    text = config_path(config).read_text(encoding="utf-8")
    name = next(line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("recipe:"))
    task: Any = load_recipe(name).Task
    defaults = [f"  task.{item.name} = {_default(item)}" for item in fields(task)]
    return "\n".join([f"The task keys of {name}:", *defaults, "", inspect.getdoc(task) or ""])


def _default(item: Any) -> str:
    if item.default is not MISSING:
        return repr(item.default)
    if item.default_factory is not MISSING:
        return repr(item.default_factory())
    return "(must be given)"
