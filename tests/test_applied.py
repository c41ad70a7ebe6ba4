"""A scale set for now is not saved without a word, and an adapter is not applied twice without one."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from convert_cases import random_adapter
from flora import FloraConfig
from flora.convert import save
from flora.layers.merged import MARK
from flora_cli import main
from foreign_models import build
from test_extract import save_model
from test_merge import picked

TWICE = "is merged into this model already, as flora_merged in the model's config says: it would be applied twice"


def test_saving_says_that_a_scale_set_for_now_is_not_saved(tmp_path: Path) -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(7, 11)), FloraConfig(r=2, target_modules=["0"], init_weights=False))
    layer = model.base_model.model[0]
    layer.set_scale("default", 0.5)
    with pytest.warns(
        UserWarning, match=r"1 layers \(first: 0\) of the adapter 'default' run at a scale that set_scale"
    ):
        model.save_pretrained(tmp_path / "a")
    layer.unscale_layer()
    model.save_pretrained(tmp_path / "b")  # a warning would be an error here


def test_an_adapter_on_the_model_it_was_merged_into_is_noticed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = FloraConfig(r=2, target_modules=["c_fc"], init_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(build("gpt2"), config)
    model.save_pretrained(tmp_path / "adapter")
    PeftModel.from_pretrained(build("gpt2"), tmp_path / "adapter")

    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    with pytest.warns(UserWarning, match=TWICE):
        PeftModel.from_pretrained(merged, tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with pytest.warns(UserWarning, match=TWICE):
        PeftModel.from_pretrained(again, tmp_path / "adapter")


def test_unloading_without_merging_leaves_no_mark() -> None:
    base = get_peft_model(build("gpt2"), FloraConfig(r=2, target_modules=["c_fc"])).unload()
    assert not hasattr(base.config, MARK)


def test_flora_merge_refuses_what_is_merged_already(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = build("gpt2")
    save_model(base, tmp_path / "base")
    for seed, name in enumerate(("one", "other")):
        torch.manual_seed(seed)
        save(random_adapter(base, picked, 0.02), tmp_path / name)

    def merge(adapter: str, base: str, out: str) -> int:
        return main(["merge", str(tmp_path / adapter), "--base", str(tmp_path / base), "--out", str(tmp_path / out)])

    assert merge("one", "base", "merged") == 0
    assert len(json.loads((tmp_path / "merged" / "config.json").read_text())[MARK]) == 1
    assert merge("one", "merged", "twice") == 2
    assert "this adapter is merged into" in capsys.readouterr().err
    assert not (tmp_path / "twice").exists()

    assert merge("other", "merged", "both") == 0
    assert len(json.loads((tmp_path / "both" / "config.json").read_text())[MARK]) == 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "both")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = PeftModel.from_pretrained(loaded, tmp_path / "one")
    assert wrapped is not None
