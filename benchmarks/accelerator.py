"""The rows of ``gpu.py``: what is built, how it is trained under each method, and how a step is timed."""

from __future__ import annotations

import copy
import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import flora
from benchmarks import clock
from benchmarks.unets import Attention, DiffusionUNet, Residual, VolumeBlock, VolumeUNet

MODES = ("eager", "captured", "compiled")
METHODS = ("frozen", "full", "flora", "prepared", "lora")
PREPARED = ("eager",)  # the modes in which ``flora.prepare`` changes something
BUDGET = clock.Budget(3, 7, 30, 5.0)
LORA_TAKES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
RANK = 16


@dataclass(frozen=True)
class Row:
    """One thing that is trained.

    Attributes:
        build: quick -> the model, with random weights.
        inputs: quick -> the arguments of its forward.
        size: the input in words.
        head: what every method trains in full, a name in the model.
        targets: raw parameters that are adapted as well.
        blocks: names of the classes that a compiler is given one by one.
        part: quick -> the model that is compiled, with one block of each shape, and what it is in words; by default
            the whole model.
    """

    build: Callable[[bool], nn.Module]
    inputs: Callable[[bool], dict[str, Tensor]]
    size: str
    head: str | None = None
    targets: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
    part: tuple[Callable[[bool], nn.Module], str] | None = None


