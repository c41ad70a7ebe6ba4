"""``FloraModel``: which layers get an adapter, with which ranks. All is resolved and checked before anything changes."""

from __future__ import annotations

import difflib
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, NoMatchingPeftModuleError
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from transformers import PreTrainedModel

from flora.layers import find_layer, refusal, weight_shape
from flora.ranks import Weight, resolve, solve_budget
from flora.tucker import count_params
from flora.tuner.config import FloraConfig
from flora.tuner.layer import FloraLayer

SHORTHANDS = {"all": ("linear", "conv", "embedding"), "all-linear": ("linear",), "all-conv": ("conv",)}


class FloraModel(BaseTuner):
    """The tuner that PEFT builds from a ``FloraConfig``."""

    prefix = "tucker_"
    tuner_layer_cls = FloraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _prepare_adapter_config(self, peft_config: FloraConfig, model_config: dict[str, Any]) -> FloraConfig:
        """Fills in the targets: the model type's own, or every layer of the kinds a shorthand stands for."""
        shorthand = peft_config.target_modules
        if not isinstance(shorthand, str) or shorthand.lower() not in SHORTHANDS:
            return super()._prepare_adapter_config(peft_config, model_config)
        kinds = SHORTHANDS[shorthand.lower()]
        head = _output_head(self.model)
        names = [
            name
            for name, module in _layers(self.model)
            if (found := find_layer(module)) and found[1].kind in kinds and refusal(module) is None
            if name and not any(name == key or name.startswith(f"{key}.") for key in head)
        ]
        if not names:
            raise NoMatchingPeftModuleError(
                f"target_modules={shorthand!r} matches nothing: {type(self.model).__name__} has no layer of kind "
                f"{' or '.join(kinds)} outside its head"
            )
        peft_config.target_modules = set(names)
        return peft_config

    def _prepare_model(self, peft_config: FloraConfig, model: nn.Module) -> None:
        """Resolves every target and its ranks, so that a bad request raises here, with the model untouched."""
        matched = {
            name: module for name, module in _layers(model) if name and self._check_target_module_exists(peft_config, name)
        }
        if not matched:
            self._explain_no_match(peft_config, model)
            return
        weights = {name: _weight(name, module) for name, module in matched.items()}
        if peft_config.budget is not None:
            peft_config.rank_pattern = _spend(peft_config, weights, model)
            peft_config.budget = None
        larger = []
        for name, weight in weights.items():
            ranks = _ranks(peft_config, name, weight)
            peft_config.scale_for(name)
            if count_params(weight.shape, ranks) > math.prod(weight.shape):
                larger.append(name)
        if larger:
            warnings.warn(
                f"the adapter has more parameters than the weight itself in {len(larger)} of {len(weights)} layers "
                f"(first: {larger[0]}); lower r or exclude them",
                stacklevel=2,
            )

    def _explain_no_match(self, config: FloraConfig, model: nn.Module) -> None:
        """Raises with the nearest names when the targets are plainly misspelt; otherwise PEFT's own error follows."""
        if not isinstance(config.target_modules, set) or config.exclude_modules or config.layers_to_transform is not None:
            return
        names = [name for name, module in _layers(model) if find_layer(module)]
        suffixes = {name.rpartition(".")[2] for name in names} | set(names)
        near = {
            target: difflib.get_close_matches(target, sorted(suffixes), n=3) for target in sorted(config.target_modules)
        }
        hints = "; ".join(f"instead of {target!r} try {', '.join(map(repr, found))}" for target, found in near.items() if found)
        raise NoMatchingPeftModuleError(
            f"Target modules {sorted(config.target_modules)} not found in the base model "
            f"{type(model).__name__}{': ' + hints if hints else ''}. Please check the target modules; "
            "print(model) lists the names, and 'all' takes every layer that can be adapted"
        )

    def _create_and_replace(
        self,
        peft_config: FloraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        base = target.get_base_layer() if isinstance(target, FloraLayer) else target
        ranks = _ranks(peft_config, current_key, _weight(current_key, base))
        layer = target if isinstance(target, FloraLayer) else FloraLayer(base)
        layer.update_layer(adapter_name, peft_config, ranks, peft_config.scale_for(current_key))
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Puts one module in the place of another; device and dtype are settled in ``FloraLayer.update_layer``."""
        setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names (a different adapter for each sample of a batch) is not supported by FLoRA yet; "
                "run one batch per adapter, with set_adapter"
            )
        yield

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: FloraConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's renaming, then a check that every tensor of the file has its place in this base model."""
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        own = model.state_dict()
        for key, value in remapped.items():
            if f".{cls.prefix}" not in key:
                continue
            layer, _, tensor = key.partition(f".{cls.prefix}")
            layer = layer.removeprefix("base_model.model.")
            if key not in own:
                raise ValueError(
                    f"the adapter does not fit this base model: it has {tensor!r} for the layer {layer!r}, which the base "
                    "model lacks or adapts with other ranks; load it on the model it was trained on"
                )
            if own[key].shape != value.shape:
                raise ValueError(
                    f"the adapter does not fit this base model: {layer!r} has {tensor!r} of shape {tuple(value.shape)} in "
                    f"the file, but the base model needs {tuple(own[key].shape)}; load it on the model it was trained on"
                )
        return remapped


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module that could be a target, by name, with what is inside tuner layers left out and the layers unwrapped."""
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside.append(f"{name}.")
            module = module.get_base_layer()
        yield name, module


def _output_head(model: nn.Module) -> list[str]:
    """The names of the modules that make a transformers model's output: its LM head, or what lies outside its backbone."""
    if not isinstance(model, PreTrainedModel):
        return []
    output = model.get_output_embeddings()
    backbone = model.base_model
    if output is not None:
        return [name for name, module in model.named_modules() if module is output]
    return [] if backbone is model else [name for name, module in model.named_children() if module is not backbone]


def _weight(name: str, module: nn.Module) -> Weight:
    """The shape and the axes of a targeted module's weight.

    Raises:
        ValueError: the module cannot be adapted; names it and says why.
    """
    found, reason = find_layer(module), refusal(module)
    if found is None or reason is not None:
        raise ValueError(f"Target module {name} ({type(module).__name__}) is not supported: {reason}")
    return Weight(weight_shape(module, found[1].weight), found[1].axes)


def _ranks(config: FloraConfig, name: str, weight: Weight) -> tuple[int, ...]:
    return resolve(weight.shape, config.rank_for(name), config.kernel_r, axes=weight.axes, name=f"{name}.weight")


def _spend(config: FloraConfig, weights: dict[str, Weight], model: nn.Module) -> dict[str, int | list[int]]:
    """The budget as ranks: the user's own ``rank_pattern`` entries are kept and paid for first."""
    total = sum(parameter.numel() for parameter in model.parameters())
    budget = config.budget or 0
    count = int(budget * total) if budget < 1 else int(budget)
    fixed = {name: weight for name, weight in weights.items() if config.rank_for(name) is not config.r}
    paid = sum(count_params(weight.shape, _ranks(config, name, weight)) for name, weight in fixed.items())
    free = {name: weight for name, weight in weights.items() if name not in fixed}
    solved = solve_budget(free, count - paid, config.kernel_r) if free else {}
    return {**config.rank_pattern, **{re.escape(name): list(ranks) for name, ranks in solved.items()}}
