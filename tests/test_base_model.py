"""Which class a base model is, and that nothing which somebody sent is imported to find out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GPT2LMHeadModel, SpeechT5HifiGan, SpeechT5HifiGanConfig

import flora_cli
from flora.convert.base_model import adapted_class, is_stored_as, meta_model, open_base, stored_class, try_base
from flora.convert.report import ROUNDING
from flora.runs.reloading import load_base, read_run
from foreign_models import build
from test_extract import save_model

EVIL = "raise SystemExit('the code of a stranger has run')\n"


def names(library: object, name: object) -> dict[str, object]:
    return {"auto_mapping": {"parent_library": library, "base_model_class": name}}


def test_a_folder_and_its_class(tmp_path: Path) -> None:
    save_model(build("gpt2"), tmp_path / "base")
    base = open_base(tmp_path / "base")
    assert type(base.model) is GPT2LMHeadModel
    assert next(base.model.parameters()).is_meta
    assert base.shapes["transformer.h.0.attn.c_attn.weight"] == (12, 36)
    assert base.layouts["transformer.h.0.attn.c_attn.weight"].axes == ("in", "out")
    assert open_base(base) is base
    for config, expected in (
        (names("transformers.models.gpt2.modeling_gpt2", "GPT2LMHeadModel"), True),
        ({"task_type": "CAUSAL_LM"}, True),
        ({"task_type": "SEQ_CLS"}, False),
        ({}, True),
    ):
        assert is_stored_as(tmp_path / "base", config, tmp_path) is expected


@pytest.mark.parametrize(
    "settings", [{"architectures": ["pipeline"]}, {"architectures": [3]}, {"architectures": None}, {}]
)
def test_what_is_no_model_is_no_class(settings: dict[str, object], tmp_path: Path) -> None:
    """``transformers.pipeline`` is a function that would run."""
    assert stored_class(settings) is None
    (tmp_path / "config.json").write_text(json.dumps({**settings, "model_type": "gpt2"}))
    assert try_base(tmp_path) is None


REFUSED = [
    (names("payload", "Model"), "payload is not an installed package, so it is not imported"),
    (names("sent.payload", "Model"), "sent is not an installed package, so it is not imported"),
    (names("transformers.nowhere", "Model"), "transformers.nowhere.Model: No module named"),
    (names("transformers", "pipeline"), "names 'pipeline', which is not a model in transformers"),
    (names("os", "system"), "names 'system', which is not a model in os"),
    (names(3, "Model"), "expected the names of a library and a class"),
    ({"auto_mapping": "transformers"}, "expected the names of a library and a class"),
    ({"task_type": ["CAUSAL_LM"]}, "says neither the class"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_no_module_of_a_sent_folder_is_imported(
    config: dict[str, object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where Python would find it, because the command runs there."""
    (tmp_path / "sent").mkdir()
    for path in (tmp_path / "payload.py", tmp_path / "sent/payload.py"):
        path.write_text(EVIL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=message):
        adapted_class(config, tmp_path / "sent")


def test_a_class_that_the_program_has_imported_itself(tmp_path: Path) -> None:
    assert adapted_class(names(__name__, "Own"), tmp_path) is Own


class Own(nn.Module):
    """Stands for a model of the user's."""


def test_the_python_file_that_a_folder_names_is_run_only_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.py").write_text(EVIL)
    (run / "config.yaml").write_text(f"recipe: {run / 'recipe.py'}\n")
    (run / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "gone")}))
    (run / "adapter_model.safetensors").write_bytes(b"")
    for call in (lambda: read_run(run), lambda: load_base(run)):
        with pytest.raises(ValueError, match="does not run unasked.*--run-recipe-file"):
            call()
    for argv in (["eval", str(run)], ["merge", str(run), "--out", str(tmp_path / "out")]):
        assert flora_cli.main(argv) == 2
        assert "does not run unasked" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="has run"):
        read_run(run, run_recipe_file=True)


def test_a_config_that_no_auto_class_knows(tmp_path: Path) -> None:
    config = SpeechT5HifiGanConfig(upsample_initial_channel=32, model_in_dim=12)
    config.save_pretrained(tmp_path)
    assert type(meta_model(str(tmp_path))) is SpeechT5HifiGan
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text('{"model_type": "gpt2", "n_embd": "many", "architectures": []}')
    with pytest.raises(ValueError, match=r"broken"):
        meta_model(str(tmp_path / "broken"))
    with pytest.raises(ValueError, match="it has no model_type"):
        meta_model(str(write(tmp_path / "list.yaml", "- 1\n")))


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_table_of_tolerances_has_every_dtype_of_a_model() -> None:
    assert set(ROUNDING) == {torch.float64, torch.float32, torch.float16, torch.bfloat16}
    assert all(0 < row.weight <= row.model < 0.1 for row in ROUNDING.values())
