"""The UNet of Stable Diffusion learns a few pictures; the adapter is written as a file for ComfyUI and diffusers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from peft import get_peft_model
from PIL import Image, ImageOps
from torch.nn.functional import mse_loss
from transformers import CLIPTextModel, CLIPTokenizer

import flora


@torch.no_grad()
def main(
    pictures: Path, model: str = "stable-diffusion-v1-5/stable-diffusion-v1-5", prompt: str = "a photo of sks dog",
    output: Path = Path("diffusion-adapter"), size: int = 512, steps: int = 400,
) -> Path:  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vae = AutoencoderKL.from_pretrained(model, subfolder="vae").to(device)
    encoder = CLIPTextModel.from_pretrained(model, subfolder="text_encoder").to(device)
    tokenizer = CLIPTokenizer.from_pretrained(model, subfolder="tokenizer")
    scheduler = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet").to(device)

    # Latents and the embedding of the prompt are computed once.
    squares = [ImageOps.fit(Image.open(path).convert("RGB"), (size, size)) for path in sorted(pictures.glob("*.*"))]
    images = torch.stack([torch.tensor(np.asarray(square)).permute(2, 0, 1) / 127.5 - 1 for square in squares])
    latents = vae.encode(images.to(device)).latent_dist.mode() * vae.config.scaling_factor
    tokens = tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)
    embedding = encoder(tokens)[0]

    config = flora.FloraConfig(r=16, target_modules=["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"])
    adapted = get_peft_model(unet, config)
    adapted.print_trainable_parameters()
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=2e-4)
    for step in range(steps):
        clean = latents[step % len(latents)][None]
        noise, time = torch.randn_like(clean), torch.randint(scheduler.config.num_train_timesteps, (1,), device=device)
        with torch.enable_grad():
            predicted = adapted(scheduler.add_noise(clean, noise, time), time, embedding).sample
            mse_loss(predicted, noise).backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.save_pretrained(output)

    file = output.with_suffix(".safetensors")
    print(flora.save(flora.load(output), file, format="kohya", prefix="lora_unet", overwrite=True))
    return file


if __name__ == "__main__":
    main(Path("pictures"))
