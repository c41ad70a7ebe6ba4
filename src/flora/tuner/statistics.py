"""The running statistics of norms: they belong to the frozen model, so an adapter leaves them as they are.

A batch norm in train mode moves its running mean and variance. No adapter file holds them, so a model trained that way
would give other outputs once its adapter is loaded on the base model again.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator

from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from flora.errors import counted

logger = logging.getLogger(__name__)


def settle_statistics(model: nn.Module, *, freeze: bool, training: bool) -> None:
    """Makes the norms of the frozen model use their running statistics, in train mode too; says so once.

    A norm inside ``modules_to_save`` is trained and saved with its statistics, and moves them as ever.

    Args:
        model: with its adapters.
        freeze: False leaves the norms as they are, with a warning that their statistics are not saved.
        training: whether the adapter is going to be trained; if not, nothing is said.
    """
    wrappers = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    originals = {norm for module in wrappers for norm in _norms(module.original_module)}
    saved = {norm for module in wrappers for norm in _norms(module)} - originals
    for norm in saved:
        _release(norm)

    fresh = [norm for norm in _norms(model) if norm not in saved and not _is_held(norm)]
    told = [norm for norm in fresh if norm not in originals]

    if not freeze:
        if told and training:
            warnings.warn(
                f"the running statistics of {len(told)} norms move in training and are not saved with the adapter: "
                "after loading, the model will give other outputs; put the norms into modules_to_save",
                stacklevel=2,
            )

        return

    for norm in fresh:
        norm.register_forward_pre_hook(_use_running)

    if told and training:
        logger.warning(
            "%s the running statistics of the base model, in train mode too, because an adapter file "
            "does not hold them; FloraConfig(freeze_batch_norm=False) lets them move, modules_to_save trains them",
            counted(len(told), "batch norm keeps", "batch norms keep"),
        )


def hold_untrained_statistics(model: nn.Module) -> None:
    """Makes every norm whose parameters are not trained use its running statistics, in train mode too.

    For models with another method's adapter, so that a comparison trains all of them alike.
    """
    for norm in _norms(model):
        if not _is_held(norm) and not any(value.requires_grad for value in norm.parameters()):
            norm.register_forward_pre_hook(_use_running)


def release_statistics(model: nn.Module) -> None:
    """Undoes :func:`settle_statistics`."""
    for norm in _norms(model):
        _release(norm)


def _norms(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if isinstance(module, _NormBase) and getattr(module, "running_mean", None) is not None:
            yield module


def _use_running(norm: nn.Module, inputs: object) -> None:
    if norm.training:
        norm.training = False


def _is_held(norm: nn.Module) -> bool:
    return _use_running in norm._forward_pre_hooks.values()


def _release(norm: nn.Module) -> None:
    for key, hook in list(norm._forward_pre_hooks.items()):
        if hook is _use_running:
            del norm._forward_pre_hooks[key]
