"""Volumes from NIfTI files: read with checks, brought to the axes, spacing and intensities that a network is given.

Turning, resampling, scaling and cropping are MONAI's.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import nibabel
import numpy as np
import torch
from monai.data.meta_tensor import MetaTensor
from monai.transforms.croppad.array import RandCropByPosNegLabel
from monai.transforms.intensity.array import ScaleIntensityRange
from monai.transforms.spatial.array import Orientation, Spacing, SpatialResample
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset

from flora.data.files import regular
from flora.errors import UserError

NIFTI = (".nii", ".nii.gz")
MOST_VOXELS = 2**30
# Bytes of volumes that a data set keeps in memory, in each process that reads it.
KEPT = 2**28
# How far the grids of an image and its labels may lie apart, in the unit of the file.
NEAR = 1e-3


class Pair(NamedTuple):
    """The files of an image and of its labels."""

    image: Path
    labels: Path


class Reading(NamedTuple):
    """How volumes are brought to what a network takes.

    Attributes:
        num_channels: Of the image.
        classes: Of the labels, which are whole numbers below it.
        orientation: The directions of the three axes, as MONAI writes them: "RAS" is right, anterior, superior.
        spacing: The size of a voxel that volumes are resampled to; None leaves them as they are.
        intensity: Lowest and highest value, which become 0 and 1, and what is beyond them is clipped; None gives each
            channel of each volume the mean 0 and the standard deviation 1.
    """

    num_channels: int
    classes: int
    orientation: str = "RAS"
    spacing: Sequence[float] | None = None
    intensity: Sequence[float] | None = None


def read_file(path: Path) -> MetaTensor:
    """The voxels of a NIfTI file with its grid, shape (channels, *size).

    Raises:
        UserError: the file cannot be read, has too many voxels or other dimensions.
    """
    try:
        found = cast("Any", nibabel).load(regular(path))
        # The header says this before anything is allocated.
        if math.prod(found.shape) > MOST_VOXELS:
            raise UserError(f"{path.name} claims the size {found.shape}, more than can be read")
        voxels = np.asanyarray(found.dataobj)
    except (nibabel.filebasedimages.ImageFileError, EOFError, zlib.error) as error:
        raise UserError(f"{path.name} cannot be read ({error})") from None

    if voxels.ndim not in (3, 4):
        raise UserError(f"{path.name} has {voxels.ndim} dimensions, expected 3, or 4 with the channels last")

    values = torch.tensor(voxels.astype(np.float32)).reshape(*voxels.shape[:3], -1).movedim(-1, 0)

    return MetaTensor(values, affine=torch.tensor(found.affine))


def turned(volume: MetaTensor, reading: Reading) -> MetaTensor:
    """The volume with its axes in the directions of ``reading.orientation``."""
    return cast("MetaTensor", Orientation(axcodes=reading.orientation, labels=None)(volume))


def resampled(volume: MetaTensor, reading: Reading, mode: str = "bilinear") -> MetaTensor:
    """The volume with voxels of the size ``reading.spacing``.

    Raises:
        UserError: there would be too many of them.
    """
    if reading.spacing is None:
        return volume

    # A header may say that a voxel is a kilometre wide.
    sides = [side * own / new for side, own, new in zip(volume.shape[1:], volume.pixdim, reading.spacing, strict=True)]
    if not math.prod(max(1.0, float(side)) for side in sides) <= MOST_VOXELS:
        shown = " x ".join(f"{side:.0f}" for side in sides)
        raise UserError(
            f"at the spacing {list(reading.spacing)} it would have {shown} voxels, too many to hold in memory"
        )

    return cast("MetaTensor", Spacing(pixdim=tuple(reading.spacing), mode=mode)(volume))


def normalised(volume: Tensor, reading: Reading) -> Tensor:
    """The intensities as the network takes them.

    Args:
        volume: shape (channels, *size).
        reading: How.

    Raises:
        UserError: the volume has other channels than the network takes, or voxels that are not numbers.
    """
    values = torch.as_tensor(volume).as_subclass(Tensor)
    if len(values) != reading.num_channels:
        raise UserError(f"the image has {len(values)} channels, the network takes {reading.num_channels}")
    if not torch.isfinite(values).all():
        raise UserError(f"{int((~torch.isfinite(values)).sum())} voxels are NaN or infinite")

    if reading.intensity is not None:
        low, high = reading.intensity
        scaled = ScaleIntensityRange(low, high, 0.0, 1.0, clip=True)(values)
        return torch.as_tensor(scaled).as_subclass(Tensor)

    std, mean = torch.std_mean(values, dim=(1, 2, 3), correction=0, keepdim=True)

    return (values - mean) / std.clamp_min(1e-6)


def read_pair(pair: Pair, reading: Reading) -> tuple[Tensor, Tensor]:
    """The image and its labels, as the network takes them.

    Returns:
        The image, shape (channels, *size), and its labels, shape (*size,).

    Raises:
        UserError: a file cannot be read, or the two do not fit each other.
    """
    image, labels = (read_file(path) for path in pair)
    if image.shape[1:] != labels.shape[1:] or len(labels) != 1:
        sizes = [tuple(file.shape[1:]) if len(file) == 1 else (*file.shape[1:], len(file)) for file in (image, labels)]
        raise UserError(f"the image has size {sizes[0]}, its labels {sizes[1]}")
    if reading.spacing is not None and not torch.allclose(image.affine, labels.affine, atol=NEAR):
        raise UserError("the image and its labels lie on different grids, so they cannot be resampled to one spacing")

    found = torch.unique(labels.as_tensor())
    if bad := sorted(set(found.tolist()) - set(range(reading.classes))):
        raise UserError(f"the labels have {bad[0]:g}, expected whole numbers from 0 to {reading.classes - 1}")

    volume = normalised(resampled(turned(image, reading), reading), reading)
    classes = resampled(turned(labels, reading), reading, mode="nearest")

    return volume, classes.as_tensor()[0].round().long()


def write_classes(logits: Tensor, turned_volume: MetaTensor, grid: MetaTensor, like: Path, target: Path) -> np.ndarray:
    """Writes the class of each voxel as NIfTI, on the very grid and in the orientation of the input.

    Args:
        logits: On ``grid``, shape (classes, *size).
        turned_volume: The input with its axes turned, not resampled.
        grid: The volume that the network got.
        like: The input's file.
        target: The file to write.

    Returns:
        The classes, with the axes turned, shape (*size,).
    """
    if grid is not turned_volume:
        back = SpatialResample(mode="bilinear", padding_mode="border")
        logits = back(
            MetaTensor(logits.float(), affine=grid.affine),
            dst_affine=turned_volume.affine,
            spatial_size=turned_volume.shape[1:],
        )

    classes = np.asarray(logits.argmax(0).cpu()).astype(np.uint8)
    files = cast("Any", nibabel)
    affine = turned_volume.affine.numpy()
    here, there = (files.orientations.io_orientation(each) for each in (affine, files.load(like).affine))
    mask = files.Nifti1Image(classes, affine).as_reoriented(files.orientations.ornt_transform(here, there))
    files.save(mask, target)

    return classes


class Volumes(Dataset[dict[str, Tensor]]):
    """Pairs with margins around them, or patches drawn from each.

    Args:
        pairs: The files.
        reading: How they are read.
        size: Of a sample; or, for whole volumes, the size that a volume gets for the one that it has.
        patches: Drawn from each pair.
        stream: The seed of the draws; None pads instead.
        foreground: The share of patches that are centred on a voxel of a class above 0; 0 draws them anywhere.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        reading: Reading,
        size: Sequence[int] | Callable[[Sequence[int]], Sequence[int]],
        patches: int = 1,
        stream: int | None = None,
        foreground: float = 0.0,
    ) -> None:
        self.pairs, self.reading, self.size = pairs, reading, size
        self.patches, self.stream, self.foreground = patches, stream, foreground
        self.kept: dict[Pair, tuple[Tensor, Tensor]] = {}
        self.room = KEPT

    def __len__(self) -> int:
        return len(self.pairs) * self.patches

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """A sample: ``pixel_values``, shape (channels, *size), and ``labels``, shape (*size,)."""
        image, labels = self._read(self.pairs[index % len(self.pairs)])

        if callable(self.size):
            size = self.size(labels.shape)
        else:
            size = self.size

        if self.stream is not None:
            image, labels = self._patch(image, labels, size, np.random.default_rng([self.stream, index]))

        # A label takes one byte.
        return with_margins({"pixel_values": image, "labels": labels.to(torch.uint8)}, size)

    def _read(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """The pair; those that are read first are kept for the epochs that follow, as many as there is room for."""
        if pair in self.kept:
            return self.kept[pair]

        found = read_pair(pair, self.reading)
        size = sum(tensor.nbytes for tensor in found)
        if size <= self.room:
            self.kept[pair] = found
            self.room -= size

        return found

    def _patch(
        self, image: Tensor, labels: Tensor, size: Sequence[int], random: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        if self.foreground and labels.any():
            crop = RandCropByPosNegLabel(
                size, pos=self.foreground, neg=1 - self.foreground, num_samples=1, allow_smaller=True
            )
            crop.set_random_state(seed=int(random.integers(2**32)))
            both = torch.cat([image, labels[None].to(image.dtype)])
            found = torch.as_tensor(crop(both, label=labels[None])[0]).as_subclass(Tensor)
            return found[:-1], found[-1].long()

        room = [max(0, length - most) for length, most in zip(labels.shape, size, strict=True)]
        start = [int(random.integers(free + 1)) for free in room]
        window = (slice(None), *(slice(at, at + most) for at, most in zip(start, size, strict=True)))

        return image[window], labels[window[1:]]


def with_margins(sample: dict[str, Tensor], size: Sequence[int]) -> dict[str, Tensor]:
    """The sample in the middle of a larger one, whose margins are background.

    Args:
        sample: ``pixel_values``, shape (channels, *size), and ``labels``, shape (*size,).
        size: Of the larger one.
    """
    image, labels = sample["pixel_values"], sample["labels"]
    missing = [most - length for length, most in zip(labels.shape, size, strict=True)]
    margins = [width for lack in reversed(missing) for width in (lack // 2, lack - lack // 2)]

    return {"pixel_values": pad(image, margins, value=float(image.min())), "labels": pad(labels, margins)}


def batch_of(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch of samples, each with margins up to the largest of them."""
    size = [max(lengths) for lengths in zip(*(sample["labels"].shape for sample in samples), strict=True)]
    padded = [with_margins(sample, size) for sample in samples]

    return {key: torch.stack([sample[key] for sample in padded]) for key in ("pixel_values", "labels")}
