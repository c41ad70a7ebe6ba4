"""How long do the steps of layers and models take on a CUDA device, and how much memory?

Three modes: eager; compiled; and captured, the compiled step recorded once as a CUDA graph and replayed, which is the
time of the device alone. In the other two the clock also sees the host, which prepares each kernel; the device is
waited for after each step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import ConvNextV2Config, ConvNextV2ForImageClassification

from benchmarks import clock, methods, models
from benchmarks.architectures import Model, UnavailableError, images
from benchmarks.grid import Case, linear
from benchmarks.results import Options

NAMES = ("frozen", "full", "flora", "lora", "authors")
MODES = ("eager", "compiled", "captured")
BUDGET = clock.Budget(10, 20, 200, 3.0)
TOKENS = 8192
SHAPES = [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)]  # q and o, k and v, gate and up, down of a Llama 8B


def measure(options: Options, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> Iterator[dict[str, Any]]:
    """Rows of single layers, then of whole models, in every mode; yields what there is after each of them."""
    shapes = [(64, 96)] if options.quick else SHAPES
    cases = [linear(inner, out, 64 if options.quick else TOKENS, 16) for inner, out in shapes]
    found: dict[str, Any] = {"device": device, "dtype": str(dtype).removeprefix("torch."), "rows": [], "models": []}
    for case in tqdm(cases, desc="layers"):
        found["rows"].append(layer_row(placed(case, device, dtype), options, device, dtype))
        yield found
    for model in tqdm([] if options.quick else MODELS, desc="models"):
        found["models"].append(model_row(model, options, device, dtype))
        yield found


def layer_row(case: Case, options: Options, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """One layer under every method, eager and compiled."""
    built, refused = methods.build(case, NAMES)
    x = case.inputs(options.seed)[0].detach().to(device, dtype).requires_grad_()
    grad = methods.output_grad(built["frozen"], (x,))
    found: dict[str, Any] = {name: {"refused": why} for name, why in refused.items()}
    found |= {name: {"parameters": it.count, "note": it.note, "ms": {}, "peak": {}} for name, it in built.items()}

    def steps(mode: str) -> dict[str, clock.Step]:
        run = {name: replace(it, module=as_mode(it.module, mode)) for name, it in built.items()}
        return {name: methods.training_step(it, (x,), grad) for name, it in run.items()}

    time_modes(steps, found, options, device)
    return {"case": case.name, "group": case.group, "size": case.size, "rank": case.rank, "methods": found}


def model_row(model: Model, options: Options, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """One model under every method, eager and compiled; a method at a time, since each has weights of its own."""
    named: dict[str, Any] = {"case": model.name, "group": "model", "size": model.size, "rank": model.rank}
    try:
        base = model.build().to(device, dtype)
    except UnavailableError as error:
        return {**named, "skipped": str(error)}
    inputs = {key: moved(value, device, dtype) for key, value in model.inputs(options.quick).items()}
    built = {name: models.METHODS[name](copy.deepcopy(base), model) for name in NAMES if name in models.METHODS}
    found: dict[str, Any] = {
        name: {"parameters": sum(p.numel() for p in module.parameters() if p.requires_grad), "ms": {}, "peak": {}}
        for name, module in built.items()
    }

    def steps(mode: str) -> dict[str, clock.Step]:
        return {name: models.training_step(as_mode(module, mode), model, inputs) for name, module in built.items()}

    time_modes(steps, found, options, device)
    return {**named, "methods": found}


def time_modes(
    steps: Callable[[str], Mapping[str, clock.Step]], found: dict[str, Any], options: Options, device: str
) -> None:
    """Fills in times and peak memory of every method, in both modes."""
    cuda = device.startswith("cuda")
    run: Mapping[str, clock.Step] = {}
    for mode in MODES:
        if mode == "captured":  # follows the compiled ones
            run = {name: captured(step) for name, step in run.items()}
        else:
            torch.compiler.reset()
            run = steps(mode)
        budget = BUDGET.shortened() if options.quick else BUDGET
        times = clock.interleave(run, budget, options.seed, torch.cuda.synchronize if cuda else None)
        for name, values in times.items():
            found[name]["ms"][mode] = clock.summary(values)
            found[name]["peak"][mode] = peak(run[name]) if cuda and mode != "captured" else None


def captured(step: clock.Step) -> clock.Step:
    """The step as a CUDA graph: its kernels are launched by the device."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def peak(step: clock.Step) -> int:
    """Bytes that the step takes at most beyond what lives before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def as_mode(module: nn.Module, mode: str) -> nn.Module:
    """The module as it is, or compiled."""
    return torch.compile(module, dynamic=False) if mode == "compiled" else module


def placed(case: Case, device: str, dtype: torch.dtype) -> Case:
    """The case with its layer on the device before a method touches it, as a user would load it."""
    return replace(case, build=lambda: case.build().to(device, dtype))


def moved(value: Tensor, device: str, dtype: torch.dtype) -> Tensor:
    """An input on the device, numbers in the dtype, ids as they are."""
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)


class Denoiser(nn.Module):
    """The U-Net of a latent diffusion model, as diffusers configures it by default, with text of 77 tokens."""

    def __init__(self) -> None:
        super().__init__()
        try:
            from diffusers import UNet2DConditionModel
        except ImportError as error:
            raise UnavailableError("diffusers is not installed") from error
        self.unet = UNet2DConditionModel(cross_attention_dim=768)

    def forward(self, sample: Tensor, text: Tensor, steps: Tensor) -> Tensor:
        """(batch, 4, side, side) latents -> the same."""
        return self.unet(sample, steps, encoder_hidden_states=text).sample


def latents(small: bool) -> dict[str, Tensor]:
    """Four images of 512 pixels in latent space."""
    batch = 1 if small else 4
    noise, text = torch.randn(batch, 4, 64, 64), torch.randn(batch, 77, 768)
    return {"sample": noise, "text": text, "steps": torch.arange(batch)}


def convnext() -> nn.Module:
    """ConvNeXt-V2-Large."""
    return ConvNextV2ForImageClassification(
        ConvNextV2Config(depths=[3, 3, 27, 3], hidden_sizes=[192, 384, 768, 1536], num_labels=10)
    )


MODELS = [
    Model("ConvNeXt-V2-Large", convnext, images(16, 224), "classifier", 16, "batch 16, 224 x 224"),
    Model("Diffusion U-Net", Denoiser, latents, "unet.conv_out", 16, "batch 4, latents of 64 x 64"),
]
