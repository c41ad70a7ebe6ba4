"""Random inputs of the kind that a model takes, to compare two models on."""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from flora.errors import UserError

# Frames of sound, where the model leaves their number open.
FRAMES = 64
# Where a config says the size of one frame.
FEATURES = ("num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel")


def random_inputs(model: PreTrainedModel) -> dict[str, Any]:
    """Two random samples of the kind the model takes: images, volumes, token ids, sound, or noise and a prompt.

    Raises:
        UserError: the model takes something else, or its config does not say how much of it.
    """
    name, config = getattr(model, "main_input_name", None), model.config
    random = torch.Generator().manual_seed(0)

    try:
        inputs = _inputs(name, config, random)
        if inputs is not None and "decoder_input_ids" in inspect.signature(model.forward).parameters:
            inputs["decoder_input_ids"] = torch.randint(0, _decoder_words(config), (2, 5), generator=random)
    except (AttributeError, TypeError) as error:
        # A config of another kind than those with this input usually have, or one that leaves a size open.
        raise UserError(f"the config of {type(model).__name__} does not say how large {name!r} is ({error})") from None

    if inputs is None:
        raise UserError(
            f"{type(model).__name__} takes {name!r}, and only images (pixel_values), token ids (input_ids) and sound "
            "(input_values, input_features) can be made at random; use merge_and_unload(safe_merge=True) of PEFT"
        )

    return cast("dict[str, Any]", _placed(inputs, model))


def _placed(value: Any, model: PreTrainedModel) -> Any:
    """Tensors, alone or in a dict, on the device of the model; numbers with a fraction in its dtype."""
    if isinstance(value, dict):
        return {key: _placed(part, model) for key, part in value.items()}
    if value.is_floating_point():
        return value.to(model.device, model.dtype)
    return value.to(model.device)


def _inputs(name: str | None, config: Any, random: torch.Generator) -> dict[str, Any] | None:
    # A transformer of Stable Diffusion 3.
    if hasattr(config, "joint_attention_dim") and hasattr(config, "pooled_projection_dim"):
        return {
            "hidden_states": torch.randn(
                2, config.in_channels, config.sample_size, config.sample_size, generator=random
            ),
            "timestep": torch.tensor([1.0, 500.0]),
            "encoder_hidden_states": torch.randn(2, 7, config.joint_attention_dim, generator=random),
            "pooled_projections": torch.randn(2, config.pooled_projection_dim, generator=random),
        }

    # A UNet2DConditionModel.
    if hasattr(config, "cross_attention_dim") and hasattr(config, "sample_size"):
        shape = (2, config.in_channels, config.sample_size, config.sample_size)
        found: dict[str, Any] = {
            "sample": torch.randn(shape, generator=random),
            "timestep": torch.tensor([1.0, 500.0]),
            "encoder_hidden_states": torch.randn(2, 7, config.cross_attention_dim, generator=random),
        }
        # Stable Diffusion XL also takes the pooled prompt and six sizes.
        if getattr(config, "addition_embed_type", None) == "text_time":
            width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            pooled = torch.randn(2, width, generator=random)
            found["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": torch.full((2, 6), 64.0)}
        return found

    if name == "pixel_values":
        return {name: torch.randn(2, *_image_shape(config), generator=random)}
    if name == "input_ids":
        return {name: torch.randint(0, config.get_text_config().vocab_size, (2, 16), generator=random)}
    if name == "input_values":
        return {name: torch.randn(2, 16000, generator=random)}
    if name == "input_features":
        return {name: torch.randn(2, *_sound_shape(config), generator=random)}
    return None


def _decoder_words(config: Any) -> int:
    """How many words the decoder of a model with an encoder knows; Marian's may know others than its encoder."""
    words: int = getattr(config, "decoder_vocab_size", None) or config.get_text_config(decoder=True).vocab_size
    return words


def _image_shape(config: Any) -> tuple[int, ...]:
    """Channels and spatial size."""
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", 224)
    return getattr(vision, "num_channels", 3), *((size, size) if isinstance(size, int) else size)


def _sound_shape(config: Any) -> tuple[int, int]:
    """Whisper takes (features, frames), and exactly as many as it has positions; others (frames, features)."""
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
        return config.num_mel_bins, 2 * config.max_source_positions
    for field in FEATURES:
        if isinstance(size := getattr(config, field, None), int):
            return FRAMES, size
    raise AttributeError(f"it has none of {', '.join(FEATURES)}")
