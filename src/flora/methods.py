"""``METHODS``: the ways to adapt a base model that ``flora compare`` knows. To add one: a function, a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from flora.settings import Comparison
from flora.tuner.config import FloraConfig


@dataclass(frozen=True)
class Request:
    """What a method is given besides the base model.

    Attributes:
        adapter: keyword arguments of ``FloraConfig``; other adapters take their targets and the head from it.
        comparison: the settings of the comparison.
        budget: trainable parameters of an adapter, the head not counted.
    """

    adapter: dict[str, Any]
    comparison: Comparison
    budget: int

    @property
    def head(self) -> list[str]:
        """The modules that every method trains in full."""
        return list(self.adapter.get("modules_to_save") or [])


def flora(base: PreTrainedModel, request: Request) -> nn.Module:
    """FLoRA as configured, with ranks solved for the budget."""
    return get_peft_model(base, FloraConfig(**{**request.adapter, "budget": request.budget}))


def lora(base: PreTrainedModel, request: Request) -> nn.Module:
    """PEFT's LoRA on those of FLoRA's targets that it can adapt."""
    rank = request.comparison.lora_r
    targets = lora_targets(base, request)
    config = LoraConfig(
        r=rank,
        lora_alpha=request.comparison.lora_alpha,
        target_modules=targets,
        modules_to_save=request.head,
    )
    return get_peft_model(base, config)


def frozen(base: PreTrainedModel, request: Request) -> nn.Module:
    """Only the head is trained.

    Raises:
        ValueError: the config names no head.
    """
    if not request.head:
        raise ValueError("the method 'frozen' trains the head only; name it in adapter.modules_to_save")
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(any(part in request.head for part in name.split(".")))
    return base


def full(base: PreTrainedModel, request: Request) -> nn.Module:
    """Every parameter is trained."""
    return base.requires_grad_(True)


METHODS: dict[str, Callable[[PreTrainedModel, Request], nn.Module]] = {
    "frozen": frozen,
    "flora": flora,
    "lora": lora,
    "full": full,
}


def targets(base: PreTrainedModel, adapter: dict[str, Any]) -> list[str]:
    """The names of the modules that FLoRA adapts with this configuration; ``base`` is left as it is."""
    adapted = get_peft_model(base, FloraConfig(**adapter))
    names = list(cast("Any", adapted.base_model).targeted_module_names)
    adapted.unload()
    return names


def lora_targets(base: PreTrainedModel, request: Request) -> list[str]:
    """FLoRA's targets that PEFT's LoRA takes: no transposed convolution, and groups must divide its rank."""
    modules = dict(base.named_modules())
    rank = request.comparison.lora_r
    return [
        name
        for name in targets(base, request.adapter)
        if rank % getattr(modules[name], "groups", 1) == 0 and not getattr(modules[name], "transposed", False)
    ]


def lora_budget(base: PreTrainedModel, request: Request) -> int:
    """The parameters of LoRA at its rank, the head not counted: what every other adapter may spend."""
    model = lora(base, request)
    return sum(value.numel() for name, value in model.named_parameters() if ".lora_" in name)


def trainable(model: nn.Module) -> int:
    """How many parameters an optimiser would change."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def is_adapter(model: nn.Module) -> bool:
    """Whether the method put a PEFT adapter on the base model, which can be merged and saved alone."""
    return isinstance(model, PeftModel)
