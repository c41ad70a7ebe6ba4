"""The methods that are compared on one layer, each as the module a user would train. To add one: a function, a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoKrConfig, LoraConfig, get_peft_model
from torch import Tensor, nn

import flora
from benchmarks.grid import Case
from flora.comparison.authors import AuthorsScheme
from flora.tuner.forward import choice_for
from flora.tuner.layer import FloraLayer


class RefusedError(ValueError):
    """The method does not take this layer; the text says why."""


@dataclass(frozen=True)
class Adapted:
    """A layer under one method.

    Attributes:
        module: what is called.
        trained: its trainable parameters.
        note: what a reader should know, such as the rank or the way.
    """

    module: nn.Module
    trained: list[nn.Parameter]
    note: str = ""

    @property
    def count(self) -> int:
        """Trainable parameters."""
        return sum(parameter.numel() for parameter in self.trained)


def frozen(case: Case) -> Adapted:
    """No parameter is trained: forward, and backward to the input."""
    return Adapted(case.build().requires_grad_(False), [])


def full(case: Case) -> Adapted:
    """Every parameter is trained."""
    return _trainable(case.build())


def flora_auto(case: Case) -> Adapted:
    """What ``get_peft_model`` gives."""
    return _flora(case, "auto")


def flora_summed(case: Case) -> Adapted:
    """The layer once with W + dW."""
    return _flora(case, "summed")


def flora_beside(case: Case) -> Adapted:
    """The small products beside the frozen layer."""
    return _flora(case, "beside")


def lora(case: Case) -> Adapted:
    """PEFT's LoRA at FLoRA's channel rank."""
    return _lora(case, case.rank)


def lora_at_equal_parameters(case: Case) -> Adapted:
    """PEFT's LoRA at the smallest rank whose parameters are nearest to FLoRA's."""
    return _lora(case, nearest_rank(lora(case).count / case.rank, flora_auto(case).count))


def lokr(case: Case) -> Adapted:
    """PEFT's LoKr with its defaults at the same rank."""
    if case.experts:
        raise RefusedError("PEFT's LoKr takes no raw parameters")
    return _peft(case, LoKrConfig(r=case.rank, alpha=case.rank, init_weights=False, **case.targets))


def lycoris(case: Case) -> Adapted:
    """LyCORIS LoCon with use_tucker (on a linear layer that is its LoRA)."""
    try:
        from lycoris.modules.locon import LoConModule
    except ImportError as error:
        raise RefusedError("lycoris-lora is not installed") from error
    if case.experts:
        raise RefusedError("LyCORIS takes no raw parameters")
    base = case.build().requires_grad_(False)
    try:
        layer = LoConModule("layer", base[0], lora_dim=case.rank, alpha=case.rank, use_tucker=True)
    except (ValueError, AttributeError) as error:
        raise RefusedError(f"LyCORIS: {type(base[0]).__name__} is not supported") from error
    nn.init.normal_(layer.lora_up.weight, std=0.01)
    return _trainable(layer)


def authors(case: Case) -> Adapted:
    """The authors' scheme with the ranks of FLoRA."""
    if case.experts:
        raise RefusedError("the authors' scheme has no raw parameters")
    ranks = flora_layers(flora_auto(case).module)[0].delta("default").form.ranks
    return _trainable(AuthorsScheme(case.build()[0], ranks))


METHODS: dict[str, Callable[[Case], Adapted]] = {
    "frozen": frozen,
    "full": full,
    "flora": flora_auto,
    "flora-summed": flora_summed,
    "flora-beside": flora_beside,
    "lora": lora,
    "lora-params": lora_at_equal_parameters,
    "lokr": lokr,
    "lycoris": lycoris,
    "authors": authors,
}


def build(case: Case, names: Sequence[str] | None = None) -> tuple[dict[str, Adapted], dict[str, str]]:
    """The layer under each method, and for those that refuse it, why."""
    built, refused = {}, {}
    for name in names or METHODS:
        torch.manual_seed(0)
        try:
            built[name] = METHODS[name](case)
        except RefusedError as error:
            refused[name] = str(error)
    return built, refused


def training_step(adapted: Adapted, inputs: Sequence[Tensor], grad: Tensor) -> Callable[[], object]:
    """Forward, then backward to the first input and to what the method trains."""
    wanted = [inputs[0], *adapted.trained]

    def step() -> object:
        return torch.autograd.grad(adapted.module(*inputs), wanted, grad)

    return step


def output_grad(adapted: Adapted, inputs: Sequence[Tensor]) -> Tensor:
    """A random gradient in the shape of the output."""
    with torch.no_grad():
        y = adapted.module(*inputs)
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)


def nearest_rank(per_rank: float, count: int) -> int:
    """The smallest rank from 1 whose ``rank * per_rank`` parameters are nearest to ``count``."""
    ranks = range(1, max(2, int(count / per_rank) + 2))
    return min(ranks, key=lambda rank: abs(rank * per_rank - count))


def flora_layers(module: nn.Module) -> list[FloraLayer]:
    """The adapted layers, the outer one first."""
    return [part for part in module.modules() if isinstance(part, FloraLayer)]


def _flora(case: Case, way: Any) -> Adapted:
    config = flora.FloraConfig(
        r=case.rank, kernel_r=case.kernel_rank, way=way, init_weights=False, **_lists(case.targets)
    )
    adapted = _peft(case, config)
    x = case.inputs()[0]
    ways = sorted({choice_for(layer, ["default"], x).way for layer in flora_layers(adapted.module)})
    return Adapted(adapted.module, adapted.trained, "/".join(ways))


def _lora(case: Case, rank: int) -> Adapted:
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights=False, **_lists(case.targets))
    adapted = _peft(case, config)
    return Adapted(adapted.module, adapted.trained, f"r = {rank}")


def _peft(case: Case, config: Any) -> Adapted:
    try:
        model = get_peft_model(case.build(), config)
    except (ValueError, NotImplementedError, TypeError) as error:
        raise RefusedError(f"{type(config).__name__.removesuffix('Config')}: {str(error).split('. ')[0]}") from error
    return _trainable(model.base_model.model)


def _lists(targets: dict[str, list[str]]) -> dict[str, Any]:
    return {key: list(value) for key, value in targets.items()}


def _trainable(module: nn.Module) -> Adapted:
    return Adapted(module, [parameter for parameter in module.parameters() if parameter.requires_grad])
