"""``FloraConfig``: what it keeps through files, pickles and copies, what its fields mean, and what it refuses."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig
from peft.utils import PeftType

from flora import FloraConfig
from flora.layers.entries import Entries
from flora.layers.patterns import names_of

# INTERFACE: the fields that users rely on, beside what PeftConfig has.
FIELDS = {
    "r", "kernel_r",
    "layout", "scale", "alpha", "dropout", "init", "init_weights", "target_modules", "exclude_modules",
    "target_parameters", "layers_to_transform", "layers_pattern", "modules_to_save", "bias", "trainable_token_indices",
    "rank_pattern", "scale_pattern", "fold", "budget", "way", "freeze_batch_norm",
}  # fmt: skip

KEPT: list[dict[str, Any]] = [
    {},
    {"r": 16, "kernel_r": None, "scale": 4.0, "target_modules": "all"},
    {"r": [4, 3, 2, 2], "target_modules": ["conv2", "conv1"], "exclude_modules": ["head"]},
    {"r": (4, 3), "target_modules": r".*\.(q|v)_proj"},
    {"r": 8, "alpha": 16, "dropout": 0.1, "init": "paper_llm", "way": "summed", "bias": "tucker_only"},
    {"target_modules": ["a"], "rank_pattern": {"a.b": 3, "c": [2, 5]}, "scale_pattern": {"a.b": 0.5}},
    {"target_modules": ["a"], "layers_to_transform": [0, 2], "layers_pattern": "h", "modules_to_save": ["head"]},
    {"target_modules": "all-linear", "budget": 0.01, "init_weights": False, "task_type": "SEQ_CLS"},
    {"target_modules": ["a"], "trainable_token_indices": [3, 5], "revision": "main"},
]


def test_the_fields_are_those_that_users_rely_on() -> None:
    own = {field.name for field in fields(FloraConfig)} - {field.name for field in fields(PeftConfig)}
    assert own == FIELDS
    assert all(field.metadata.get("help") for field in fields(FloraConfig) if field.name in FIELDS)


@pytest.mark.parametrize("given", KEPT)
def test_saved_and_loaded_it_is_equal(given: dict[str, Any], tmp_path: Path) -> None:
    config = FloraConfig(**given)
    config.save_pretrained(str(tmp_path))
    assert FloraConfig.from_pretrained(str(tmp_path)) == config
    through_peft = PeftConfig.from_pretrained(str(tmp_path))
    assert type(through_peft) is FloraConfig
    assert through_peft.target_modules == config.target_modules
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "TUCKER"


@pytest.mark.parametrize("given", KEPT)
def test_pickled_and_copied_it_is_equal(given: dict[str, Any]) -> None:
    config = FloraConfig(**given)
    for twin in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert twin == config
        assert twin.peft_type is config.peft_type is PeftType("TUCKER")
    listed = {key: sorted(value) if isinstance(value, set) else value for key, value in asdict(config).items()}
    assert FloraConfig(**{**listed, "peft_type": None}) == config


@pytest.mark.parametrize(("old", "new"), [("auto", "auto"), ("rebuild", "summed"), ("factored", "beside")])
def test_the_old_words_for_a_way_are_read(old: str, new: str, tmp_path: Path) -> None:
    config = FloraConfig(path=old)
    assert config.way == FloraConfig(way=old).way == new  # type: ignore[arg-type]
    config.save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    written = json.loads(file.read_text())
    assert (written["way"], "path" in written) == (new, False)

    del written["way"]
    file.write_text(json.dumps({**written, "path": old}))
    assert PeftConfig.from_pretrained(str(tmp_path)) == config


def test_the_table_of_configs_is_whole() -> None:
    assert len(KEPT) == 9


def test_lists_of_names_become_sets() -> None:
    config = FloraConfig(target_modules=["b", "a"], exclude_modules=("c",))
    assert (config.target_modules, config.exclude_modules) == ({"a", "b"}, {"c"})


def test_a_tuple_of_ranks_is_a_list() -> None:
    assert FloraConfig(r=(4, 3)).r == [4, 3]


# ---- patterns and scale --------------------------------------------------------------------------------------------


def entries(**fields: Any) -> Entries:
    return Entries(vars(FloraConfig(**fields)))


def test_rank_pattern_wins_over_r() -> None:
    asked = entries(r=8, rank_pattern={"layer.1.conv": [4, 3, 2, 2], r"head\.\d": 2})
    assert asked.rank(names_of("model.layer.1.conv")) == [4, 3, 2, 2]
    assert asked.rank(names_of("layer.1.conv")) == [4, 3, 2, 2]
    assert asked.rank(names_of("layer.11.conv")) == 8
    assert asked.rank(names_of("model.head.3")) == 2


def test_scale_pattern_wins_over_scale() -> None:
    asked = entries(scale=4.0, scale_pattern={"conv": 0.5})
    assert (asked.scale(names_of("a.conv")), asked.scale(names_of("a.lin"))) == (0.5, 4.0)


def test_scale_is_one_unless_given() -> None:
    assert entries().scale(names_of("lin")) == 1.0
    assert entries(scale=0.0, inference_mode=True).scale(names_of("lin")) == 0.0


def test_alpha_is_divided_by_the_rank_of_each_layer() -> None:
    asked = entries(r=8, alpha=16, rank_pattern={"wide": 32})
    assert asked.scale(names_of("a.narrow")) == 2.0
    assert asked.scale(names_of("a.wide")) == 0.5


# ---- refusals ------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"r": 0}, ValueError, "r must be at least 1, got 0"),
    ({"r": -4}, ValueError, "r must be at least 1, got -4"),
    ({"r": 4.5}, TypeError, "r must be an int, got 4.5 of type float"),
    ({"r": "8"}, TypeError, "r must be an int, got '8' of type str"),
    ({"r": True}, TypeError, "r must be an int, got True of type bool"),
    ({"r": []}, ValueError, "r is an empty list; give one rank per dimension or a single int"),
    ({"r": [4, -1]}, ValueError, "r[1] must be at least 1, got -1"),
    ({"r": [4, False]}, TypeError, "r[1] must be an int, got False of type bool"),
    ({"kernel_r": 0}, ValueError, "kernel_r must be at least 1, got 0"),
    ({"kernel_r": 1.5}, TypeError, "kernel_r must be an int, got 1.5 of type float"),
    ({"rank_pattern": {"conv": 0}}, ValueError, "rank_pattern['conv'] must be at least 1, got 0"),
    ({"rank_pattern": {"conv": [2, "3"]}}, TypeError, "rank_pattern['conv'][1] must be an int, got '3' of type str"),
    (
        {"scale": 2.0, "alpha": 16},
        ValueError,
        "scale=2.0 and alpha=16 are both given; scale is the constant s itself, alpha sets s = alpha / r: give one of",
    ),
    (
        {"alpha": 16, "r": [4, 4]},
        ValueError,
        "alpha sets s = alpha / r and needs one int r; with rank lists or a budget",
    ),
    ({"alpha": 16, "budget": 0.1}, ValueError, "alpha sets s = alpha / r and needs one int r; with rank lists or a"),
    ({"dropout": 1.0}, ValueError, "dropout must be at least 0 and below 1, got 1.0"),
    ({"dropout": -0.1}, ValueError, "dropout must be at least 0 and below 1, got -0.1"),
    (
        {"init": "paper_cnn"},
        ValueError,
        "init is 'paper_cnn', expected one of zero_first, orthogonal, paper_conv, paper_nlu, paper_llm; "
        "did you mean 'paper_conv'?",
    ),
    ({"init": "zzz"}, ValueError, "init is 'zzz', expected one of zero_first, orthogonal, paper_conv, paper_nlu"),
    (
        {"way": "besides"},
        ValueError,
        "way is 'besides', expected one of auto, summed, beside; did you mean 'beside'?",
    ),
    ({"bias": "lora_only"}, ValueError, "bias is 'lora_only', expected one of none, all, tucker_only; did you mean"),
    ({"budget": 0}, ValueError, "budget must be a fraction below 1 or a count from 1, got 0"),
    ({"budget": -5}, ValueError, "budget must be a fraction below 1 or a count from 1, got -5"),
    ({"budget": float("inf")}, ValueError, "budget must be a finite number of at most 3.4e+38, got inf"),
    ({"budget": "1000"}, TypeError, "budget must be a number, got '1000' of type str"),
    ({"scale": float("nan")}, ValueError, "scale must be a finite number of at most 3.4e+38, got nan"),
    ({"scale": 1e39}, ValueError, "scale must be a finite number of at most 3.4e+38, got 1e+39"),
    ({"scale": True}, TypeError, "scale must be a number, got True of type bool"),
    ({"scale": "2"}, TypeError, "scale must be a number, got '2' of type str"),
    ({"alpha": float("nan")}, ValueError, "alpha must be a finite number of at most 3.4e+38, got nan"),
    ({"scale_pattern": {"a": float("inf")}}, ValueError, "scale_pattern['a'] must be a finite number of at most"),
    ({"scale_pattern": {"a": "much"}}, TypeError, "scale_pattern['a'] must be a number, got 'much' of type str"),
    ({"scale_pattern": {"a": [1.0]}}, TypeError, "scale_pattern['a'] must be a number, got [1.0] of type list"),
    ({"scale_pattern": [1.0]}, TypeError, "scale_pattern must map names or regular expressions to values, got [1.0]"),
    ({"rank_pattern": {3: 2}}, TypeError, "rank_pattern must map names or regular expressions to values, got {3: 2}"),
    ({"fold": {"a": 3}}, TypeError, "fold['a'] must be a text such as '(heads dim) in, heads=12', got 3"),
    (
        {"fold": "(a b) c, a=2"},
        TypeError,
        "fold must map names or regular expressions to values, or be the word 'blocks', got '(a b) c, a=2'",
    ),
    ({"fold": "blocks", "alpha": 8}, ValueError, "alpha sets s = alpha / r and needs one int r"),
    ({"dropout": "much"}, TypeError, "dropout must be a number, got 'much' of type str"),
    ({"dropout": float("nan")}, ValueError, "dropout must be a finite number of at most 3.4e+38, got nan"),
    ({"init_weights": "no"}, TypeError, "init_weights must be true or false, got 'no'"),
    ({"freeze_batch_norm": 1}, TypeError, "freeze_batch_norm must be true or false, got 1"),
    ({"target_modules": 7}, TypeError, "target_modules must be a list of names or one regular expression, got 7 of"),
    ({"target_modules": ["a", 7]}, TypeError, "target_modules must be a list of names or one regular expression, got"),
    ({"modules_to_save": "head"}, TypeError, "modules_to_save must be a list of names, got 'head' of type str"),
    ({"target_parameters": "experts.up"}, TypeError, "target_parameters must be a list of names, got 'experts.up' of"),
    ({"layers_to_transform": ["0"]}, TypeError, "layers_to_transform must be a list of whole numbers, got ['0']"),
    ({"trainable_token_indices": {"a": [0.5]}}, TypeError, "trainable_token_indices must be a list of whole numbers"),
    ({"layout": ["a"]}, TypeError, "layout must map weights to what their dimensions mean, got ['a']"),
    ({"layout": {"a": 3}}, ValueError, "the recorded layout of a is 3, expected a kind and a list of axes; the file"),
    ({"layout": {"a": {"kind": "conv", "axes": ["out"], "groups": "x"}}}, ValueError, "the recorded layout of a is"),
    ({"path": "factor"}, ValueError, "path, the old name of way, is 'factor', expected one of auto, rebuild, factored"),
    ({"way": "beside", "path": "rebuild"}, ValueError, "way='beside' and its old name path='rebuild' are both given"),
    ({"lora_alpha": 16}, TypeError, "FloraConfig has no lora_alpha; write alpha (or scale, the constant itself)"),
    ({"rank": 8}, TypeError, "FloraConfig has no rank; write r"),
    ({"layers_pattern": "h"}, ValueError, "layers_pattern needs layers_to_transform, which says which of the layers"),
]


@pytest.mark.parametrize(("given", "error", "text"), REFUSED)
def test_a_field_out_of_range_is_refused_by_name(given: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        FloraConfig(**given)
    assert str(caught.value).startswith(text)


def test_the_table_of_refusals_is_whole() -> None:
    assert len(REFUSED) == 56


def test_a_field_that_does_not_exist_raises() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'rangs'"):
        FloraConfig(rangs=8)  # type: ignore[call-arg]
