"""The name under which saved adapters know :mod:`flora.data.volume_unet`; kept so that they load."""

from flora.data.volume_unet import VolumeUNet, VolumeUNetConfig

__all__ = ["VolumeUNet", "VolumeUNetConfig"]
