"""What every layer must satisfy, checked against one dense oracle: a copy of the base with W + s*dW written in."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrize

import flora
from cases import Case, Row
from flora.layers.table import parameter
from flora.tuner.layer import FloraLayer

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2}


def seeded(seed: int = 0) -> None:
    torch.manual_seed(seed)


def base_model(row: Row, dtype: torch.dtype = torch.float32) -> Case:
    seeded()
    return Case(row.build()).to(dtype).eval()


def inputs_of(row: Row, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    seeded(1)
    return tuple(value.to(dtype) if value.is_floating_point() else value for value in row.inputs())


def config_of(row: Row, way: str, **fields: Any) -> flora.FloraConfig:
    return flora.FloraConfig(
        **{"r": row.ranks, "target_modules": ["layer"], "way": way, "init_weights": False, **row.config, **fields}
    )


def adapted(row: Row, way: str, dtype: torch.dtype = torch.float32, name: str = "default", **fields: Any) -> PeftModel:
    base = base_model(row, dtype)
    seeded(2)
    return get_peft_model(base, config_of(row, way, **fields), adapter_name=name).eval()


def flora_layers(model: nn.Module) -> Iterator[FloraLayer]:
    return (module for module in model.modules() if isinstance(module, FloraLayer))


def oracle(
    row: Row, model: PeftModel, adapters: tuple[str, ...] = ("default",), dtype: torch.dtype = torch.float32
) -> Case:
    """The base with W + s*dW as its parameters; gradients of dW come from there by autograd."""
    dense = base_model(row, dtype)
    if parametrize.is_parametrized(dense.layer, "weight"):
        parametrize.remove_parametrizations(dense.layer, "weight")
    for layer in flora_layers(model):
        for weight in layer.attributes:
            total = sum(layer.get_delta_weight(name, weight).detach() for name in adapters)
            write(dense.layer, weight, parameter(dense.layer, weight).detach() + total)
    return dense


def write(module: nn.Module, weight: str, value: Tensor) -> None:
    owner, leaf = module.get_submodule(weight.rpartition(".")[0]), weight.rpartition(".")[2]
    target = getattr(owner, leaf)
    target.data = value.to(target.dtype)


def close(first: Tensor, second: Tensor, dtype: torch.dtype = torch.float32, slack: float = 1) -> bool:
    """Whether they differ by no more than the rounding of ``dtype``, ``slack`` times that where it adds up."""
    scale = max(second.abs().max().item(), 1e-3)
    return bool((first.float() - second.float()).abs().max().item() <= slack * TOLERANCE[dtype] * scale)


def gradients(row: Row, model: PeftModel) -> dict[str, Tensor]:
    """The gradients of core and factors by the chain rule from the oracle's gradient of its dense weight."""
    dense = oracle(row, model)
    names = {layer: tuple(layer.attributes) for layer in flora_layers(model)}
    weights = {name: parameter(dense.layer, name).detach().clone() for group in names.values() for name in group}
    leaves = {name: value.requires_grad_(True) for name, value in weights.items()}
    out = torch.func.functional_call(
        dense, {f"layer.{name}": value for name, value in leaves.items()}, inputs_of(row), row.kwargs
    )
    out.square().sum().backward()
    found = {}
    for layer, group in names.items():
        for name in group:
            delta = copy.deepcopy(layer.deltas(name)["default"])
            delta.zero_grad()
            delta.dense().backward(leaves[name].grad)
            for tensor, value in delta.named_parameters():
                found[f"{name}.{tensor}"] = value.grad
    return found
