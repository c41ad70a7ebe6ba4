"""``METHODS``: the ways to adapt a base model that ``flora compare`` knows. To add one: a function, a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from flora.comparison import one_size, rivals, starts
from flora.comparison.rivals import RefusedError, Request, train_head

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
    "lora-gradient": Method("LoRA, our start", starts.lora_form),
    "rslora": Method("rsLoRA", partial(rivals.lora, use_rslora=True)),
    "dora": Method("DoRA", partial(rivals.lora, use_dora=True)),
    "pissa": Method("PiSSA", starts.pissa),
    "lora-ga": Method("LoRA-GA", starts.lora_ga),
    "eva": Method("EVA", starts.eva),
    "miss": Method("MiSS", one_size.miss),
    "hira": Method("HiRA", rivals.hira),
    "oft": Method("OFT", one_size.oft),
    "loha": Method("LoHa", rivals.loha),
    "lokr": Method("LoKr", rivals.lokr),
    "lycoris": Method("LoCon-Tucker (LyCORIS)", rivals.lycoris),
    "authors": Method("authors' scheme", rivals.authors),
    "flora": Method("FLoRA", starts.flora),
    "flora-gradient": Method("FLoRA, gradient start", starts.flora_gradient),
    "flora-blocks": Method("FLoRA, gradient start, blocks", starts.flora_blocks),
    "flora-ranks": Method("FLoRA, gradient start and ranks", starts.flora_ranks),
    "flora-norms": Method("FLoRA, gradient start, norms too", starts.flora_norms),
    "full": Method("full fine-tuning", full, matched=False),
}
