"""Which modules a config selects by name, as PEFT has it: exact names, ends of names, regular expressions, layers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from peft.tuners.tuners_utils import _ExcludedModule
from peft.utils.constants import EMBEDDING_LAYER_NAMES

from flora.layers.patterns import Expression, exact_name, exact_pattern

# Where a module of torch keeps those of its weights.
PARAMETRIZATIONS = "parametrizations"
# Names from which a list is shortened to ends of names.
CONDENSED_FROM = 20

# The index of a layer is the first part of a name that is a number and has at least two parts before it.
_INDEX = Expression(r".*?\.[^.]*\.(?P<index>\d+)\.", "layers_to_transform")


def ends_of(name: str) -> Iterator[str]:
    """``a.b.c`` -> ``a.b.c``, ``b.c``, ``c``: under each of them a list of names can mean the module."""
    yield name
    while "." in name:
        name = name.partition(".")[2]
        yield name


class Names:
    """A field that names modules: a list of names, of ends of names and of exact patterns, or one regular expression.

    Args:
        given: the value of the field.
        field: of the config, for messages.
    """

    def __init__(self, given: str | Collection[str] | None, field: str) -> None:
        self.expression: Expression | None = None
        self.ends: frozenset[str] = frozenset()
        self.exact: frozenset[str] = frozenset()

        if isinstance(given, str):
            self.expression = Expression(rf"(?:{given})\Z", field, given)
        elif given:
            exact = {key: exact_name(key) for key in given}
            self.exact = frozenset(name for name in exact.values() if name is not None)
            self.ends = frozenset(key for key, name in exact.items() if name is None)

    def has(self, name: str) -> bool:
        """Whether the field means this module."""
        if self.expression is not None:
            return self.expression.match(name) is not None
        return name in self.exact or any(end in self.ends for end in ends_of(name))

    def names_in_full(self, name: str) -> bool:
        """Whether a list has the module by its full name."""
        return name in self.exact or name in self.ends


class Selection:
    """The modules that a config targets. Each name is looked up, none is searched for, so a config may list many.

    Args:
        config: ``target_modules``, ``target_parameters``, ``exclude_modules``, ``modules_to_save``,
            ``layers_to_transform`` and ``layers_pattern``, as ``FloraConfig`` has them.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.wanted = Names(config.get("target_modules"), "target_modules")
        self.excluded = Names(config.get("exclude_modules"), "exclude_modules")
        self.saved = tuple(config.get("modules_to_save") or ())
        indices = config.get("layers_to_transform")
        self.indices: frozenset[int] = frozenset([indices] if isinstance(indices, int) else indices or ())
        patterns: Any = config.get("layers_pattern") or ()
        listed = [patterns] if isinstance(patterns, str) else list(patterns)

        self.layers = [_INDEX]

        if listed:
            self.layers = [
                Expression(rf"(?:^|.*?\.)(?:{pattern})\.(?P<index>\d+)\.", "layers_pattern", pattern)
                for pattern in listed
            ]

    def __call__(self, name: str) -> bool | _ExcludedModule:
        """Whether the module is targeted; PEFT's own word for one that would be but is excluded."""
        if self.excluded.has(name) or self.is_saved(name):
            return _ExcludedModule()
        if not self.wanted.has(name) or self._is_parametrization(name):
            return False
        if not self.indices or self.wanted.expression is not None or self.wanted.names_in_full(name):
            return True

        return self._is_in_layers(name)

    def is_saved(self, name: str) -> bool:
        """Whether the module is one of ``modules_to_save``, or inside one."""
        return any(f".{saved}." in f".{name}." for saved in self.saved)

    def _is_parametrization(self, name: str) -> bool:
        """Whether the module is one that torch makes a parametrized weight by: "0" would be the end of its name."""
        if f".{PARAMETRIZATIONS}." not in f".{name}." or self.wanted.names_in_full(name):
            return False
        return self.wanted.expression is None or PARAMETRIZATIONS not in self.wanted.expression.shown

    def _is_in_layers(self, name: str) -> bool:
        found = next((match for layer in self.layers if (match := layer.match(name))), None)
        return found is not None and int(found["index"]) in self.indices


def list_of(names: Collection[str], others: Sequence[str]) -> set[str]:
    """A list of targets that means exactly these modules: ends of names where they do, else exact patterns.

    PEFT takes a name in a list for the end of a name too: ``1`` would also mean ``0.layers.1``. And it saves the whole
    embedding of a language model if the list has its bare name.

    Args:
        names: of the modules.
        others: the names of all other modules of the model.
    """
    taken = {end for other in others for end in ends_of(other)}
    listed = set()
    for name in names:
        ends = [name]

        if len(names) >= CONDENSED_FROM:
            ends = list(ends_of(name))[::-1]

        free = next((end for end in ends if end not in taken), None)
        if free is None or free in EMBEDDING_LAYER_NAMES:
            free = exact_pattern(name)

        listed.add(free)

    return listed
