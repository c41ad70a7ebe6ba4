"""What the text-to-image pipelines of diffusers have in common here, and where they differ: prompts and noise.

Everything is diffusers' own: prompts are encoded by the pipeline, pictures are painted by it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from flora.data.pretrained import load_pretrained
from flora.data.splits import is_local
from flora.errors import UserError
from flora.storage.progress import hidden_bars


class Family(NamedTuple):
    """A kind of pipeline.

    Attributes:
        pipeline: Its class.
        part: The name of the network that is adapted.
        network: The class of that network.
        picture: The name under which that network takes the noised latents.
        noise: The class of the noise that it was trained on.
    """

    pipeline: Any
    part: str
    network: Any
    picture: str
    noise: Any


FAMILIES = {
    "StableDiffusionPipeline": Family(StableDiffusionPipeline, "unet", UNet2DConditionModel, "sample", DDPMScheduler),
    "StableDiffusionXLPipeline": Family(
        StableDiffusionXLPipeline, "unet", UNet2DConditionModel, "sample", DDPMScheduler
    ),
    "StableDiffusion3Pipeline": Family(
        StableDiffusion3Pipeline,
        "transformer",
        SD3Transformer2DModel,
        "hidden_states",
        FlowMatchEulerDiscreteScheduler,
    ),
}
OLDEST = "StableDiffusionPipeline"


def family_of(where: str) -> Family:
    """The kind of pipeline in a folder or on the hub; parts without a ``model_index.json`` are a Stable Diffusion 1.

    Raises:
        UserError: it is another kind.
    """
    if is_local(where) and not (Path(where) / "model_index.json").is_file():
        name = OLDEST
    else:
        name = str(_index(where).get("_class_name"))

    if name not in FAMILIES:
        raise UserError(
            f"task.model {where!r} is a {name}, expected one of {', '.join(FAMILIES)}; adapt the network of another "
            "pipeline in a script of your own, as examples/diffusion_unet.py does"
        )

    return FAMILIES[name]


def _index(where: str) -> dict[str, Any]:
    """What ``model_index.json`` of a pipeline says."""
    try:
        return dict(cast("Any", DiffusionPipeline).load_config(where))
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(f"task.model is {where!r}: no pipeline can be loaded ({reason})") from None


def _assemble(where: str, family: Family, network: Any) -> Any:
    """The whole pipeline with another network in it. Parts that it was saved without, it is loaded without."""
    absent = {part: None for part, names in _index(where).items() if names in ([None, None], (None, None))}
    with hidden_bars():
        return load_pretrained(family.pipeline, where, **{**absent, family.part: network})


# ---- prompts ---------------------------------------------------------------------------------------------------------


def encode_prompts(where: str, family: Family, prompts: Iterable[str], resolution: int) -> dict[str, dict[str, Any]]:
    """What else the network gets with the picture, for each prompt; the text encoders stay as they are.

    Args:
        where: The pipeline.
        family: Its kind.
        prompts: Each is encoded once.
        resolution: Of the pictures; Stable Diffusion XL takes it as an input.

    Returns:
        Prompt -> keyword arguments of the network, without a dimension for the batch.
    """
    wanted = sorted(set(prompts))
    if family.pipeline is StableDiffusionPipeline:
        return _encode_by_clip(where, wanted)

    # The pipeline asks the network for sizes only, so it comes without weights.
    settings = family.network.load_config(where, subfolder=family.part)
    with torch.device("meta"):
        network = family.network.from_config(settings)

    pipeline = _assemble(where, family, network)
    options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    if family.pipeline is StableDiffusion3Pipeline:
        options |= {"prompt_2": None, "prompt_3": None}

    found = {}
    for prompt in wanted:
        with torch.no_grad():
            states, _, pooled, _ = pipeline.encode_prompt(prompt=prompt, **options)

        if family.pipeline is StableDiffusion3Pipeline:
            told: dict[str, Any] = {"pooled_projections": pooled[0]}
        else:
            # Original size, the corner that was cropped to, and the size that is wanted.
            times = [resolution, resolution, 0, 0, resolution, resolution]
            told = {"added_cond_kwargs": {"text_embeds": pooled[0], "time_ids": torch.tensor(times).float()}}

        found[prompt] = {"encoder_hidden_states": states[0], **told}

    return found


@torch.no_grad()
def _encode_by_clip(where: str, prompts: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The prompts of Stable Diffusion 1 and 2, whose folder need not say that it is a pipeline."""
    tokenizer = load_pretrained(CLIPTokenizer, where, subfolder="tokenizer")
    encoder = load_pretrained(CLIPTextModel, where, subfolder="text_encoder")
    found = {}
    for prompt in prompts:
        tokens = tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt")
        found[prompt] = {"encoder_hidden_states": encoder(tokens.input_ids)[0][0]}

    return found


# ---- noise -----------------------------------------------------------------------------------------------------------


class Noisy(NamedTuple):
    """A picture with noise.

    Attributes:
        picture: shape (1, channels, height, width).
        time: As the network takes it, shape (1,).
        target: What the network is to predict, shape (1, channels, height, width).
    """

    picture: Tensor
    time: Tensor
    target: Tensor


def add_noise(clean: Tensor, scheduler: Any, random: np.random.Generator) -> Noisy:
    """Draws a noise and a time.

    Args:
        clean: Latents of one picture, shape (1, channels, height, width).
        scheduler: Of the training.
        random: Draws.
    """
    noise = torch.tensor(random.standard_normal(clean.shape, dtype=np.float32))

    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        # The logit-normal draw of Stable Diffusion 3 (arXiv 2403.03206), shifted towards noise as its scheduler is.
        share = torch.sigmoid(torch.tensor(random.standard_normal(1, dtype=np.float32)))
        shift = float(cast("Any", scheduler).config.shift)
        share = shift * share / (1 + (shift - 1) * share)
        steps = cast("Any", scheduler).config.num_train_timesteps

        return Noisy((1 - share) * clean + share * noise, share * steps, noise - clean)

    time = torch.tensor(random.integers(scheduler.config.num_train_timesteps, size=1))
    if scheduler.config.prediction_type == "v_prediction":
        target = scheduler.get_velocity(clean, noise, time)
    else:
        target = noise

    return Noisy(scheduler.add_noise(clean, noise, time), time, target)


# ---- painting --------------------------------------------------------------------------------------------------------


def painter(where: str, family: Family, network: Any) -> Any:
    """The whole pipeline, with this network in it."""
    if family.pipeline is not StableDiffusionPipeline:
        return _assemble(where, family, network)

    parts = {"vae": AutoencoderKL, "text_encoder": CLIPTextModel, "tokenizer": CLIPTokenizer}
    loaded = {name: load_pretrained(kind, where, subfolder=name) for name, kind in parts.items()}
    trained = load_pretrained(DDPMScheduler, where, subfolder="scheduler").config

    # What Stable Diffusion's own sampler is set to, where the config of the training noise does not say it.
    sampler = {"steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False}
    scheduler = cast("Any", DDIMScheduler).from_config(trained, **sampler)
    options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}

    return cast("Any", StableDiffusionPipeline)(**loaded, unet=network, scheduler=scheduler, **options)
