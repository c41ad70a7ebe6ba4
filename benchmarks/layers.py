"""How long does one training step of one layer take, under each method?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import clock, methods
from benchmarks.grid import CASES, Case
from benchmarks.methods import Adapted
from benchmarks.results import Options

BUDGETS = (clock.Budget(3, 25, 60, 40.0), clock.Budget(2, 7, 30, 5.0))  # of the headline's threads, of the others


def measure(options: Options) -> dict[str, Any]:
    """The rows of the grid, each with the times and parameters of every method."""
    cases = [case.smaller() if options.quick else case for case in CASES]
    return {"rows": [row(case, options) for case in tqdm(cases, desc="layers", unit="row")]}


def row(case: Case, options: Options) -> dict[str, Any]:
    """One layer under every method, at every number of threads."""
    built, refused = methods.build(case)
    found: dict[str, Any] = {name: {"refused": why} for name, why in refused.items()}
    found |= {name: {"parameters": it.count, "note": it.note, "ms": {}} for name, it in built.items()}
    inputs = case.inputs(options.seed)
    grad = methods.output_grad(built["frozen"], inputs)
    steps = {name: methods.training_step(adapted, inputs, grad) for name, adapted in built.items()}
    for place, count in enumerate(options.threads):
        budget = BUDGETS[min(place, 1)]
        with clock.threads(count):
            times = clock.interleave(steps, budget.shortened() if options.quick else budget, options.seed)
        for name, values in times.items():
            found[name]["ms"][str(count)] = clock.summary(values)
    error = deviation(case, built["flora"], inputs, grad)
    return {
        "case": case.name,
        "group": case.group,
        "size": case.size,
        "rank": case.rank,
        "error": error,
        "methods": found,
    }


def deviation(case: Case, adapted: Adapted, inputs: tuple[Tensor, ...], grad: Tensor) -> float:
    """The largest error of FLoRA's output and gradients, against the dense W + dW, relative to the largest entry."""
    torch.manual_seed(0)
    base, layers = case.build().requires_grad_(False), methods.flora_layers(adapted.module)
    prefix = "experts" if case.experts else "0"
    keys = [f"{prefix}.{name}" for layer in layers for name in layer.attributes]
    updates = [layer.delta("default", name).dense() for layer in layers for name in layer.attributes]
    weights = {key: base.get_parameter(key) + update for key, update in zip(keys, updates, strict=True)}
    oracle = torch.func.functional_call(base, weights, inputs)
    fast = adapted.module(*inputs)
    wanted = [inputs[0], *adapted.trained]
    pairs = [(fast, oracle)]
    pairs += zip(torch.autograd.grad(fast, wanted, grad), torch.autograd.grad(oracle, wanted, grad), strict=True)
    return max(float((ours - right).abs().max() / right.abs().max()) for ours, right in pairs)
