"""What a compiler makes of one training step under each method: counted in the code that it generates, not timed.

The kernels of a CPU are generated and counted, and not built, since that takes a minute for each block and changes no
count. The networks are single blocks with the structure of the real ones and few channels, so that one takes seconds.
The decisions of the library are those of a GPU, or those of a CPU.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

sys.path[:1] = [str(Path(__file__).resolve().parents[1])]  # run as a script: the folder above, not this one

METHODS = ("flora", "flora-same", "flora-cpu", "lora")  # the second on LoRA's layers, the third as a CPU decides
RANK = 8
DTYPES = ("float32", "bfloat16")
BATCHES = (2, 2, 3, 5)
EXTERNAL = re.compile(r"^\s+(?:\w+ = )?(?:extern_kernels\.\w+|torch\.ops\.\w+\.\w+(?:\.\w+)?)\(", re.MULTILINE)
STATIC = 6  # which of the further arguments of a compiled graph says which of its inputs stay in their place
EXAMPLES = """\
examples:
  python benchmarks/compiled.py                       every block, in float32 and in bfloat16
  python benchmarks/compiled.py --rows Llama,ResNet   the rows whose names begin so; the result keeps the others
  python benchmarks/compiled.py --quick               a smoke run of one block; writes under outputs/
"""


# ---- the blocks ----------------------------------------------------------------------------------------------------


def convnext() -> tuple[Any, list[tuple[int, ...]]]:
    """ConvNeXt-V2: the convolution between two stages, and a block."""
    from transformers import ConvNextV2Config
    from transformers.models.convnextv2.modeling_convnextv2 import ConvNextV2Stage

    return ConvNextV2Stage(ConvNextV2Config(), 24, 32, depth=1), [(24, 16, 16)]


def resnet() -> tuple[Any, list[tuple[int, ...]]]:
    """ResNet-50: the first two bottlenecks of a stage, one with a convolution as its shortcut; norms as in training."""
    from transformers import ResNetConfig
    from transformers.models.resnet.modeling_resnet import ResNetStage

    return ResNetStage(ResNetConfig(), 48, 64, stride=2, depth=2), [(48, 16, 16)]


def residual() -> tuple[Any, list[tuple[int, ...]]]:
    """The diffusion U-Net: a residual block that changes the number of channels."""
    from benchmarks.unets import Residual

    return Residual(32, 64, 48), [(32, 8, 8), (48,)]


def attention() -> tuple[Any, list[tuple[int, ...]]]:
    """The diffusion U-Net: an attention block."""
    from benchmarks.unets import Attention

    return Attention(64, 32), [(64, 8, 8), (7, 32)]


def volume() -> tuple[Any, list[tuple[int, ...]]]:
    """A 3-D U-Net: a transposed convolution and the block after it."""
    from torch import nn

    from benchmarks.unets import VolumeBlock

    return nn.Sequential(nn.ConvTranspose3d(24, 16, 2, stride=2), VolumeBlock(16, 16)), [(24, 4, 4, 4)]


def llama() -> tuple[Any, list[tuple[int, ...]]]:
    """Llama: a block, and the norm after the last one."""
    from torch import nn
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=8,
    )

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = LlamaModel(config)

        def forward(self, x: Any) -> Any:
            return self.model(inputs_embeds=x, use_cache=False).last_hidden_state

    return Block(), [(16, 64)]


ROWS: dict[str, Callable[[], tuple[Any, list[tuple[int, ...]]]]] = {
    "ConvNeXt-V2, downsampling and block": convnext,
    "ResNet-50, two bottlenecks": resnet,
    "U-Net, residual block": residual,
    "U-Net, attention block": attention,
    "3-D U-Net, transposed and block": volume,
    "Llama, block": llama,
}


# ---- a step under a compiler ---------------------------------------------------------------------------------------


class Generated(NamedTuple):
    """What a compiler generated for one graph.

    Attributes:
        source: the Python code that calls kernels and torch's own operations.
        uncapturable: why the graph could not be captured as a CUDA graph; empty where it could.
    """

    source: str
    uncapturable: str


@contextmanager
def generated_only(graphs: list[Generated]) -> Iterator[None]:
    """Within, kernels are generated and do nothing; every graph that was compiled is added to ``graphs``."""
    from torch._inductor import async_compile, graph, output_code

    sources: list[str] = []
    lines, begin = graph.GraphLowering._compile_to_module_lines, output_code.CompiledFxGraph.__init__
    build = async_compile.AsyncCompile.cpp_pybinding

    def nothing(*args: Any) -> None:
        return None

    def noted(self: Any, wrapper_code: Any) -> Any:
        sources.append(wrapper_code.value)
        return lines(self, wrapper_code)

    def begun(self: Any, compiled: Any, lowered: Any, module: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, compiled, lowered, module, *args, **kwargs)
        graphs.append(Generated(sources.pop(), uncapturable(lowered, module, args[STATIC])))

    async_compile.AsyncCompile.cpp_pybinding = lambda *args, **kwargs: nothing
    graph.GraphLowering._compile_to_module_lines = noted
    output_code.CompiledFxGraph.__init__ = begun
    try:
        yield
    finally:
        async_compile.AsyncCompile.cpp_pybinding = build
        graph.GraphLowering._compile_to_module_lines = lines
        output_code.CompiledFxGraph.__init__ = begin


def uncapturable(lowered: Any, module: Any, static: Sequence[int]) -> str:
    """What torch itself looks for before it captures a graph, apart from the devices of its tensors.

    Args:
        lowered: the graph as the compiler sees it.
        module: the same before.
        static: which inputs are parameters and buffers, which a graph may write into.
    """
    from torch._inductor import cudagraph_utils, utils

    node = utils.get_first_incompatible_cudagraph_node(module)
    if node is not None:
        return f"{node.target}"
    written = sorted(set(lowered.mutated_input_idxs) - set(static))
    if written:
        return f"writes into its inputs {', '.join(map(str, written))}"

    storage = cudagraph_utils.get_input_storage_mutation_info(module)
    return cudagraph_utils.get_input_storage_mutation_reason(storage) or ""


class Layers(NamedTuple):
    """Names of layers: of all that can be adapted, and of those that PEFT's LoRA can adapt."""

    every: list[str]
    lora: list[str]


