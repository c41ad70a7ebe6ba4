"""Signals: tones in class folders, volumes as NIfTI files, a few images of one thing, and small models for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

SEED = 0
# Class -> Hz, lowest and highest.
PITCHES = {"high": (900, 1400), "low": (120, 200), "middle": (350, 550)}
RATES = (8000, 16000, 22050)
# Clips of each class.
CLIPS = {"train": 8, "validation": 4, "test": 8}


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
        num_conv_pos_embedding_groups=8,
        classifier_proj_size=32,
        layerdrop=0.0,
        mask_time_prob=0.0,
    )
    config.num_labels = len(PITCHES)
    Wav2Vec2ForSequenceClassification(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor().save_pretrained(folder)


def instance(folder: Path) -> None:
    """Five pictures of one thing, a red ring with a green core, of several sizes and before several backgrounds."""
    from PIL import Image

    random = np.random.default_rng(SEED)
    for index, (width, height) in enumerate([(40, 40), (37, 53), (64, 48), (50, 41), (48, 48)]):
        picture = _background(random, height, width)
        y, x = np.mgrid[:height, :width]
        distance = np.hypot(y - height / 2, x - width / 2) / min(height, width)
        picture[distance < 0.4] = (220, 30, 30)
        picture[distance < 0.2] = (30, 200, 60)
        Image.fromarray(picture).save(folder / f"{index}.png")


def _background(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A smooth gradient of two random colours, (height, width, 3) of uint8."""
    start, end = random.integers(0, 256, (2, 3))
    ramp = np.linspace(0, 1, height)[:, None, None]
    return np.broadcast_to(start * (1 - ramp) + end * ramp, (height, width, 3)).astype(np.uint8)


def stable_diffusion(folder: Path) -> None:
    """A pipeline folder in the layout of Stable Diffusion 1.5, tiny; its UNet has learnt to denoise backgrounds."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    torch.manual_seed(SEED)
    letters = sorted(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer({word: index for index, word in enumerate(words)}, [], model_max_length=16)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=len(words) - 2,
            eos_token_id=len(words) - 1,
            pad_token_id=len(words) - 1,
        )
    )
    vae = AutoencoderKL(  # type: ignore[no-untyped-call]
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        sample_size=16,
    )
    unet = UNet2DConditionModel(  # type: ignore[no-untyped-call]
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    scheduler = DDPMScheduler(**noise)  # type: ignore[no-untyped-call]
    _learn_backgrounds(unet, vae, scheduler)
    parts: dict[str, Any] = {"tokenizer": tokenizer, "text_encoder": text, "vae": vae, "unet": unet}
    for name, part in {**parts, "scheduler": scheduler}.items():
        part.save_pretrained(folder / name)


def _learn_backgrounds(unet: Any, vae: Any, scheduler: Any) -> None:
    """Sets the scale of the latents to 1 and trains the UNet a little, on backgrounds and random prompts."""
    random = np.random.default_rng(SEED)
    pictures = np.stack([_background(random, 16, 16) for _ in range(64)])

    with torch.no_grad():
        latents = vae.encode(torch.tensor(pictures).permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mode()
        vae.register_to_config(scaling_factor=1 / float(latents.std()))
        latents = latents * vae.config.scaling_factor

    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    for _ in range(80):
        clean = latents[torch.randint(0, len(latents), (16,))]
        noise, time = torch.randn_like(clean), torch.randint(0, len(scheduler.alphas_cumprod), (16,))
        predicted = unet(scheduler.add_noise(clean, noise, time), time, torch.randn(16, 16, 32)).sample
        torch.nn.functional.mse_loss(predicted, noise).backward()
        optimizer.step()
        optimizer.zero_grad()


def volumes(folder: Path) -> None:
    """A bright and a dark ellipsoid in noise, as the Medical Segmentation Decathlon lays volumes; no two of a size."""
    import nibabel

    random = np.random.default_rng(SEED)
    for part, count in {"Tr": 6, "Val": 2, "Ts": 3}.items():
        for name in ("images", "labels"):
            (folder / f"{name}{part}").mkdir()

        for index in range(count):
            image, labels = _ellipsoids(random)
            for name, voxels in (("images", image), ("labels", labels)):
                path = folder / f"{name}{part}" / f"case_{index}.nii.gz"
                nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), path)  # type: ignore[no-untyped-call]


def _ellipsoids(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An image of int16 and its labels 0, 1, 2 of uint8, 13 to 23 voxels a side."""
    size = tuple(random.integers(13, 24, 3).tolist())
    labels = np.zeros(size, np.uint8)
    for label, middle in ((1, 0.3), (2, 0.7)):
        centre = np.array(size) * (middle + random.uniform(-0.05, 0.05, 3))
        place = (np.indices(size).T - centre) / (np.array(size) * random.uniform(0.16, 0.22, 3))
        labels[(place**2).sum(-1).T < 1] = label

    image = 300 + 20 * random.standard_normal(size) + np.array([0, 80, -80])[labels]

    return image.astype(np.int16), labels


def unet3d(folder: Path) -> None:
    """A VolumeUNet of two steps that knows the ellipsoids of inverted images, bright for dark."""
    from flora.data.volume_unet import VolumeUNet, VolumeUNetConfig

    torch.manual_seed(SEED)
    random = np.random.default_rng(SEED + 1)
    model = VolumeUNet(VolumeUNetConfig(channels=[4, 8, 16], strides=[2, 2], res_units=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        image, labels = (torch.tensor(each[:12, :12, :12].astype(np.float32)) for each in _ellipsoids(random))
        image = (image.mean() - image) / image.std()
        model(image[None, None], labels[None].long()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    model.save_pretrained(folder)


MAKERS = {
    "volumes": volumes,
    "unet3d": unet3d,
    "tones": tones,
    "wav2vec2": wav2vec2,
    "instance": instance,
    "stable-diffusion": stable_diffusion,
}
