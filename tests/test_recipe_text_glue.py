"""The recipe text_glue: rows one by one, GLUE's metrics, the settings of the authors, DeBERTaV3's parameters."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import BertConfig, BertModel, DebertaV2Config, DebertaV2ForSequenceClassification, EvalPrediction

from flora import FloraConfig
from flora.data.samples.text import write_tokenizer
from flora.recipes import CONFIGS
from flora.recipes.text_glue import KINDS, Task, compute_metrics, load_data
from flora.runs.merging import merge
from flora.runs.settings import read
from flora.runs.training import train

# What PAPER reports: rate, epochs, alpha, longest text, warm-up.
AUTHORS = {
    "mnli": (5e-4, 7, 16, 256, 1000),
    "sst2": (8e-4, 24, 16, 128, 1000),
    "cola": (8e-4, 25, 32, 64, 100),
    "qqp": (8e-4, 5, 16, 320, 2000),
    "qnli": (5e-4, 5, 32, 512, 500),
    "rte": (1.2e-3, 50, 32, 320, 0.05),  # 200 of about 3,900 steps
    "mrpc": (1e-3, 30, 32, 320, 0.1),
    "stsb": (2.2e-3, 25, 32, 128, 100),
}
PAIRS = ["a cat sat\tthe cat sat\t0", "a dog ran\tno dog ran\t1", "a bird\tbirds\t2"] * 4


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny BERT without a head."""
    folder = tmp_path_factory.mktemp("encoder")
    size = len(write_tokenizer(folder, PAIRS))
    config = BertConfig(
        vocab_size=size, hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)


def task(encoder: str, data: Path, name: str = "mnli", **settings: Any) -> Task:
    return Task(name=name, model=encoder, data=str(data), **settings)


def write(folder: Path, name: str, lines: list[str]) -> Path:
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("a cat\tthe cat\t3", "the label is '3', expected 0 entailment, 1 neutral, 2 contradiction"),
        ("a cat\tthe cat\t1.5", "the label is '1.5'"),
        ("a cat\tthe cat\tyes", "the label is 'yes'"),
        ("a cat\t \t1", "a text is empty or not a string: ' '"),
        ("a cat\t1", "lacks 'label'; it has 'premise', 'hypothesis'"),
        ("a cat\tthe cat\t1\tmore", "has 1 more fields than there are columns"),
    ],
)
@pytest.mark.parametrize("header", [["premise\thypothesis\tlabel"], []])
def test_a_bad_row_is_named(
    line: str, reason: str, header: list[str], encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path, "train.tsv", [*header, *PAIRS[:2], line, *PAIRS[2:]])
    with pytest.raises(ValueError, match="1 of 13 train rows cannot be used") as raised:
        load_data(task(encoder, folder), 0)
    assert f"train.tsv:{3 + len(header)}: {reason}" in str(raised.value)
    data = load_data(task(encoder, folder, bad_data="skip"), 0)
    assert sum(len(data.split(split)) for split in ("train", "validation", "test")) == 12  # type: ignore[arg-type]
    assert f"train.tsv:{3 + len(header)}: {reason}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"premise": "a", "hypothesis": "b", "label": 1', "not valid JSON"),
        ('{"premise": "a", "hypothesis": null, "label": 1}', "a text is empty or not a string: None"),
        ('["a", "b", 1]', "expected a JSON object, got list"),
        ('{"premise": "a", "label": 1}', "lacks 'hypothesis'"),
    ],
)
def test_a_bad_json_line_is_named(line: str, reason: str, encoder: str, tmp_path: Path) -> None:
    good = '{"premise": "a \u2028 cat", "hypothesis": "the cat", "label": "neutral"}'
    folder = write(tmp_path, "train.jsonl", [good, "", line])
    with pytest.raises(ValueError, match=rf"train\.jsonl:3: {reason}"):
        load_data(task(encoder, folder), 0)


