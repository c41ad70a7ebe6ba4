"""Where a weight of the model is in its files: transformers stores some under other names, split or transposed.

The fused experts of a Mixtral are one parameter in the model and a file entry per expert and projection. transformers
knows the way back (``revert_weight_conversion``); run on the numbers 0, 1, 2, ... it tells for each file entry which
numbers of the parameter it holds, and so how a change of the one is a change of the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from flora.errors import UserError
from flora.storage.checkpoint import Checkpoint


class FileMap:
    """The file entries of each weight of a model.

    Args:
        checkpoint: the files.
        model: the model on the meta device, or None where only the files are known.
    """

    def __init__(self, checkpoint: Checkpoint, model: nn.Module | None) -> None:
        self.checkpoint = checkpoint
        self.model = model

    def find(self, name: str, shape: tuple[int, ...]) -> list[str]:
        """The entries that a weight is made of.

        Raises:
            ValueError: the files do not have it, or with another shape; says what to do.
        """
        if name in self.checkpoint:
            if self.checkpoint.shape(name) != shape:
                raise UserError(
                    f"{name} has shape {self.checkpoint.shape(name)} in {self.checkpoint.path} and {shape} in the "
                    "adapter; give the base model that the adapter was trained on"
                )
            return [name]
        found = list(self._revert(name, torch.empty(shape, device="meta")))
        if found == [name] or any(key not in self.checkpoint for key in found):
            raise UserError(f"{self.checkpoint.path} has no weight {name!r}{self._hint(name)}")
        if sum(math.prod(self.checkpoint.shape(key)) for key in found) != math.prod(shape):
            raise UserError(
                f"{name} of shape {shape} in the adapter does not fit its entries in {self.checkpoint.path}"
            )
        return found

    def _hint(self, name: str) -> str:
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        if name in tied:
            return "; it is tied to another weight, and changing one alone would untie them: untie before training"
        leaf = ".".join(name.split(".")[-2:])
        near = next((key for key in self.checkpoint if key.endswith(leaf)), None)
        return "; give the base model that the adapter was trained on" + (f" (it has {near!r})" if near else "")

    def split(self, name: str, change: Tensor) -> dict[str, Tensor]:
        """The change of a weight as changes of its entries."""
        return {name: change} if name in self.checkpoint else self._revert(name, change)

    def join(self, name: str, shape: tuple[int, ...], entries: Mapping[str, Tensor]) -> Tensor:
        """The weight, from its entries."""
        if name in entries:
            return entries[name]
        whole = torch.empty(math.prod(shape), dtype=next(iter(entries.values())).dtype)
        for key, places in self._revert(name, torch.arange(math.prod(shape)).reshape(shape)).items():
            whole[places.reshape(-1)] = entries[key].reshape(-1)
        return whole.reshape(shape)

    def _revert(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        if self.model is None or not hasattr(self.model, "config"):
            return {name: tensor}
        from transformers import PreTrainedModel
        from transformers.core_model_loading import revert_weight_conversion

        if not isinstance(self.model, PreTrainedModel):
            return {name: tensor}
        return dict(revert_weight_conversion(self.model, {name: tensor}))
