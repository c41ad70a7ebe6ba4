"""How PEFT comes to know the method: once, under a member that is like PEFT's own, and never over another's."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import textwrap

import pytest
from peft import LoraConfig, get_peft_config, get_peft_model
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.utils import PeftType
from torch import nn

import flora
from flora.tuner import register
from flora.tuner.model import FloraModel

ADDED = {"einops", "flora"}  # top-level packages that `import flora` loads beyond `import peft`


def run(script: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter: what an import does shows only there."""
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_peft_finds_config_model_and_prefix() -> None:
    member = PeftType("TUCKER")
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is flora.FloraConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is FloraModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == FloraModel.prefix == "tucker_"


def test_the_prefix_is_the_one_that_transformers_builds() -> None:
    assert FloraModel.prefix == flora.FloraConfig().peft_type.value.lower() + "_"
    assert "lora_" not in FloraModel.prefix


def test_registering_again_changes_nothing() -> None:
    before = [dict(PEFT_TYPE_TO_CONFIG_MAPPING), dict(PEFT_TYPE_TO_TUNER_MAPPING), list(PeftType)]
    register()
    assert [dict(PEFT_TYPE_TO_CONFIG_MAPPING), dict(PEFT_TYPE_TO_TUNER_MAPPING), list(PeftType)] == before


def test_the_member_is_like_any_other() -> None:
    member, own = PeftType("TUCKER"), PeftType.LORA
    assert type(member) is type(own) is PeftType
    assert (member.value, member.name, str.__str__(member)) == ("TUCKER", "TUCKER", "TUCKER")
    assert PeftType["TUCKER"] is PeftType.TUCKER is member  # type: ignore[attr-defined]
    assert list(PeftType).count(member) == 1
    assert PeftType.__members__["TUCKER"] is member
    assert len(PeftType) == len(list(PeftType)) == len({each.value for each in PeftType})
    assert member == "TUCKER"
    assert hash(member) == hash(PeftType("TUCKER"))
    assert member != own
    for twin in (pickle.loads(pickle.dumps(member)), copy.copy(member), copy.deepcopy(member)):
        assert twin is member
    assert json.loads(json.dumps(member)) == "TUCKER"
    assert repr(member) == repr(own).replace("LORA", "TUCKER")


def test_an_unknown_name_is_still_unknown() -> None:
    with pytest.raises(ValueError, match="'TUCKER2' is not a valid PeftType"):
        PeftType("TUCKER2")


def test_a_config_is_built_from_its_type() -> None:
    config = get_peft_config({"peft_type": "TUCKER", "r": 3})
    assert type(config) is flora.FloraConfig
    assert config.r == 3


def test_other_methods_are_left_alone() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(7, 5)), LoraConfig(r=2, target_modules=["0"]))
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def test_the_public_names_are_there() -> None:
    assert len(set(flora.__all__)) == len(flora.__all__)
    for name in flora.__all__:
        assert getattr(flora, name) is not None
    promised = {"FloraConfig", "INITIALIZERS", "LAYERS", "Plan", "Tucker", "TuckerDelta", "plan"}
    assert promised <= set(flora.__all__)


def test_the_import_is_light() -> None:
    """Nothing beyond a short list comes with ``import flora`` that ``import peft`` has not brought already."""
    done = run("""
        import json, sys, peft
        before = set(sys.modules)
        import flora
        print(json.dumps(sorted(set(sys.modules) - before)))
    """)
    assert done.returncode == 0, done.stderr
    added = json.loads(done.stdout)
    known = set(sys.stdlib_module_names)
    assert {name.partition(".")[0] for name in added} - known <= ADDED
    heavy = {"accelerate", "matplotlib", "sklearn", "tensorly", "scipy", "yaml", "jsonargparse", "datasets", "pandas"}
    assert not heavy & {name.partition(".")[0] for name in added}
    inside = {name for name in added if name.startswith("flora.")}
    assert not {name for name in inside if name.startswith(("flora.recipes", "flora.report", "flora.runs"))}
    assert len(inside) > 5


TAKEN = """
    from peft import LoraConfig, LoraModel
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils import PeftType

    theirs = str.__new__(PeftType, "TUCKER")
    theirs._name_ = theirs._value_ = "TUCKER"
    type.__setattr__(PeftType, "TUCKER", theirs)
    PeftType._member_map_["TUCKER"] = PeftType._value2member_map_["TUCKER"] = theirs
    PeftType._member_names_.append("TUCKER")
    PEFT_TYPE_TO_CONFIG_MAPPING[theirs] = LoraConfig
    PEFT_TYPE_TO_TUNER_MAPPING[theirs] = LoraModel
    try:
        import flora
    except ImportError as error:
        print(error)
    assert PeftType("TUCKER") is theirs and list(PeftType).count("TUCKER") == 1
    assert PEFT_TYPE_TO_CONFIG_MAPPING[theirs] is LoraConfig and PEFT_TYPE_TO_TUNER_MAPPING[theirs] is LoraModel
"""


def test_a_method_of_that_name_in_peft_is_not_overwritten() -> None:
    done = run(TAKEN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (
        "PEFT already has a method 'TUCKER' (peft.tuners.lora.model.LoraModel), so flora-peft cannot register its own "
        "under that name; upgrade flora-peft, or install the PEFT version that its release notes name"
    )
