"""Records of text to learn from: the formats of TRL, of Alpaca and of ShareGPT, as TRL's trainer takes them.

================  ================================================================================================
kind              the keys of a record
================  ================================================================================================
``conversation``  ``messages`` (lists of ``role``, ``content``) or ShareGPT's ``conversations`` (``from``, ``value``)
``completion``    ``prompt`` and ``completion``, as two texts; two lists of messages are a conversation
``instruction``   ``instruction``, ``output`` and perhaps ``input``, in the frame of Alpaca
``text``          ``text``: every token is learnt, as in pretraining
================  ================================================================================================
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from flora.data.files import parsed
from flora.errors import UserError

COLUMNS = ("messages", "conversations", "prompt", "completion", "instruction", "input", "output", "text")
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# The frame of Alpaca, with and without an input; commonsense-170k is written for it.
INTRODUCTION = {
    True: "Below is an instruction that describes a task, paired with an input that provides further context. ",
    False: "Below is an instruction that describes a task. ",
}
REQUEST = "Write a response that appropriately completes the request.\n\n"


class Record(NamedTuple):
    """A record as TRL takes it.

    Attributes:
        kind: A row of the table above.
        columns: ``prompt`` and ``completion``, as texts or lists of messages; or ``text``.
    """

    kind: str
    columns: dict[str, Any]


def prompt_of(instruction: str, given: str) -> str:
    """The prompt in the frame of Alpaca, up to where the answer starts."""
    if given:
        lead = f"### Input:\n{given}\n\n"
    else:
        lead = ""
    return f"{INTRODUCTION[bool(given)]}{REQUEST}### Instruction:\n{instruction}\n\n{lead}### Response:\n"


def read_record(entry: object, names: Mapping[str, str] | None = None) -> Record:
    """A record in one of the known formats.

    Args:
        entry: A line of JSON, or a dict.
        names: The key that this package uses -> the name that the data have for it.

    Raises:
        ValueError: The record has none of the formats, a text is empty, or a conversation does not end with an answer.
    """
    row = parsed(entry)
    row = {**row, **{key: row[name] for key, name in (names or {}).items() if name in row}}

    if "messages" in row:
        return _conversation(row["messages"])
    if "conversations" in row:
        return _conversation(_of_sharegpt(row["conversations"]))

    if "chosen" in row:
        raise UserError(
            "it has 'chosen' and 'rejected': preferences are learnt by TRL's DPOTrainer, which takes "
            "peft_config=FloraConfig(...); examples/llm_preferences.py does it for such a file"
        )

    if "prompt" in row and "completion" in row:
        return _completion(row["prompt"], row["completion"])
    if "instruction" in row or "output" in row:
        return _instruction(row)
    if "text" in row:
        return Record("text", {"text": _text(row, "text")})

    raise UserError(
        "expected messages, conversations, prompt and completion, instruction and output, or text; the record has "
        f"{', '.join(map(repr, row))}; name them, such as task.columns={{prompt: question, completion: answer}}"
    )


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key) or ""
    if not isinstance(value, str):
        raise UserError(f"{key!r} is not a text: {value!r}")
    if not value.strip():
        raise UserError(f"{key!r} is empty or missing; the record has {', '.join(map(repr, row))}")
    return value


def _instruction(row: Mapping[str, Any]) -> Record:
    texts = {key: _text(row, key) for key in ("instruction", "output")}
    given = _text(row, "input") if row.get("input") else ""
    return Record("instruction", {"prompt": prompt_of(texts["instruction"], given), "completion": texts["output"]})


def _completion(prompt: Any, completion: Any) -> Record:
    if isinstance(prompt, list) and isinstance(completion, list):
        return _conversation([*prompt, *completion])
    row = {"prompt": prompt, "completion": completion}
    return Record("completion", {key: _text(row, key) for key in row})


def _conversation(given: Any) -> Record:
    """Messages of which the last one is the answer that is learnt."""
    if not isinstance(given, list):
        raise UserError(f"expected a list of messages, got {type(given).__name__}")

    messages = [parsed(message, ["role", "content"]) for message in given]
    for message in messages:
        if not isinstance(message["content"], str) or not message["content"].strip():
            raise UserError(f"a message of the {message['role']} is empty or not a text: {message['content']!r}")

    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise UserError("the messages must end with a question and the assistant's answer")

    plain = [{"role": message["role"], "content": message["content"]} for message in messages]

    return Record("conversation", {"prompt": plain[:-1], "completion": plain[-1:]})


def _of_sharegpt(turns: Any) -> list[dict[str, Any]]:
    if not isinstance(turns, list):
        raise UserError(f"'conversations' must be a list of turns, got {type(turns).__name__}")

    messages = []
    for turn in turns:
        given = parsed(turn, ["from", "value"])
        if given["from"] not in SPEAKERS:
            raise UserError(f"a turn is from {given['from']!r}, expected {', '.join(SPEAKERS)}")

        messages.append({"role": SPEAKERS[given["from"]], "content": given["value"]})

    return messages


def chat_template(kind: str, bos: str, eos: str) -> str:
    """The chat template of a model that learnt records without messages, so that others prompt it as it was trained.

    Args:
        kind: Of the records: instruction, completion or text.
        bos: What a text starts with, if anything.
        eos: What ends an answer.
    """
    before, after = "", ""

    if kind == "instruction":
        before, _, after = prompt_of("\0", "").partition("\0")

    answer = "{{ message['content'] }}{{ " + json.dumps(eos) + " }}"
    question = "{{ " + json.dumps(before) + " }}{{ message['content'] }}{{ " + json.dumps(after) + " }}"
    turn = "{% if message['role'] == 'assistant' %}" + answer + "{% else %}" + question + "{% endif %}"

    return "{{ " + json.dumps(bos) + " }}{% for message in messages %}" + turn + "{% endfor %}"
