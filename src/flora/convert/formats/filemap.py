"""Where a weight of the model is in its files, and how it is stored there.

The files of a model need not have its weights under their own names, nor in one piece:

* transformers gives many of them another name (``lm_head.weight`` of LLaVA is ``language_model.lm_head.weight``);
* it stores the fused experts of a Mixtral as an entry for each expert and projection. It knows the way back
  (``revert_weight_conversion``); run on the numbers 0, 1, 2, ... that tells which numbers of the parameter each entry
  holds, and so how a change of the one is a change of the others;
* torch stores a parametrised weight as what it is computed from, such as the length and direction of a weight norm.
"""

from __future__ import annotations

import copy
import math
from functools import cached_property
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from flora.errors import UserError
from flora.layers.names import unsaved
from flora.storage.checkpoint import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# How far, relative to its largest entry, a parametrised weight may be from what was assigned to it.
EXACT = 1e-6


class FileMap:
    """The file entries of each weight of a model.

    Args:
        checkpoint: the files.
        model: the model on the meta device, or None where only the files are known.
    """

    def __init__(self, checkpoint: Checkpoint, model: nn.Module | None) -> None:
        self.checkpoint = checkpoint
        self.model = model

    # ---- names -------------------------------------------------------------------------------------------------------

    @cached_property
    def _entry_of(self) -> dict[str, str]:
        """The name of a weight in the model -> its file entry, for those that are stored in one piece."""
        model = self._transformers_model()
        if model is None:
            return {name: name for name in self.checkpoint}

        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        transforms = get_model_conversion_mapping(model)
        renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        expected = model.state_dict()

        entries: dict[str, str] = {}
        for key in sorted(self.checkpoint):
            name, converter = rename_source_key(key, renamings, converters, model.base_model_prefix, expected)
            if converter is None:
                entries.setdefault(name, key)

        return entries

    def entry(self, name: str) -> str | None:
        """The file entry that holds a tensor in one piece, or None if there is none."""
        found = self._entry_of.get(name)
        if found is None and name in self.checkpoint:
            return name
        return found

    def name_of(self, key: str) -> str:
        """The name in the model of a tensor that the files have in one piece."""
        return self._name_of.get(key, key)

    @cached_property
    def _name_of(self) -> dict[str, str]:
        return {key: name for name, key in self._entry_of.items()}

    def find(self, name: str, shape: tuple[int, ...]) -> list[str]:
        """The entries that a weight is made of.

        Raises:
            UserError: the files do not have it, or with another shape; says what to do.
        """
        key = self.entry(name)
        if key is not None:
            if self.checkpoint.shape(key) != shape:
                raise UserError(
                    f"{name} has shape {self.checkpoint.shape(key)} in {self.checkpoint.path} and {shape} in the "
                    "adapter; give the base model that the adapter was trained on"
                )

            return [key]

        parametrization = self._parametrization(name)
        if parametrization is not None:
            return list(self._originals(name, parametrization).values())

        found = self.stored_as(name, shape)
        if found == [name] or any(key not in self.checkpoint for key in found):
            raise UserError(f"{self.checkpoint.path} has no weight {name!r}{self._hint(name)}")

        if sum(math.prod(self.checkpoint.shape(key)) for key in found) != math.prod(shape):
            raise UserError(
                f"{name} of shape {shape} in the adapter does not fit its entries in {self.checkpoint.path}"
            )

        return found

    def stored_as(self, name: str, shape: tuple[int, ...]) -> list[str]:
        """The entries that transformers would write for a weight, whether the files have them or not."""
        return list(self._revert(name, torch.empty(shape, device="meta")))

    def tied_to(self, name: str) -> str | None:
        """The weight that another one is tied to, and that alone is in the files; None where it is tied to none."""
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        return tied.get(name)

    def _hint(self, name: str) -> str:
        if name in unsaved(self.model):
            return (
                f"; {type(self.model).__name__} computes it and does not save it. Train an adapter without it "
                "(exclude_modules), or merge in Python: model.merge_and_unload().save_pretrained(...)"
            )
        if self.tied_to(name) is not None:
            return "; it is tied to another weight, and changing one alone would untie them: untie before training"

        remedy = "; give the base model that the adapter was trained on"
        leaf = ".".join(name.split(".")[-2:])
        near = next((key for key in self.checkpoint if key.endswith(leaf)), None)
        if near is None:
            return remedy

        return f"{remedy} (it has {near!r})"

    # ---- tensors -----------------------------------------------------------------------------------------------------

    def read(self, name: str, shape: tuple[int, ...], source: Checkpoint | None = None) -> Tensor:
        """The weight as the model has it.

        Args:
            name: of the weight.
            shape: of the weight.
            source: other files with the same entries, such as those of a fine-tuned model; by default our own.
        """
        if source is None:
            source = self.checkpoint

        key = self.entry(name)
        if key is not None:
            return source.get(key)

        parametrization = self._parametrization(name)
        if parametrization is not None:
            with torch.no_grad():
                return cast("Tensor", self._filled(name, parametrization, source)())

        # The numbers 0, 1, 2, ... in place of the weight tell where each number of an entry belongs.
        places = self._revert(name, torch.arange(math.prod(shape)).reshape(shape))
        entries = {key: source.get(key) for key in places}
        weight = torch.empty(math.prod(shape), dtype=next(iter(entries.values())).dtype)
        for key, entry in entries.items():
            weight[places[key].reshape(-1)] = entry.reshape(-1)

        return weight.reshape(shape)

    def split(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """A new value of the weight as new values of its entries.

        Raises:
            UserError: the weight is parametrised, and its parametrization cannot take this value.
        """
        key = self.entry(name)
        if key is not None:
            return {key: weight}

        parametrization = self._parametrization(name)
        if parametrization is not None:
            return self._assign(name, parametrization, weight)

        return self._revert(name, weight)

    def _revert(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        model = self._transformers_model()
        if model is None:
            return {name: tensor}
        from transformers.core_model_loading import revert_weight_conversion

        return dict(revert_weight_conversion(model, {name: tensor}))

    def _transformers_model(self) -> PreTrainedModel | None:
        """The model, if it is one of transformers."""
        if self.model is None or not hasattr(self.model, "config"):
            return None

        from transformers import PreTrainedModel

        if not isinstance(self.model, PreTrainedModel):
            return None

        return self.model

    # ---- parametrised weights ----------------------------------------------------------------------------------------

    def _parametrization(self, name: str) -> ParametrizationList | None:
        """The parametrization of a weight of the model, or None where it is a plain parameter."""
        module, _, leaf = name.rpartition(".")

        try:
            owner = None if self.model is None else self.model.get_submodule(module)
        except AttributeError:
            return None

        if owner is None or not is_parametrized(owner, leaf):
            return None

        return cast("ParametrizationList", cast("nn.ModuleDict", owner.parametrizations)[leaf])

    def parametrised(self) -> dict[str, tuple[int, ...]]:
        """The parametrised weights of the model, which are no parameters of it, and their shapes."""
        found = {}
        for module, owner in [] if self.model is None else self.model.named_modules():
            if is_parametrized(owner):
                for leaf in cast("nn.ModuleDict", owner.parametrizations):
                    found[f"{module}.{leaf}"] = tuple(getattr(owner, leaf).shape)
        return found

    def _originals(self, name: str, parametrization: ParametrizationList) -> dict[str, str]:
        """The name of each tensor of a parametrization -> its file entry.

        Raises:
            UserError: the files do not have one of them.
        """
        module, _, leaf = name.rpartition(".")
        found = {}
        for inner in parametrization.state_dict():
            stored = f"{module}.parametrizations.{leaf}.{inner}"
            key = self.entry(stored)
            if key is None:
                raise UserError(f"{self.checkpoint.path} has no weight {stored!r}{self._hint(stored)}")

            found[inner] = key

        return found

    def _filled(self, name: str, parametrization: ParametrizationList, source: Checkpoint) -> ParametrizationList:
        """A copy of the parametrization with the numbers of the files, in float64 and in eval mode."""
        filled = copy.deepcopy(parametrization).to_empty(device="cpu").double().eval()
        originals = self._originals(name, parametrization)
        filled.load_state_dict({inner: source.get(key).double() for inner, key in originals.items()})
        return filled

    def _assign(self, name: str, parametrization: ParametrizationList, weight: Tensor) -> dict[str, Tensor]:
        """The tensors of the parametrization that make this weight.

        Not every parametrization can make every weight: one that is orthogonal, or that divides by its largest singular
        value, makes another weight of what is assigned to it. So the result is computed and compared.
        """
        filled = self._filled(name, parametrization, self.checkpoint)
        kinds = ", ".join(type(part).__name__.lstrip("_") for part in parametrization)
        refusal = (
            f"{name} has the parametrization {kinds}, which cannot make the merged weight; remove it from the base "
            "model first (torch.nn.utils.parametrize.remove_parametrizations), save that, and give it with --base"
        )

        # A parametrization refuses by any of these: torch where there is no right_inverse, its author where the weight
        # is none that it can make.
        try:
            with torch.no_grad():
                filled.right_inverse(weight.double())
                made = cast("Tensor", filled())
        except (NotImplementedError, ValueError, RuntimeError):
            raise UserError(refusal) from None

        if not float((made - weight.double()).abs().max()) <= EXACT * float(weight.abs().max()):
            raise UserError(refusal)

        originals = self._originals(name, parametrization)

        return {key: filled.state_dict()[inner] for inner, key in originals.items()}
