"""GLUE: a text encoder learns one of the eight tasks; sentences or pairs of them are classified or scored.

Data: the hub's ``nyu-mll/glue``, or a local folder with train, validation and test as .jsonl, .tsv or .csv and the
columns of the hub. Where the test set has no labels, as in GLUE, the validation set is the test, another is held out.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from flora.data.files import Item, parsed
from flora.data.pretrained import load_pretrained
from flora.data.records import records, sift
from flora.data.results import ranked
from flora.data.samples import locate
from flora.data.shown import WORST, Findings, Shown, classified
from flora.data.splits import drawn, with_held_out
from flora.errors import UserError
from flora.recipes import Data, Request, Tested

METRIC = "score"


@dataclass(frozen=True)
class Kind:
    """One of the tasks: the columns of its texts, its labels in order (none: a score from 0 to 5), its metrics."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]


KINDS = {
    "cola": Kind(("sentence",), ("unacceptable", "acceptable"), ("matthews",)),
    "sst2": Kind(("sentence",), ("negative", "positive"), ("accuracy",)),
    "mrpc": Kind(("sentence1", "sentence2"), ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "qqp": Kind(("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
    "stsb": Kind(("sentence1", "sentence2"), (), ("pearson", "spearman")),
    "mnli": Kind(("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), ("accuracy",)),
    "qnli": Kind(("question", "sentence"), ("entailment", "not_entailment"), ("accuracy",)),
    "rte": Kind(("sentence1", "sentence2"), ("entailment", "not_entailment"), ("accuracy",)),
}


def correlation(measure: Callable[..., Any], labels: np.ndarray, predictions: np.ndarray) -> float:
    """A coefficient of correlation; 0 where one side is constant and it is not defined."""
    constant = np.ptp(labels) == 0 or np.ptp(predictions) == 0
    if constant:
        return 0.0
    return float(measure(labels, predictions).statistic)


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy_score,
    "f1": partial(f1_score, zero_division=0),
    "matthews": matthews_corrcoef,
    "pearson": partial(correlation, pearsonr),
    "spearman": partial(correlation, spearmanr),
}


@dataclass
class Task:
    """Settings of the data and the base model.

    Args:
        name: of the task: cola, sst2, mrpc, qqp, stsb, mnli, qnli or rte.
        model: the base encoder: a hub id or a local folder.
        data: a hub id, or a local folder with train, validation and test as .jsonl, .tsv or .csv (columns as on the
            hub; a table without a header has the texts first and then the label).
        max_length: tokens that are kept of a text or pair.
        train_size: training examples, drawn by the seed; None takes all.
        bad_data: "error" stops at a row that cannot be used, "skip" leaves such rows out and says how many.
    """

    name: str = "rte"
    model: str = "microsoft/deberta-v3-base"
    data: str = "nyu-mll/glue"
    max_length: int = 320
    train_size: int | None = None
    bad_data: Literal["error", "skip"] = "error"

    def __post_init__(self) -> None:
        if self.name not in KINDS:
            raise UserError(f"task.name is {self.name!r}, expected one of {', '.join(KINDS)}")
        if self.max_length < 1:
            raise UserError(f"task.max_length is {self.max_length}, expected at least 1")


class Examples(Dataset[dict[str, Any]]):
    """Token ids of texts or pairs with their label, as the model takes them; tokenized on demand."""

    def __init__(self, rows: list[tuple[list[str], float]], tokenizer: Any, max_length: int) -> None:
        self.rows, self.tokenizer, self.max_length = rows, tokenizer, max_length

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        texts, label = self.rows[index]
        return {**self.tokenizer(*texts, truncation=True, max_length=self.max_length), "labels": label}


def example(record: object, kind: Kind) -> tuple[list[str], float]:
    """The texts and the label of a row.

    Raises:
        ValueError: a column is missing, a text is empty, or the label is not one of the task's.
    """
    row = parsed(record, [*kind.texts, "label"])
    texts = [row[column] for column in kind.texts]
    if bad := [text for text in texts if not isinstance(text, str) or not text.strip()]:
        raise UserError(f"a text is empty or not a string: {bad[0]!r}")
    return texts, number(row["label"], kind)


def number(label: object, kind: Kind) -> float:
    """The label as the model takes it: a class (int) or a score (float).

    Raises:
        ValueError: it is out of range.
    """
    if label in kind.labels:
        return kind.labels.index(label)

    with suppress(TypeError, ValueError):
        value = float(cast("str", label))
        if kind.labels and value in range(len(kind.labels)):
            return int(value)
        if not kind.labels and 0 <= value <= 5:
            return value

    names = ", ".join(f"{at} {name}" for at, name in enumerate(kind.labels)) or "a score from 0 to 5"
    raise UserError(f"the label is {label!r}, expected {names}")


def hidden(item: Item[Any]) -> bool:
    """Whether a row of the test set has no label, which GLUE writes as -1."""
    return isinstance(item.value, dict) and str(item.value.get("label")) == "-1"


def load_data(task: Task, seed: int) -> Data:
    """The rows of the task; the seed draws ``train_size`` of the training rows.

    Raises:
        FileNotFoundError, ValueError: data or tokenizer cannot be loaded, or rows cannot be used.
    """
    kind = KINDS[task.name]
    parts = records(locate(task.data), (".jsonl", ".tsv", ".csv"), [*kind.texts, "label"], task.name)
    if parts.get("test") and all(map(hidden, parts["test"])):
        parts["test"] = parts.pop("validation", [])

    check = partial(example, kind=kind)
    good = {key: sift(part, check, bad=task.bad_data, what=f"{key} rows") for key, part in parts.items() if part}
    rows = with_held_out({key: [check(item.value) for item in part] for key, part in good.items()})

    rows["train"] = drawn(rows["train"], task.train_size, seed, "rows")

    tokenizer = load_pretrained(AutoTokenizer, locate(task.model))
    train, validation, test = (Examples(part, tokenizer, task.max_length) for part in rows.values())

    return Data(train, validation, test, DataCollatorWithPadding(tokenizer), tokenizer)


def load_base(task: Task) -> PreTrainedModel:
    """The encoder with a new head for the task, whose name is kept in the model's config."""
    names = dict(enumerate(KINDS[task.name].labels))
    if names:
        labels = {"id2label": names, "label2id": {name: at for at, name in names.items()}}
    else:
        labels = {"num_labels": 1}

    model = load_pretrained(AutoModelForSequenceClassification, locate(task.model), **labels)
    model.config.finetuning_task = task.name

    return cast("PreTrainedModel", model)


class GlueTrainer(Trainer):
    """A Trainer whose metrics are those of the model's task."""

    def __init__(self, model: nn.Module, arguments: TrainingArguments, **options: Any) -> None:
        super().__init__(model, arguments, **options)
        self.compute_metrics = partial(compute_metrics, name=cast("Any", model).config.finetuning_task)
        # Its loss is a mean: not to be multiplied by the processes.
        self.model_accepts_loss_kwargs = False


TRAINER = GlueTrainer


def predictor(task: Task, model: Any, folder: Path) -> Callable[[Request], dict[str, Any]]:
    """Gives the class of a text, or the score of a pair; the two texts of a pair are separated by ``|||``."""
    tokenizer = load_pretrained(AutoTokenizer, str(folder))
    kind = KINDS[task.name]

    def answer(request: Request) -> dict[str, Any]:
        texts = [text.strip() for text in request.given.split("|||")]
        if len(texts) != len(kind.texts) or not all(texts):
            raise UserError(f"{request.given!r}: expected {' ||| '.join(kind.texts)}, as the task {task.name} has them")

        options = {"truncation": True, "max_length": task.max_length, "return_tensors": "pt"}
        logits = model(**tokenizer(*texts, **options).to(model.device)).logits[0]

        if kind.labels:
            return ranked(logits, kind.labels)

        return {"score": round(float(logits), 4)}

    return answer


def findings(tested: Tested) -> Findings:
    """Which classes are taken for which, and the worst errors; of scores, those that are furthest off."""
    kind, rows = KINDS[tested.task.name], cast("Examples", tested.data.test).rows

    def show(index: int) -> Shown:
        return Shown(texts=list(zip(kind.texts, rows[index][0], strict=True)))

    if kind.labels:
        return classified(tested.predictions, tested.labels, kind.labels, show)

    scores = tested.predictions.reshape(-1)
    furthest = np.argsort(-abs(scores - tested.labels))[:WORST]
    examples = [
        Shown(f"{tested.labels[index]:g}, taken for {scores[index]:.2f}", texts=show(index).texts)
        for index in furthest.tolist()
    ]

    return Findings(f"The {len(examples)} scores that are furthest off", examples)


def compute_metrics(prediction: EvalPrediction, name: str = "rte") -> dict[str, float]:
    """The metrics of a task and, as GLUE counts it, their mean ``score``."""
    kind, outputs = KINDS[name], cast("np.ndarray", prediction.predictions)
    answers = outputs.argmax(-1) if kind.labels else outputs.reshape(-1)

    found = {key: float(METRICS[key](cast("np.ndarray", prediction.label_ids), answers)) for key in kind.metrics}

    return {**found, "score": sum(found.values()) / len(found)}
