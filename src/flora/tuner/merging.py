"""Writing the updates of adapters into the base weights, and taking them out again.

A weight of a parametrization (``torch.nn.utils.parametrizations``) is written through its right inverse where that
gives the weight back: weight norm does. Spectral norm, orthogonal and the like cannot hold any other weight than their
own, so the parametrization is taken off, the weight written as it is, and unmerging puts the parametrization on again.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import reduce
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from flora.errors import UserError
from flora.layers.table import parameter
from flora.tuner.adapted import AdaptedLayer

# How many roundings a right inverse may miss the weight by.
ROUNDINGS = 8


class Parametrization(NamedTuple):
    """What was taken off a weight: the modules of its parametrization, and the tensors that it was made from."""

    modules: list[nn.Module]
    originals: dict[str, Tensor]


def merged_weights(layer: AdaptedLayer, adapters: list[str]) -> dict[str, Tensor]:
    """Weight -> ``W + s dW`` of adapters that the layer has, in the dtype of W."""
    with torch.no_grad():
        before = {weight: base_weight(layer, weight) for weight in layer.attributes}
        return {weight: (old + layer.dense(adapters, weight)).to(old.dtype) for weight, old in before.items()}


def check_finite(merged: Iterable[Tensor], adapters: list[str], place: str) -> None:
    """Raises a ``UserError`` if a merged weight has NaN or infinite entries."""
    if not all(torch.isfinite(value).all() for value in merged):
        raise UserError(
            f"NaNs detected in the merged weights. The adapter {adapters[0]} seems to be broken: merging "
            f"{', '.join(adapters)} would give NaN or infinite entries in {place or 'a layer'}; the base weight was "
            "left as it is"
        )


def merge(layer: AdaptedLayer, adapters: list[str], safe_merge: bool) -> None:
    """Adds the updates of adapters that the layer has to its base weights; see ``FloraLayer.merge``."""
    # All merged weights are formed before the first is written, so that one that is not finite leaves all as they were.
    # A safe merge also keeps the old weights: taking the update off again would leave a rounding in each number.
    merged = merged_weights(layer, adapters)

    if safe_merge:
        check_finite(merged.values(), adapters, layer.place)

        if not layer.merged and layer.quantization_backend is None:
            layer._backup = {weight: base_weight(layer, weight) for weight in layer.attributes}

    for weight, value in merged.items():
        _write(layer, weight, value)

    layer.merged_adapters.extend(adapters)
    layer._merged_scales.update({(name, weight): delta.scale for name, weight, delta in layer._changes(adapters)})


def unmerge(layer: AdaptedLayer) -> None:
    """Takes the merged updates out of the base weights again; exact after a safe merge, else to one rounding."""
    with torch.no_grad():
        for weight in layer.attributes:
            old = layer._backup.get(weight)
            if old is None:
                value = base_weight(layer, weight)
                old = (value - _merged_update(layer, weight).reshape(value.shape)).to(value.dtype)

            taken_off = layer._taken_off.pop(weight, None)
            if taken_off is None:
                _write(layer, weight, old)
            else:
                _put_on(layer, weight, old, taken_off)

    layer._backup = {}
    layer._merged_scales.clear()
    layer.merged_adapters.clear()


def _merged_update(layer: AdaptedLayer, weight: str) -> Tensor:
    """What merging has added to a weight, over the folded dimensions: at the scales of then, which may have changed."""
    changes = []
    for adapter in layer.merged_adapters:
        form = layer.delta(adapter, weight).form
        changes.append(form.scaled(layer._merged_scales[adapter, weight]).to_dense())

    return reduce(torch.add, changes)


def base_weight(layer: AdaptedLayer, weight: str) -> Tensor:
    """A weight of the base layer; of a quantised one, what it stands for."""
    if layer.quantization_backend is not None:
        if layer.quantization_backend.backend_name == "bnb 4bit":
            # For inference on a CPU bitsandbytes changes the layout of the weight, and PEFT would read it wrongly.
            # Reading the state dict changes it back.
            layer.get_base_layer().state_dict()

        return layer.get_base_weight()

    owner, leaf = _owner(layer, weight)
    if not parametrize.is_parametrized(owner, leaf):
        return parameter(layer.get_base_layer(), weight).detach()

    with _at_rest(_parametrization(owner, leaf)):
        return getattr(owner, leaf).detach()  # type: ignore[no-any-return]


def _write(layer: AdaptedLayer, weight: str, value: Tensor) -> None:
    """Sets a weight of the base layer."""
    if layer.quantization_backend is not None:
        layer.set_base_weight(value)
        return

    owner, leaf = _owner(layer, weight)
    if not parametrize.is_parametrized(owner, leaf):
        getattr(owner, leaf).data = value
    elif not _write_through(owner, leaf, value):
        layer._taken_off[weight] = _take_off(owner, leaf, value)
        warnings.warn(
            f"merging removes the parametrization of {layer.place}.{weight}: it cannot hold W + s dW. The merged layer "
            "computes the right thing with a plain weight",
            stacklevel=2,
        )


def _owner(layer: AdaptedLayer, weight: str) -> tuple[nn.Module, str]:
    """The module that holds a weight, and the weight's name there."""
    path, _, leaf = weight.rpartition(".")
    return layer.get_base_layer().get_submodule(path), leaf


