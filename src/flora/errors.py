"""The class of errors that the user can mend. Any other exception is a bug of flora."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

# What parsers and torch raise about contents that nobody wrote so on purpose: a wrong type, a number of thousands of
# digits, brackets in brackets, a tensor of 65 dimensions.
MALFORMED = (ArithmeticError, AttributeError, EOFError, LookupError, RuntimeError, TypeError, ValueError, re.error)


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


class WrongTypeError(UserError, TypeError):
    """A value of a type that cannot be used."""


@contextmanager
def user_errors(*kinds: type[Exception], about: str = "") -> Iterator[None]:
    """Stands where something that the user gave is handed to another library: what that refuses is a UserError.

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

        raise UserError(f"{about}: {reason}" if about else reason) from error
