"""Organs and tissues in volumes: MONAI's 3-D U-Net, its Conv3d and ConvTranspose3d adapted as five-dimensional weights.

Data: NIfTI files as the Medical Segmentation Decathlon lays them, ``imagesTr/NAME.nii.gz`` with
``labelsTr/NAME.nii.gz``; ``imagesVal`` and ``imagesTs`` with their labels where there are such. Volumes are turned to
the same axes, not resampled; each channel gets mean 0 and standard deviation 1. All are padded to one size, a multiple
of what the strides of the network divide by. The draw of a patch depends on its number and the seed alone.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import nibabel
import numpy as np
import torch
from monai.inferers.utils import sliding_window_inference
from monai.metrics.meandice import compute_dice
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset
from transformers import EvalPrediction

from flora.data.records import Bad, Item, is_local, load_pretrained, sift, with_held_out
from flora.data.samples import locate
from flora.data.volume_unet import VolumeUNet, VolumeUNetConfig
from flora.errors import UserError
from flora.recipes import Data, Request
from flora.storage.atomic import cache_folder, staged_folder
from flora.storage.progress import hidden_bars

METRIC = "dice"
PARTS = {"train": "Tr", "validation": "Val", "test": "Ts"}
NIFTI = (".nii", ".nii.gz")
BASE_SEED = 0  # of a network that starts at random
Pair = tuple[Path, Path]  # files of an image and of its labels


@dataclass
class Task:
    """Settings of the data and the base model.

    Args:
        model: a folder or hub id that VolumeUNet.save_pretrained wrote; null starts from a random network.
        data: a folder with imagesTr and labelsTr, or the hub id of a data set with these folders.
        num_channels, classes, channels, strides, res_units: shape of a random network, see VolumeUNetConfig.
        patch: size of the training samples, drawn from the volumes; null trains on whole volumes.
        patches: drawn from each volume in an epoch.
        bad_data: "error" stops at volumes that cannot be used, "skip" leaves them out.
    """

    model: str | None = None
    data: str = "./Task04_Hippocampus"
    num_channels: int = 1
    classes: int = 3
    channels: list[int] = field(default_factory=lambda: [16, 32, 64, 128])
    strides: list[int] = field(default_factory=lambda: [2, 2, 2])
    res_units: int = 2
    patch: list[int] | None = None
    patches: int = 1
    bad_data: Bad = "error"

    def __post_init__(self) -> None:
        if len(self.strides) != len(self.channels) - 1:
            raise UserError(f"task.strides {self.strides} must be one fewer than task.channels {self.channels}")
        if self.classes < 2:
            raise UserError(f"task.classes is {self.classes}, expected 2 or more: the background counts")
        if self.patch is not None and len(self.patch) != 3:
            raise UserError(f"task.patch is {self.patch}, expected three sizes")


MOST_VOXELS = 2**30


def read_array(path: Path) -> np.ndarray:
    """The voxels of a NIfTI file, its axes turned to right, anterior, superior."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path.name} is not a regular file")

    try:
        found = cast("Any", nibabel).load(path)
        # Told by the header, before anything is allocated.
        if math.prod(found.shape) > MOST_VOXELS:
            raise UserError(f"{path.name} is said to have the size {found.shape}, which is more than can be read")
        return np.asanyarray(cast("Any", nibabel).as_closest_canonical(found).dataobj)
    except (nibabel.filebasedimages.ImageFileError, EOFError, zlib.error) as error:
        raise UserError(f"{path.name} cannot be read ({error})") from None


def read_pair(pair: Pair, config: VolumeUNetConfig) -> tuple[Tensor, Tensor]:
    """The image (channels, *size), normalised, and its labels (*size); raises where they do not fit each other."""
    image, labels = (read_array(path) for path in pair)
    if image.ndim not in (3, 4) or image.shape[:3] != labels.shape:
        raise UserError(f"the image has size {image.shape}, its labels {labels.shape}")

    volume = normalised(image, config)

    if bad := sorted(set(np.unique(labels).tolist()) - set(range(config.classes))):
        raise UserError(f"the labels have {bad[0]:g}, expected whole numbers from 0 to {config.classes - 1}")

    return volume, torch.tensor(labels.astype(np.int64))


