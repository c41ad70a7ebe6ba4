"""``VolumeNetwork``: any segmentation network of MONAI as a model of transformers, given by its name and arguments.

The name is looked up among the classes of ``monai.networks.nets`` and nowhere else, and the arguments are plain values,
so that a config which somebody sent cannot name code to run.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import monai.networks.nets
import torch
from monai.inferers.utils import sliding_window_inference
from monai.losses.dice import DiceCELoss
from monai.losses.ds_loss import DeepSupervisionLoss
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SemanticSegmenterOutput

from flora.errors import UserError, user_errors
from flora.storage.parsing import read_yaml
from flora.storage.tensors import read_pickled, read_tensors

NETS = "monai.networks.nets"
BUNDLE_CONFIGS = ("inference.json", "inference.yaml", "train.json", "train.yaml")
BUNDLE_WEIGHTS = Path("models") / "model.pt"
# What trainers and compilers put before the names of weights.
WRAPPED = ("module.", "network.", "_orig_mod.")
# How many names of weights a message has.
SHOWN = 3


class VolumeNetworkConfig(PretrainedConfig):
    """What a :class:`VolumeNetwork` is built from.

    Args:
        network: The name of a class in ``monai.networks.nets``.
        network_args: Its arguments, plain values. The numbers of channels and classes, ``spatial_dims`` and
            ``img_size`` are filled in.
        num_channels: Of the volumes.
        classes: Of voxels, the background included.
        patch: The size of a volume that the network takes; larger ones go through it in windows of this size.
    """

    model_type = "volume_network"

    def __init__(
        self,
        network: str = "UNet",
        network_args: Mapping[str, Any] | None = None,
        num_channels: int = 1,
        classes: int = 2,
        patch: Sequence[int] = (96, 96, 96),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.network, self.network_args = network, dict(network_args or {})
        self.num_channels, self.classes, self.patch = num_channels, classes, list(patch)

    def padded(self, size: Sequence[int]) -> list[int]:
        """The size that volumes of ``size`` are padded to: at least one patch."""
        return [max(length, least) for length, least in zip(size, self.patch, strict=True)]

    @property
    def image_size(self) -> list[int]:
        """The size that it takes in one piece."""
        return self.patch


class VolumeNetwork(PreTrainedModel):
    """A network of MONAI with the loss Dice + cross entropy, saved and loaded as transformers does.

    In training it takes patches. In evaluation it takes volumes of any size, by MONAI's sliding window.

    Examples:
        >>> args = {"channels": [4, 8], "strides": [2]}
        >>> model = VolumeNetwork(VolumeNetworkConfig("UNet", args, classes=3, patch=[8, 8, 8])).eval()
        >>> tuple(model(torch.zeros(1, 1, 13, 9, 5)).logits.shape)
        (1, 3, 13, 9, 5)
    """

    config_class = VolumeNetworkConfig
    main_input_name = "pixel_values"

    def __init__(self, config: VolumeNetworkConfig) -> None:
        super().__init__(config)
        self.network = build(config)
        self.loss = DeepSupervisionLoss(DiceCELoss(to_onehot_y=True, softmax=True))
        self.second_names = second_names(self)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """The weights that are the same object as another, as transformers asks for them when it loads."""
        return dict(self.second_names)

    def save_pretrained(self, save_directory: Any, *args: Any, **options: Any) -> None:
        """As transformers does it, with each weight under its first name alone."""
        weights = {name: value for name, value in self.state_dict().items() if name not in self.second_names}
        super().save_pretrained(save_directory, *args, **{"state_dict": weights, **options})

    def _init_weights(self, module: nn.Module) -> None:
        """Every layer starts as MONAI starts it."""

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> SemanticSegmenterOutput:
        """Classifies each voxel.

        Args:
            pixel_values: Volumes, shape (batch, channels, *size); in training ``size`` is the patch.
            labels: The classes of the voxels, shape (batch, *size).

        Returns:
            Logits, shape (batch, classes, *size), and with labels the loss.
        """
        if self.training or list(pixel_values.shape[2:]) == self.config.patch:
            found = levels(self.network(pixel_values))
        else:
            found = [self._by_windows(pixel_values)]

        loss = None
        if labels is not None:
            loss = self.loss(found if len(found) > 1 else found[0], labels[:, None].long())

        return SemanticSegmenterOutput(loss, found[0])

    def _by_windows(self, volumes: Tensor) -> Tensor:
        logits = sliding_window_inference(
            volumes,
            self.config.patch,
            1,
            lambda window: levels(self.network(window))[0],
            mode="gaussian",
            cval=float(volumes.min()),
        )
        return cast("Tensor", logits)


def levels(output: Any) -> list[Tensor]:
    """What a network gives, the finest first: some give coarser levels too, in a list or along a second dimension."""
    if isinstance(output, Tensor) and output.ndim == 6:
        return list(output.unbind(1))
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, (list, tuple)):
        return [level for level in output if level is not None]

    raise UserError(f"it gives a {type(output).__name__}, expected a tensor or a list of tensors")


def second_names(model: nn.Module) -> dict[str, str]:
    """The other names of parameters and buffers that a model holds more than once -> the first name of each."""
    seen: dict[int, str] = {}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: first for name, tensor in tensors if (first := seen.setdefault(id(tensor), name)) != name}


# ---- from a name and arguments ---------------------------------------------------------------------------------------


def network_class(name: str) -> Any:
    """The class of that name in ``monai.networks.nets``.

    Raises:
        UserError: there is none, or it is no network from volumes to classes of voxels; names the nearest.
    """
    takes = ("in_channels", "out_channels")
    known = {
        each: found
        for each, found in vars(monai.networks.nets).items()
        if isinstance(found, type) and issubclass(found, nn.Module) and set(takes) <= set(_parameters(found))
    }
    if name in known:
        return known[name]

    # MONAI spells most of them in several ways.
    near = difflib.get_close_matches(name, [each for each, found in known.items() if found.__name__ == each])
    if near:
        hint = f"; did you mean {' or '.join(map(repr, near))}?"
    else:
        hint = ", such as 'DynUNet', 'SegResNet', 'SwinUNETR' or 'UNet'"

    raise UserError(f"task.network is {name!r}, expected a segmentation network of {NETS}{hint}")


def _parameters(network: type) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(network).parameters


def build(config: VolumeNetworkConfig) -> nn.Module:
    """The network of a config, started as MONAI starts it.

    Raises:
        UserError: MONAI does not take the arguments, or they contradict the other settings.
    """
    kind = network_class(config.network)
    parameters = _parameters(kind)
    filled = {
        "spatial_dims": 3,
        "in_channels": config.num_channels,
        "out_channels": config.classes,
        "img_size": config.patch,
    }
    fixed = {name: value for name, value in filled.items() if name in parameters}
    for name, value in config.network_args.items():
        if name in fixed and name != "img_size" and value != fixed[name]:
            owner = {"in_channels": "task.num_channels", "out_channels": "task.classes"}.get(name, "a volume")
            raise UserError(f"task.network_args has {name}={value!r}, but {owner} says {fixed[name]}")

    given = {**fixed, **config.network_args}
    known = ", ".join(parameters)
    about = f"MONAI's {config.network} does not take task.network_args (its arguments: {known})"

    # transformers builds on the meta device, on which some networks cannot compute their constants.
    with torch.device("cpu"), user_errors(Exception, about=about):
        return cast("nn.Module", kind(**given))


def check_network(config: VolumeNetworkConfig) -> None:
    """Checks, without computing anything, that the network gives the classes of a patch.

    Raises:
        UserError: it does not take the patch, or gives something else.
    """
    network = build(config).to("meta")
    expected = (2, config.classes, *config.patch)
    sample = torch.zeros(2, config.num_channels, *config.patch, device="meta")

    for training in (True, False):
        about = f"MONAI's {config.network} does not take task.patch={config.patch}"
        with torch.no_grad(), user_errors(Exception, about=about):
            found = [tuple(level.shape) for level in levels(network.train(training)(sample))]

        if not found or found[0] != expected or any(len(shape) != len(expected) for shape in found):
            raise UserError(
                f"MONAI's {config.network} gives {found} for two patches, expected {expected}: one number for each "
                "class and voxel; take another network or patch"
            )


# ---- a bundle of MONAI -----------------------------------------------------------------------------------------------


def read_bundle(folder: Path) -> tuple[str, dict[str, Any]]:
    """The name and the arguments of the network that a bundle defines as ``network_def``.

    Args:
        folder: The bundle, with ``configs/inference.json`` or ``configs/train.json`` (or ``.yaml``).

    Raises:
        FileNotFoundError: there is no such config.
        UserError: the definition is not one class of ``monai.networks.nets`` with plain values, but code to run.
    """
    paths = [folder / "configs" / name for name in BUNDLE_CONFIGS]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"task.network is the folder {folder}, which has none of {', '.join(map(str, paths))}")

    # JSON is YAML too.
    found = read_yaml(path)
    defined = found.get("network_def") if isinstance(found, dict) else None
    if not isinstance(defined, dict) or not isinstance(defined.get("_target_"), str):
        raise UserError(f"{path} has no network_def with a _target_; give task.network and task.network_args")

    target, arguments = defined["_target_"], {key: value for key, value in defined.items() if key != "_target_"}
    library, _, name = target.rpartition(".")
    if library and library != NETS and not library.startswith(f"{NETS}."):
        raise UserError(f"{path}: the network is {target}, which is not part of {NETS}, so it is not imported")

    for key, value in arguments.items():
        if key.startswith("_") or _has_code(value):
            raise UserError(
                f"{path}: network_def has {key}={value!r}, which MONAI would run or look up; flora runs nothing of a "
                "bundle. Give task.network and task.network_args with the values written out"
            )

    return name, arguments


def _has_code(value: Any) -> bool:
    """Whether MONAI would take a value of a bundle's config for code, a reference or an object to make."""
    if isinstance(value, str):
        return value.startswith(("$", "@", "%"))
    if isinstance(value, dict):
        return "_target_" in value or any(map(_has_code, [*value, *value.values()]))
    if isinstance(value, list):
        return any(map(_has_code, value))
    return False


