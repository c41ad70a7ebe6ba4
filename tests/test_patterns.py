"""Which entry of a config holds for a weight, and which modules a config selects: the rule, and its limits."""

from __future__ import annotations

import itertools
import re
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn

from flora import FloraConfig
from flora.layers import patterns
from flora.layers.entries import Entries
from flora.layers.patterns import Expression, Patterns, exact_name, exact_pattern, names_of
from flora.tuner.layer import FloraLayer
from flora.tuner.selection import Selection, list_of

OUT = ("layers.1.attn", "out_proj.weight")
RULE: list[tuple[dict[str, int], tuple[str, str], int | None]] = [
    ({"attn": 1}, OUT, 1),
    ({"attn.out_proj": 1}, OUT, 1),
    ({"out_proj": 1}, OUT, 1),
    ({"out_proj.weight": 1}, OUT, 1),
    ({r"layers\.\d\.attn": 1}, OUT, 1),
    ({"q_proj": 1}, OUT, None),
    ({"attn": 1, "out_proj": 2}, OUT, 2),  # the closer name
    ({"attn": 1, "out_proj": 2, "weight": 3}, OUT, 3),
    ({"attn": 1}, ("layers.1.attn", "in_proj_weight"), 1),
    ({"out_proj": 1}, ("layers.1.attn", "in_proj_weight"), None),
    ({"fc": 1, ".*": 2}, ("a.fc", "weight"), 2),  # the whole of ``a.fc.weight`` is closer than ``a.fc``
    ({"v_proj": 1, ".*proj": 2}, ("a.v_proj", "weight"), 1),  # the first of two
    ({".*proj": 2, "v_proj": 1}, ("a.v_proj", "weight"), 2),
    ({".*proj": 2, exact_pattern("a.v_proj.weight"): 1}, ("a.v_proj", "weight"), 1),  # a full name, before all
    ({".*weight": 2, exact_pattern("a.v_proj.weight"): 1}, ("a.v_proj", "weight"), 1),
    ({".*weight": 2, exact_pattern("a.v_proj"): 1}, ("a.v_proj", "weight"), 2),
    ({"v_proj": 2, exact_pattern("a.v_proj"): 1}, ("a.v_proj", "weight"), 2),
    ({exact_pattern("a.v_proj"): 1, "v_proj": 2}, ("a.v_proj", "weight"), 1),
    ({exact_pattern("v_proj.weight"): 1}, ("a.v_proj", "weight"), None),  # and nothing longer
    ({"proj": 1}, ("a.v_proj", "weight"), None),  # a part of a name begins after a dot
    ({"^a": 1, "b|^c": 2}, ("b", "weight"), 2),
    ({}, ("a", "weight"), None),
]


@pytest.mark.parametrize(("table", "place", "value"), RULE)
def test_the_rule(table: dict[str, int], place: tuple[str, str], value: int | None) -> None:
    found = Patterns(table).find(names_of(*place))
    assert (None if found is None else found.value) == value


def test_the_rule_does_not_depend_on_the_order_once_names_are_exact() -> None:
    table = {"v_proj": 4, ".*proj": 2, exact_pattern("v_proj.weight"): 4, exact_pattern("q_proj.weight"): 2}
    for keys in (sorted(table), sorted(table, reverse=True)):
        read = Patterns({key: table[key] for key in keys})
        for module, value in (("v_proj", 4), ("q_proj", 2)):
            found = read.find(names_of(module))
            assert found is not None
            assert found.value == value


PARTS = st.sampled_from(["a", "b", "ab", "1", "12", "out_proj"])
NAMES = st.lists(PARTS, min_size=1, max_size=4).map(".".join)
KEYS = st.one_of(NAMES, st.sampled_from([".*", r".*\.a", r"a|b", r"\d+", "^a", "^a.b", r"(a|ab)\.1", "a.1", "."]))


@given(st.lists(KEYS, unique=True, max_size=4), NAMES)
def test_a_key_matches_a_name_as_peft_has_it(keys: list[str], name: str) -> None:
    expected = get_pattern_key(keys, name)
    found = Patterns(dict.fromkeys(keys, 1)).find((name,))
    exact = next((key for key in keys if exact_name(key) == name), None)
    if exact is not None:
        expected = exact
    assert (name if found is None else found.key) == (expected if expected in keys else name)


