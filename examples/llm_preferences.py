"""Preferences from a file of your own, with TRL's DPO: `python llm_preferences.py pairs.jsonl`.

Each line is `{"prompt": ..., "chosen": ..., "rejected": ...}`, as texts or as lists of messages; `columns`
renames others.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import DPOConfig, DPOTrainer

import flora


def main(
    pairs: Path,
    model: str = "Qwen/Qwen3-0.6B",
    output: Path = Path("preferred"),
    columns: dict[str, str] | None = None,
    load_in_4bit: bool = False,
    steps: int = 100,
) -> Path:
    data = Dataset.from_json(str(pairs))
    # The name in the file -> prompt, chosen or rejected.
    data = data.rename_columns(columns or {}).select_columns(["prompt", "chosen", "rejected"])

    packed = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4") if load_in_4bit else None
    base = AutoModelForCausalLM.from_pretrained(model, quantization_config=packed)

    # The base model without the adapter is the reference, so there is no second copy.
    trainer = DPOTrainer(
        base,
        args=DPOConfig(
            str(output),
            max_steps=steps,
            per_device_train_batch_size=2,
            learning_rate=1e-4,
            bf16=torch.cuda.is_available(),
            logging_steps=10,
            report_to="none",
        ),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=flora.FloraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model()

    return output


if __name__ == "__main__":
    print(main(Path(sys.argv[1])))
