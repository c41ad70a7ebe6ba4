"""A mixture of experts: all experts of a layer share one Tucker form over (expert, out, in)."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import flora

TEXTS = ["the opposite of hot is cold", "the opposite of big is small", "the opposite of old is new"]


def main(model: str = "Qwen/Qwen3-30B-A3B", output: Path = Path("experts"), steps: int = 50) -> list[float]:
    base = AutoModelForCausalLM.from_pretrained(model, dtype="auto", device_map="auto")
    tokenizer = AutoTokenizer.from_pretrained(model)
    config = flora.FloraConfig(
        r=16,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],  # three-dimensional parameters
    )
    adapted = get_peft_model(base, config)
    adapted.print_trainable_parameters()

    batch = tokenizer(TEXTS, return_tensors="pt", padding=True).to(adapted.device)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=1e-3)
    losses = []
    for _ in range(steps):
        loss = adapted(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    adapted.save_pretrained(output)
    return losses


if __name__ == "__main__":
    print(main())