@given(st.text(st.characters(codec="ascii", categories=("L", "N", "P", "S")), min_size=1, max_size=9))
def test_an_exact_pattern_is_read_back(name: str) -> None:
    assert exact_name(exact_pattern(name)) == name


@pytest.mark.parametrize("key", ["a", "^a.b", "^a|b", r"^a\.*", "^", "^(a)"])
def test_other_keys_are_no_exact_patterns(key: str) -> None:
    assert exact_name(key) is None or exact_pattern(exact_name(key) or "") == key
    assert exact_name("^a.b") is None


def test_keys_that_match_nothing_are_named() -> None:
    table = Patterns({"a": 1, ".*x": 2, exact_pattern("b.c"): 3, r"b\..*": 4, exact_pattern("q"): 5, "z": 6})
    assert table.unmatched({"a", "b.c", "b"}) == [".*x", exact_pattern("q"), "z"]


def test_exact_names_are_looked_up_and_every_key_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made, asked = [], []
    make, match = Expression.__init__, Expression.match
    monkeypatch.setattr(Expression, "__init__", lambda self, *args: (made.append(self), make(self, *args))[1])
    monkeypatch.setattr(Expression, "match", lambda self, name: (asked.append(name), match(self, name))[1])
    count = 2_000
    table = Patterns({exact_pattern(f"m.{n}.fc.weight"): n for n in range(count)} | {r"m\.\d+\.gate": -1})
    for n in range(count):
        found = table.find(names_of(f"m.{n}.fc"))
        assert found is not None
        assert found.value == n
    assert (len(made), len(asked)) == (1, 0)


# ---- a stranger's patterns -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["(a|a)*[bc]", "(?:a{0,30}){0,30}[bc]"])
def test_a_key_that_would_take_for_ever_is_refused(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    with pytest.raises(ValueError, match=r"scale_pattern has '.*', which takes more than 0.2 s to match; write it"):
        Patterns({key: 1.0}, "scale_pattern").find(("a" * 60,))


UNREADABLE: list[tuple[dict[str, Any], str]] = [
    ({"rank_pattern": {"(": 2}}, "rank_pattern has '(', which is not a regular expression: "),
    ({"scale_pattern": {"a[": 2.0}}, "scale_pattern has 'a[', which is not a regular expression: "),
    ({"fold": {"*": "(a b) c, a=2"}}, "fold has '*', which is not a regular expression: "),
    ({"target_modules": "(" * 5000 + "a" + ")" * 5000}, "target_modules has '((("),
    ({"target_modules": ".*("}, "target_modules has '.*(', which is not a regular expression: "),
    ({"exclude_modules": ".*("}, "exclude_modules has '.*(', which is not a regular expression: "),
    ({"layers_pattern": "(", "layers_to_transform": 1}, "layers_pattern has '(', which is not a regular expression: "),
    ({"rank_pattern": {"(((a{1000}){1000}){1000})": 2}}, "rank_pattern has a regular expression of "),
]


@pytest.mark.parametrize(("fields", "text"), UNREADABLE)
def test_what_is_no_regular_expression_is_named_by_its_field(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError) as caught:
        FloraConfig(**fields)
    assert str(caught.value).startswith(text)


# ---- which modules ---------------------------------------------------------------------------------------------------

TARGETS = st.one_of(
    st.lists(NAMES, min_size=1, max_size=3),
    st.sampled_from([".*", r".*\.a", r"(.*\.)?(a|b)", "a.1", r"a\.\d+\.b"]),
)


@given(
    TARGETS,
    st.one_of(st.none(), TARGETS),
    st.one_of(st.none(), st.lists(PARTS, max_size=2)),
    st.one_of(st.none(), st.integers(0, 12), st.lists(st.sampled_from([0, 1, 12]), max_size=2)),
    st.one_of(st.none(), st.sampled_from(["a", "b", ["a", "ab"], []])),
    st.lists(NAMES, min_size=1, max_size=8),
)
def test_a_config_selects_the_modules_that_peft_selects(
    targets: Any, excluded: Any, saved: Any, indices: Any, layers: Any, names: list[str]
) -> None:
    if indices is None:
        layers = None
    config = FloraConfig(
        target_modules=targets,
        exclude_modules=excluded,
        modules_to_save=saved,
        layers_to_transform=indices,
        layers_pattern=layers,
    )
    selection = Selection(vars(config))
    for name in names:
        expected, found = check_target_module_exists(config, name), selection(name)
        assert bool(found) == bool(expected), name
        assert isinstance(found, _ExcludedModule) == isinstance(expected, _ExcludedModule)


@given(st.sets(NAMES, min_size=1, max_size=30), st.data())
def test_a_list_means_exactly_the_modules_it_was_made_of(names: set[str], data: st.DataObject) -> None:
    wanted = set(data.draw(st.lists(st.sampled_from(sorted(names)), min_size=1)))
    selection = Selection({"target_modules": list_of(wanted, sorted(names - wanted))})
    assert {name for name in names if selection(name)} == wanted


def test_a_long_list_is_shortened_to_ends_of_names() -> None:
    wanted = {f"model.layers.{n}.{name}" for n in range(20) for name in ("q", "v")} | {"model.embed_tokens"}
    others = [f"model.layers.{n}.mlp.{name}" for n in range(20) for name in ("q", "up")]
    listed = list_of(wanted, others)
    assert {"v", r"^model\.embed_tokens"} < listed
    assert {name for name in listed if name.endswith("q")} == {f"{n}.q" for n in range(20)}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)


