"""What does one training step cost in operations and in bytes kept for backward, and how does that grow? No clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor
from tqdm import tqdm

from benchmarks import ledger, methods
from benchmarks.grid import CASES, Case, conv, linear
from benchmarks.methods import Adapted
from benchmarks.results import Options

SWEPT = ("frozen", "full", "flora", "lora", "authors")


def measure(options: Options) -> dict[str, Any]:
    """The rows of the grid, and the sweeps."""
    cases = [case.smaller() if options.quick else case for case in CASES]
    sweeps = list(growth())[:2] if options.quick else list(growth())
    return {
        "rows": [row(case) for case in tqdm(cases, desc="counts", unit="row")],
        "growth": [
            {"of": name, "value": value, **row(case, SWEPT)} for name, value, case in tqdm(sweeps, desc="growth")
        ],
    }


def row(case: Case, names: tuple[str, ...] | None = None) -> dict[str, Any]:
    """One layer: for each method the operations and bytes; and the bytes of the input itself.

    ``frozen_and_input`` is what the frozen layer keeps and the input, the input counted once.
    """
    built, refused = methods.build(case, names)
    inputs = case.inputs()
    grad = methods.output_grad(built["frozen"], inputs)
    found: dict[str, Any] = {name: {"refused": why} for name, why in refused.items()}
    for name, adapted in built.items():
        found[name] = {
            "parameters": adapted.count,
            "note": adapted.note,
            "flops": ledger.flops(_counted_step(adapted, inputs, grad)),
            "kept": sum(storages(adapted, inputs).values()),
        }
    size = inputs[0].untyped_storage().nbytes()
    both = storages(built["frozen"], inputs) | {ledger.address(inputs[0]): size}
    return {
        "case": case.name,
        "group": case.group,
        "size": case.size,
        "input": size,
        "frozen_and_input": sum(both.values()),
        "methods": found,
    }


def _counted_step(adapted: Adapted, inputs: tuple[Any, ...], grad: Tensor) -> Callable[[], object]:
    """The training step through ``backward``: torch's counter does not see ``torch.autograd.grad`` with parameters."""

    def step() -> None:
        adapted.module(*inputs).backward(grad, inputs=[inputs[0], *adapted.trained])

    return step


def storages(adapted: Adapted, inputs: tuple[Any, ...]) -> dict[int, int]:
    """What a method keeps for backward on these inputs."""
    return ledger.kept(lambda: adapted.module(*inputs), adapted.module.parameters())


def growth() -> Iterator[tuple[str, int, Case]]:
    """(what grows, its value, the case): one thing at a time from one convolution and one linear layer."""
    image, text = conv(128, 28, batch=4), linear(768, 768, 512, 8)
    for rank in (4, 8, 16, 32, 64):
        yield "rank, conv", rank, replace(image, rank=rank)
        yield "rank, linear", rank, replace(text, rank=rank)
    for width in (64, 128, 256, 512):
        yield "width, conv", width, conv(width, 28, batch=4)
    for width in (256, 512, 1024, 2048):
        yield "width, linear", width, linear(width, width, 512, 8)
    for kernel in (1, 3, 5, 7):
        yield "kernel size, conv", kernel, conv(128, 28, kernel, batch=4)
    for batch in (1, 2, 4, 8):
        yield "batch, conv", batch, conv(128, 28, batch=batch)
        yield "tokens, linear", 512 * batch, linear(768, 768, 512 * batch, 8)
