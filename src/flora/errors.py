"""The class of errors that the user can mend. Any other exception is a bug of flora."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

# What to do where a check of what flora itself wrote has failed.
REPORT = "run the command again; if this comes back, report it together with what `flora --version` prints"

# What Python and torch say in a RuntimeError of a thread or a process that the system does not give, or has ended.
USED_UP = ("can't start new thread", "is killed by signal", "exited unexpectedly")


class UserError(ValueError):
    """Something that was given cannot be used: a setting, a file, a model, data.

    The message says what it is, what was expected and what to do. The command prints it as one line and ends with exit
    code 2, and does the same for any ``OSError``. Every other exception is a bug of flora.

    Attributes:
        exit_code: of the command.
    """

    exit_code = 2


class DivergedError(UserError):
    """The loss or the weights became NaN or infinite. The remedy is another setting, such as a lower learning rate."""

    exit_code = 1


class BudgetError(UserError):
    """A budget of parameters that does not buy the smallest ranks."""


class WrongTypeError(UserError, TypeError):
    """A value of a type that cannot be used."""


@contextmanager
def user_errors(*kinds: type[Exception], about: str = "") -> Iterator[None]:
    """Stands where something that the user gave is handed to another library: what that refuses is a UserError.

    Nothing of ours stands inside but the call: what our own code raises there would look like the user's fault. What
    comes from outside is looked at, field by field, by the code that reads it.

    Args:
        kinds: the exceptions by which the library refuses.
        about: what was given, for the beginning of the message; nothing where the library's own message says it.

    Raises:
        UserError: one of ``kinds`` was raised inside; an error of the user's, or of the system's, is left as it is.
    """
    try:
        yield
    except (UserError, OSError):
        raise
    except kinds as error:
        reason = " ".join(str(error).split()) or "no reason given"

        if isinstance(error, KeyError):
            reason = f"{reason} is missing"
        if about:
            reason = f"{about}: {reason}"

        raise UserError(reason) from error


def system_refusal(error: Exception) -> str | None:
    """What the system has refused to compiled code, which has no ``OSError`` to tell it by; None for other errors.

    Examples:
        >>> system_refusal(RuntimeError("unable to open file <a> in read-only mode: Too many open files (24)"))
        'unable to open file <a> in read-only mode: Too many open files (24)'
        >>> system_refusal(RuntimeError("shapes differ (24)"))
    """
    if not isinstance(error, RuntimeError):
        return None

    text = " ".join(str(error).split())

    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return f"{text}; a smaller batch or a smaller model needs less"
    if any(part in text for part in USED_UP):
        return text

    number = re.search(r"\((\d+)\)$", text)
    if number is not None and text.endswith(f"{os.strerror(int(number[1]))} {number[0]}"):
        return text
    return None


def printable(text: str) -> str:
    r"""The text with control characters as escapes: a name in a file of somebody else could otherwise move the cursor.

    The ends of lines and tabs stay.

    Examples:
        >>> printable("a\x1b[2J")
        'a\\x1b[2J'
    """
    return "".join(_escaped(letter) for letter in text)


def _escaped(letter: str) -> str:
    if letter.isprintable() or letter in "\n\t":
        return letter
    return repr(letter)[1:-1]


def counted(count: int, one: str, several: str = "") -> str:
    """A number with the word for what is counted.

    Examples:
        >>> counted(1, "weight"), counted(3, "weight"), counted(3, "weight gets", "weights get")
        ('1 weight', '3 weights', '3 weights get')
    """
    if count == 1:
        return f"1 {one}"
    return f"{count:,} {several or one + 's'}"


def nearest(word: str, known: Sequence[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest of the known words, or nothing when none is near.

    Examples:
        >>> nearest("lineer", ["linear", "conv"])
        "; did you mean 'linear'?"
    """
    found = difflib.get_close_matches(word, known, n=1)
    if not found:
        return ""
    return f"; did you mean {found[0]!r}?"


def nearest_path(path: Path) -> str:
    """``"; did you mean 'photos'?"`` where something of nearly this name is beside it."""
    try:
        names = [other.name for other in path.parent.iterdir()]
    except OSError:
        # There is no such folder, or it may not be listed.
        return ""

    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.75)
    if near:
        return f"; did you mean {str(path.parent / near[0])!r}?"

    return ""
