"""``VolumeUNet``: MONAI's U-Net for volumes as a model of transformers, as Trainer, merge and reloading take it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from monai.losses.dice import DiceCELoss
from monai.networks.nets.unet import UNet
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SemanticSegmenterOutput


class VolumeUNetConfig(PretrainedConfig):
    """Shape of a :class:`VolumeUNet`.

    Args:
        num_channels: of the volumes.
        classes: of voxels, the background included.
        channels: of each level.
        strides: from each level to the next.
        res_units: convolutions in the residual unit of a level.
    """

    model_type = "volume_unet"

    def __init__(
        self,
        num_channels: int = 1,
        classes: int = 3,
        channels: Sequence[int] = (16, 32, 64, 128),
        strides: Sequence[int] = (2, 2, 2),
        res_units: int = 2,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_channels, self.classes, self.res_units = num_channels, classes, res_units
        self.channels, self.strides = list(channels), list(strides)

    def padded(self, size: Sequence[int]) -> list[int]:
        """The least size that the strides divide, at least two steps long for the sake of the normalisation."""
        step = math.prod(self.strides)
        return [max(2, math.ceil(length / step)) * step for length in size]

    @property
    def image_size(self) -> list[int]:
        """The least size that it takes."""
        return self.padded([1, 1, 1])


class VolumeUNet(PreTrainedModel):
    """MONAI's UNet in three dimensions with the loss Dice + cross entropy, saved and loaded as transformers does."""

    config_class = VolumeUNetConfig
    main_input_name = "pixel_values"

    def __init__(self, config: VolumeUNetConfig) -> None:
        super().__init__(config)
        self.unet = UNet(
            spatial_dims=3,
            in_channels=config.num_channels,
            out_channels=config.classes,
            channels=config.channels,
            strides=config.strides,
            num_res_units=config.res_units,
        )
        self.loss = DiceCELoss(to_onehot_y=True, softmax=True)
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """Every layer starts as torch starts it."""

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> SemanticSegmenterOutput:
        """Logits (batch, classes, *size) of volumes (batch, channels, *size); with labels (batch, *size) the loss."""
        logits = self.unet(pixel_values.contiguous(memory_format=torch.channels_last_3d))
        return SemanticSegmenterOutput(None if labels is None else self.loss(logits, labels[:, None].long()), logits)


AutoConfig.register(VolumeUNetConfig.model_type, VolumeUNetConfig, exist_ok=True)
AutoModel.register(VolumeUNetConfig, VolumeUNet, exist_ok=True)
