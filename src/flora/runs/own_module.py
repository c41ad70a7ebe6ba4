"""A network of one's own, given to the command as ``file.py:function``: the function is called and returns it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flora.errors import UserError, nearest
from flora.recipes import run_file

REFERENCE = re.compile(r"(?P<file>.+\.py):(?P<function>\w+)")


def is_reference(text: str) -> bool:
    """Whether a text is ``file.py:function``.

    Examples:
        >>> is_reference("models/net.py:make"), is_reference("owner/name"), is_reference("config.json")
        (True, False, False)
    """
    return REFERENCE.fullmatch(text) is not None


def model_or_name(given: str | None, run_code: bool, *, same: bool = False) -> Any:
    """What an option for a model means: the module of ``file.py:function``, or the name as it is.

    Args:
        given: The option.
        run_code: Whether the file may be run; see :func:`own_module`.
        same: Whether the weights matter; see :func:`own_module`.
    """
    if given is None or not is_reference(given):
        return given
    return own_module(given, run_code=run_code, same=same)


def own_module(reference: str, *, run_code: bool, same: bool = False) -> nn.Module:
    """Calls the function that a reference names.

    Args:
        reference: ``file.py:function``; the function takes nothing and returns a module.
        run_code: Whether the file may be run: the user has said so.
        same: Whether the weights matter. The function is then called twice, and must give the same ones.

    Returns:
        The module, in evaluation mode.

    Raises:
        FileNotFoundError: There is no such file.
        UserError: The file may not or cannot be run, it has no such function, or that does not return a module or
            gives other weights each time.
    """
    found = REFERENCE.fullmatch(reference)
    if found is None:
        raise UserError(f"{reference!r} is not of the form file.py:function")

    path, name = Path(found["file"]), found["function"]
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if not run_code:
        raise UserError(f"{path} is Python code, which is not run unasked; if it is yours, add --run-code")

    function = _function(path, name)
    module = _call(function, reference)
    if same and not _same_weights(module, _call(function, reference)):
        raise UserError(
            f"{reference} gives other weights each time it is called, so they cannot be those that the adapter was "
            "trained on; load them in that function (load_state_dict), or call torch.manual_seed there as in training"
        )

    return module.eval()


def _function(path: Path, name: str) -> Any:
    module = run_file(path, path.stem, str(path))
    function = getattr(module, name, None)
    if not callable(function):
        names = [each for each, value in vars(module).items() if callable(value) and not each.startswith("_")]
        raise UserError(f"{path} has no function {name!r}{nearest(name, names)}")

    return function


def _call(function: Any, reference: str) -> nn.Module:
    try:
        module = function()
    except Exception as error:
        # Whatever the user's own code raises.
        raise UserError(
            f"{reference} cannot be called without arguments: {type(error).__name__}: {error}; give a function that "
            "takes nothing and returns the module"
        ) from error

    if not isinstance(module, nn.Module):
        raise UserError(f"{reference} returned {module!r:.60}, expected a torch.nn.Module")

    return module


def _same_weights(first: nn.Module, second: nn.Module) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(
        not isinstance(value, torch.Tensor) or torch.equal(value, other[key]) for key, value in one.items()
    )
