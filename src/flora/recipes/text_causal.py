"""A language model learns from text, with TRL's SFTTrainer; where there are questions, the loss is on the answers only.

Data: a hub data set, or local .json, .jsonl, .csv or .tsv in one of the formats of ``flora.data.chats``: messages,
ShareGPT's conversations, prompt and completion, Alpaca's instruction and output, or plain text. The ``training`` keys
of the config are those of TRL's SFTConfig: ``max_length`` cuts examples, ``packing`` packs them, ``bf16`` and
``activation_checkpointing`` are on unless set.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from datasets import Dataset
from peft import prepare_model_for_kbit_training
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, EvalPrediction, PreTrainedModel
from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]

from flora.data.chats import COLUMNS, chat_template, read_record
from flora.data.pretrained import load_pretrained
from flora.data.records import records, sift
from flora.data.samples import locate
from flora.data.shown import FEW, Findings, Shown
from flora.data.splits import check_share, with_held_out
from flora.errors import UserError
from flora.recipes import Data, Request, Tested

METRIC = "token_accuracy"
ARGUMENTS = SFTConfig
ENDINGS = (".jsonl", ".json", ".csv", ".tsv")
# Tokens that a prediction writes at most.
LONGEST_ANSWER = 256


@dataclass
class Task:
    """Settings of the data and the base model.

    Args:
        model: the base language model: a hub id or a local folder.
        data: A hub id, a file, or a folder with train, validation and test as .jsonl, .json, .csv or .tsv. Records have
            messages, conversations, prompt and completion, instruction and output (perhaps input), or text.
        columns: What the data call these, where they have other names, such as {prompt: question, completion: answer}.
        load_in_4bit: Whether the base weights are kept in 4 bits (NF4 of bitsandbytes), as QLoRA does.
        held_out: The share of the training data to test on, and to choose on, where there is no such split.
        bad_data: "error" stops at a record that cannot be used, "skip" leaves such records out and says how many.
    """

    model: str = "yahma/llama-7b-hf"
    data: str = "zwhe99/commonsense_170k"
    columns: dict[str, str] | None = None
    load_in_4bit: bool = False
    held_out: float = 0.02
    bad_data: Literal["error", "skip"] = "error"

    def __post_init__(self) -> None:
        check_share(self.held_out)
        if unknown := set(self.columns or {}) - set(COLUMNS):
            raise UserError(f"task.columns has {min(unknown)!r}, expected keys among {', '.join(COLUMNS)}")


def load_data(task: Task, seed: int) -> Data:
    """The examples of each split; nothing of them is random.

    Raises:
        FileNotFoundError, ValueError: data or tokenizer cannot be loaded, or records cannot be used.
    """
    parts = records(locate(task.data), ENDINGS, ("instruction", "input", "output"))
    tokenizer = load_pretrained(AutoTokenizer, locate(task.model))
    read = partial(read_record, names=task.columns)
    good = {key: sift(part, read, bad=task.bad_data, what=f"{key} records") for key, part in parts.items()}
    found = {key: [read(item.value) for item in part] for key, part in good.items()}

    kinds = sorted({record.kind for part in found.values() for record in part})
    if len(kinds) > 1:
        raise UserError(f"task.data has records of the kinds {' and '.join(kinds)}; give one kind")

    teach_template(tokenizer, kinds[0], task.model)
    rows = with_held_out({key: [record.columns for record in part] for key, part in found.items()}, task.held_out)
    train, validation, test = (Dataset.from_list(part) for part in rows.values())

    return Data(train, validation, test, processor=tokenizer)


def teach_template(tokenizer: Any, kind: str, model: str) -> None:
    """Gives the tokenizer the chat template that fits the records, so that it is saved and served with the adapter.

    Raises:
        ValueError: The records are conversations, and the model has no template for these.
    """
    if kind == "conversation":
        if not tokenizer.chat_template:
            raise UserError(f"task.data has messages, but the tokenizer of {model} has no chat template for them")
        return
    adds_bos = tokenizer.bos_token is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    tokenizer.chat_template = chat_template(kind, tokenizer.bos_token if adds_bos else "", tokenizer.eos_token or "")


def load_base(task: Task) -> PreTrainedModel:
    """The language model, in the precision that it is stored in, or in 4 bits."""
    if not task.load_in_4bit:
        return cast("PreTrainedModel", load_pretrained(AutoModelForCausalLM, locate(task.model)))

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )

    try:
        model = load_pretrained(AutoModelForCausalLM, locate(task.model), quantization_config=quantization)
    except ImportError as error:
        raise UserError(
            f'task.load_in_4bit needs bitsandbytes: pip install "flora-peft[quantized]" ({error})'
        ) from None

    return cast("PreTrainedModel", prepare_model_for_kbit_training(model, use_gradient_checkpointing=False))


def predictor(task: Task, model: Any, folder: Path) -> Callable[[Request], dict[str, Any]]:
    """Answers a text, asked in the way that the model was taught; the likeliest token each time."""
    tokenizer = load_pretrained(AutoTokenizer, str(folder))

    def answer(request: Request) -> dict[str, Any]:
        messages = [{"role": "user", "content": request.given}]
        options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        inputs = tokenizer.apply_chat_template(messages, **options).to(model.device)
        return {"text": generated(model, tokenizer, dict(inputs))}

    return answer


def generated(model: Any, tokenizer: Any, inputs: dict[str, Any], longest: int = LONGEST_ANSWER) -> str:
    """What the model writes after a prompt, without it; so many tokens at most, and no more than its context holds."""
    asked = inputs["input_ids"].shape[1]
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if window is not None:
        longest = max(1, min(longest, window - asked))

    options = {"max_new_tokens": longest, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    tokens = model.generate(**inputs, **options)[0, asked:]
    return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()


# Tokens of an answer on the page of a run.
LONGEST_SHOWN = 64
# Tokens of a text that the model is given to continue.
BEGINNING = 32


def findings(tested: Tested) -> Findings:
    """The first questions of the test set, the answers that the model writes, and those that the data have."""
    test, tokenizer = cast("Any", tested.data.test), tested.data.processor
    rows = list(test.select(range(min(FEW, len(test)))))

    if tested.model is None:
        rows = []

    return Findings(
        f"What the model writes: the first {len(rows)} of the test set, {LONGEST_SHOWN} tokens at most",
        [_answered(row, tested.model, tokenizer) for row in rows],
        wide=True,
    )


def _answered(row: dict[str, Any], model: Any, tokenizer: Any) -> Shown:
    """A record with what the model makes of its beginning."""
    if "text" in row:
        tokens = tokenizer(row["text"], return_tensors="pt").input_ids[0]
        inputs = {"input_ids": tokens[None, :BEGINNING], "attention_mask": torch.ones_like(tokens[None, :BEGINNING])}
        prompt, truth = (tokenizer.decode(part) for part in (tokens[:BEGINNING], tokens[BEGINNING:][:LONGEST_SHOWN]))
    elif isinstance(row["prompt"], str):
        inputs = dict(tokenizer(row["prompt"], return_tensors="pt"))
        prompt, truth = row["prompt"], row["completion"]
    else:
        options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        inputs = dict(tokenizer.apply_chat_template(row["prompt"], **options))
        prompt, truth = row["prompt"][-1]["content"], row["completion"][-1]["content"]

    written = generated(
        model, tokenizer, {name: value.to(model.device) for name, value in inputs.items()}, LONGEST_SHOWN
    )

    return Shown(texts=[("given", prompt), ("written", written), ("true", truth)])


class AnswerTrainer(SFTTrainer):
    """TRL's trainer, measured by which tokens of the answers it gets right: the logits are never kept."""

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Tokenizes a split that was not given to the trainer at its start."""
        sft = cast("Any", self)
        # As SFTTrainer.evaluate does.
        if isinstance(eval_dataset, Dataset) and not sft._skip_prepare_dataset:
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
        """Does nothing: flora writes the card of the output folder."""


TRAINER = AnswerTrainer


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """The share of the answers' tokens that are the likeliest in their place."""
    right, answered = cast("np.ndarray", prediction.predictions), cast("np.ndarray", prediction.label_ids) != -100
    return {"token_accuracy": float(right[answered].mean())}
