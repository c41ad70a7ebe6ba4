"""The recipe text_causal: records one by one, the loss on answers only, LLaMA-7B's parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    EvalPrediction,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TrainerCallback,
)

from flora import FloraConfig
from flora.data.chats import prompt_of, read_record
from flora.data.samples import locate
from flora.errors import UserError
from flora.recipes import text_causal
from flora.recipes.text_causal import Task, compute_metrics, load_data
from flora.runs import training as training_module
from flora.runs.predicting import predict
from flora.runs.settings import read
from flora.runs.training import make_trainer, train, training_arguments

GOOD = [{"instruction": "Say the word hot twice .", "input": "", "output": "hot hot"}] * 12
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"


def task(data: Path, **settings: Any) -> Task:
    return Task(model="sample:text/llama", data=str(data), **settings)


def jsonl(folder: Path, records: list[Any]) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ('{"instruction": "a", "output": "b"', "not valid JSON"),
        ([1], "expected a JSON object, got list"),
        ({"instruction": "a", "output": " "}, "'output' is empty or missing; the record has 'instruction', 'output'"),
        ({"question": "a", "output": "b"}, "'instruction' is empty or missing; the record has 'question', 'output'"),
        ({"question": "a", "answer": "b"}, "expected messages, conversations, prompt and completion, instruction and"),
        ({"prompt": "a", "completion": ""}, "'completion' is empty or missing"),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            "it has 'chosen' and 'rejected': preferences",
        ),
        ({"conversations": [{"from": "bot", "value": "a"}]}, "a turn is from 'bot', expected human"),
        ({"instruction": "a", "output": 7}, "'output' is not a text: 7"),
        ({"messages": [{"role": "user", "content": "a"}]}, "the messages must end with a question and the assistant's"),
        ({"messages": [{"role": "user"}]}, "lacks 'content'"),
        ({"messages": [{"role": "user", "content": ""}]}, "a message of the user is empty or not a text: ''"),
        ({"messages": "hello"}, "expected a list of messages, got str"),
    ],
)
def test_a_bad_record_is_named(record: Any, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = jsonl(tmp_path, [*GOOD, record, *GOOD])
    with pytest.raises(ValueError, match="1 of 25 train records cannot be used") as raised:
        load_data(task(folder), 0)
    assert f"train.jsonl:13: {reason}" in str(raised.value)
    data = load_data(task(folder, bad_data="skip"), 0)
    assert sum(map(len, (data.train, data.validation, data.test))) == 24  # type: ignore[arg-type]
    assert f"train.jsonl:13: {reason}" in capsys.readouterr().out


def test_a_list_in_one_file(tmp_path: Path) -> None:
    path = tmp_path / "all.json"
    path.write_text(json.dumps([*GOOD, {"instruction": "a"}]))
    with pytest.raises(ValueError, match=r"all\.json: entry 13: 'output' is empty or missing"):
        load_data(task(path), 0)
    path.write_text('[{"instruction": "a",\n "output": }]')
    with pytest.raises(ValueError, match=r"all\.json:2: not valid JSON"):
        load_data(task(path), 0)
    path.write_text('{"data": []}')
    with pytest.raises(ValueError, match=r"all\.json must be one list of entries, got dict"):
        load_data(task(path), 0)


def test_one_kind_of_records_that_the_tokenizer_can_write(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "hot"}, {"role": "assistant", "content": "cold"}]}
    with pytest.raises(ValueError, match="records of the kinds conversation and instruction; give one kind"):
        load_data(task(jsonl(tmp_path, [*GOOD, chat])), 0)
    with pytest.raises(ValueError, match="the tokenizer of sample:text/llama has no chat template"):
        load_data(task(jsonl(tmp_path, [chat] * 5)), 0)


@pytest.mark.parametrize("wrong", [0, 0.5])
def test_settings_of_the_task_are_checked(wrong: float) -> None:
    with pytest.raises(ValueError, match="task.held_out is"):
        Task(held_out=wrong)


def test_the_prompt() -> None:
    assert prompt_of("Say a.", "") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay a.\n\n### Response:\n"
    )
    assert "further context. Write a" in prompt_of("Say it.", "a")
    assert "### Instruction:\nSay it.\n\n### Input:\na\n\n### Response:\n" in prompt_of("Say it.", "a")


def trainer_of(data: Path, output: Path, model: str | None = None) -> Any:
    """A trainer on the tiny model with this data."""
    where = [] if model is None else [f"task.model={model}"]
    settings = read("text_causal-tiny", [f"task.data={data}", f"output={output}", "training.disable_tqdm=true", *where])
    loaded = text_causal.load_data(settings.task, 0)
    base = text_causal.load_base(settings.task)
    return make_trainer(base, text_causal, loaded, training_arguments(settings, output))  # type: ignore[arg-type]


def answers(trainer: Any, split: Any) -> list[str]:
    """The text that the loss is on, of the first batch."""
    batch = next(iter(trainer.get_eval_dataloader(split)))
    return [trainer.processing_class.decode(row[row != -100]) for row in batch["labels"]]


def test_the_loss_is_on_the_answers(tmp_path: Path) -> None:
    record = {"instruction": "Name the opposite of the word .", "input": "hot", "output": "the opposite is cold"}
    trainer = trainer_of(jsonl(tmp_path, [record] * 5), tmp_path / "run")
    assert set(answers(trainer, trainer.eval_dataset)) == {"the opposite is cold </s>"}


def test_the_loss_is_on_the_last_message(tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(locate("sample:text/llama"))
    tokenizer.chat_template = TEMPLATE
    model = LlamaForCausalLM.from_pretrained(locate("sample:text/llama"))
    for part in (tokenizer, model):
        part.save_pretrained(tmp_path / "model")
    talk = ["hot", "cold", "big", "small"]
    messages = [{"role": ("user", "assistant")[at % 2], "content": word} for at, word in enumerate(talk)]
    trainer = trainer_of(jsonl(tmp_path, [{"messages": messages}] * 5), tmp_path / "run", str(tmp_path / "model"))
    assert set(answers(trainer, trainer.eval_dataset)) == {"small </s>"}


def test_what_is_measured_is_what_the_logits_say(tmp_path: Path) -> None:
    """Against the model's own loss and logits, on answers of several lengths."""
    records = [{"instruction": "Say the word .", "output": " ".join(["hot"] * count)} for count in range(1, 12)]
    trainer = trainer_of(jsonl(tmp_path, records), tmp_path / "run")
    batch = next(iter(trainer.get_train_dataloader()))
    model = trainer.model.eval()
    loss, right, labels = trainer.prediction_step(model, dict(batch), False)
    with torch.no_grad():
        plain = model(**batch)
    torch.testing.assert_close(loss, plain.loss)
    shifted = batch["labels"][:, 1:]
    expected = (plain.logits[:, :-1].argmax(-1) == shifted) & (shifted != -100)
    assert torch.equal(labels, shifted)
    assert torch.equal(right.bool(), expected)
    assert right.shape == shifted.shape  # no vocabulary


