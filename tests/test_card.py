"""Every folder that is saved says how to load it, and names no path of this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import flora
from flora.convert import convert
from flora.report.card import model_card
from flora.storage.card import adapter_card, is_hub_id

TINY = BertConfig(vocab_size=31, hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=14)
METRICS = {
    "recipe": "vision_classify",
    "validation": {"accuracy": 0.8125},
    "test": {"loss": 0.5, "accuracy": 0.75},
    "trainable_parameters": 1234,
    "total_parameters": 56789,
    "adapter_bytes": 4936,
    "seconds": 12.34,
    "steps": 50,
    "seed": 0,
}


def saved_by_peft(folder: Path) -> None:
    config = flora.FloraConfig(r=2, target_modules=["query"])
    get_peft_model(BertForSequenceClassification(TINY), config).save_pretrained(folder)


def saved_by_transformers(folder: Path) -> None:
    model = BertForSequenceClassification(TINY)
    model.add_adapter(flora.FloraConfig(r=2, target_modules=["query"]))
    model.save_pretrained(folder)


def saved_from_plain_torch(folder: Path) -> None:
    get_peft_model(nn.Sequential(nn.Conv2d(3, 5, 3)), flora.FloraConfig(r=2, target_modules="all")).save_pretrained(
        folder
    )


@pytest.mark.parametrize("save", [saved_by_peft, saved_by_transformers, saved_from_plain_torch])
def test_a_saved_adapter_says_how_to_load_it(save: object, tmp_path: Path) -> None:
    save(tmp_path / "adapter")  # type: ignore[operator]
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert "import flora\nfrom peft import PeftModel\n" in card.text
    assert "More Information Needed" not in card.text
    assert str(tmp_path) not in card.content
    assert card.data.to_dict()["library_name"] == "peft"
    assert "flora" in card.data.tags


def test_a_card_that_somebody_wrote_stays(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Mine\n")
    saved_from_plain_torch(tmp_path)
    assert "# Mine" in (tmp_path / "README.md").read_text()


def test_a_card_of_trl_says_how_to_load_it_and_its_example_runs_with_the_import(tmp_path: Path) -> None:
    example = (
        "## Quick start\n\n```python\nfrom transformers import pipeline\n\ngenerator = pipeline(model='me/it')\n```\n"
    )
    (tmp_path / "README.md").write_text(f"---\nlibrary_name: transformers\ntags: [trl, sft]\n---\n# Mine\n\n{example}")
    saved_by_peft(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert "import flora  # tells PEFT the method\nfrom transformers import pipeline\n" in card.text
    assert "import flora\nfrom peft import PeftModel\n" in card.text
    assert {"flora", "tucker"} <= set(card.data.tags)
    before = (tmp_path / "README.md").read_text()
    saved_by_peft(tmp_path)
    assert (tmp_path / "README.md").read_text().count("## Load") == before.count("## Load") == 1


def test_what_convert_writes_has_a_card(tmp_path: Path) -> None:
    config = flora.FloraConfig(r=2, target_modules=["query"], init_weights=False)
    get_peft_model(BertForSequenceClassification(TINY), config).save_pretrained(tmp_path / "adapter")
    run = {"base_model_name_or_path": "google/bert", "peft_type": "TUCKER"}
    (tmp_path / "adapter" / "README.md").write_text(model_card(METRICS, run, "adapter"))
    for kind, first in (("flora", "import flora\nfrom peft"), ("lora", "flora-peft is not needed")):
        convert(tmp_path / "adapter", tmp_path / kind, to=kind)
        card = ModelCard.load(tmp_path / kind / "README.md")
        assert first in card.text
        assert ("import flora" in card.text) == (kind == "flora")
        assert str(tmp_path) not in card.content
        assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {"accuracy": 0.75}


def test_the_example_of_a_plain_model_loads(tmp_path: Path) -> None:
    saved_from_plain_torch(tmp_path)
    text = ModelCard.load(tmp_path / "README.md").text
    code = text.partition("```python\n")[2].partition("```")[0]
    code = code.replace("base = ...", "base = nn.Sequential(nn.Conv2d(3, 5, 3))")
    names = {"nn": nn}
    exec(code.replace("path/to/this/folder", str(tmp_path)), names)
    assert isinstance(names["model"], PeftModel)


def test_the_card_of_a_run_has_its_numbers_for_the_hub() -> None:
    config = {
        "base_model_name_or_path": "facebook/convnextv2-tiny-1k-224",
        "auto_mapping": {
            "base_model_class": "ConvNextV2ForImageClassification",
            "parent_library": "transformers.models.convnextv2.modeling_convnextv2",
        },
    }
    text = model_card(METRICS, config, "/home/me/outputs/photos", classes=3)
    card = ModelCard(text)
    assert "/home" not in text
    assert card.data.base_model == "facebook/convnextv2-tiny-1k-224"
    assert [(result.metric_type, result.metric_value) for result in card.data.eval_results] == [("accuracy", 0.75)]
    assert "flora predict photos INPUT..." in text
    assert 'from_pretrained("facebook/convnextv2-tiny-1k-224", num_labels=3, ignore_mismatched_sizes=True)' in text
    assert "| validation accuracy | 0.8125 |" in text


def test_a_base_on_a_disk_is_not_named(tmp_path: Path) -> None:
    assert not is_hub_id(str(tmp_path))
    assert not is_hub_id("./model")
    assert is_hub_id("org/name")
    text = adapter_card({"base_model_name_or_path": str(tmp_path), "auto_mapping": None, "task_type": "CAUSAL_LM"})
    assert str(tmp_path) not in text
    assert 'AutoModelForCausalLM.from_pretrained("path/to/the/base/model")' in text
