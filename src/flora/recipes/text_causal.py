"""Instruction tuning: a language model learns to answer, with TRL's SFTTrainer; the loss is on the answers only.

Data: a hub data set, or local .json, .jsonl, .csv or .tsv with instruction, input and output, or with the messages of a
conversation, of which the last one is the answer. The ``training`` keys of the config are those of TRL's SFTConfig:
``max_length`` cuts examples, ``packing`` packs them, ``bf16`` and ``activation_checkpointing`` are on unless set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, EvalPrediction, PreTrainedModel
from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]

from flora.data.records import load_pretrained, parsed, records, sift, with_held_out
from flora.data.samples import locate
from flora.errors import UserError
from flora.recipes import Data

METRIC = "token_accuracy"
ARGUMENTS = SFTConfig
ENDINGS = (".jsonl", ".json", ".csv", ".tsv")
INTRODUCTION = {  # by whether there is an input: the frame of Alpaca, which commonsense-170k is written for
    True: "Below is an instruction that describes a task, paired with an input that provides further context. ",
    False: "Below is an instruction that describes a task. ",
}
REQUEST = "Write a response that appropriately completes the request.\n\n"


@dataclass
class Task:
    """Settings of the data and the base model.

    Args:
        model: the base language model: a hub id or a local folder.
        data: a hub id, a file, or a folder with train, validation and test as .jsonl, .json, .csv or .tsv; records have
            instruction, output and perhaps input, or messages (a list of role and content; the last is the answer).
        held_out: share of the training data to test on, and to choose on, where there is no such split.
        bad_data: "error" stops at a record that cannot be used, "skip" leaves such records out and says how many.
    """

    model: str = "yahma/llama-7b-hf"
    data: str = "zwhe99/commonsense_170k"
    held_out: float = 0.02
    bad_data: Literal["error", "skip"] = "error"

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 0.5:
            raise UserError(f"task.held_out is {self.held_out}, expected a share between 0 and 0.5")


def prompt_of(instruction: str, given: str) -> str:
    """What the model is asked, up to where its answer starts."""
    lead = f"### Input:\n{given}\n\n" if given else ""
    return f"{INTRODUCTION[bool(given)]}{REQUEST}### Instruction:\n{instruction}\n\n{lead}### Response:\n"


def example(record: object) -> dict[str, Any]:
    """A record as TRL takes it: prompt and completion, as texts or, of a conversation, as messages.

    Raises:
        ValueError: a key is missing, a text is empty, or the conversation does not end with the assistant.
    """
    row = parsed(record)
    if "messages" not in row:
        texts = {key: row.get(key) or "" for key in ("instruction", "input", "output")}
        if strange := [key for key, text in texts.items() if not isinstance(text, str)]:
            raise UserError(f"{strange[0]!r} is no text: {texts[strange[0]]!r}")
        if empty := [key for key in ("instruction", "output") if not texts[key].strip()]:
            raise UserError(f"{empty[0]!r} is empty or not there; the record has {', '.join(map(repr, row))}")
        return {"prompt": prompt_of(texts["instruction"], texts["input"]), "completion": texts["output"]}
    if not isinstance(row["messages"], list):
        raise UserError(f"expected a list of messages, got {type(row['messages']).__name__}")
    messages = [parsed(message, ["role", "content"]) for message in row["messages"]]
    for message in messages:
        if not isinstance(message["content"], str) or not message["content"].strip():
            raise UserError(f"a message of the {message['role']} is empty or no text: {message['content']!r}")
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise UserError("the messages must end with a question and the assistant's answer")
    plain = [{"role": message["role"], "content": message["content"]} for message in messages]
    return {"prompt": plain[:-1], "completion": plain[-1:]}


def load_data(task: Task, seed: int) -> Data:
    """The examples of each split; nothing of them is random.

    Raises:
        FileNotFoundError, ValueError: data or tokenizer cannot be loaded, or records cannot be used.
    """
    parts = records(locate(task.data), ENDINGS, ("instruction", "input", "output"))
    tokenizer = load_pretrained(AutoTokenizer, locate(task.model))
    good = {key: sift(part, example, bad=task.bad_data, what=f"{key} records") for key, part in parts.items()}
    rows = with_held_out({key: [example(item.value) for item in part] for key, part in good.items()}, task.held_out)
    chat = {isinstance(row["prompt"], list) for part in rows.values() for row in part}
    if len(chat) > 1:
        raise UserError("task.data has records with messages and records with instructions; give one kind")
    if True in chat and not tokenizer.chat_template:
        raise UserError(f"task.data has messages, but the tokenizer of {task.model} has no chat template for them")
    train, validation, test = (Dataset.from_list(part) for part in rows.values())
    return Data(train, validation, test, processor=tokenizer)


def load_base(task: Task) -> PreTrainedModel:
    """The language model, in the precision that it is stored in."""
    return cast("PreTrainedModel", load_pretrained(AutoModelForCausalLM, locate(task.model)))


class AnswerTrainer(SFTTrainer):
    """TRL's trainer, measured by which tokens of the answers it gets right: the logits are never kept."""

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Tokenizes a split that was not given to the trainer at its start."""
        sft = cast("Any", self)
        if isinstance(eval_dataset, Dataset) and not sft._skip_prepare_dataset:  # as SFTTrainer.evaluate does
            eval_dataset = sft._prepare_dataset(eval_dataset, sft.processing_class, sft.args, False, None, "eval")
        return super().get_eval_dataloader(eval_dataset)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The loss, for each token of the answers whether it is the likeliest (0 or 1), and the labels."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs, fused_lm_head=True)
        if prediction_loss_only:
            return outputs.loss, None, None
        return outputs.loss, outputs.is_top1.long(), inputs["labels"][:, 1:].contiguous()

    def create_model_card(self, *arguments: Any, **options: Any) -> None:
        """Nothing: the output folder gets a card of its own."""


TRAINER = AnswerTrainer


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """The share of the answers' tokens that are the likeliest in their place."""
    right, answered = cast("np.ndarray", prediction.predictions), cast("np.ndarray", prediction.label_ids) != -100
    return {"token_accuracy": float(right[answered].mean())}
