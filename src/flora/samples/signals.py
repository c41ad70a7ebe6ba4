"""Signals: tones in class folders, volumes as NIfTI files, a few images of one thing, and small models for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

SEED = 0
PITCHES = {"high": (900, 1400), "low": (120, 200), "middle": (350, 550)}  # class -> Hz, lowest and highest
RATES = (8000, 16000, 22050)
CLIPS = {"train": 8, "validation": 4, "test": 8}  # of each class


def tones(folder: Path) -> None:
    """Decaying tones in noise, 0.3 to 0.6 s, in one folder per pitch; several sampling rates, some in stereo."""
    import soundfile

    random = np.random.default_rng(SEED)
    for split, count in CLIPS.items():
        for name, pitch in PITCHES.items():
            place = folder / split / name
            place.mkdir(parents=True)
            for index in range(count):
                rate = RATES[index % len(RATES)]
                time = np.arange(int(random.uniform(0.3, 0.6) * rate)) / rate
                wave = np.sin(2 * np.pi * (random.uniform(*pitch) * time + random.uniform())) * np.exp(-2 * time)
                wave = 0.5 * wave + 0.02 * random.standard_normal(len(time))
                soundfile.write(place / f"{index}.wav", np.stack([wave, wave], 1) if index % 2 else wave, rate)


def wav2vec2(folder: Path) -> None:
    """A Wav2Vec2 for three classes with the seven convolutions of the real one, 16 channels wide, not pretrained."""
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForSequenceClassification

    torch.manual_seed(SEED)
    config = Wav2Vec2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        conv_dim=[16] * 7,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=32,
        layerdrop=0.0,
        mask_time_prob=0.0,
    )
    config.num_labels = len(PITCHES)
    Wav2Vec2ForSequenceClassification(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor().save_pretrained(folder)


MAKERS = {"tones": tones, "wav2vec2": wav2vec2}
