"""A language model with TRL: first answers are learnt (SFT), then preferences (DPO)."""

from __future__ import annotations

from pathlib import Path

import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import flora

QUESTIONS = ["Name the opposite of hot .", "Name the opposite of big .", "Name the opposite of old ."]
GOOD = ["cold", "small", "new"]
BAD = ["hot", "big", "old"]


def main(model: str = "Qwen/Qwen3-0.6B", output: Path = Path("llm"), steps: int = 100) -> Path:
    common = {"max_steps": steps, "per_device_train_batch_size": 3, "report_to": "none", "logging_steps": 10}
    common["bf16"] = torch.cuda.is_available()
    config = flora.FloraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")

    answers = Dataset.from_dict({"prompt": QUESTIONS, "completion": GOOD})
    trainer = SFTTrainer(
        model, SFTConfig(str(output / "sft"), learning_rate=3e-4, **common), train_dataset=answers, peft_config=config
    )
    trainer.train()
    trainer.save_model()

    # The adapter goes on training; the base model without it is the reference, so there is no second copy.
    preferences = Dataset.from_dict({"prompt": QUESTIONS, "chosen": GOOD, "rejected": BAD})
    trained = AutoPeftModelForCausalLM.from_pretrained(output / "sft", is_trainable=True)
    tokenizer = AutoTokenizer.from_pretrained(output / "sft")
    trainer = DPOTrainer(
        trained,
        args=DPOConfig(str(output / "dpo"), learning_rate=1e-5, **common),
        train_dataset=preferences,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    return output / "dpo"


if __name__ == "__main__":
    print(main())
