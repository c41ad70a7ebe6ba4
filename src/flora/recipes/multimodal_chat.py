"""Visual instruction tuning: a LLaVA (vision tower, projector, language model) learns to answer questions on images.

Data: LLaVA's JSON, entries with ``image`` (a file below ``task.images``, or a list of them, or none for text only) and
``conversations`` of human and gpt in turn, where ``<image>`` marks the place of an image; or a hub data set with those
columns. The loss is on the answers, each with the token that ends it.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, cast

from datasets import Dataset, Image, List
from PIL import Image as Pillow
from torch import nn
from torch.optim import Optimizer
from transformers import AutoProcessor, LlavaForConditionalGeneration, PreTrainedModel
from trl import SFTConfig  # type: ignore[attr-defined]
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from flora.data.files import check_image, parsed
from flora.data.pretrained import load_pretrained
from flora.data.records import records, sift
from flora.data.samples import locate
from flora.data.shown import FEW, Findings, Shown
from flora.data.splits import IMAGES, check_share, with_held_out
from flora.errors import UserError
from flora.recipes import Data, Request, Tested
from flora.recipes.text_causal import LONGEST_SHOWN, AnswerTrainer, compute_metrics, generated

__all__ = ["ARGUMENTS", "METRIC", "TRAINER", "Task", "compute_metrics", "load_base", "load_data"]
METRIC = "token_accuracy"
MARK = "<image>"
PROJECTOR = "multi_modal_projector"
# The name that TRL has for a speaker, then those that data have.
ROLES = (("user", "human", "user"), ("assistant", "gpt", "assistant"))
# The conversation of LLaVA 1.5. What stands between the generation marks is learnt.
TEMPLATE = (
    "{{ bos_token }}A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
    "{% for message in messages %}{% if message['role'] == 'user' %} USER: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %} ASSISTANT:{% else %}{% generation %} {{ message['content'][0]['text'] }}{{ eos_token }}"
    "{% endgeneration %}{% endif %}{% endfor %}"
)


@dataclass
class Task:
    """Settings of the data and the base model.

    Args:
        model: the base model, of the kind of LLaVA 1.5: a hub id or a local folder.
        data: a .json or .jsonl file, a folder with train, validation and test of that kind, or a hub id.
        subset: of a hub data set.
        images: the folder of the images of local data; None is the folder of the data file.
        max_length: tokens that are kept of a conversation; those of the images count.
        held_out: share of the training data to test on, and to choose on, where there is no such split.
        bad_data: "error" stops at an entry that cannot be used, "skip" leaves such entries out and says how many.
    """

    model: str = "llava-hf/llava-1.5-7b-hf"
    data: str = "lmms-lab/LLaVA-OneVision-Data"
    subset: str | None = None
    images: str | None = None
    max_length: int = 2048
    held_out: float = 0.05
    bad_data: Literal["error", "skip"] = "error"

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise UserError(f"task.max_length is {self.max_length}, expected at least 1")
        check_share(self.held_out)


def messages_of(turns: object, images: int) -> list[dict[str, Any]]:
    """The messages of a conversation, with places for so many images.

    Raises:
        ValueError: the turns are not human and gpt in turn, a text is empty, or the marks do not match the images.
    """
    if not isinstance(turns, list) or not turns or len(turns) % 2:
        raise UserError("'conversations' must be a list in which human and gpt take turns, ending with an answer")

    messages: list[dict[str, Any]] = []
    for at, turn in enumerate(turns):
        given, (role, *names) = parsed(turn, ["from", "value"]), ROLES[at % 2]
        if given["from"] not in names:
            raise UserError(f"turn {at + 1} is from {given['from']!r}, expected {names[0]!r}")

        text = given["value"]
        if not isinstance(text, str) or not text.replace(MARK, "").strip():
            raise UserError(f"turn {at + 1} has an empty text or none: {text!r}")
        if role == "assistant" and MARK in text:
            raise UserError(f"turn {at + 1} is an answer with {MARK}, which only questions may have")

        content: list[dict[str, Any]] = []
        for at_image, piece in enumerate(text.split(MARK)):
            content += [{"type": "image"}] * (at_image > 0)
            content += [{"type": "text", "text": piece.strip()}] * bool(piece.strip())

        messages.append({"role": role, "content": content})

    marks = sum(part["type"] == "image" for message in messages for part in message["content"])
    if marks != images:
        raise UserError(f"has {images} images but {MARK} {marks} times")

    return messages


def example(entry: object, folder: Path) -> dict[str, Any]:
    """An entry as TRL takes it: messages, and the images as files or bytes.

    Raises:
        ValueError, OSError: the entry, its conversation or one of its images cannot be used.
    """
    row = parsed(entry, ["conversations"])
    given = row.get("image") or []
    images = [_image(image, folder) for image in (given if isinstance(given, list) else [given])]
    return {"messages": messages_of(row["conversations"], len(images)), "images": images}


def _image(image: Any, folder: Path) -> dict[str, Any]:
    # Of the hub: the bytes of the file.
    if isinstance(image, dict):
        with Pillow.open(io.BytesIO(image["bytes"])) as opened:
            opened.load()

        return {"bytes": image["bytes"], "path": None}

    if not isinstance(image, str):
        raise UserError(f"'image' must be the name of a file, got {type(image).__name__}")

    _check_once(folder / image)

    return {"bytes": None, "path": str(folder / image)}


_check_once = lru_cache(maxsize=None)(check_image)


def load_data(task: Task, seed: int) -> Data:
    """The conversations of each split; images are opened when they are needed.

    Raises:
        FileNotFoundError, ValueError: data or processor cannot be loaded, or entries cannot be used.
    """
    where = locate(task.data)
    beside = Path(where) if Path(where).is_dir() else Path(where).parent

    check = partial(example, folder=Path(task.images or beside).expanduser())
    items = records(where, (".json", ".jsonl"), name=task.subset)
    good = {key: sift(part, check, bad=task.bad_data, what=f"{key} entries") for key, part in items.items()}
    rows = {key: [check(item.value) for item in part] for key, part in good.items()}
    processor = load_pretrained(AutoProcessor, locate(task.model))
    processor.chat_template = TEMPLATE
    pictures = List(Image(mode="RGB"))
    parts = with_held_out(rows, task.held_out).values()
    train, validation, test = (Dataset.from_list(part).cast_column("images", pictures) for part in parts)
    collate = DataCollatorForVisionLanguageModeling(processor, max_length=task.max_length, assistant_only_loss=True)

    return Data(train, validation, test, collate, processor)


def load_base(task: Task) -> PreTrainedModel:
    """The model, in the precision that it is stored in."""
    return cast("PreTrainedModel", load_pretrained(LlavaForConditionalGeneration, locate(task.model)))


INPUT_FILES = IMAGES
TAKES_PROMPT = True


def predictor(task: Task, model: Any, folder: Path) -> Callable[[Request], dict[str, Any]]:
    """Answers the question ``prompt`` about an image."""
    processor = load_pretrained(AutoProcessor, str(folder))

    def answer(request: Request) -> dict[str, Any]:
        if not request.prompt:
            raise UserError(
                "this recipe answers questions about images; give the question with --prompt 'What is this?'"
            )

        with Pillow.open(request.given) as opened:
            image = opened.convert("RGB")

        content = [{"type": "image"}, {"type": "text", "text": request.prompt}]
        text = processor.apply_chat_template([{"role": "user", "content": content}])
        inputs = processor(text=text, images=[image], return_tensors="pt", add_special_tokens=False).to(model.device)

        return {"text": generated(model, processor.tokenizer, dict(inputs))}

    return answer


def findings(tested: Tested) -> Findings:
    """The first questions of the test set with their images, the answers that are written, and the true ones."""
    rows, processor, model = tested.data.test, tested.data.processor, cast("Any", tested.model)
    count = 0 if model is None else min(FEW, len(cast("Any", rows)))

    examples = []
    for number in range(count):
        row = rows[number]
        question, answer = row["messages"][:2]
        images = row["images"][: sum(part["type"] == "image" for part in question["content"])]
        text = processor.apply_chat_template([question])
        options = {"return_tensors": "pt", "add_special_tokens": False}
        inputs = processor(text=text, images=images or None, **options).to(model.device)
        asked, truth = (" ".join(part["text"] or "" for part in turn["content"]).strip() for turn in (question, answer))
        written = generated(model, processor.tokenizer, dict(inputs), LONGEST_SHOWN)
        texts = [("asked", asked), ("written", written), ("true", truth)]
        examples.append(Shown(pictures=[("", image) for image in images], texts=texts))

    return Findings(f"The first {count} questions of the test set", examples)


@dataclass
class ChatArguments(SFTConfig):
    """TRL's arguments, and a learning rate of the projector's own.

    Args:
        projector_learning_rate: of the projector, where it is trained (modules_to_save); None is ``learning_rate``.
    """

    projector_learning_rate: float | None = None


class ChatTrainer(AnswerTrainer):
    """The trainer of answers, with a learning rate of the projector's own."""

    def create_optimizer(self, model: Any = None) -> Optimizer:
        """The optimiser, with the projector's parameters in a separate group."""
        optimizer = super().create_optimizer(model)
        rate = cast("ChatArguments", self.args).projector_learning_rate
        named = cast("nn.Module", self.model if model is None else model).named_parameters()
        own = {id(parameter) for name, parameter in named if rate is not None and PROJECTOR in name}
        for group in list(optimizer.param_groups) if own else []:
            moved = [parameter for parameter in group["params"] if id(parameter) in own]
            if moved:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
                optimizer.add_param_group({**group, "params": moved, "lr": rate})

        return optimizer


TRAINER = ChatTrainer
ARGUMENTS = ChatArguments
