"""TRL's SFTTrainer takes a FloraConfig as it takes a LoraConfig."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import flora
from flora.tuner.layer import FloraLayer

trl = pytest.importorskip("trl", reason="in the dev extra")

# TRL and transformers 5 disagree on the names of these options; nothing a user of either sets.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6.*:FutureWarning")

WORDS = ["<pad>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"]
TEXTS = ["a b c d e f g", "z y x w v u", "h i j k l m", "n o p q r s t"]


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    return LlamaForCausalLM(config)


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", bos_token="<eos>", unk_token="<unk>"
    )


def trainer(folder: Path, config: flora.FloraConfig) -> object:
    arguments = trl.SFTConfig(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=2,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        max_length=16,
        dataloader_pin_memory=False,
    )
    return trl.SFTTrainer(
        model=base(),
        args=arguments,
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer(),
        peft_config=config,
    )


def test_two_steps_then_save_and_reload(tmp_path: Path) -> None:
    run = trainer(tmp_path, flora.FloraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert isinstance(run.model, PeftModel)
    trainable = {name: value.detach().clone() for name, value in run.model.named_parameters() if value.requires_grad}
    assert all(".tucker_" in name for name in trainable)
    assert sum(isinstance(module, FloraLayer) for module in run.model.modules()) == 14
    run.train()
    now = dict(run.model.named_parameters())
    assert any(not torch.equal(now[name], value) for name, value in trainable.items())
    run.save_model(str(tmp_path / "final"))
    ids = torch.tensor([[3, 4, 5, 6]])
    for folder in ("final", "checkpoint-2"):
        again = PeftModel.from_pretrained(base(), tmp_path / folder).eval()
        with torch.no_grad():
            assert torch.allclose(again(ids).logits, run.model.eval()(ids).logits, atol=1e-6)