def layers_of(block: Any) -> Layers:
    """The layers of a block."""
    from torch import nn

    kinds = (nn.Linear, nn.Conv2d, nn.Conv3d)
    every = [name for name, part in block.named_modules() if isinstance(part, (*kinds, nn.ConvTranspose3d))]
    parts = {name: block.get_submodule(name) for name in every}
    lora = [name for name, part in parts.items() if isinstance(part, kinds) and not RANK % getattr(part, "groups", 1)]
    return Layers(every, lora)


def under(method: str, block: Any) -> Any:
    """The block as that method trains it."""
    from peft import LoraConfig, get_peft_model

    import flora

    layers = layers_of(block.requires_grad_(False))
    config: Any
    if method == "lora":
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=layers.lora)
    else:
        names = layers.lora if method == "flora-same" else layers.every
        config = flora.FloraConfig(r=RANK, target_modules=names, freeze_batch_norm=False)

    return get_peft_model(block, config).train().base_model.model


@contextmanager
def decisions(method: str) -> Iterator[None]:
    """Within, a method runs with a GPU's decisions on CPU tensors, unless a CPU's are asked for."""
    if method == "flora-cpu":
        yield
        return

    from benchmarks import gpu_branch
    from flora.layers import device

    own = device.product
    with gpu_branch.taken():
        device.product = partial(unrounded, own, product_op())
        try:
            yield
        finally:
            device.product = own


def unrounded(own: Any, product: Any, left: Any, right: Any, dtype: Any, scale: float = 1.0) -> Any:
    """A product in half precision that returns its float32 sums: one call of torch's on a GPU, and of ours here."""
    import torch

    if left.device.type != "cpu" or left.dtype == torch.float32 or dtype != torch.float32:
        return own(left, right, dtype, scale)

    found = product(left, right)

    return found if scale == 1 else scale * found


@functools.cache
def product_op() -> Any:
    """The operation that stands for ``aten::mm.dtype``, which torch has for GPUs only."""
    import torch
    from torch import library

    def product(left: Any, right: Any) -> Any:
        return torch.mm(left.float(), right.float())

    def shape(left: Any, right: Any) -> Any:
        return left.new_empty(left.shape[0], right.shape[1], dtype=torch.float32)

    library.define("benchmarks::product", "(Tensor left, Tensor right) -> Tensor")
    library.impl("benchmarks::product", "default", product)
    library.register_fake("benchmarks::product", shape)

    return torch.ops.benchmarks.product