def linear(inner: int, out: int) -> Row:
    """A linear layer with bias over 8,192 tokens."""

    def build(quick: bool) -> nn.Module:
        return nn.Sequential(nn.Linear(inner // 64, out // 64) if quick else nn.Linear(inner, out))

    def inputs(quick: bool) -> dict[str, Tensor]:
        return {"input": torch.randn(64, inner // 64) if quick else torch.randn(8192, inner)}

    return Row(build, inputs, "8,192 tokens")


def convnext(quick: bool, depths: Sequence[int] = (3, 3, 27, 3)) -> nn.Module:
    """ConvNeXt-V2-Large."""
    from transformers import ConvNextV2Config, ConvNextV2ForImageClassification

    widths = [192, 384, 768, 1536]
    if quick:
        depths, widths = [min(depth, 2) for depth in depths], [16, 32, 32, 32]
    return ConvNextV2ForImageClassification(ConvNextV2Config(depths=list(depths), hidden_sizes=widths, num_labels=10))


def resnet(quick: bool, depths: Sequence[int] = (3, 4, 6, 3)) -> nn.Module:
    """ResNet-50."""
    from transformers import ResNetConfig, ResNetForImageClassification

    size: dict[str, Any] = {"depths": list(depths)}
    if quick:
        size = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}
    return ResNetForImageClassification(ResNetConfig(num_labels=10, **size))


def llama_block(quick: bool, layers: int = 2) -> nn.Module:
    """Blocks of a Llama-like model with eight experts, two for each token (Mixtral)."""
    from transformers import MixtralConfig, MixtralModel

    width, inner = (64, 96) if quick else (2048, 4096)
    config = MixtralConfig(
        vocab_size=128, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_local_experts=8,
        num_attention_heads=4 if quick else 16, num_key_value_heads=2 if quick else 4,
    )  # fmt: skip
    config._experts_implementation = "grouped_mm"
    model = MixtralModel(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return model


def images(batch: int) -> Callable[[bool], dict[str, Tensor]]:
    """Of 224 pixels, smaller ones in a smoke run."""

    def make(quick: bool) -> dict[str, Tensor]:
        return {"pixel_values": torch.randn(1, 3, 64, 64) if quick else torch.randn(batch, 3, 224, 224)}

    return make


def latents(quick: bool) -> dict[str, Tensor]:
    """Sixteen images of 512 pixels in latent space, with 77 tokens of text."""
    batch, side, width = (1, 8, 32) if quick else (16, 64, 320)
    return {
        "sample": torch.randn(batch, 4, side, side),
        "text": torch.randn(batch, 77, 32 if quick else 768),
        "steps": torch.randn(batch, width),
    }


def volumes(quick: bool) -> dict[str, Tensor]:
    """Two volumes of 96 voxels a side."""
    return {"pixel_values": torch.randn(1, 1, 16, 16, 16) if quick else torch.randn(2, 1, 96, 96, 96)}


def hidden_states(quick: bool) -> dict[str, Tensor]:
    """Four texts of 2,048 tokens as vectors."""
    return {"inputs_embeds": torch.randn(1, 16, 64) if quick else torch.randn(4, 2048, 2048)}


ROWS: dict[str, Row] = {
    "convnext": Row(
        convnext,
        images(64),
        "batch 64, 224 x 224",
        "classifier",
        blocks=("ConvNextV2Layer",),
        part=(partial(convnext, depths=(1, 1, 1, 1)), "one block of each of four widths"),
    ),
    "unet": Row(
        lambda quick: DiffusionUNet((32, 32, 64), 32) if quick else DiffusionUNet(),
        latents,
        "batch 16, latents of 64 x 64",
        "head",
        blocks=(Residual.__name__, Attention.__name__),
        part=(lambda quick: DiffusionUNet((32, 32) if quick else (320, 640), 32 if quick else 768), "two resolutions"),
    ),
    "unet3d": Row(
        lambda quick: VolumeUNet((8, 16)) if quick else VolumeUNet(),
        volumes,
        "batch 2, 96 x 96 x 96",
        "head",
        blocks=(VolumeBlock.__name__,),
        part=(lambda quick: VolumeUNet((8, 16) if quick else (32, 64, 128)), "three resolutions"),
    ),
    "resnet": Row(
        resnet,
        images(128),
        "batch 128, 224 x 224",
        "classifier.1",
        blocks=("ResNetBottleNeckLayer",),
        part=(partial(resnet, depths=(1, 1, 1, 1)), "one block of each of four widths"),
    ),
    "llama": Row(
        llama_block,
        hidden_states,
        "4 x 2,048 tokens, 2 of 8 experts",
        targets=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
        blocks=("MixtralDecoderLayer",),
        part=(partial(llama_block, layers=1), "one block"),
    ),
    "linear-4096-4096": linear(4096, 4096),
    "linear-4096-1024": linear(4096, 1024),
    "linear-4096-14336": linear(4096, 14336),
    "linear-768-3072": linear(768, 3072),
}


# ---- the methods ---------------------------------------------------------------------------------------------------


def under(method: str, base: nn.Module, row: Row) -> nn.Module:
    """The model as that method trains it."""
    base.requires_grad_(method == "full")
    if method in ("frozen", "full"):
        if row.head:
            base.get_submodule(row.head).requires_grad_(True)
        return base.train()

    saved = [row.head] if row.head else None
    experts = {"target_parameters": list(row.targets)} if row.targets else {}
    config: Any
    if method in ("flora", "prepared"):
        excluded = [row.head] if row.head else []
        config = flora.FloraConfig(
            r=RANK,
            target_modules="all",
            exclude_modules=excluded,
            modules_to_save=saved,
            freeze_batch_norm=False,  # as under the other methods
        )
        if row.targets:
            config = flora.FloraConfig(r=RANK, target_modules=_lora_targets(base, row), **experts)
    else:
        names = _lora_targets(base, row)
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names, modules_to_save=saved, **experts)
    model = get_peft_model(base, config)
    for value in model.parameters():
        if value.requires_grad and not value.any():  # as after a first step: what starts at zero is zero no more
            nn.init.normal_(value, std=0.01)
    if method == "prepared":
        flora.prepare(model)
    return model.train()


def _lora_targets(base: nn.Module, row: Row) -> list[str]:
    """The layers that PEFT's LoRA can adapt, named one by one."""
    return [
        name
        for name, part in base.named_modules()
        if isinstance(part, LORA_TAKES) and name != row.head and RANK % getattr(part, "groups", 1) == 0
    ]


def compiled(model: nn.Module, row: Row) -> nn.Module:
    """The same weights, with every block of the row compiled."""
    torch._dynamo.config.recompile_limit = 64
    for part in model.modules():
        if type(part).__name__ in row.blocks or (not row.blocks and part is model):
            part.compile(dynamic=False)
    return model


# ---- a step --------------------------------------------------------------------------------------------------------


def training_step(model: nn.Module, inputs: Mapping[str, Tensor]) -> clock.Step:
    """Forward, loss, backward to the input and to what is trained; no optimiser."""

    def step() -> None:
        leaves = {name: value.detach().requires_grad_(value.is_floating_point()) for name, value in inputs.items()}
        out = model(*leaves.values()) if "input" in leaves else model(**leaves)
        for key in ("logits", "last_hidden_state"):
            out = getattr(out, key, out)
        out.float().square().mean().backward()
        for parameter in model.parameters():
            parameter.grad = None

    return step


def captured(step: clock.Step) -> clock.Step:
    """The step as a CUDA graph: the device launches its kernels."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):
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


def kernels(step: clock.Step) -> list[list[Any]]:
    """The kernels of a step that take the longest: name, how often, milliseconds in all."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    events = [event for event in profile.key_averages() if event.self_device_time_total > 0]
    events.sort(key=lambda event: -event.self_device_time_total)
    return [[event.key[:90], event.count, round(event.self_device_time_total / 1e3, 3)] for event in events[:40]]


@dataclass
class Run:
    """A row that is being measured."""

    row: Row
    asked: Any
    models: dict[str, nn.Module] = field(default_factory=dict)
    steps: dict[str, clock.Step] = field(default_factory=dict)


def measure(name: str, modes: Sequence[str], asked: Any, found: dict[str, Any], save: Callable[[], None]) -> None:
    """Measures one row in these modes; ``found`` grows, and is saved after each mode."""
    row, cuda = ROWS[name], asked.device == "cuda"
    line = _line(name, found)
    if "skipped" in line:
        return
    methods = line["methods"]
    build = row.build
    if "compiled" in modes and row.part is not None:
        build, line["compiled_part"] = row.part

    torch.manual_seed(asked.seed)
    try:
        base = build(asked.quick)
    except ImportError as error:
        line["skipped"] = str(error)
        return

    dtype = torch.bfloat16
    base = base.to(asked.device, dtype)
    inputs = {key: value.to(asked.device, dtype) for key, value in row.inputs(asked.quick).items()}
    run = Run(row, asked)
    for method in METHODS:
        if method == "prepared" and (line["group"] == "linear" or not set(PREPARED) & set(modes)):
            continue
        model = under(method, copy.deepcopy(base), row)
        count = sum(value.numel() for value in model.parameters() if value.requires_grad)
        methods.setdefault(method, {"parameters": count, "ms": {}, "peak": {}})
        run.models[method], run.steps[method] = model, training_step(model, inputs)
    del base

    try:
        for mode in modes:
            if mode == "captured" and not cuda:
                continue
            time_mode(mode, run, methods)
            save()
    finally:
        run.models.clear(), run.steps.clear()
        torch.compiler.reset()
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()


def _line(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """What was found of a row so far."""
    group = "linear" if name.startswith("linear") else "model"
    lines = found["rows" if group == "linear" else "models"]
    for line in lines:
        if line["case"] == name:
            return line  # type: ignore[no-any-return]
    line = {"case": name, "group": group, "size": ROWS[name].size, "rank": RANK, "methods": {}}
    lines.append(line)
    return line


def time_mode(mode: str, run: Run, methods: dict[str, Any]) -> None:
    """Fills in times, peak memory and kernels of every method in one mode."""
    asked, cuda = run.asked, run.asked.device == "cuda"
    steps = {method: step for method, step in run.steps.items() if method != "prepared" or mode in PREPARED}
    if mode == "compiled":
        for model in run.models.values():
            compiled(model, run.row)
    steps = ready(steps, mode, methods)
    if not steps:
        raise RuntimeError("; ".join(f"{name}: {values['failed'][mode]}" for name, values in methods.items()))

    budget = BUDGET.shortened() if asked.quick else BUDGET
    times = clock.interleave(steps, budget, asked.seed, torch.cuda.synchronize if cuda else None)
    for method, values in times.items():
        methods[method]["ms"][mode] = clock.summary(values)
        if cuda and mode != "captured":
            methods[method]["peak"][mode] = peak(steps[method])
    if asked.profile and cuda and mode == "eager":
        for method in steps.keys() & {"full", "flora"}:
            methods[method]["kernels"] = kernels(steps[method])


def ready(steps: Mapping[str, clock.Step], mode: str, methods: dict[str, Any]) -> dict[str, clock.Step]:
    """The steps after their first run, captured where asked for; what fails is noted with its method and left out."""
    found: dict[str, clock.Step] = {}
    for method, step in steps.items():
        try:
            step()
            found[method] = captured(step) if mode == "captured" else step
        except Exception as error:  # one method that fails must not take the others along
            methods[method].setdefault("failed", {})[mode] = f"{type(error).__name__}: {error}"[:2000]

    return found


def summary(found: Mapping[str, Any]) -> str:
    """A short table: the frozen step, the others relative to it, and peak memory in MiB."""
    lines = [f"{'row':<20}{'mode':<10}{'frozen ms':>10}" + "".join(f"{name:>9}" for name in METHODS[1:]) + "  peak MiB"]
    for line in [*found["models"], *found["rows"]]:
        for mode in MODES:
            ours = {name: values["ms"].get(mode) for name, values in line.get("methods", {}).items()}
            if not ours.get("frozen"):
                continue
            frozen = statistics.median(ours["frozen"]["raw"])
            ratios = "".join(
                f"{ours[name]['median'] / frozen:>9.3f}" if ours.get(name) else f"{'-':>9}" for name in METHODS[1:]
            )
            peaks = [line["methods"].get(name, {"peak": {}})["peak"].get(mode) or 0 for name in METHODS]
            sizes = " ".join(f"{size / 2**20:.0f}" for size in peaks)
            lines.append(f"{line['case']:<20}{mode:<10}{frozen:>10.2f}{ratios}  {sizes}")
    lines += [f"failed: {name}: {why[:200]}" for name, why in found.get("failed", {}).items()]
    lines += [
        f"failed: {line['case']}, {name}, {mode}: {why[:200]}"
        for line in [*found["models"], *found["rows"]]
        for name, values in line.get("methods", {}).items()
        for mode, why in values.get("failed", {}).items()
    ]
    return "\n".join([*lines, *found.get("not_run", [])])