# ---- parametrized weights ------------------------------------------------------------------------------------------


def _parametrization(owner: nn.Module, leaf: str) -> Any:
    """The list of modules that a parametrized weight is made by, with the tensors that it is made from."""
    return cast(Any, owner).parametrizations[leaf]


@contextmanager
def _at_rest(parametrizations: Iterable[nn.Module]) -> Iterator[None]:
    """Spectral norm takes a step of its power iteration whenever the weight is read in training; not in here."""
    training = {module: module.training for each in parametrizations for module in each.modules()}
    for module in training:
        module.training = False

    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def _write_through(owner: nn.Module, leaf: str, value: Tensor) -> bool:
    """Writes a weight by the right inverse; returns False, and changes nothing, where that is not exact."""
    # Assigning to a parametrized weight calls the right inverse, which changes the tensors that the weight is made
    # from. Whether they give the weight back shows only when it is read again, so the old tensors are kept until then.
    lists = _parametrization(owner, leaf)
    before = {name: tensor.detach().clone() for name, tensor in lists.state_dict(keep_vars=True).items()}

    try:
        with _at_rest(lists):
            setattr(owner, leaf, value)
            miss = (getattr(owner, leaf) - value).abs().max()

        if miss <= ROUNDINGS * torch.finfo(value.dtype).eps * value.abs().max():
            return True
    except (ValueError, RuntimeError, NotImplementedError):
        # The parametrization takes no such weight, or has no right inverse.
        pass

    with torch.no_grad():
        for name, tensor in lists.state_dict(keep_vars=True).items():
            tensor.data = before[name]

    return False


def _take_off(owner: nn.Module, leaf: str, value: Tensor) -> Parametrization:
    """Puts a plain weight in the place of a parametrized one."""
    lists = _parametrization(owner, leaf)
    modules = list(lists)
    originals = {name: tensor.detach().clone() for name, tensor in lists.named_parameters(recurse=False)}
    wanted = any(tensor.requires_grad for tensor in lists.parameters(recurse=False))

    # Copies of a parametrized module share its class, and torch takes the weight's property off the class: they would
    # have no weight any more. So the module that changes gets a class of its own.
    shared = type(owner)
    owner.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))

    with _at_rest(modules):
        parametrize.remove_parametrizations(owner, leaf, leave_parametrized=True)

    getattr(owner, leaf).data = value
    getattr(owner, leaf).requires_grad_(wanted)

    return Parametrization(modules, originals)


def _put_on(layer: AdaptedLayer, weight: str, value: Tensor, taken_off: Parametrization) -> None:
    """Restores the parametrization of a weight."""
    owner, leaf = _owner(layer, weight)
    wanted = getattr(owner, leaf).requires_grad
    getattr(owner, leaf).data = value

    # Registering calls the right inverse, whose result is not needed: the tensors that the weight was made from are put
    # back afterwards as they were.
    with _at_rest(taken_off.modules):
        for module in taken_off.modules:
            parametrize.register_parametrization(owner, leaf, module, unsafe=True)

    lists = _parametrization(owner, leaf)
    for name, tensor in lists.named_parameters(recurse=False):
        tensor.data = taken_off.originals[name]
        tensor.requires_grad_(wanted)
