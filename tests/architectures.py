"""Tiny models of many architectures, from config classes alone: what users adapt, without a download.

A row is a function that builds the model and one that makes its inputs. Sizes are as small as the architecture allows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Architecture:
    """How a model is built and called.

    Attributes:
        build: makes the model, with random weights.
        inputs: the keyword arguments of its forward; positional ones are under "args".
        generates: whether ``generate`` with a cache is compared too.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    generates: bool = False


def text() -> dict[str, Any]:
    return {"input_ids": torch.randint(3, 61, (2, 9))}


def pair() -> dict[str, Any]:
    return {"input_ids": torch.randint(3, 61, (2, 9)), "decoder_input_ids": torch.randint(3, 61, (2, 5))}


def image(size: int = 32, channels: int = 3) -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, channels, size, size)}


def sound(samples: int = 800) -> dict[str, Any]:
    return {"input_values": torch.randn(2, samples)}


def positional(*shape: int) -> dict[str, Any]:
    return {"args": (torch.randn(*shape),)}


LANGUAGE = {
    "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "tie_word_embeddings": False,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ENCODER = {
    "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64, "pad_token_id": 0, "type_vocab_size": 2,
}  # fmt: skip
SEQ2SEQ = {
    "vocab_size": 61, "d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "tie_word_embeddings": False,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
PYRAMID = {
    "model_type": "swin", "image_size": 64, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2],
    "window_size": 2, "patch_size": 4, "out_features": ["stage1", "stage2", "stage3", "stage4"],
}  # fmt: skip
STAGES = {"depths": [1, 1], "hidden_sizes": [8, 16], "num_stages": 2, "embedding_size": 8, "layer_type": "basic"}
SHIFTED = {"image_size": 32, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}
SPEECH = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "conv_dim": (8, 8),
    "conv_stride": (4, 4), "conv_kernel": (5, 4), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False, "layerdrop": 0.0, "vocab_size": 31,
}  # fmt: skip
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "num_local_experts": 3}


def build(auto: str, kind: str, fields: dict[str, Any]) -> nn.Module:
    """A model of transformers by the name of an auto class and of a model type."""
    import transformers

    config = transformers.CONFIG_MAPPING[kind](**fields)
    return getattr(transformers, auto).from_config(config)  # type: ignore[no-any-return]


def named(library: str, name: str, *args: Any, **fields: Any) -> nn.Module:
    """A model of a library by its class."""
    import importlib

    return getattr(importlib.import_module(library), name)(*args, **fields)  # type: ignore[no-any-return]


def by_config(name: str, **fields: Any) -> nn.Module:
    """A model of transformers by the names of its class and its config's."""
    import transformers

    return getattr(transformers, name)(getattr(transformers, fields.pop("config"))(**fields))  # type: ignore[no-any-return]


def causal(kind: str, **fields: Any) -> Architecture:
    return Architecture(partial(build, "AutoModelForCausalLM", kind, {**LANGUAGE, **fields}), text, True)


def encoder(kind: str, auto: str = "AutoModel", **fields: Any) -> Architecture:
    return Architecture(partial(build, auto, kind, {**ENCODER, **fields}), text)


def seq2seq(kind: str, **fields: Any) -> Architecture:
    return Architecture(partial(build, "AutoModelForSeq2SeqLM", kind, {**SEQ2SEQ, **fields}), pair, True)


def vision(kind: str, size: int = 32, auto: str = "AutoModel", **fields: Any) -> Architecture:
    return Architecture(partial(build, auto, kind, {**VISION, **fields}), partial(image, size))


def speech(kind: str, **fields: Any) -> Architecture:
    return Architecture(partial(build, "AutoModel", kind, {**SPEECH, **fields}), sound)


def medical(name: str, shape: tuple[int, ...], *args: Any, **fields: Any) -> Architecture:
    return Architecture(partial(named, "monai.networks.nets", name, *args, **fields), partial(positional, *shape))


def diffusion(name: str, inputs: Callable[[], dict[str, Any]], **fields: Any) -> Architecture:
    return Architecture(partial(named, "diffusers", name, **fields), inputs)


def noisy(**extra: tuple[int, ...]) -> dict[str, Any]:
    shapes = {"sample": (2, 4, 8, 8), **extra}
    return {"timestep": torch.tensor([3, 5]), **{name: torch.randn(*shape) for name, shape in shapes.items()}}


