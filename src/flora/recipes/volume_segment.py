"""Organs and tissues in volumes: a network of MONAI, its Conv3d and ConvTranspose3d adapted as 5-dimensional weights.

Data: NIfTI files as the Medical Segmentation Decathlon lays them, ``imagesTr/NAME.nii.gz`` with
``labelsTr/NAME.nii.gz``; ``imagesVal`` and ``imagesTs`` with their labels where there are such. Volumes are turned to
the same axes and, on request, resampled to one spacing. In evaluation each keeps its size, up to what the network
divides it by. The draw of a patch depends on its number and the seed alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from monai.inferers.utils import sliding_window_inference
from monai.metrics.meandice import compute_dice
from torch import Tensor, nn
from transformers import AutoConfig, EvalPrediction, PreTrainedModel, Trainer

from flora.data.files import Item
from flora.data.pretrained import load_pretrained
from flora.data.records import Bad, sift
from flora.data.results import colours, hex_colours
from flora.data.samples import locate
from flora.data.shown import FEW, Findings, Shown, grey, overlaid
from flora.data.splits import drawn, is_local, with_held_out
from flora.data.volume_files import (
    NIFTI,
    Pair,
    Reading,
    Volumes,
    batch_of,
    normalised,
    read_file,
    read_pair,
    resampled,
    turned,
    write_classes,
)
from flora.data.volume_network import (
    BUNDLE_WEIGHTS,
    VolumeNetwork,
    VolumeNetworkConfig,
    check_network,
    load_weights,
    network_class,
    read_bundle,
)
from flora.data.volume_unet import VolumeUNet, VolumeUNetConfig
from flora.errors import UserError
from flora.recipes import Data, Request, Tested
from flora.storage.atomic import cache_folder, staged_folder
from flora.storage.progress import hidden_bars

METRIC = "dice"
PARTS = {"train": "Tr", "validation": "Val", "test": "Ts"}
# Each letter is a direction of its axis.
AXES = ("LR", "PA", "IS")
# A label is one byte, in masks too.
MOST_CLASSES = 256
# The seed of a network that starts at random.
BASE_SEED = 0
INPUT_FILES = NIFTI
Config = VolumeUNetConfig | VolumeNetworkConfig


class VolumeTrainer(Trainer):
    """A Trainer that keeps of each volume it measures the Dice coefficients, and not what the network made of it."""

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
        """Of a batch: the loss, the coefficients, shape (batch, classes - 1), and a number in the place of each label.

        Volumes of different sizes cannot be put into one array, and those of a whole test set take too much memory.
        """
        loss, logits, labels = cast("Any", super().prediction_step(model, inputs, *args, **options))
        return loss, dice_of(logits, labels), labels[:, 0, 0, 0]


TRAINER = VolumeTrainer


@dataclass
class Task:
    """Settings of the data and the base model.

    Args:
        network: a segmentation network of MONAI by the name of its class in monai.networks.nets, such as SegResNet, or
            the folder of a MONAI bundle whose network_def is plain; null takes task.model, or a VolumeUNet.
        network_args: arguments of that class, as {"init_filters": 8}; they go before those of a bundle.
        weights: a safetensors file or torch checkpoint with the pretrained weights of the network; null takes those of
            the bundle, or starts at random.
        new_layers: layers that start at random, because the weights have another number of classes; name them in
            adapter.modules_to_save too.
        model: a folder or hub id that VolumeUNet.save_pretrained or `flora merge` wrote; goes before task.network.
        data: a folder with imagesTr and labelsTr, or the hub id of a data set with these folders.
        num_channels, classes: of the volumes and of voxels, the background included.
        channels, strides, res_units: shape of a random VolumeUNet, see VolumeUNetConfig.
        spacing: the size of a voxel to resample to, as [1.0, 1.0, 2.5]; null leaves volumes as they are.
        orientation: of the axes, as MONAI writes it.
        intensity: lowest and highest intensity, which become 0 and 1, as [-175, 250] for abdominal CT; null gives each
            channel of each volume the mean 0 and the standard deviation 1.
        patch: size of the training samples, drawn from the volumes; null trains on whole volumes.
        patches: drawn from each volume in an epoch.
        foreground: share of the patches that are centred on a labelled voxel; 0 draws them anywhere.
        train_size: training volumes, drawn by the seed; null takes all.
        bad_data: "error" stops at volumes that cannot be used, "skip" leaves them out.
    """

    network: str | None = None
    network_args: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    new_layers: list[str] = field(default_factory=list)
    model: str | None = None
    data: str = "./Task04_Hippocampus"
    num_channels: int = 1
    classes: int = 3
    channels: list[int] = field(default_factory=lambda: [16, 32, 64, 128])
    strides: list[int] = field(default_factory=lambda: [2, 2, 2])
    res_units: int = 2
    spacing: list[float] | None = None
    orientation: str = "RAS"
    intensity: list[float] | None = None
    patch: list[int] | None = None
    patches: int = 1
    foreground: float = 0.0
    train_size: int | None = None
    bad_data: Bad = "error"

    def __post_init__(self) -> None:
        self._check_network()
        self._check_reading()

    def _check_network(self) -> None:
        if len(self.strides) != len(self.channels) - 1:
            raise UserError(f"task.strides {self.strides} must be one fewer than task.channels {self.channels}")
        if not 2 <= self.classes <= MOST_CLASSES:
            raise UserError(f"task.classes is {self.classes}, expected 2 to {MOST_CLASSES}: the background counts")
        if self.patch is not None and (len(self.patch) != 3 or min(self.patch) < 1):
            raise UserError(f"task.patch is {self.patch}, expected three sizes")
        if self.network is None and (self.network_args or self.weights or self.new_layers):
            raise UserError("task.network_args, task.weights and task.new_layers belong to task.network, which is null")
        if self.network is not None and self.model is None and self.patch is None:
            raise UserError("task.network needs task.patch, the size that the network takes, such as [96, 96, 96]")

    def _check_reading(self) -> None:
        if self.spacing is not None and (len(self.spacing) != 3 or min(self.spacing) <= 0):
            raise UserError(f"task.spacing is {self.spacing}, expected three sizes above 0, in millimetres")
        if [sum(letter in axis for letter in self.orientation) for axis in AXES] != [1, 1, 1]:
            raise UserError(f"task.orientation is {self.orientation!r}, expected one of L or R, A or P, S or I: 'RAS'")
        if self.intensity is not None and (len(self.intensity) != 2 or self.intensity[0] >= self.intensity[1]):
            raise UserError(f"task.intensity is {self.intensity}, expected the lowest and the highest value")
        if not 0 <= self.foreground <= 1:
            raise UserError(f"task.foreground is {self.foreground}, expected a share from 0 to 1")

    def reading(self, config: Config) -> Reading:
        """How volumes are read for a network."""
        return Reading(config.num_channels, config.classes, self.orientation, self.spacing, self.intensity)


def find_pairs(root: Path) -> dict[str, list[Item[Pair]]]:
    """The images of each part with the files that their labels should be in; raises where none is to train on."""
    parts = {}
    for part, ending in PARTS.items():
        images, labels = root / f"images{ending}", root / f"labels{ending}"
        # The Decathlon keeps the labels of its test images to itself.
        if labels.is_dir():
            files = sorted(p for p in images.glob("*") if p.name.endswith(NIFTI) and not p.name.startswith("."))
            parts[part] = [Item(str(path), Pair(path, labels / path.name)) for path in files]

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
    """Where the network is: the folder or hub id of ``task.model``, or the cache, where a network is put first."""
    if task.model is not None:
        return locate(task.model)
    if task.network is not None:
        return _monai_network(task, task.network)

    config = VolumeUNetConfig(task.num_channels, task.classes, task.channels, task.strides, task.res_units)
    return _cached("volume_unet", config.to_json_string().encode(), lambda: VolumeUNet(config))


def _is_bundle(network: str) -> bool:
    """Whether it is the folder of a bundle; a bare name is a class even where a folder is called like it."""
    return "/" in network or (Path(network) / "configs").is_dir()


def _trained_weights(task: Task) -> str | None:
    """The file with the weights of ``task.network``, or None where it starts at random."""
    if task.weights is not None or task.network is None or not _is_bundle(task.network):
        return task.weights

    of_bundle = Path(task.network).expanduser() / BUNDLE_WEIGHTS
    if of_bundle.is_file():
        return str(of_bundle)
    return None


def notes(task: Task) -> list[str]:
    """What is said before training."""
    if task.model is not None or _trained_weights(task) is not None:
        return []
    return ["the base network starts at random, so an adapter has little to build on; give task.weights or task.model"]


def _monai_network(task: Task, network: str) -> str:
    """The folder of a network of MONAI with its weights; the same settings and weights give the same folder."""
    name, arguments, weights = network, task.network_args, _trained_weights(task)

    if _is_bundle(network):
        name, defined = read_bundle(Path(network).expanduser())
        arguments = {**defined, **arguments}

    network_class(name)
    config = VolumeNetworkConfig(name, arguments, task.num_channels, task.classes, cast("list[int]", task.patch))
    key = [config.to_json_string(), *task.new_layers]
    if weights is not None:
        file = Path(weights).expanduser()
        if not file.is_file():
            raise FileNotFoundError(f"task.weights is {weights!r}: no such file")
        key.append(hashlib.sha256(file.read_bytes()).hexdigest())

    def make() -> VolumeNetwork:
        check_network(config)
        model = VolumeNetwork(config)
        if weights is not None:
            load_weights(model.network, file, task.new_layers)
        return model

    return _cached("volume_network", "\n".join(key).encode(), make)


def _cached(kind: str, key: bytes, make: Callable[[], PreTrainedModel]) -> str:
    folder = cache_folder() / f"{kind}-{hashlib.sha256(key).hexdigest()[:12]}"
    if not folder.is_dir():
        with torch.random.fork_rng(), staged_folder(folder) as staged, hidden_bars():
            torch.manual_seed(BASE_SEED)
            make().save_pretrained(staged)

    return str(folder)


def network_config(where: str) -> Config:
    """The config of the network in a folder or on the hub."""
    found = load_pretrained(AutoConfig, where)
    if not isinstance(found, (VolumeUNetConfig, VolumeNetworkConfig)):
        raise UserError(
            f"task.model {where!r} is a {found.model_type}, expected a network that `flora merge` or "
            "VolumeUNet.save_pretrained wrote; give a network of MONAI as task.network"
        )

    return found


def load_data(task: Task, seed: int) -> Data:
    """The data, every volume read once to see that it can be; the seed draws ``train_size`` volumes and the patches.

    Raises:
        FileNotFoundError, ValueError: volumes or the network cannot be used; names file and reason.
    """
    config = network_config(network_folder(task))
    if isinstance(config, VolumeNetworkConfig):
        patch: list[int] | None = config.patch
    else:
        patch = task.patch

    if patch is not None and config.padded(patch) != patch:
        raise UserError(
            f"task.patch is {patch}, which the strides do not divide; the next size that works is "
            f"{config.padded(patch)}"
        )

    reading = task.reading(config)
    sizes: dict[Pair, tuple[int, ...]] = {}

    def check(pair: Pair) -> None:
        sizes[pair] = tuple(read_pair(pair, reading)[1].shape)

    parts = find_pairs(data_folder(locate(task.data)))
    good = {part: sift(items, check, bad=task.bad_data, what=f"{part} volumes") for part, items in parts.items()}
    pairs = with_held_out({part: [item.value for item in items] for part, items in good.items()})
    pairs["train"] = drawn(pairs["train"], task.train_size, seed, "volumes")

    if patch is not None:
        train = Volumes(pairs["train"], reading, patch, task.patches, seed, task.foreground)
    else:
        largest = [max(lengths) for lengths in zip(*(sizes[pair] for pair in pairs["train"]), strict=True)]
        train = Volumes(pairs["train"], reading, config.padded(largest))

    validation, test = (Volumes(pairs[part], reading, config.padded) for part in ("validation", "test"))

    return Data(train, validation, test, collate=batch_of)


def load_base(task: Task) -> PreTrainedModel:
    """The network."""
    where = network_folder(task)
    if isinstance(network_config(where), VolumeNetworkConfig):
        kind: Any = VolumeNetwork
    else:
        kind = VolumeUNet

    return cast("PreTrainedModel", load_pretrained(kind, where).to(memory_format=torch.channels_last_3d))


def predictor(task: Task, model: Any, folder: Path) -> Callable[[Request], dict[str, Any]]:
    """Writes the labels of a volume as NIfTI, on the very grid and in the orientation of the input."""
    reading = task.reading(model.config)

    def answer(request: Request) -> dict[str, Any]:
        source, path = Path(request.given), request.file(".nii.gz")
        volume = turned(read_file(source), reading)
        grid = resampled(volume, reading)
        logits = logits_of(model, normalised(grid, reading), task.patch)
        classes = write_classes(logits, volume, grid, source, path)
        counts = np.bincount(classes.ravel(), minlength=model.config.classes)

        return {"file": str(path), "voxels": {str(number): int(count) for number, count in enumerate(counts)}}

    return answer


def logits_of(model: Any, volume: Tensor, patch: list[int] | None) -> Tensor:
    """The logits of each voxel.

    Args:
        model: The network.
        volume: The image, shape (channels, *size).
        patch: The size of the windows that are slid over the volume; None takes it in one piece. A ``VolumeNetwork``
            slides windows itself.

    Returns:
        shape (classes, *size).
    """
    batch = volume[None].to(model.device)
    if isinstance(model.config, VolumeNetworkConfig):
        return cast("Tensor", model(pixel_values=batch).logits[0].cpu())

    window = patch or model.config.padded(list(volume.shape[1:]))
    logits = sliding_window_inference(
        batch,
        window,
        1,
        lambda part: model(pixel_values=part).logits,
        mode="gaussian",
        padding_mode="constant",
        cval=float(volume.min()),
    )

    return logits[0].cpu()


def dice_of(logits: Tensor, labels: Tensor) -> Tensor:
    """The Dice coefficient of each volume and class but the background; NaN for a class that a volume lacks.

    Args:
        logits: shape (batch, classes, *size).
        labels: shape (batch, *size).

    Returns:
        shape (batch, classes - 1).
    """
    found, truth = logits.argmax(1, keepdim=True), labels[:, None]
    return compute_dice(found, truth, include_background=False, num_classes=logits.shape[1])


def findings(tested: Tested) -> Findings:
    """The Dice coefficient of each class, and slices of the volumes that the model does worst on."""
    volumes, model = cast("Volumes", tested.data.test), cast("Any", tested.model)
    # shape: (volumes, classes without the background)
    scores = tested.predictions
    classes = scores.shape[1] + 1
    known = [number for number in range(1, classes) if np.isfinite(scores[:, number - 1]).any()]
    mean = {f"class {number}": float(np.nanmean(scores[:, number - 1])) for number in known}

    # The mean over the classes that a volume has; a volume without any has nothing wrong.
    count = np.isfinite(scores).sum(1)
    means = np.where(count > 0, np.nansum(scores, axis=1) / np.maximum(count, 1), 1.0)
    worst = np.argsort(means)[:FEW].tolist()
    palette = colours(classes)
    examples = []

    # A model that is spread over several processes cannot be run again by one of them.
    for index in worst if model is not None else []:
        sample = volumes[index]
        with torch.no_grad():
            logits = model(pixel_values=sample["pixel_values"][None].to(model.device)).logits

        # shape: (depth, height, width)
        volume, true = sample["pixel_values"][0].numpy(), sample["labels"].numpy()
        found = logits[0].argmax(0).cpu().numpy()

        # The slice across the last axis with the most that is not background.
        at = int(((true > 0) | (found > 0)).sum((0, 1)).argmax())
        plane, truth, answer = (np.rot90(each[:, :, at]) for each in (volume, true, found))
        image = grey(plane)
        pictures = [
            ("image", image),
            ("found", overlaid(image, answer, palette)),
            ("true", overlaid(image, truth, palette)),
        ]
        examples.append(Shown(f"{volumes.pairs[index].image.name}, slice {at}: Dice {means[index]:.3f}", pictures))

    heading = f"Slices of the {len(worst)} test volumes with the lowest Dice, of {len(volumes):,}"
    named = {f"class {number}": colour for number, colour in enumerate(hex_colours(classes))}

    return Findings(heading, examples, scores=mean, score="Dice", colours=named, wide=True)


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """The Dice coefficient, the mean over volumes and foreground classes; a class that a volume lacks is left out."""
    scores = np.asarray(prediction.predictions)
    return {"dice": float(np.nanmean(scores)) if np.isfinite(scores).any() else 0.0}
