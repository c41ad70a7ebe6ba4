"""What the arguments of the ``flora`` command may be, and what is said of one that is something else.

Outside the package for the same reason as ``flora_cli``: help must not wait for PEFT.
"""

from __future__ import annotations

import argparse
import difflib
import re
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
