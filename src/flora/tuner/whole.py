"""What adapters hold in full, modules of ``modules_to_save`` and rows of ``trainable_token_indices``; sums of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from flora.errors import UserError
from flora.tuner.config import FloraConfig


class Whole(NamedTuple):
    """A tensor that adapters replace.

    Attributes:
        name: of its module, for messages.
        base: as the base model has it.
        held: adapter -> its own.
        moves: whether it is a statistic that training moves, instead of a parameter.
    """

    name: str
    base: Tensor
    held: dict[str, Tensor]
    moves: bool


def config_of_sum(configs: Sequence[FloraConfig]) -> dict[str, Any]:
    """What the config of a sum of adapters says of whole tensors: those that any of them has.

    Raises:
        UserError: the adapters train biases, which all of them share with the base model, or different rows.
    """
    if any(config.bias != "none" for config in configs):
        raise UserError(
            "an adapter with bias has changed biases of the base model itself, so that a weighted sum would not have "
            "its share of them; train the adapters with bias='none', or merge them one after the other"
        )

    rows = [config.trainable_token_indices for config in configs if config.trainable_token_indices]
    if any(each != rows[0] for each in rows):
        raise UserError(
            f"the adapters train different rows of embeddings ({' and '.join(map(str, rows))}), and a sum needs the "
            "same trainable_token_indices in all of them"
        )

    saved = dict.fromkeys(name for config in configs for name in config.modules_to_save or ())
    return {"modules_to_save": list(saved) or None, "trainable_token_indices": rows[0] if rows else None}


def check_sum(model: nn.Module, adapters: Sequence[str]) -> None:
    """Refuses to add statistics that training has moved: a weighted sum of variances need not be a variance.

    Raises:
        UserError: an adapter has moved a statistic.
    """
    for name, base, held, moves in _whole_tensors(model):
        if moves and any(not torch.equal(held[adapter], base) for adapter in adapters if adapter in held):
            raise UserError(
                f"{name} of modules_to_save has running statistics that the adapters have moved, and those have no "
                "weighted sum; leave the module out of modules_to_save in adapters that are to be added"
            )


@torch.no_grad()
def write_sum(model: nn.Module, weights: Sequence[tuple[str, float]], total: str) -> None:
    """Gives an adapter the base's whole tensors plus the weighted changes of other adapters.

    Args:
        model: with the adapters.
        weights: adapters with their factors.
        total: the adapter that is written.
    """
    for whole in _whole_tensors(model):
        if total not in whole.held or whole.moves:
            continue

        value = whole.base.clone()
        for adapter, factor in weights:
            if adapter in whole.held:
                value += factor * (whole.held[adapter] - whole.base)

        whole.held[total].copy_(value)


def _whole_tensors(model: nn.Module) -> Iterator[Whole]:
    for name, wrapper in model.named_modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            yield from _of_module(name, wrapper)
        elif isinstance(wrapper, TrainableTokensWrapper):
            rows = cast("Any", wrapper.token_adapter)
            originals = rows.trainable_tokens_original
            held = dict(rows.trainable_tokens_delta.items())
            if held:
                yield Whole(name, originals[next(iter(held))], held, moves=False)


def _of_module(name: str, wrapper: AuxiliaryTrainingWrapper) -> Iterator[Whole]:
    copies = cast("Mapping[str, nn.Module]", cast("Any", wrapper).modules_to_save)
    tensors = {adapter: copied.state_dict(keep_vars=True) for adapter, copied in copies.items()}
    base = cast("nn.Module", wrapper.original_module)
    parameters = {key for key, _ in base.named_parameters(remove_duplicate=False)}
    for key, value in base.state_dict(keep_vars=True).items():
        held = {adapter: found[key] for adapter, found in tensors.items()}
        yield Whole(name, value, held, moves=key not in parameters)
