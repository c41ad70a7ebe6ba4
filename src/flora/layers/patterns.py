"""Which entry of a config holds for a weight: the only place where names are matched with patterns."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

import regex

from flora.errors import UserError

Value = TypeVar("Value")
# Characters of a pattern.
LONGEST_PATTERN = 1_000_000
# Copies that the counts of a pattern, {n} within {m}, may ask for.
MOST_REPEATS = 10_000
# The time for all slow matches of one table of patterns together.
SECONDS = 10.0
# A match that takes fewer seconds does not count.
SLOW = 0.01
_COUNT = re.compile(r"\{(\d*),?(\d*)\}")
# A character of a key that is a name; a dot without a backslash is any character.
_CHARACTER = re.compile(r"\\\.|[\w.]")


class Found(NamedTuple, Generic[Value]):
    """The entry of a table that holds for a weight."""

    key: str
    value: Value
    # The place of the key in its table.
    place: int


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


def _fault(pattern: str) -> str:
    """What is wrong with a pattern as it was written; what is compiled may have more around it."""
    try:
        regex.compile(pattern)
    except (regex.error, RecursionError) as error:
        return str(error)
    return ""


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
            reason = _fault(self.shown) or error
            raise UserError(
                f"{field} has {self.shown!r}, which is not a regular expression: {reason}; "
                "put a backslash before a letter that stands for itself"
            ) from None

    def match(self, name: str) -> regex.Match[str] | None:
        """The match at the beginning of a name.

        Raises:
            UserError: it takes too long.
        """
        # Of this thread's work: a machine that is busy with something else must not make a match slow.
        start = time.thread_time()

        try:
            found = self.compiled.match(name, timeout=max(self.clock.left, SLOW))
        except TimeoutError:
            found, self.clock.left = None, 0.0

        self.clock.spend(time.thread_time() - start)

        if self.clock.left <= 0:
            raise UserError(
                f"{self.field} has {self.shown!r}, which takes more than {SECONDS:g} s to match; write it without a "
                "repeated group that can match the same text in several ways"
            )

        return found


def _is_end(key: str) -> bool:
    """Whether a key is a name or the end of one: characters of names, and dots with or without a backslash."""
    return re.fullmatch(rf"(?:{_CHARACTER.pattern})+", key) is not None


class _Ends(Generic[Value]):
    """Keys that are ends of names, each looked up under the places of its free dots, which stand for any character."""

    def __init__(self) -> None:
        # Length -> places of the free dots -> the key's text -> the first entry of that text.
        self.found: dict[int, dict[tuple[int, ...], dict[str, Found[Value]]]] = {}
        self.entries: list[Found[Value]] = []

    def add(self, entry: Found[Value]) -> None:
        """Takes in the entry of a key for which ``_is_end`` holds."""
        characters = _CHARACTER.findall(entry.key)
        free = tuple(place for place, character in enumerate(characters) if character == ".")
        text = "".join(character[-1] for character in characters)
        self.found.setdefault(len(text), {}).setdefault(free, {}).setdefault(text, entry)
        self.entries.append(entry)

    def matching(self, name: str) -> Iterator[Found[Value]]:
        """The entries that hold for a name; of several keys that mean the same, the first."""
        start = 0
        while True:
            end = name[start:]

            for free, texts in self.found.get(len(end), {}).items():
                characters = list(end)
                for place in free:
                    characters[place] = "."

                entry = texts.get("".join(characters))
                if entry is not None:
                    yield entry

            start = name.find(".", start) + 1
            if not start:
                return

    def unmatched(self, names: Iterable[str]) -> list[Found[Value]]:
        """The entries whose key means none of these names."""
        met = {entry.key for name in names for entry in self.matching(name)}
        return [entry for entry in self.entries if entry.key not in met]


class Patterns(Generic[Value]):
    """A table of a config, such as ``rank_pattern``: regular expression or end of a name -> value.

    The rule, the same for the tuner and for every reader of a file: an entry for the exact full name of the weight
    (:func:`exact_pattern`) holds before any other; then the closest of the weight's names that any key matches; of
    several keys that match it, the first. A key matches a name, or the end of one that begins after a dot, as PEFT
    has it.

    Names and ends of names are looked up, other keys compiled once, so a table with an entry for each of n weights is
    read in time linear in n.

    Args:
        given: key -> value.
        field: of the config, for messages.

    Raises:
        UserError: a key is not a regular expression, or is too large.
    """

    def __init__(self, given: Mapping[str, Value], field: str = "the pattern") -> None:
        self.field = field
        self.exact: dict[str, Found[Value]] = {}
        self.ends: _Ends[Value] = _Ends()
        self.others: list[tuple[Expression, Found[Value]]] = []
        clock = Clock()

        for place, (key, value) in enumerate(given.items()):
            entry = Found(key, value, place)
            name = exact_name(key)
            if name is not None:
                self.exact[name] = entry
            elif _is_end(key):
                self.ends.add(entry)
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
        unmatched = [entry for name, entry in self.exact.items() if name not in names]
        unmatched += self.ends.unmatched(names)
        unmatched += [entry for expression, entry in self.others if not any(map(expression.match, names))]
        return [entry.key for entry in sorted(unmatched, key=lambda entry: entry.place)]

    def _first(self, name: str) -> Found[Value] | None:
        # Entries of plain names are looked up; only those of expressions are tried one by one, and no further than the
        # entry that is already found, since the first in the table holds.
        plain = [*self.ends.matching(name)]
        if name in self.exact:
            plain.append(self.exact[name])

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