def flux() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 9, 4), "encoder_hidden_states": torch.randn(1, 5, 16),
        "pooled_projections": torch.randn(1, 8), "timestep": torch.tensor([0.5]), "img_ids": torch.zeros(9, 3),
        "txt_ids": torch.zeros(5, 3), "guidance": None,
    }  # fmt: skip


def sd3() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 4, 8, 8), "encoder_hidden_states": torch.randn(1, 5, 16),
        "pooled_projections": torch.randn(1, 16), "timestep": torch.tensor([3]),
    }  # fmt: skip


def clip() -> dict[str, Any]:
    return {**text(), **image(32)}


BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 16,
    "attention_head_dim": 4,
}  # fmt: skip

ARCHITECTURES: dict[str, Architecture] = {
    # Language models.
    "llama": causal("llama"),
    "mistral": causal("mistral"),
    "qwen2": causal("qwen2"),
    "qwen3": causal("qwen3"),
    "gemma2": causal("gemma2"),
    "gemma3": causal("gemma3_text"),
    "gemma3n": causal(
        "gemma3n_text", intermediate_size=[24] * 5, num_hidden_layers=5, hidden_size_per_layer_input=4,
        vocab_size_per_layer_input=61, altup_num_inputs=2, laurel_rank=4, num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        activation_sparsity_pattern=[0.0] * 5,
    ),
    "phi": causal("phi"),
    "phi3": causal("phi3"),
    "gpt2": causal("gpt2", n_positions=64),
    "gpt-neox": causal("gpt_neox"),
    "gpt-j": causal("gptj", rotary_dim=4),
    "opt": causal("opt", ffn_dim=24, word_embed_proj_dim=16),
    "bloom": causal("bloom", n_layer=2, n_head=2),
    "olmo2": causal("olmo2"),
    "cohere": causal("cohere"),
    "stablelm": causal("stablelm"),
    "starcoder2": causal("starcoder2"),
    "granite": causal("granite"),
    "glm": causal("glm"),
    "nemotron": causal("nemotron"),
    # Mixtures of experts.
    "mixtral": causal("mixtral", **EXPERTS),
    "qwen3-moe": causal("qwen3_moe", **EXPERTS, mlp_only_layers=[]),
    "olmoe": causal("olmoe", **EXPERTS),
    "granite-moe": causal("granitemoe", **EXPERTS),
    "gpt-oss": causal("gpt_oss", **EXPERTS, layer_types=["full_attention"] * 2),
    # State-space and hybrid models.
    "mamba": causal("mamba", state_size=4),
    "mamba2": causal("mamba2", state_size=8, num_heads=4, head_dim=8, n_groups=2, chunk_size=8),
    "falcon-mamba": causal("falcon_mamba", state_size=4),
    "jamba": causal(
        "jamba", **EXPERTS, mamba_d_state=4, mamba_dt_rank=4, attn_layer_period=2, attn_layer_offset=1,
        expert_layer_period=2, expert_layer_offset=1, use_mamba_kernels=False,
    ),
    "bamba": causal(
        "bamba", mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=4, mamba_chunk_size=8,
        attn_layer_indices=[1],
    ),
    "falcon-h1": causal(
        "falcon_h1", mamba_n_heads=4, mamba_d_head=8, mamba_d_ssm=32, mamba_n_groups=1, mamba_d_state=4,
        mamba_chunk_size=8,
    ),
    "lfm2": causal("lfm2", layer_types=["conv", "full_attention"], conv_L_cache=3, block_multiple_of=4),
    "qwen3-next": causal(
        "qwen3_next", **EXPERTS, layer_types=["linear_attention", "full_attention"], linear_num_value_heads=2,
        linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, shared_expert_intermediate_size=12,
    ),
    "recurrent-gemma": causal("recurrent_gemma", lru_width=16, num_hidden_layers=3, attention_window_size=8),
    "rwkv": Architecture(  # with a cache it changes states in place that its backward needs
        causal("rwkv", attention_hidden_size=16).build, lambda: {**text(), "use_cache": False}, True
    ),
    # Encoders.
    "bert": encoder("bert", "AutoModelForMaskedLM"),
    "roberta": encoder("roberta"),
    "albert": encoder("albert", embedding_size=8),
    "electra": encoder("electra", embedding_size=8),
    "deberta": encoder("deberta-v2", relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8),
    "distilbert": encoder("distilbert", dim=16, hidden_dim=24, n_heads=2, n_layers=2),
    "modernbert": encoder("modernbert", cls_token_id=1, sep_token_id=2),
    "mpnet": encoder("mpnet"),
    "convbert": encoder("convbert", embedding_size=16, conv_kernel_size=3),
    "squeezebert": encoder("squeezebert", embedding_size=16),
    # Encoders with decoders.
    "t5": seq2seq("t5", d_kv=8, d_ff=24, num_layers=2, num_heads=2),
    "bart": seq2seq("bart"),
    "pegasus": seq2seq("pegasus"),
    "m2m-100": seq2seq("m2m_100"),
    "whisper": Architecture(
        partial(
            build, "AutoModelForSpeechSeq2Seq", "whisper",
            {**SEQ2SEQ, "num_mel_bins": 7, "max_source_positions": 10, "max_target_positions": 20},
        ),
        lambda: {"input_features": torch.randn(2, 7, 20), "decoder_input_ids": torch.randint(3, 61, (2, 5))},
    ),
    # Images and video.
    "vit": vision("vit", auto="AutoModelForImageClassification"),
    "deit": vision("deit"),
    "beit": vision("beit", use_relative_position_bias=True),
    "dinov2": vision("dinov2"),
    "dinov3": vision("dinov3_vit"),
    "swin": Architecture(partial(build, "AutoModel", "swin", {**SHIFTED, "patch_size": 4}), image),
    "swinv2": Architecture(partial(build, "AutoModel", "swinv2", {**SHIFTED, "patch_size": 4}), image),
    "swin2sr": Architecture(
        partial(build, "AutoModelForImageToImage", "swin2sr", {**SHIFTED, "patch_size": 1, "upscale": 2}),
        partial(image, 8),
    ),
    "convnext": vision("convnext", num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], patch_size=4),
    "convnextv2": vision("convnextv2", num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], patch_size=4),
    "resnet": vision("resnet", **STAGES),
    "regnet": Architecture(
        partial(build, "AutoModel", "regnet", {**STAGES, "layer_type": "y", "groups_width": 4}), image
    ),
    "mobilenet-v2": vision("mobilenet_v2", depth_multiplier=0.25),
    "mobilevit": vision("mobilevit", 64, hidden_sizes=[8, 12, 16], neck_hidden_sizes=[8] * 7, patch_size=2),
    "segformer": vision(
        "segformer", num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16],
        num_attention_heads=[1, 2], patch_sizes=[7, 3], strides=[4, 2], mlp_ratios=[2, 2],
    ),
    "poolformer": vision(
        "poolformer", depths=[1, 1], hidden_sizes=[8, 16], patch_sizes=[7, 3], strides=[4, 2], padding=[2, 1],
        num_encoder_blocks=2,
    ),
    "hiera": vision("hiera", 64, image_size=[64, 64], embed_dim=8, depths=[1, 1], num_heads=[1, 2], query_stride=[2, 2],
                    num_query_pool=1, masked_unit_size=[4, 4], patch_size=[7, 7]),
    "videomae": Architecture(
        partial(build, "AutoModel", "videomae", {**VISION, "num_frames": 4, "tubelet_size": 2}),
        lambda: {"pixel_values": torch.randn(2, 4, 3, 32, 32)},
    ),
    "clip": Architecture(
        partial(
            by_config, "CLIPModel", config="CLIPConfig", text_config={**ENCODER, "eos_token_id": 2},
            vision_config=VISION, projection_dim=8,
        ),
        clip,
    ),
    "siglip": Architecture(
        partial(by_config, "SiglipModel", config="SiglipConfig", text_config=ENCODER, vision_config=VISION), clip
    ),
    "d-fine": Architecture(
        partial(
            by_config, "DFineForObjectDetection", config="DFineConfig", encoder_hidden_dim=16, d_model=16,
            encoder_in_channels=[12, 16, 24], decoder_in_channels=[16] * 3, feat_strides=[8, 16, 32],
            encoder_layers=1, decoder_layers=2, encoder_ffn_dim=24, decoder_ffn_dim=24, encoder_attention_heads=2,
            decoder_attention_heads=2, num_queries=5, num_denoising=0, hidden_expansion=0.5, backbone_config={
                "model_type": "hgnet_v2", "stem_channels": [3, 8, 8], "stage_in_channels": [8, 8, 12, 16],
                "stage_mid_channels": [8] * 4, "stage_out_channels": [8, 12, 16, 24], "stage_num_blocks": [1] * 4,
                "stage_numb_of_layers": [2] * 4, "embedding_size": 8, "hidden_sizes": [8, 12, 16, 24],
                "depths": [1] * 4, "out_features": ["stage2", "stage3", "stage4"],
            },
        ),
        partial(image, 64),
    ),
    # Models that run layers from lists beside their tree.
    "upernet": Architecture(
        partial(by_config, "UperNetForSemanticSegmentation", config="UperNetConfig", backbone_config=PYRAMID,
                hidden_size=8, auxiliary_channels=8, auxiliary_in_channels=32, num_labels=3),
        partial(image, 64),
    ),
    "mask2former": Architecture(
        partial(by_config, "Mask2FormerForUniversalSegmentation", config="Mask2FormerConfig", backbone_config=PYRAMID,
                feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=24, encoder_layers=1,
                decoder_layers=2, num_attention_heads=2, dim_feedforward=24, num_queries=5),
        partial(image, 64),
    ),
    # Sound.
    "wav2vec2": speech("wav2vec2"),
    "hubert": speech("hubert"),
    "wavlm": speech("wavlm"),
    "unispeech": speech("unispeech"),
    "audio-spectrogram": Architecture(
        partial(
            build, "AutoModel", "audio-spectrogram-transformer",
            {**VISION, "num_mel_bins": 16, "max_length": 24, "frequency_stride": 8, "time_stride": 8},
        ),
        lambda: {"input_values": torch.randn(2, 24, 16)},
    ),
    "encodec": Architecture(
        partial(build, "AutoModel", "encodec", {
            "hidden_size": 8, "num_filters": 4, "upsampling_ratios": [4, 2], "codebook_size": 16,
            "num_lstm_layers": 1,
        }),
        lambda: {"input_values": torch.randn(1, 1, 64)},
    ),
    # Diffusion.
    "unet-2d": diffusion(
        "UNet2DModel", noisy, sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
    ),
    "unet-2d-condition": diffusion(
        "UNet2DConditionModel", partial(noisy, encoder_hidden_states=(2, 5, 16)), sample_size=8, **BLOCKS
    ),
    "unet-3d-condition": diffusion(
        "UNet3DConditionModel", partial(noisy, sample=(2, 4, 2, 8, 8), encoder_hidden_states=(2, 5, 16)),
        sample_size=8, **{**BLOCKS, "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
                          "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D")},
    ),
    "autoencoder-kl": diffusion(
        "AutoencoderKL", partial(positional, 2, 3, 16, 16), block_out_channels=(8, 16), layers_per_block=1,
        norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ),
    "autoencoder-tiny": diffusion(
        "AutoencoderTiny", partial(positional, 2, 3, 32, 32), encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
    ),
    "flux": diffusion(
        "FluxTransformer2DModel", flux, patch_size=1, in_channels=4, num_layers=1, num_single_layers=1,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    ),
    "stable-diffusion-3": diffusion(
        "SD3Transformer2DModel", sd3, sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16,
    ),
    # Medical images.
    "monai unet": medical("UNet", (1, 1, 16, 16, 16), 3, 1, 2, (4, 8), (2,)),
    "monai dynunet": medical("DynUNet", (1, 1, 16, 16, 16), 3, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 8, 12]),
    "monai segresnet": medical("SegResNet", (1, 1, 16, 16, 16), 3, 8),
    "monai unetr": medical(
        "UNETR", (1, 1, 16, 16, 16), 1, 2, (16, 16, 16), feature_size=4, hidden_size=12, mlp_dim=16, num_heads=2
    ),
    "monai attention unet": medical("AttentionUnet", (1, 1, 16, 16), 2, 1, 2, (4, 8), (2,)),
    "monai basic unet": medical("BasicUNet", (1, 1, 32, 32), 2, 1, 2, (4, 4, 8, 8, 8, 4)),
    "monai densenet": medical("DenseNet", (1, 1, 32, 32), 2, 1, 2, init_features=8, growth_rate=4, block_config=(2, 2)),
    "monai efficientnet": medical("EfficientNetBN", (2, 1, 64, 64), "efficientnet-b0", False, True, 2, 1, 2),
    "monai autoencoder": medical("AutoEncoder", (1, 1, 16, 16), 2, 1, 1, (4, 8), (2, 2)),
    "monai vit": medical("ViT", (1, 1, 16, 16), 1, (16, 16), (8, 8), 16, 24, 2, 2, spatial_dims=2),
}  # fmt: skip
FAST = ("llama", "mamba", "mixtral", "t5", "wavlm", "vit", "monai dynunet")