# ---- weights ---------------------------------------------------------------------------------------------------------


def load_weights(network: nn.Module, path: Path, new_layers: Sequence[str] = ()) -> None:
    """Puts the weights of a file into a network.

    Args:
        network: To fill.
        path: A safetensors file, or a checkpoint of torch, which is read without running anything in it.
        new_layers: Names of layers that stay as they are, such as an output layer with another number of classes.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: the file cannot be read, or holds other weights than the network has; names the first.
    """
    if path.suffix == ".safetensors":
        stored, _ = read_tensors(path)
    else:
        stored = read_pickled(path)

    wanted = network.state_dict()
    stored = unwrapped(stored, wanted)
    # A layer that a network holds twice may be stored once.
    for name, first in second_names(network).items():
        for missing, there in ((name, first), (first, name)):
            if missing not in stored and there in stored:
                stored[missing] = stored[there]

    unknown = [name for name in new_layers if not any(_inside(key, name) for key in wanted)]
    if unknown:
        raise UserError(f"task.new_layers has {unknown[0]!r}, which no weight of the network begins with")

    new = {key for key in wanted if any(_inside(key, name) for name in new_layers)}
    stored = {key: value for key, value in stored.items() if not any(_inside(key, name) for name in new_layers)}
    faults = {
        "missing in the file": sorted(wanted.keys() - stored.keys() - new),
        "not in the network": sorted(stored.keys() - wanted.keys()),
        "of another shape": [
            f"{key} {tuple(value.shape)} for {tuple(wanted[key].shape)}"
            for key, value in stored.items()
            if key in wanted and value.shape != wanted[key].shape
        ],
    }
    told = [f"{len(names)} {what} ({', '.join(names[:SHOWN])})" for what, names in faults.items() if names]
    if told:
        raise UserError(
            f"the weights in {path} do not fit task.network and task.network_args: {'; '.join(told)}. Give the "
            "arguments that they were trained with; layers that should start at random go into task.new_layers"
        )

    network.load_state_dict(stored, strict=False)


def unwrapped(stored: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights without what a trainer has put before every name, as long as the network does not know the names."""
    names = dict(stored)
    for _ in WRAPPED:
        prefix = next((each for each in WRAPPED if names and all(key.startswith(each) for key in names)), None)
        if prefix is None or names.keys() & wanted.keys():
            break
        names = {key.removeprefix(prefix): value for key, value in names.items()}

    return names


def _inside(key: str, layer: str) -> bool:
    return key == layer or key.startswith(f"{layer}.")


AutoConfig.register(VolumeNetworkConfig.model_type, VolumeNetworkConfig, exist_ok=True)
AutoModel.register(VolumeNetworkConfig, VolumeNetwork, exist_ok=True)
