"""``METHODS``: the ways to adapt a base model that ``flora compare`` knows. To add one: a function, a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from peft import get_peft_model
from torch import nn

from flora.comparison import rivals
from flora.comparison.rivals import RefusedError, Request, train_head
from flora.tuner.config import FloraConfig

Build = Callable[[nn.Module, Request], nn.Module]


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        title: as it is printed.
        build: puts the method on a base model.
        matched: whether it is an adapter, which spends the budget that all adapters have.
    """

    title: str
    build: Build
    matched: bool = True


def flora(base: nn.Module, request: Request) -> nn.Module:
    """FLoRA as configured, with ranks solved for the budget.

    Raises:
        RefusedError: the budget is too small.
    """
    try:
        config = FloraConfig(**{**request.adapter, "budget": request.budget})
        return get_peft_model(cast("Any", base), config)
    except ValueError as error:
        if "budget of" not in str(error):
            raise
        raise RefusedError(str(error)) from None


def frozen(base: nn.Module, request: Request) -> nn.Module:
    """Only the head is trained.

    Raises:
        RefusedError: the config names no head.
    """
    if not request.head:
        raise RefusedError("it trains the head only, and adapter.modules_to_save names none")
    return train_head(base.requires_grad_(False), request.head)


def bitfit(base: nn.Module, request: Request) -> nn.Module:
    """The biases and the head are trained (Ben Zaken et al. 2022).

    Raises:
        RefusedError: the model has no biases.
    """
    biases = [value for name, value in base.named_parameters() if name.rpartition(".")[2] == "bias"]
    if not biases:
        raise RefusedError("the model has no biases")
    base.requires_grad_(False)
    for value in biases:
        value.requires_grad_(True)
    return train_head(base, request.head)


def full(base: nn.Module, request: Request) -> nn.Module:
    """Every parameter is trained."""
    return base.requires_grad_(True)


METHODS: dict[str, Method] = {
    "frozen": Method("head only", frozen, matched=False),
    "bitfit": Method("BitFit", bitfit, matched=False),
    "lora": Method("LoRA", rivals.lora),
    "dora": Method("DoRA", partial(rivals.lora, use_dora=True)),
    "loha": Method("LoHa", rivals.loha),
    "lokr": Method("LoKr", rivals.lokr),
    "lycoris": Method("LoCon-Tucker (LyCORIS)", rivals.lycoris),
    "authors": Method("authors' scheme", rivals.authors),
    "flora": Method("FLoRA", flora),
    "full": Method("full fine-tuning", full, matched=False),
}
