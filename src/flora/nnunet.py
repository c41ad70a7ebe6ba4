"""A trainer for nnU-Net v2 that adapts a trained network, instead of training a new one.

nnU-Net finds trainers by name in the folders of its environment variable ``nnUNet_extTrainer``. A file there with a
subclass says what is adapted; docs/volumes.md has it whole, with the commands.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import flora
from flora.errors import UserError

# Part of the names of nnU-Net's output layers, one for each resolution.
HEAD = "seg_layers."
# What nnU-Net's checkpoints hold beside tensors: numbers of numpy in the log, and the device.
NUMBERS: list[Any] = [
    cast("Any", np)._core.multiarray.scalar, np.dtype, type(np.dtype(np.float64)), type(np.dtype(np.float32)),
    type(np.dtype(np.int64)), torch.device,
]  # fmt: skip


class FloraTrainer(nnUNetTrainer):  # type: ignore[misc]
    """nnU-Net's trainer with the network frozen and an adapter on it.

    What it saves is a checkpoint of nnU-Net's form with the adapter merged, so that ``nnUNetv2_predict`` takes it like
    any other one. Beside each ``checkpoint_NAME.pth`` the folder ``checkpoint_NAME_adapter`` holds the adapter alone.

    Attributes:
        pretrained: The checkpoint of the trained network, of the same architecture and plans. Where the number of
            classes differs, the output layers start at random and are trained whole.
        adapter: What is adapted, and at which rank.
        learning_rate: Of AdamW at the beginning; it falls as nnU-Net's own does.
        epochs: Of the training.

    Examples:
        A file ``trainers/mine.py``::

            import flora
            from flora.nnunet import FloraTrainer

            class nnUNetTrainerMine(FloraTrainer):
                pretrained = "/data/nnUNet_results/Dataset001_Big/.../fold_0/checkpoint_final.pth"
                adapter = flora.FloraConfig(r=8, kernel_r=3, target_modules="all")
    """

    pretrained: ClassVar[str | None] = None
    adapter: ClassVar[flora.FloraConfig] = flora.FloraConfig(r=8, kernel_r=3, target_modules="all")
    learning_rate: ClassVar[float] = 5e-3
    epochs: ClassVar[int] = 100
    adapted: PeftModel | None = None
    network: Any

    def initialize(self) -> None:
        """Builds the network, as nnU-Net does."""
        if self.is_ddp:
            raise UserError("FloraTrainer trains on one GPU; leave out -num_gpus")

        self.initial_lr, self.num_epochs = self.learning_rate, self.epochs
        super().initialize()

    def configure_optimizers(self) -> tuple[Any, Any]:
        """Attaches the adapter, which has to be there before its weights can be given to an optimiser."""
        if self.adapted is None:
            self.adapted = self._attach()

        weights = [weight for weight in self.adapted.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=self.initial_lr, weight_decay=0.0)

        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)

    def _attach(self) -> PeftModel:
        if self.pretrained is None:
            raise UserError(
                f"{type(self).__name__}.pretrained is not set: an adapter is for a network that is trained; give the "
                "path of its checkpoint_final.pth"
            )

        # A compiled network holds the plain one.
        network = getattr(self.network, "_orig_mod", self.network)
        new = load_trained(network, Path(self.pretrained).expanduser())
        config = self.adapter
        if new:
            self.print_to_log_file(f"classes that differ from {self.pretrained}: {', '.join(new)} start at random")
            config = replace(config, modules_to_save=[*(config.modules_to_save or []), *new])

        adapted = cast("PeftModel", get_peft_model(network, config))
        trained = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
        self.print_to_log_file(f"FLoRA trains {trained:,} numbers on {self.pretrained}")

        return adapted

    def merged(self) -> nn.Module:
        """A copy of the network with the adapter merged: nnU-Net's own network, with its names."""
        return cast("nn.Module", copy.deepcopy(cast("Any", self.adapted)).merge_and_unload())

    @contextmanager
    def _merged_network(self) -> Any:
        """Inside, ``network`` is the merged copy."""
        adapted, self.network = self.network, self.merged()
        try:
            yield
        finally:
            self.network = adapted

    def save_checkpoint(self, filename: str) -> None:
        """Writes nnU-Net's checkpoint with the adapter merged, and the adapter alone beside it."""
        if self.disable_checkpointing:
            return

        with self._merged_network():
            super().save_checkpoint(filename)

        cast("Any", self.adapted).save_pretrained(str(adapter_folder(filename)))

    def load_checkpoint(self, filename_or_checkpoint: Any) -> None:
        """Continues from a checkpoint: the adapter from the folder beside it, everything else from the file."""
        if not self.was_initialized:
            self.initialize()

        folder = adapter_folder(filename_or_checkpoint)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} does not exist; {filename_or_checkpoint} was not written by this trainer"
            )

        with self._merged_network():
            super().load_checkpoint(filename_or_checkpoint)

        cast("Any", self.adapted).load_adapter(str(folder), "default", is_trainable=True)


def adapter_folder(checkpoint: str) -> Path:
    """Where the adapter of a checkpoint is."""
    path = Path(checkpoint)
    return path.with_name(f"{path.stem}_adapter")


def load_trained(network: nn.Module, path: Path) -> list[str]:
    """Puts the weights of a checkpoint of nnU-Net into a network; nothing else in the file is used or run.

    Args:
        network: Of nnU-Net.
        path: The checkpoint.

    Returns:
        The names of the output layers that were left as they are, because the checkpoint has other classes.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it is not a checkpoint of nnU-Net, or of another architecture.
    """
    if not path.is_file():
        raise FileNotFoundError(f"pretrained is {path}: no such file")

    try:
        with torch.serialization.safe_globals(NUMBERS):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch raises errors of many kinds.
        reason = str(error).partition("\n")[0][:200]
        raise UserError(f"{path} cannot be read without running what is in it, so it is not read ({reason})") from None

    if not isinstance(found, Mapping) or not isinstance(found.get("network_weights"), Mapping):
        raise UserError(f"{path} is not a checkpoint of nnU-Net: it has no network_weights")

    stored: dict[str, Tensor] = {key.removeprefix("module."): value for key, value in found["network_weights"].items()}
    wanted = network.state_dict()
    odd = sorted(key for key in wanted if key not in stored or stored[key].shape != wanted[key].shape)
    others = [key for key in odd if HEAD not in key] + sorted(stored.keys() - wanted.keys())
    others = [key for key in others if HEAD not in key]
    if others:
        raise UserError(
            f"{path} has another architecture: {len(others)} weights differ (first: {others[0]}). Plan the data set "
            "with the plans of the trained one (nnUNetv2_move_plans_between_datasets), then preprocess it"
        )

    new = sorted({key.rpartition(".")[0] for key in odd})
    kept = {key: value for key, value in stored.items() if key in wanted and key.rpartition(".")[0] not in new}
    network.load_state_dict(kept, strict=False)

    return new