def normalised(image: np.ndarray, config: VolumeUNetConfig) -> Tensor:
    """The image as the network takes it: each channel with mean 0 and standard deviation 1.

    Args:
        image: Voxels, shape (*size,) or (*size, channels).
        config: Of the network.

    Returns:
        shape (channels, *size).

    Raises:
        ValueError: The image has other channels than the network takes, or voxels that are no numbers.
    """
    if image.ndim not in (3, 4):
        raise UserError(f"the image has {image.ndim} dimensions, expected 3, or 4 with the channels last")

    volume = torch.tensor(image.astype(np.float32)).reshape(*image.shape[:3], -1).movedim(-1, 0)
    if len(volume) != config.num_channels:
        raise UserError(f"the image has {len(volume)} channels, the network takes {config.num_channels}")
    if not torch.isfinite(volume).all():
        raise UserError(f"{int((~torch.isfinite(volume)).sum())} voxels are NaN or infinite")

    std, mean = torch.std_mean(volume, dim=(1, 2, 3), correction=0, keepdim=True)

    return (volume - mean) / std.clamp_min(1e-6)


class Volumes(Dataset[dict[str, Tensor]]):
    """Pairs padded to ``size``, or ``patches`` of that size from each, drawn by the seed ``stream`` if it is given."""

    def __init__(
        self, pairs: list[Pair], config: VolumeUNetConfig, size: list[int], patches: int = 1, stream: int | None = None
    ) -> None:
        self.pairs, self.config, self.size, self.patches, self.stream = pairs, config, size, patches, stream

    def __len__(self) -> int:
        return len(self.pairs) * self.patches

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image, labels = read_pair(self.pairs[index % len(self.pairs)], self.config)

        if self.stream is not None:
            random = np.random.default_rng([self.stream, index])
            room = [max(0, length - most) for length, most in zip(labels.shape, self.size, strict=True)]
            start = [int(random.integers(free + 1)) for free in room]
            window = (slice(None), *(slice(at, at + most) for at, most in zip(start, self.size, strict=True)))
            image, labels = image[window], labels[window[1:]]

        missing = [most - length for length, most in zip(labels.shape, self.size, strict=True)]
        margins = [width for lack in reversed(missing) for width in (lack // 2, lack - lack // 2)]

        return {"pixel_values": pad(image, margins, value=float(image.min())), "labels": pad(labels, margins)}


def find_pairs(root: Path) -> dict[str, list[Item[Pair]]]:
    """The images of each part with the files that their labels should be in; raises where none is to train on."""
    parts = {}
    for part, ending in PARTS.items():
        images, labels = root / f"images{ending}", root / f"labels{ending}"
        # The Decathlon keeps the labels of its test images to itself.
        if labels.is_dir():
            files = sorted(p for p in images.glob("*") if p.name.endswith(NIFTI) and not p.name.startswith("."))
            parts[part] = [Item(str(path), (path, labels / path.name)) for path in files]

    if not parts.get("train"):
        raise FileNotFoundError(
            f"{root} has no volumes in imagesTr with labels of the same names in labelsTr "
            "(.nii, .nii.gz); rename its folders, or set task.data"
        )

    return parts


def data_folder(where: str) -> Path:
    """The folder of a data set; one of the hub is downloaded."""
    if is_local(where):
        return Path(where)

    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(where, repo_type="dataset"))
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(f"task.data {where!r} is no local path and cannot be loaded ({reason})") from None


def network_folder(task: Task) -> str:
    """Where the network is: the folder or hub id of ``task.model``, or the cache, where a random one is put first."""
    if task.model is not None:
        return locate(task.model)

    config = VolumeUNetConfig(task.num_channels, task.classes, task.channels, task.strides, task.res_units)
    folder = cache_folder() / f"volume_unet-{hashlib.sha256(config.to_json_string().encode()).hexdigest()[:12]}"
    if not folder.is_dir():
        with torch.random.fork_rng(), staged_folder(folder) as staged, hidden_bars():
            torch.manual_seed(BASE_SEED)
            VolumeUNet(config).save_pretrained(staged)

    return str(folder)


def load_data(task: Task, seed: int) -> Data:
    """The data, every volume read once to see that it can be; the seed draws the patches.

    Raises:
        FileNotFoundError, ValueError: volumes or the network cannot be used; names file and reason.
    """
    config = load_pretrained(VolumeUNetConfig, network_folder(task))
    if task.patch is not None and config.padded(task.patch) != task.patch:
        raise UserError(f"task.patch is {task.patch}, the next that the strides divide is {config.padded(task.patch)}")

    parts, check = find_pairs(data_folder(locate(task.data))), partial(read_pair, config=config)
    good = {part: sift(items, check, bad=task.bad_data, what=f"{part} volumes") for part, items in parts.items()}
    pairs = with_held_out({part: [item.value for item in items] for part, items in good.items()})
    sizes = [read_array(labels).shape for part in pairs.values() for _, labels in part]
    size = config.padded([max(lengths) for lengths in zip(*sizes, strict=True)])
    whole = {part: Volumes(pairs[part], config, size) for part in PARTS}

    if task.patch is not None:
        whole["train"] = Volumes(pairs["train"], config, task.patch, task.patches, seed)

    return Data(whole["train"], whole["validation"], whole["test"])


def load_base(task: Task) -> VolumeUNet:
    """The network."""
    return cast(
        "VolumeUNet", load_pretrained(VolumeUNet, network_folder(task)).to(memory_format=torch.channels_last_3d)
    )


INPUT_FILES = NIFTI


def predictor(task: Task, model: Any, folder: Path) -> Callable[[Request], dict[str, Any]]:
    """Writes the labels of a volume as NIfTI, on the very grid and in the orientation of the input."""
    files = cast("Any", nibabel)

    def answer(request: Request) -> dict[str, Any]:
        source = files.load(request.given)
        upright = files.as_closest_canonical(source)
        volume = normalised(read_array(Path(request.given)), model.config)
        labels = classes_of(model, volume, task.patch)

        # Back from right, anterior, superior to the axes that the file has.
        there = files.orientations.io_orientation(source.affine)
        back = files.orientations.ornt_transform(files.orientations.io_orientation(upright.affine), there)
        mask = files.Nifti1Image(labels.astype(np.uint8), upright.affine).as_reoriented(back)
        path = request.file(".nii.gz")
        files.save(mask, path)
        counts = np.bincount(labels.ravel(), minlength=model.config.classes)

        return {"file": str(path), "voxels": {str(number): int(count) for number, count in enumerate(counts)}}

    return answer


def classes_of(model: Any, volume: Tensor, patch: list[int] | None) -> np.ndarray:
    """The class of each voxel.

    Args:
        model: The network.
        volume: The image, shape (channels, *size).
        patch: The size of the windows that are slid over the volume; None takes it in one piece.
    """
    window = patch or model.config.padded(list(volume.shape[1:]))
    logits = sliding_window_inference(
        volume[None].to(model.device),
        window,
        1,
        lambda part: model(pixel_values=part).logits,
        mode="gaussian",
        padding_mode="constant",
        cval=float(volume.min()),
    )

    return logits[0].argmax(0).cpu().numpy()


def preprocess_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """The class of each voxel, which is all that the metric needs of the logits."""
    return logits.argmax(1)


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """The Dice coefficient, the mean over volumes and foreground classes; a class that a volume lacks is left out."""
    predicted, truth = (torch.tensor(cast("Any", each)) for each in (prediction.predictions, prediction.label_ids))
    classes = max(2, int(torch.maximum(predicted.max(), truth.max())) + 1)
    scores = compute_dice(predicted[:, None], truth[:, None], include_background=False, num_classes=classes)
    return {"dice": float(scores.nanmean()) if scores.isfinite().any() else 0.0}
