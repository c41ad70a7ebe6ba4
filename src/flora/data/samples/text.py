"""Small texts in the formats of real ones (tables, JSONL), and tiny language models with a tokenizer of their words."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    DebertaV2Config,
    DebertaV2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

SIZES = {"train": 160, "validation": 40, "test": 40}
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
THINGS = ["film", "book", "song", "play", "story", "meal", "walk", "trip"]
LIKED = ["fine", "lovely", "moving", "clever", "warm", "fresh"]
DISLIKED = ["dull", "clumsy", "cold", "stale", "noisy", "empty"]
OPPOSITES = {
    "hot": "cold",
    "big": "small",
    "old": "new",
    "wet": "dry",
    "fast": "slow",
    "dark": "light",
    "loud": "quiet",
}
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (250, 250, 250)}


def sentences() -> dict[str, list[tuple[str, int]]]:
    """Sentences with 1 where they praise and 0 where they blame, for each split."""
    draw = random.Random(0)

    def one() -> tuple[str, int]:
        label = draw.randrange(2)
        words = draw.sample(LIKED if label else DISLIKED, 2)
        return f"the {draw.choice(THINGS)} was {words[0]} and {words[1]} , more {words[0]} than the last", label

    return {split: [one() for _ in range(size)] for split, size in SIZES.items()}


def instructions() -> dict[str, list[dict[str, str]]]:
    """Instructions with the answer, for each split."""
    draw, pairs = random.Random(0), [*OPPOSITES.items(), *((b, a) for a, b in OPPOSITES.items())]

    def one() -> dict[str, str]:
        word, other = draw.choice(pairs)

        if draw.random() < 0.5:
            return {
                "instruction": "Name the opposite of the word .",
                "input": word,
                "output": f"the opposite is {other}",
            }

        return {"instruction": f"Say the word {word} twice .", "input": "", "output": f"{word} {word}"}

    return {split: [one() for _ in range(size)] for split, size in SIZES.items()}


def write_tokenizer(folder: Path, texts: Iterable[str], special: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer that knows the words of the texts, written to the folder; its first ids are ``SPECIAL``."""
    split = pre_tokenizers.Whitespace()
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    vocabulary = {word: at for at, word in enumerate(dict.fromkeys([*SPECIAL, *special, *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, extra_special_tokens=list(special))
    fast.save_pretrained(folder)

    return fast


def write_model(folder: Path, build: Any, config: Any) -> None:
    """A model with random weights, always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = build(config)
        model.save_pretrained(folder)


def sentiment(folder: Path) -> None:
    """SST-2 in small: train.tsv, validation.tsv, test.tsv."""
    for split, rows in sentences().items():
        lines = ["sentence\tlabel", *(f"{text}\t{label}" for text, label in rows)]
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def deberta(folder: Path) -> None:
    """DeBERTaV3 in small, without a head."""
    tokenizer = write_tokenizer(folder, (text for rows in sentences().values() for text, _ in rows))
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "type_vocab_size": 0,
        "pad_token_id": 0,
        "relative_attention": True,
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": "p2c|c2p",
        "position_biased_input": False,
    }
    write_model(folder, DebertaV2Model, DebertaV2Config(**sizes))


def instruction_lines(folder: Path) -> None:
    """train.jsonl, validation.jsonl and test.jsonl with instruction, input and output."""
    for split, rows in instructions().items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _language_sizes(folder: Path, texts: Iterable[str], special: Iterable[str] = ()) -> dict[str, Any]:
    """A tokenizer of the texts, written, and the sizes of a small decoder for it."""
    return {
        "vocab_size": len(write_tokenizer(folder, texts, special)),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _instruction_texts() -> list[str]:
    frame = "Below is an instruction that describes a task , paired with an input that provides further context . "
    frame += "Write a response that appropriately completes the request . ### Instruction : ### Input : ### Response : "
    return [frame, *(text for rows in instructions().values() for row in rows for text in row.values())]


def llama(folder: Path) -> None:
    """LLaMA in small."""
    write_model(folder, LlamaForCausalLM, LlamaConfig(**_language_sizes(folder, _instruction_texts())))


def moe(folder: Path) -> None:
    """Qwen3-MoE in small: five experts in one 3-D parameter, of which two see each token."""
    sizes = {**_language_sizes(folder, _instruction_texts()), "head_dim": 8, "num_experts": 5, "num_experts_per_tok": 2}
    write_model(folder, Qwen3MoeForCausalLM, Qwen3MoeConfig(**sizes, moe_intermediate_size=24))


def conversations(folder: Path) -> None:
    """Visual instructions in LLaVA's format: train.json, validation.json, test.json, and images of one colour."""
    draw = random.Random(0)
    (folder / "images").mkdir()

    for split, size in SIZES.items():
        entries: list[dict[str, Any]] = []
        for at in range(size // 4):
            name, colour = draw.choice(list(COLOURS.items()))
            shape = draw.choice([(20, 26), (31, 24), (24, 24)])
            file = f"images/{split}-{at}.png"
            Image.new("RGB", shape, colour).save(folder / file)
            turns = ["<image>\nWhat colour is it ?", f"It is {name} .", "Say it twice .", f"{name} {name}"]
            talk = [{"from": ("human", "gpt")[turn % 2], "value": text} for turn, text in enumerate(turns)]
            entries.append({"id": f"{split}-{at}", "image": file, "conversations": talk})

        (folder / f"{split}.json").write_text(json.dumps(entries, indent=1), encoding="utf-8")


def llava(folder: Path) -> None:
    """LLaVA 1.5 in small, with its processor: nine tokens for an image of 24 x 24."""
    words = "A chat between a curious human and an artificial intelligence assistant . The assistant gives helpful , "
    words += (
        "detailed , and polite answers to the human ' s questions . USER : ASSISTANT : What colour is it ? It is . "
    )
    words += "Say it twice . " + " ".join(COLOURS)
    text = _language_sizes(folder, [words], ["<image>"])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    vision: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision, num_hidden_layers=2, image_size=24, patch_size=8, projection_dim=16),
        text_config=LlamaConfig(**text),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=9,
    )
    size = {"height": 24, "width": 24}
    images = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=size)
    options = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    LlavaProcessor(images, tokenizer, **options).save_pretrained(folder)
    write_model(folder, LlavaForConditionalGeneration, config)


MAKERS = {
    "sentiment": sentiment,
    "deberta": deberta,
    "instructions": instruction_lines,
    "llama": llama,
    "moe": moe,
    "conversations": conversations,
    "llava": llava,
}