def count(name: str, method: str, dtype: str) -> dict[str, Any]:
    """Kernels, calls of torch's own operations, graphs of the first and of a second step, breaks of the graph.

    Args:
        name: of the row.
        method: one of ``METHODS``.
        dtype: of the base model, by torch's name.
    """
    import torch
    from torch._dynamo.utils import counters
    from torch._inductor import config, metrics

    torch.manual_seed(0)
    block, sizes = ROWS[name]()
    model = under(method, block.to(getattr(torch, dtype)))
    graphs: list[Generated] = []

    torch.compiler.reset()
    metrics.reset()
    counters.clear()
    compiled = torch.compile(model)
    seen = []
    with generated_only(graphs), config.patch(force_disable_caches=True), decisions(method):
        for _ in range(2):
            step(compiled, sizes, dtype)
            seen.append(counters["stats"]["unique_graphs"])

    return {
        "kernels": metrics.generated_kernel_count,
        "operations": sum(len(EXTERNAL.findall(graph.source)) for graph in graphs),
        "graphs": seen[0],
        "recompiled": seen[1] - seen[0],
        "breaks": sum(counters["graph_break"].values()),
        "uncapturable": [graph.uncapturable for graph in graphs if graph.uncapturable],
    }


def step(model: Any, sizes: Sequence[tuple[int, ...]], dtype: str, batch: int = 2, device: str = "cpu") -> None:
    """Forward and backward, to the inputs and to what is trained."""
    import torch

    shapes = [(batch, *size) for size in sizes]
    leaves = [torch.randn(shape, dtype=getattr(torch, dtype), device=device).requires_grad_() for shape in shapes]
    model(*leaves).float().square().mean().backward()


def traced(name: str, method: str, dtype: str, batches: Sequence[int]) -> dict[str, Any]:
    """How many graphs steps of these batches ask for, and the devices of all that they compute.

    The model is on the meta device, which stands for one that is not the CPU: a tensor of the CPU among its numbers is
    what keeps a graph from being captured.
    """
    import torch
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.utils import counters
    from torch._functorch.aot_autograd import make_boxed_func

    devices: set[str] = set()

    def watching(graph: Any, inputs: Any) -> Any:
        values = [node.meta.get("val") for node in graph.graph.nodes]
        devices.update(value.device.type for value in values if isinstance(value, torch.Tensor))
        return make_boxed_func(graph.forward)

    block, sizes = ROWS[name]()
    model = under(method, block.to(getattr(torch, dtype))).to("meta")

    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(model, backend=aot_autograd(fw_compiler=watching, bw_compiler=watching))
    seen = [0]
    with decisions(method):
        for batch in batches:
            step(compiled, sizes, dtype, batch, "meta")
            seen.append(counters["stats"]["unique_graphs"])

    graphs = [after - before for before, after in pairwise(seen)]
    return {"graphs_by_batch": graphs, "devices": sorted(devices)}


# ---- the command ---------------------------------------------------------------------------------------------------


def row(name: str, dtype: str) -> dict[str, Any]:
    """A row of the result. A CPU's decisions are asked for in float32, and LoRA's layers where they are fewer."""
    from benchmarks import results

    layers = layers_of(ROWS[name]()[0])
    methods = {}
    for method in METHODS:
        if (method == "flora-same" and layers.every == layers.lora) or (method == "flora-cpu" and dtype != "float32"):
            continue

        methods[method] = count(name, method, dtype)
        if method == "flora":
            methods[method] |= traced(name, method, dtype, BATCHES)

        print(f"{name}, {dtype}, {method}: {methods[method]}", flush=True)

    return {"case": name, "dtype": dtype, "commit": results.commit(), "methods": methods}


def main(argv: Sequence[str] | None = None) -> int:
    """Counts every row and writes what was found after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=lambda text: text.split(","), help="beginnings of names; by default all")
    parser.add_argument("--dtype", choices=DTYPES, help="by default both")
    parser.add_argument("--quick", action="store_true", help="the first row in float32, results elsewhere")
    parser.add_argument("--out", type=Path, help="folder of the result")
    asked = parser.parse_args(argv)

    from benchmarks import quiet

    quiet.settle()
    from benchmarks import results

    wanted = asked.rows or (list(ROWS)[:1] if asked.quick else list(ROWS))
    dtypes = [asked.dtype] if asked.dtype else (DTYPES[:1] if asked.quick else DTYPES)
    options = results.Options(asked.quick, (1,), 0, results.load())
    folder = asked.out or (results.QUICK if asked.quick else results.RESULTS)

    before = results.read(folder).get("compiled", {"rows": []})["rows"] if folder.is_dir() else []
    rows = {(old["case"], old["dtype"]): old for old in before}
    order = [(name, dtype) for dtype in DTYPES for name in ROWS]
    for name, dtype in order:
        if dtype in dtypes and any(name.startswith(start) for start in wanted):
            rows[name, dtype] = row(name, dtype)
            found = [rows[key] for key in order if key in rows]
            results.write("compiled", {"rank": RANK, "batches": BATCHES, "rows": found}, options, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
