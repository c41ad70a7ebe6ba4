"""The words around the verbs of ``flora``: what arguments may be, versions, and what to type after a mistake.

Outside the package for the same reason as ``flora_cli``: help must not wait for PEFT.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

Argument = tuple[tuple[str, ...], dict[str, Any]]


def argument(*names: str, **options: Any) -> Argument:
    """An argument of a verb: what ``ArgumentParser.add_argument`` takes."""
    return names, options


def numbers(text: str) -> list[int]:
    """``"0,1,2"`` as a list of ints."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 0,1,2") from None


def whole(text: str) -> int:
    """``"8"`` as an int."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number such as 8") from None


def positive(text: str) -> int:
    """A whole number from 1."""
    value = whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is below 1; give a whole number such as 4096")
    return value


def number(text: str) -> float:
    """``"0.9"`` as a float."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 0.9") from None


def fraction_or_count(text: str) -> float | int:
    """A budget: a count of parameters, or a fraction of the model."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a count of parameters such as 500000, or a fraction of the model such as 0.01"
        ) from None

    if value.is_integer():
        return int(value)
    return value


def words(text: str) -> list[str]:
    """``"a,b"`` as a list."""
    return [part.strip() for part in text.split(",") if part.strip()]


class Parser(argparse.ArgumentParser):
    """Errors in one line, with the nearest word that would have been right."""

    def error(self, message: str) -> NoReturn:
        """Prints what is wrong and where help is, and ends with exit code 2."""
        found = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if found:
            message += nearest(found[1], re.findall(r"[\w-]+", found[2]))

        self.exit(2, f"{self.prog}: error: {message}; `{self.prog} --help` shows examples\n")


def nearest(word: str, known: list[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest of the words, or nothing when none is near."""
    found = difflib.get_close_matches(word, known, n=1)
    if found:
        return f"; did you mean {found[0]!r}?"
    return ""


def versions() -> str:
    """The versions of this package and of those that it stands on, without importing any of them."""
    text = Path(__file__).with_name("flora").joinpath("__init__.py").read_text(encoding="utf-8")
    own = text.partition('__version__ = "')[2].partition('"')[0]
    others = ", ".join(f"{name} {_version_of(name)}" for name in ("torch", "peft", "transformers"))
    return f"flora {own} ({others}, Python {sys.version.split()[0]})"


def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "is not installed"


def meant(strange: str, known: list[Argument], *, overrides: bool) -> str:
    """What an option that the verb does not have was meant to be."""
    options = [name for names, _ in known for name in names if name.startswith("--")]
    word = strange.partition("=")[0]
    near = difflib.get_close_matches(word, options, n=1) or [name for name in options if word.startswith(name)]

    if near:
        return f"; did you mean {near[0]!r}?"
    if overrides:
        return f"; settings are written without dashes, as {word.lstrip('-')}=VALUE"
    if options:
        return f"; its options are {', '.join(options)}"
    return ""


def quiet_bars() -> None:
    """No progress bars of other packages: in a file or a pipe each of their steps would be a line."""
    for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")


def how_to_go_on(args: argparse.Namespace) -> str:
    """What to type after an interruption."""
    if args.verb == "train":
        items = "".join(f" {shlex.quote(item)}" for item in args.overrides)
        return f"; `flora train {shlex.quote(args.config)}{items} --resume` continues from the last checkpoint"
    if args.verb in ("compare", "extract"):
        return f"; the same `flora {args.verb}` command continues where this one stopped"
    return ""


def asks_for_keys(given: list[str]) -> bool:
    """Whether the help of one recipe is wanted, as ``flora train digits --help`` asks."""
    asking = len(given) == 3 and given[0] in ("train", "compare") and given[2] in ("-h", "--help")
    return asking and not given[1].startswith("-")
