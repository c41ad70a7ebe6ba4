"""``flora recipes``: the packaged configs."""

from __future__ import annotations

from tabulate import tabulate

from flora.recipes import CONFIGS, config_names


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
