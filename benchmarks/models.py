"""How long does a training step of a whole model take, how long attaching, and does merging give the base's speed?"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm

import flora
from benchmarks import clock, ledger
from benchmarks.architectures import MODELS, Model, UnavailableError
from benchmarks.results import Options
from flora.comparison import memory

STEPS = (clock.Budget(2, 9, 20, 45.0), clock.Budget(1, 5, 12, 12.0))  # of the headline's threads, of the others
INFERENCE = clock.Budget(2, 9, 40, 8.0)
ATTACHED = 3  # times, by each method in turn
LORA_TAKES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


def measure(options: Options) -> dict[str, Any]:
    """A row for each model; those whose package is missing say so."""
    return {"rows": [row(model, options) for model in tqdm(MODELS, desc="models", unit="model")]}


def row(model: Model, options: Options) -> dict[str, Any]:
    """One model under every method."""
    named: dict[str, Any] = {"model": model.name, "size": model.size, "rank": model.rank}
    torch.manual_seed(options.seed)
    try:
        base = model.build()
    except UnavailableError as error:
        return {**named, "skipped": str(error)}
    inputs = model.inputs(options.quick)
    with clock.threads(options.threads[0]):
        attached = attach_times(base, model, options)
        inference = merged_inference(base, model, inputs, options)
    methods = training(base, model, inputs, options)
    for name, times in attached.items():
        methods[name]["attach_ms"] = clock.summary(times)
    return {**named, "methods": methods, "inference_ms": inference}


def training(base: nn.Module, model: Model, inputs: dict[str, Tensor], options: Options) -> dict[str, Any]:
    """Times of a step under every method, parameters, bytes kept and the growth of the peak memory."""
    built = {name: make(copy.deepcopy(base), model) for name, make in METHODS.items()}
    if adapted_layers(built["flora-same"]) == adapted_layers(built["flora"]):
        del built["flora-same"]
    for module in built.values():
        leave_the_start(module)
    steps = {name: training_step(module, model, inputs) for name, module in built.items()}
    found: dict[str, Any] = {}
    with clock.threads(options.threads[0]):
        for name, module in built.items():
            held = ledger.kept(lambda module=module: forward(module, model, inputs), module.parameters())
            found[name] = {
                "parameters": sum(value.numel() for value in module.parameters() if value.requires_grad),
                "layers": adapted_layers(module),
                "kept": sum(held.values()),
                "peak_growth": memory.peak_growth(steps[name]),
                "ms": {},
            }
            module.zero_grad(set_to_none=True)
    for place, count in enumerate(options.threads):
        budget = STEPS[min(place, 1)]
        with clock.threads(count):
            times = clock.interleave(steps, budget.shortened() if options.quick else budget, options.seed)
        for name, values in times.items():
            found[name]["ms"][str(count)] = clock.summary(values)
    return found


def leave_the_start(module: nn.Module) -> None:
    """An adapter as it is after a first step: what starts at zero is zero no more."""
    for value in module.parameters():
        if value.requires_grad and not value.any():
            nn.init.normal_(value, std=0.01)


def training_step(module: nn.Module, model: Model, inputs: dict[str, Tensor]) -> Callable[[], object]:
    """Forward, loss, backward to the model's input and to what the method trains; no optimiser."""

    def step() -> None:
        forward(module, model, inputs).square().mean().backward()
        module.zero_grad(set_to_none=True)

    return step


def forward(module: nn.Module, model: Model, inputs: dict[str, Tensor]) -> Tensor:
    """The model's output, with a gradient asked for at its input as the frozen model's own step has it."""
    if model.entry is None:
        inputs = {name: _entering(value) for name, value in inputs.items()}
    out = module(**inputs)
    return out if isinstance(out, Tensor) else out.logits


def _entering(value: Tensor) -> Tensor:
    return value.detach().requires_grad_() if value.is_floating_point() else value


def frozen(base: nn.Module, model: Model) -> nn.Module:
    """Only the head is trained."""
    base.requires_grad_(False)
    base.get_submodule(model.head).requires_grad_(True)
    return _entered(base, model)