def test_accuracy_by_hand() -> None:
    labels = np.array([[-100, 5, 6, 7], [-100, 8, -100, -100]])
    right = np.array([[1, 1, 0, 1], [1, 0, -100, -100]])
    assert compute_metrics(EvalPrediction(right, labels)) == {"token_accuracy": 0.5}


MESSAGES = [{"role": "user", "content": "hot"}, {"role": "assistant", "content": "cold"}]


@pytest.mark.parametrize(
    ("record", "names", "kind", "columns"),
    [
        ({"messages": MESSAGES}, None, "conversation", {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}),
        (
            {"conversations": [{"from": "human", "value": "hot"}, {"from": "gpt", "value": "cold"}]},
            None, "conversation", {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
        ),
        (
            {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
            None, "conversation", {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
        ),
        ({"prompt": "a", "completion": "b"}, None, "completion", {"prompt": "a", "completion": "b"}),
        (
            {"question": "a", "answer": "b"}, {"prompt": "question", "completion": "answer"},
            "completion", {"prompt": "a", "completion": "b"},
        ),
        ({"instruction": "a", "output": "b"}, None, "instruction", {"prompt": prompt_of("a", ""), "completion": "b"}),
        ({"text": "a b"}, None, "text", {"text": "a b"}),
        ({"body": "a b"}, {"text": "body"}, "text", {"text": "a b"}),
    ],
)  # fmt: skip
def test_each_format_of_records(record: Any, names: Any, kind: str, columns: dict[str, Any]) -> None:
    assert read_record(json.dumps(record), names) == (kind, columns)


def test_a_mapping_of_columns_that_we_do_not_have() -> None:
    with pytest.raises(ValueError, match="task.columns has 'question', expected keys among messages"):
        Task(columns={"question": "prompt"})


def test_who_asks_later_uses_the_frame_that_was_taught(tmp_path: Path) -> None:
    data = load_data(task(jsonl(tmp_path, GOOD)), 0)
    asked = [{"role": "user", "content": "Say a."}]
    text = data.processor.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert text == prompt_of("Say a.", "")
    given = [{"prompt": "hot", "completion": "cold"}] * 9
    (tmp_path / "plain").mkdir()
    data = load_data(task(jsonl(tmp_path / "plain", given)), 0)
    talk = [*asked, {"role": "assistant", "content": "a"}]
    assert data.processor.apply_chat_template(talk, tokenize=False) == "Say a.a</s>"


def test_every_token_of_plain_text_is_learnt(tmp_path: Path) -> None:
    trainer = trainer_of(jsonl(tmp_path, [{"text": "hot cold big small"}] * 9), tmp_path / "run")
    assert set(answers(trainer, trainer.eval_dataset)) == {"hot cold big small </s>"}


class Kill(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt


@pytest.mark.parametrize("config", ["text_causal-tiny", "text_causal-moe-tiny"])
def test_killed_and_resumed_ends_with_the_same_weights(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = ["training.disable_tqdm=true", "training.max_steps=8", "training.save_steps=3"]
    train(read(config, [f"output={tmp_path / 'whole'}", *quick]))
    settings = read(config, [f"output={tmp_path / 'cut'}", *quick])

    def armed(*arguments: Any) -> Any:
        trainer = make_trainer(*arguments)
        trainer.add_callback(Kill())
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(training_module, "make_trainer", armed)
        with pytest.raises(KeyboardInterrupt):
            train(settings)
    assert train(settings, resume=True)["resumed_at"] == 3
    whole, cut = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(value, cut[key]) for key, value in whole.items())
    assert "import flora\n" in (tmp_path / "cut" / "README.md").read_text()


def llama_7b() -> nn.Module:
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig())  # the defaults are those of LLaMA-7B


def spent(model: PeftModel, prefix: str) -> int:
    return sum(value.numel() for name, value in model.named_parameters() if f".{prefix}" in name)


def test_parameters_of_llama_7b() -> None:
    adapter = read("text_causal").adapter
    names, r = adapter["target_modules"], adapter["r"]
    model = get_peft_model(llama_7b(), FloraConfig(**adapter), low_cpu_mem_usage=True)
    lora = get_peft_model(llama_7b(), LoraConfig(r=r, target_modules=names), low_cpu_mem_usage=True)
    assert spent(lora, "lora_") == 56_098_816
    assert spent(model, "tucker_") == spent(lora, "lora_") + 160 * r**2


def test_the_experts_of_the_real_config_are_adapted() -> None:
    """Qwen3-30B-A3B with two of its 48 layers."""
    adapter = read("text_causal-moe").adapter
    with torch.device("meta"):
        config = Qwen3MoeConfig(num_hidden_layers=2, head_dim=128, moe_intermediate_size=768, num_experts=128)
        model = get_peft_model(Qwen3MoeForCausalLM(config), FloraConfig(**adapter), low_cpu_mem_usage=True)
    cores = {name: tuple(value.shape) for name, value in model.named_parameters() if name.endswith(".core")}
    assert len(cores) == 2 * (4 + 2)
    assert sum(shape == (16, 16, 16) for shape in cores.values()) == 2 * 2


def test_four_bits_without_their_package_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.quantizers.quantizer_bnb_4bit.is_bitsandbytes_available", lambda: False)
    with pytest.raises(UserError, match=r'needs bitsandbytes: pip install "flora-peft\[quantized\]"'):
        text_causal.load_base(text_causal.Task(model="sample:text/llama", load_in_4bit=True))


@pytest.mark.slow
def test_a_base_in_four_bits_learns_and_answers(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    quick = ["training.disable_tqdm=true", "training.max_steps=4", "training.save_steps=4", "task.load_in_4bit=true"]
    metrics = train(read("text_causal-tiny", [f"output={tmp_path / 'run'}", *quick]))
    assert metrics["steps"] == 4
    (result,) = predict(tmp_path / "run", ["Say the word hot twice ."])
    assert isinstance(result["text"], str)
