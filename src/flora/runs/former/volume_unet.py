"""The name that :mod:`flora.data.volume_unet` had in 0.1.0."""

from flora.data.volume_unet import VolumeUNet, VolumeUNetConfig

__all__ = ["VolumeUNet", "VolumeUNetConfig"]