def test_other_files_are_refused(encoder: str, tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_bytes(b"premise\thypothesis\tlabel\na cat\tthe c\xe9t\t1\n")
    with pytest.raises(ValueError, match=r"train\.tsv:2: not UTF-8 text"):
        load_data(task(encoder, tmp_path), 0)
    with pytest.raises(ValueError, match="expected a file \\(.jsonl, .tsv, .csv\\), or a folder with train.jsonl"):
        load_data(task(encoder, tmp_path.parent), 0)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_data(task(encoder, tmp_path / "nothing.tsv"), 0)


def test_a_quoted_table(encoder: str, tmp_path: Path) -> None:
    rows = ['"a ""cat"", it sat",the cat,0', '"a dog\nran",no dog,1', "a bird,birds,2"]
    write(tmp_path, "train.csv", ["premise,hypothesis,label", *rows])
    write(tmp_path, "dev.csv", ["hypothesis,premise,label", "no dog,a dog,entailment"])
    write(tmp_path, "test.csv", ["premise,hypothesis,label", "a dog,no dog,-1"])
    data = load_data(task(encoder, tmp_path), 0)
    # the test set has no labels: what is tested on is the validation set, what is chosen on a part of the training set
    assert data.test.rows == [(["a dog", "no dog"], 0)]  # type: ignore[attr-defined]
    texts = sorted(row[0][0] for part in (data.train, data.validation) for row in part.rows)  # type: ignore[attr-defined]
    assert texts == ['a "cat", it sat', "a bird", "a dog\nran"]


def test_scores_are_numbers(encoder: str, tmp_path: Path) -> None:
    folder = write(tmp_path, "train.tsv", ["a cat\tthe cat\t4.25", "a dog\tno dog\t0", "a bird\tbirds\t5"])
    data = load_data(task(encoder, folder, "stsb"), 0)
    batch = data.collate([data.train[0], data.test[0]])  # type: ignore[misc]
    assert batch["labels"].dtype == torch.float32
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    (folder / "train.tsv").write_text("a cat\tthe cat\t5.1\n")
    with pytest.raises(ValueError, match="the label is '5.1', expected a score from 0 to 5"):
        load_data(task(encoder, folder, "stsb"), 0)


def test_few_examples_drawn_by_the_seed(encoder: str, tmp_path: Path) -> None:
    folder = write(tmp_path, "train.tsv", [f"word {at}\t{at % 2}" for at in range(100)])
    first, same, other = (load_data(task(encoder, folder, "sst2", train_size=20), seed) for seed in (0, 0, 1))
    assert first.train.rows == same.train.rows != other.train.rows  # type: ignore[attr-defined]
    assert len(first.train) == 20  # type: ignore[arg-type]
    assert first.test.rows == other.test.rows  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="task.train_size is 73, expected 1 to 72"):
        load_data(task(encoder, folder, "sst2", train_size=73), 0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"name": "wnli"}, "task.name is 'wnli', expected one of cola"), ({"max_length": 0}, "at least 1")],
)
def test_settings_of_the_task_are_checked(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Task(**wrong)


def logits(classes: list[int]) -> np.ndarray:
    return np.eye(2)[classes]


def test_metrics_by_hand() -> None:
    truth = np.array([1, 1, 1, 0, 0])
    guess = EvalPrediction(logits([1, 1, 0, 0, 1]), truth)  # 2 hits, 1 false alarm, 1 miss, 1 correct rejection
    assert compute_metrics(guess, "rte") == {"accuracy": 0.6, "score": 0.6}
    assert compute_metrics(guess, "mrpc") == pytest.approx({"accuracy": 0.6, "f1": 2 / 3, "score": (0.6 + 2 / 3) / 2})
    matthews = (2 * 1 - 1 * 1) / np.sqrt(3 * 3 * 2 * 2)
    assert compute_metrics(guess, "cola") == pytest.approx({"matthews": matthews, "score": matthews})
    scores = EvalPrediction(np.array([[1.0], [2.0], [4.0]]), np.array([1.0, 2.0, 3.0]))
    pearson = 3 / np.sqrt(2 * 14 / 3)
    assert compute_metrics(scores, "stsb") == pytest.approx(
        {"pearson": pearson, "spearman": 1.0, "score": (pearson + 1) / 2}
    )
    constant = EvalPrediction(np.ones((3, 1)), np.array([1.0, 2.0, 3.0]))
    assert compute_metrics(constant, "stsb")["score"] == 0


def test_three_labels_are_trained_and_merged(encoder: str, tmp_path: Path) -> None:
    """The base model's folder says nothing of labels: the recipe does."""
    write(tmp_path, "train.tsv", PAIRS)
    changes = [f"output={tmp_path / 'run'}", f"task.model={encoder}", f"task.data={tmp_path / 'train.tsv'}"]
    few = [
        "task.name=mnli",
        "adapter.target_modules=[query]",
        "training.num_train_epochs=1",
        "training.disable_tqdm=true",
    ]
    metrics = train(read("text_glue-tiny", [*changes, *few]))
    assert set(metrics["test"]) == {"loss", "accuracy", "score"}
    assert merge(tmp_path / "run", tmp_path / "merged").difference < 1e-5
    assert '"entailment"' in (tmp_path / "merged" / "config.json").read_text()


def commands() -> list[list[str]]:
    """The commands in the comments of the config, one for each other task."""
    lines = [line.removeprefix("#") for line in (CONFIGS / "text_glue.yaml").read_text().splitlines()[3:]]
    text = "\n".join(line for line in lines if line.startswith((" flora train", "     ")))
    return [shlex.split(part) for part in text.split("flora train text_glue ")[1:]]


def test_the_settings_are_those_of_the_authors() -> None:
    found = {}
    for overrides in [[], *commands()]:
        settings = read("text_glue", overrides)
        training, name = settings.training, settings.task.name
        assert training["per_device_train_batch_size"] == 32
        assert settings.output == Path("outputs/text_glue" + (f"-{name}" if overrides else ""))
        found[name] = (
            training["learning_rate"],
            training["num_train_epochs"],
            settings.adapter["alpha"],
            settings.task.max_length,
            training["warmup_steps"],
        )
    assert found == AUTHORS
    assert set(found) == set(KINDS)


def deberta_v3_base() -> nn.Module:
    config = DebertaV2Config(vocab_size=128100, hidden_size=768, num_hidden_layers=12, intermediate_size=3072)
    with torch.device("meta"):
        return DebertaV2ForSequenceClassification(config)


def spent(model: PeftModel, prefix: str) -> int:
    return sum(value.numel() for name, value in model.named_parameters() if f".{prefix}" in name)


@pytest.mark.parametrize("r", [2, 8, 13])
def test_parameters_of_deberta_v3_base(r: int) -> None:
    adapter = read("text_glue").adapter
    model = get_peft_model(deberta_v3_base(), FloraConfig(**{**adapter, "r": r}), low_cpu_mem_usage=True)
    assert len(model.base_model.targeted_module_names) == 6 * 12
    assert spent(model, "tucker_") == 165_888 * r + 72 * r**2
    lora = get_peft_model(
        deberta_v3_base(), LoraConfig(r=r, target_modules=adapter["target_modules"]), low_cpu_mem_usage=True
    )
    assert spent(lora, "lora_") == 165_888 * r
