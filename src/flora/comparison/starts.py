"""Methods that start from the data or from the weights: LoRA's that PEFT has, and ours, on LoRA's form too."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, cast

import torch
from peft import PeftConfig, get_peft_model
from peft.tuners.tuners_utils import NoMatchingPeftModuleError
from torch import Tensor, nn

from flora.comparison.rivals import (
    RefusedError,
    Request,
    attach,
    lora_config,
    match,
    newer,
    peft_costs,
    supported,
    targets,
)
from flora.errors import BudgetError
from flora.layers.entries import BLOCKS
from flora.layers.patterns import exact_pattern
from flora.runs.training import First
from flora.tucker.blocks import AXES
from flora.tucker.form import count_params
from flora.tuner.config import FloraConfig
from flora.tuner.gradient.collect import adapted_weights
from flora.tuner.gradient.start import BATCHES, adapt_and_tell, start
from flora.tuner.targets import expand

# Why a model is refused that its shapes would leave as ``flora_gradient`` has it.
NOT_CUT = "no weight is worth cutting into blocks, so that it is FLoRA with the gradient start"


def flora(base: nn.Module, request: Request) -> nn.Module:
    """FLoRA as configured, with equal ranks solved for the budget.

    Raises:
        RefusedError: the budget is too small.
    """
    return _within_budget(lambda config: cast("nn.Module", get_peft_model(cast("Any", base), config)), request)


def flora_gradient(base: nn.Module, request: Request) -> nn.Module:
    """The same ranks, started along the gradient. Raises as :func:`flora` does."""
    return _begun(flora(base, request), request)


def _begun(model: nn.Module, request: Request) -> nn.Module:
    first = request.first_batches()
    request.starts.append(start(model, first.batches, loss=first.loss))
    return model


def flora_ranks(base: nn.Module, request: Request) -> nn.Module:
    """Ranks where the gradient is, started along it. Raises as :func:`flora` does."""
    first = request.first_batches()

    def begin(config: FloraConfig) -> nn.Module:
        adapted = adapt_and_tell(base, config, first.batches, loss=first.loss, choose_ranks=True)
        request.starts.append(adapted.start)
        return adapted.model

    return _within_budget(begin, request)


def flora_blocks(base: nn.Module, request: Request) -> nn.Module:
    """The same with channels in blocks. Raises as :func:`flora` does, and where no weight is worth cutting."""
    model = flora(base, replace(request, adapter={**request.adapter, "fold": BLOCKS}))
    folds = [weight.delta.fold for weight in adapted_weights(model, "default")]
    if not any(fold is not None and fold.axes[: len(AXES)] == AXES for fold in folds):
        raise RefusedError(NOT_CUT)

    return _begun(model, request)


def flora_norms(base: nn.Module, request: Request) -> nn.Module:
    """The same on the norms too, within the same budget. Raises as :func:`flora` does, and where there are no norms."""
    found = targets(base, request.adapter)
    wanted = [exact_pattern(name) for name, leaves in found.items() if not leaves]

    try:
        norms = expand("all-norm", base)
    except NoMatchingPeftModuleError:
        raise RefusedError("the model has no norms with weights") from None

    return flora_gradient(base, replace(request, adapter={**request.adapter, "target_modules": [*wanted, *norms]}))


def _within_budget(build: Callable[[FloraConfig], nn.Module], request: Request) -> nn.Module:
    try:
        return build(FloraConfig(**{**request.adapter, "budget": request.budget}))
    except BudgetError as error:
        raise RefusedError(str(error)) from None


def lora_form(base: nn.Module, request: Request) -> nn.Module:
    """LoRA as a Tucker form, first mode factored and the others kept whole, started along the gradient as FLoRA is.

    Raises as :func:`lora` does.
    """
    modules = dict(base.named_modules())
    found = [name for name, leaves in supported(base, request, partial(lora_config, request, {})).items() if not leaves]
    shapes = {name: tuple(cast("Tensor", modules[name].weight).shape) for name in found}

    def ranks_of(name: str, rank: int) -> tuple[int, ...]:
        return (min(rank, shapes[name][0]), *shapes[name][1:])

    ranks = match(lambda rank: {name: count_params(shapes[name], ranks_of(name, rank)) for name in found}, request)
    config = FloraConfig(
        **{
            **request.adapter,
            "budget": None,
            "scale": request.scale,
            "target_modules": "|".join(re.escape(name) for name in ranks),
            "target_parameters": None,
            "rank_pattern": {exact_pattern(name): list(ranks_of(name, rank)) for name, rank in ranks.items()},
        }
    )
    first = request.first_batches()

    with warnings.catch_warnings():
        # As LoRA has then.
        warnings.filterwarnings("ignore", "the adapter has more parameters than the weight itself")
        adapted = adapt_and_tell(base, config, first.batches, loss=first.loss)

    request.starts.append(adapted.start)

    return adapted.model


def pissa(base: nn.Module, request: Request) -> nn.Module:
    """LoRA that starts from the leading singular vectors of the weights (PEFT's ``pissa``), on linear layers.

    Raises as :func:`lora` does.
    """
    return attach(base, _on_linear(base, request, init_lora_weights="pissa"))


def lora_ga(base: nn.Module, request: Request) -> nn.Module:
    """LoRA that starts from the singular vectors of the gradient (PEFT's ``lora_ga``), on linear layers.

    Raises as :func:`lora` does.
    """
    first = request.first_batches()
    batches = list(islice(first.batches, BATCHES))
    config = _on_linear(base, request, init_lora_weights="lora_ga", lora_ga_config=newer("LoraGAConfig")())

    def step() -> None:
        with warnings.catch_warnings():
            # Nothing before the first layer trains.
            warnings.filterwarnings("ignore", "Full backward hook is firing")
            for batch in batches:
                first.loss(base, batch).backward()

    newer("preprocess_loraga")(base, cast("Any", config), step)

    return attach(base, config)


def eva(base: nn.Module, request: Request) -> nn.Module:
    """LoRA that starts from the singular vectors of the layers' inputs (PEFT's ``eva``), on linear layers.

    It moves ranks between the layers, up to a layer having twice its share, which changes how many parameters they have
    in all. Where that is too many, it may move fewer, and none at last. Raises as :func:`lora` does.
    """
    first = request.first_batches()
    batches = [dict(batch) for batch in islice(first.batches, BATCHES)]
    widths = {name: sum(layer.weight.shape) for name, layer in base.named_modules() if isinstance(layer, nn.Linear)}

    for rho in (2.0, 1.5, 1.0):
        # Labels are no mask here: most tasks have one for each sample.
        given = newer("EvaConfig")(rho=rho, use_label_mask=False)
        config = _on_linear(base, request, init_lora_weights="eva", eva_config=given)
        vectors = _eva_vectors(base, config, first, batches)
        cost = sum(len(found) * widths[name] for name, found in vectors.items())
        if cost <= request.budget:
            break
    else:
        raise RefusedError(f"its ranks cost {cost:,} parameters, more than the {request.budget:,} it may spend")

    ranks = {name: len(found) for name, found in vectors.items() if len(found)}
    adapted = attach(base, lora_config(request, {}, ranks, {name: [] for name in ranks}))
    inner = cast("Any", adapted.base_model).model

    with torch.no_grad():
        for name in ranks:
            inner.get_submodule(name).lora_A["default"].weight.copy_(vectors[name])

    return adapted


def _eva_vectors(base: nn.Module, config: PeftConfig, first: First, batches: list[Any]) -> dict[str, Tensor]:
    """The vectors of each layer, as many as its rank; padding of text is left out."""

    def mask_of(batch: dict[str, Tensor], config: PeftConfig) -> Tensor | None:
        return batch.get("attention_mask")

    def rows_of(inputs: tuple[Tensor, ...], mask: Tensor | None, name: str) -> Tensor:
        if mask is not None and inputs[0].shape[:-1] == mask.shape:
            return inputs[0][mask.bool()]
        return inputs[0].flatten(0, -2).contiguous()

    found = newer("get_eva_state_dict")(
        base,
        batches,
        config,
        forward_fn=first.loss,
        prepare_model_inputs_fn=mask_of,
        prepare_layer_inputs_fn=rows_of,
        show_progress_bar=False,
    )

    return cast("dict[str, Tensor]", found)


def _on_linear(base: nn.Module, request: Request, **options: Any) -> PeftConfig:
    """LoRA with a start that only linear layers have, at ranks solved for its usual one."""
    modules = dict(base.named_modules())
    configure = partial(lora_config, request, {})
    usual = supported(base, request, configure)
    found = {name: leaves for name, leaves in usual.items() if type(modules[name]) is nn.Linear and not leaves}
    ranks = match(lambda rank: peft_costs(base, configure, dict.fromkeys(found, rank), found), request)
    config = configure(ranks, found)

    for name, value in options.items():
        setattr(config, name, value)

    return config