SHORT: list[tuple[str, nn.Module, set[str]]] = [
    ("all", nn.Sequential(nn.Sequential(Block(), Block()), nn.Linear(3, 2)), {"0.0.fc", "0.1.fc", "1"}),
    (
        "all",
        nn.ModuleDict({"attn": nn.MultiheadAttention(6, 2), "out_proj": nn.Linear(6, 3)}),
        {"attn", "out_proj"},
    ),
    (
        "all-linear",
        nn.ModuleDict({"patch": nn.ModuleDict({"proj": nn.Conv2d(3, 7, 3)}), "proj": nn.Linear(7, 3)}),
        {"proj"},
    ),
    ("all-conv", nn.ModuleDict({"a": nn.ModuleDict({"0": nn.Linear(3, 3)}), "0": nn.Conv1d(3, 5, 1)}), {"0"}),
]


@pytest.mark.filterwarnings("ignore:the adapter has more parameters than the weight itself")
@pytest.mark.parametrize(("word", "model", "wanted"), SHORT)
def test_a_shorthand_means_an_exact_set(word: str, model: nn.Module, wanted: set[str]) -> None:
    config = FloraConfig(r=1, target_modules=word)
    adapted = get_peft_model(model, config).base_model.model
    assert {name for name, module in adapted.named_modules() if isinstance(module, FloraLayer)} == wanted


def test_entries_ask_every_table_by_all_names_of_a_weight() -> None:
    entries = Entries({"r": 8, "alpha": 16, "rank_pattern": {"attn": 4}, "fold": {"out_proj": "(a b) c, a=2"}})
    assert entries.scale(names_of(*OUT)) == 4.0
    assert entries.fold(names_of(*OUT)) == "(a b) c, a=2"
    assert entries.fold(names_of("attn", "in_proj_weight")) is None


@given(
    keys=st.lists(
        st.lists(st.sampled_from(["a", "b", "0", ".", r"\."]), min_size=1, max_size=5).map("".join), max_size=6
    ),
    name=st.lists(st.text("ab0", min_size=1, max_size=2), min_size=1, max_size=4).map(".".join),
)
def test_ends_of_names_are_looked_up_as_the_expression_matches(keys: list[str], name: str) -> None:
    """A dot without a backslash is any character, as in the expression of the key."""
    matching = [key for key in keys if re.match(rf"(.*\.)?({key})$", name)]
    table = Patterns(dict.fromkeys(keys, 1))
    found = table.find((name,))
    assert (found and found.key) == (matching[0] if matching else None)
    assert set(table.unmatched([name])) == set(keys) - set(matching)


def test_a_table_of_ends_of_names_is_read_in_linear_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Expression, "match", lambda self, name: pytest.fail(f"{self.shown} was tried"))
    count = 5000
    table = Patterns({f"layers.{n}.q" if n % 2 else rf"layers\.{n}\.q": n for n in range(count)})
    names = [f"model.layers.{n}.q" for n in range(count)]
    assert [table.find((name,)).value for name in names] == [*range(count)]
    assert table.unmatched(names) == []


def test_a_busy_machine_does_not_make_a_match_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = itertools.count(step=100)
    monkeypatch.setattr(time, "perf_counter", lambda: next(seconds))
    assert Patterns({r"x+\d": 1}).find(("m.xx7",)) is not None