def full(base: nn.Module, model: Model) -> nn.Module:
    """Everything is trained."""
    return _entered(base.requires_grad_(True), model)


def flora_all(base: nn.Module, model: Model) -> nn.Module:
    """FLoRA on every weight that it adapts, the head trained in full."""
    _entered(base, model)
    return get_peft_model(base, flora_config(model))


def lora_all(base: nn.Module, model: Model) -> nn.Module:
    """PEFT's LoRA at the same rank, on those of FLoRA's targets that it can adapt."""
    _entered(base, model)
    return get_peft_model(base, lora_config(base, model))


def flora_on_loras_layers(base: nn.Module, model: Model) -> nn.Module:
    """FLoRA on those layers only that LoRA adapts too."""
    _entered(base, model)
    config = flora_config(model)
    config.target_modules, config.exclude_modules = set(lora_targets(base, model)), None
    return get_peft_model(base, config)


METHODS: dict[str, Callable[[nn.Module, Model], nn.Module]] = {
    "frozen": frozen,
    "full": full,
    "flora": flora_all,
    "lora": lora_all,
    "flora-same": flora_on_loras_layers,  # where LoRA cannot adapt every layer
}


def flora_config(model: Model) -> flora.FloraConfig:
    """Of a model, with the default kernel rank. Batch norms run as under LoRA: on the batch's statistics."""
    return flora.FloraConfig(
        r=model.rank,
        target_modules="all",
        exclude_modules=[model.head],
        modules_to_save=[model.head],
        freeze_batch_norm=False,
    )


def lora_targets(base: nn.Module, model: Model) -> list[str]:
    """FLoRA's targets that PEFT's LoRA can adapt, named one by one."""
    return [
        name
        for name, part in base.named_modules()
        if isinstance(part, LORA_TAKES) and name != model.head and model.rank % getattr(part, "groups", 1) == 0
    ]


def lora_config(base: nn.Module, model: Model) -> LoraConfig:
    """At FLoRA's channel rank."""
    names = lora_targets(base, model)
    return LoraConfig(r=model.rank, lora_alpha=model.rank, target_modules=names, modules_to_save=[model.head])


def adapted_layers(module: nn.Module) -> int:
    """How many layers have an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return sum(isinstance(part, BaseTunerLayer) for part in module.modules())


def attach_times(base: nn.Module, model: Model, options: Options) -> dict[str, clock.Times]:
    """Times of ``get_peft_model``, on a copy each time, the methods in turn."""
    times: dict[str, clock.Times] = {"flora": [], "lora": []}
    for _ in range(1 if options.quick else ATTACHED):
        for name, taken in times.items():
            fresh = copy.deepcopy(base)
            taken.append(clock.seconds(partial(METHODS[name], fresh, model)))
    return times


def merged_inference(
    base: nn.Module, model: Model, inputs: dict[str, Tensor], options: Options
) -> dict[str, dict[str, Any]]:
    """Forward without gradients: the base model, a copy of it (the noise), and FLoRA merged into one."""
    merged = get_peft_model(copy.deepcopy(base), flora_config(model)).merge_and_unload()
    subjects = {"base": copy.deepcopy(base), "base again": copy.deepcopy(base), "merged": merged}

    def infer(module: nn.Module) -> Callable[[], object]:
        module.eval()

        @torch.inference_mode()
        def step() -> object:
            return module(**inputs)

        return step

    budget = INFERENCE.shortened() if options.quick else INFERENCE
    times = clock.interleave({name: infer(module) for name, module in subjects.items()}, budget, options.seed)
    return {name: clock.summary(values) for name, values in times.items()}


def _entered(base: nn.Module, model: Model) -> nn.Module:
    """Asks for a gradient where ids have become vectors, which stand for the model's input."""
    if model.entry is not None:
        base.get_submodule(model.entry).register_forward_hook(_require_grad)
    return base.train()


def _require_grad(module: nn.Module, args: Any, output: Tensor) -> None:
    output.requires_grad_(True)
