"""Which entry of a config holds for a weight: the only place where names are matched with patterns."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

import regex

from flora.errors import UserError

Value = TypeVar("Value")
LONGEST_PATTERN = 1_000_000  # characters
MOST_REPEATS = 10_000  # copies that the counts of a pattern, {n} within {m}, may ask for
SECONDS = 10.0  # for all the slow matches of one table of patterns together
SLOW = 0.01  # seconds; what takes less does not count
_COUNT = re.compile(r"\{(\d*),?(\d*)\}")


class Found(NamedTuple, Generic[Value]):
    """The entry of a table that holds for a weight."""

    key: str
    value: Value
    place: int  # of the key in its table


def names_of(module: str, weight: str = "weight") -> tuple[str, ...]:
    """The names under which a config may speak of one weight, the closest first.

    An adapted module can hold weights that are not its own: ``out_proj.weight`` of an attention also answers to
    ``out_proj``, the name of the module inside.

    Args:
        module: the name of the adapted module in the base model.
        weight: of the weight in that module; dotted where the weight is that of a module inside.

    Examples:
        >>> names_of("layers.0.attn", "out_proj.weight")
        ('layers.0.attn.out_proj.weight', 'layers.0.attn.out_proj', 'layers.0.attn')
    """
    full = f"{module}.{weight}" if module else weight
    inner = full.rpartition(".")[0]
    return tuple(dict.fromkeys((full, inner, module)))


def exact_pattern(name: str) -> str:
    """A pattern that holds for this name and no other."""
    return f"^{re.escape(name)}"


def exact_name(pattern: str) -> str | None:
    """The inverse of :func:`exact_pattern`: the one name that such a pattern holds for, None for any other pattern."""
    if not pattern.startswith("^"):
        return None
    name = re.sub(r"\\(.)", r"\1", pattern[1:])
    if exact_pattern(name) != pattern:
        return None
    return name


class Clock:
    """The time that the slow matches of one table may still take together."""

    def __init__(self) -> None:
        self.left = SECONDS

    def spend(self, seconds: float) -> None:
        """Takes off what one match took; short ones are free."""
        if seconds > SLOW:
            self.left -= seconds


class Expression:
    """A regular expression of a config. A stranger may have written it, so matching has a limit of time.

    Args:
        pattern: what is compiled.
        field: of the config, for messages.
        shown: the pattern as the user wrote it, for messages.
        clock: shared by the expressions of one table.

    Raises:
        UserError: it is not a regular expression, or is too large.
    """

    def __init__(self, pattern: str, field: str, shown: str | None = None, clock: Clock | None = None) -> None:
        self.field = field

        self.shown = pattern if shown is None else shown

        self.clock = clock or Clock()

        counts = [int(count[:9]) for pair in _COUNT.findall(pattern) for count in pair[::-1] if count]
        copies = math.prod(max(1, count) for count in counts)
        if len(pattern) > LONGEST_PATTERN or copies > MOST_REPEATS:
            raise UserError(
                f"{field} has a regular expression of {len(pattern)} characters whose counts multiply to {copies} "
                f"({self.shown[:60]!r}...); at most {LONGEST_PATTERN} and {MOST_REPEATS} are read"
            )

        try:
            self.compiled = regex.compile(pattern)
        except (regex.error, RecursionError) as error:
            raise UserError(f"{field} has {self.shown!r}, which is not a regular expression: {error}") from None

    def match(self, name: str) -> regex.Match[str] | None:
        """The match at the beginning of a name.

        Raises:
            UserError: it takes too long.
        """
        start = time.perf_counter()

        try:
            found = self.compiled.match(name, timeout=max(self.clock.left, SLOW))
        except TimeoutError:
            found, self.clock.left = None, 0.0

        self.clock.spend(time.perf_counter() - start)

        if self.clock.left <= 0:
            raise UserError(
                f"{self.field} has {self.shown!r}, which takes more than {SECONDS:g} s to match; write it without a "
                "repeated group that can match the same text in several ways"
            )

        return found


class Patterns(Generic[Value]):
    """A table of a config, such as ``rank_pattern``: regular expression or end of a name -> value.

    The rule, the same for the tuner and for every reader of a file: an entry for the exact full name of the weight
    (:func:`exact_pattern`) holds before any other; then the closest of the weight's names that any key matches; of
    several keys that match it, the first. A key matches a name, or the end of one that begins after a dot, as PEFT
    has it.

    Each key is compiled once and exact names are looked up, so a table with an entry for each of n weights is read in
    time linear in n.

    Args:
        given: key -> value.
        field: of the config, for messages.

    Raises:
        UserError: a key is not a regular expression, or is too large.
    """

    def __init__(self, given: Mapping[str, Value], field: str = "the pattern") -> None:
        self.field = field
        self.exact: dict[str, Found[Value]] = {}
        # Last part of a name -> its entry.
        self.leaves: dict[str, Found[Value]] = {}
        self.others: list[tuple[Expression, Found[Value]]] = []
        clock = Clock()

        for place, (key, value) in enumerate(given.items()):
            entry = Found(key, value, place)
            name = exact_name(key)
            if name is not None:
                self.exact[name] = entry
            elif re.fullmatch(r"\w+", key):
                self.leaves[key] = entry
            else:
                self.others.append((Expression(rf"(.*\.)?({key})$", field, key, clock), entry))

    def find(self, names: Sequence[str]) -> Found[Value] | None:
        """The entry that holds for a weight with these names, the closest first; None if there is none.

        Raises:
            UserError: a key takes too long to match.
        """
        if names[0] in self.exact:
            return self.exact[names[0]]

        for name in names:
            found = self._first(name)
            if found is not None:
                return found

        return None

    def unmatched(self, names: Collection[str]) -> list[str]:
        """The keys that match none of these names."""
        leaves = {name.rpartition(".")[2] for name in names}
        unmatched = [entry for name, entry in self.exact.items() if name not in names]
        unmatched += [entry for leaf, entry in self.leaves.items() if leaf not in leaves]
        unmatched += [entry for expression, entry in self.others if not any(map(expression.match, names))]
        return [entry.key for entry in sorted(unmatched, key=lambda entry: entry.place)]

    def _first(self, name: str) -> Found[Value] | None:
        # Entries of plain names are looked up; only those of expressions are tried one by one, and no further than the
        # entry that is already found, since the first in the table holds.
        plain = [entry for entry in (self.exact.get(name), self.leaves.get(name.rpartition(".")[2])) if entry]
        first = min(plain, key=lambda entry: entry.place, default=None)
        for expression, entry in self.others:
            if first is not None and first.place < entry.place:
                return first
            if expression.match(name):
                return entry

        return first


def match_pattern(patterns: Iterable[str], name: str) -> str | None:
    """The key of a table that holds for a name; where a table is asked more than once, make it a :class:`Patterns`."""
    found = Patterns(dict.fromkeys(patterns)).find((name,))
    if found is None:
        return None
    return found.key
