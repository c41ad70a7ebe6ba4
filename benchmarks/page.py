"""docs/benchmarks.md, written from the results and from nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import gpu_tables, plots, results, tables
from benchmarks.verdicts import Row, slow_choices, verdicts

DOCS = results.ROOT / "docs"
HEAD = """# Benchmarks

Time and memory, written by `make bench` from the files in [benchmarks/results](../benchmarks/results). Scores are on
their own page: [quality at equal parameters](quality.md).

A *step* is the forward and the backward to the input and to what a method trains, without an optimiser; in float32, but
for the sections that name bfloat16. No adapter can be faster than the *frozen* layer's own step, so times are given
relative to it. In every repeat the methods take turns in a new random order. A ratio of two methods is taken within
each repeat, where both met the same machine. Figures are medians over the repeats, ± is half the interquartile range.
The headline is one thread; there the processor time of the process is read beside the wall clock, and the two differ
where other work used the machine.

*FLoRA* is what `get_peft_model` gives, *summed* and *beside* are two of its ways by themselves. *LoRA, equal
parameters* has the rank whose parameters are nearest to FLoRA's. *authors' scheme* is our implementation of it: dW
formed at every forward, and a second full-size run of the layer with it. Adapters start from random values, so that no
multiplication by zero is skipped.
"""


MISSING = {
    "gpu": """## On a GPU

Not measured: no CUDA device was at hand. `python benchmarks/gpu.py` measures there, eager and compiled."""
}


def write(folder: Path, out: Path) -> list[Path]:
    """The page and the plot, from the results in ``folder``."""
    found = results.read(folder)
    out.mkdir(parents=True, exist_ok=True)
    written = [out / "benchmarks.md"]
    written[0].write_text(render(found), encoding="utf-8")
    if "layers" in found:
        written.append(out / "benchmarks.png")
        plots.step_times(found["layers"]["rows"], written[1])
    return written


def render(found: Mapping[str, Row]) -> str:
    """The page as Markdown."""
    parts = [HEAD, tables.origin(found), *_asked(found)]
    for question, section in SECTIONS.items():
        parts += (
            section(found[question]) if question in found else [MISSING.get(question, f"## Not measured: {question}")]
        )
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _asked(found: Mapping[str, Row]) -> list[str]:
    judged = list(verdicts(found))
    parts = ["## What was aimed at and what was measured", tables.verdict_table(judged)]
    failing = [verdict for _, said in judged for verdict in said[:1] if not verdict.holds]
    reasons = [
        f"* {verdict.check.line}; beyond the limit: {', '.join(verdict.beyond)}. {verdict.check.reason}"
        for verdict in failing
    ]
    return parts + (["Why lines fail:", "\n".join(reasons)] if reasons else [])


def _layers(result: Row) -> list[str]:
    rows, threads = result["rows"], [str(count) for count in result["machine"]["threads"]]
    slow = slow_choices(rows)
    chosen = [f"* {name}: {times:.2f} times the better path." for name, times in slow.items()]
    parts = ["## One layer", "![step times](benchmarks.png)", tables.times(rows, threads[0])]
    parts += ["What the dashes stand for:", "\n".join(tables.refusals(rows))]
    parts += ["### FLoRA row by row", tables.per_row(rows)]
    parts += ["Rows where the chosen path is more than a tenth slower than the better one:"]
    parts += ["\n".join(chosen) if chosen else "None."]
    parts += ["### Trainable parameters", tables.parameters(rows)]
    for count in threads[1:]:
        parts += [f"### With {count} threads", tables.times(rows, count)]
    return parts


def _counts(result: Row) -> list[str]:
    flops, kept = (tables.ledger(result["rows"], key, unit) for key, unit in (("flops", 1e9), ("kept", tables.MIB)))
    return [
        "## What needs no clock",
        "Operations of a step (GFLOP), by `torch.utils.flop_counter`, products that are added in place counted too:",
        flops,
        "MiB that forward keeps for backward, each storage once, parameters left out:",
        kept,
        "### How they grow",
        "One thing at a time, from a 3x3 convolution with 128 channels on 28 x 28 and a linear layer of width 768.",
        tables.growth(result["growth"], ("full", "flora", "lora", "authors")),
    ]


def _models(result: Row) -> list[str]:
    rows, threads = result["rows"], [str(count) for count in result["machine"]["threads"]]
    parts = [
        "## Whole models",
        "Random weights. Every method trains the head and takes the gradient to the model's input (to the embeddings' "
        "output where the input is ids); *frozen* trains only the head. FLoRA adapts `all`, LoRA those of its layers "
        "that PEFT can adapt; where these are fewer, *FLoRA on LoRA's layers* adapts the same ones.",
        tables.models(rows, threads[0]),
    ]
    for count in threads[1:]:
        parts += [f"### With {count} threads", tables.models(rows, count)]
    return [*parts, "### Merged", tables.inference(rows)]


def _attach(result: Row) -> list[str]:
    text = (
        f"A Llama of {result['parameters']:,} parameters in {result['dtype']}, all linear layers, r = {result['rank']}."
    )
    parts = ["## Attaching and saving", text, tables.attach(result)]
    many = result.get("many")
    if many is not None:
        middle = many["attach_ms"]["median"]
        parts.append(f"FLoRA on {many['layers']} small layers of five kinds is attached in {middle:,.0f} ms.")

    return parts


def _compiled(result: Row) -> list[str]:
    text = (
        "Kernels that `torch.compile` generates for a training step of one block, + calls of torch's own products and "
        "convolutions; counted in the code for a CPU, with the decisions that the library takes on a GPU, and with few "
        f"channels, r = {result['rank']}. LoRA leaves depthwise and transposed convolutions out."
    )
    whole = all(_is_one_graph(method) for row in result["rows"] for method in row["methods"].values())
    rest = (
        "No graph breaks, a second step compiles nothing, other batch sizes share one more graph, and no graph writes "
        "into its inputs (statistics of norms aside) or computes on the CPU, which would keep it from being captured."
    )
    half = (
        "In bfloat16 a layer asks for one kernel for the sum of W and dW with its rounding, and a convolution for one "
        "more: its gradient comes in bfloat16 and is widened before it is projected. LoRA widens an input once for "
        "all layers that share it."
    )
    return ["## Under a compiler", text, tables.compiled(result["rows"]), half, *([rest] if whole else [])]


def _host(result: Row) -> list[str]:
    repeats = min(row["repeats"] for row in result["rows"])
    text = (
        "Microseconds of processor time that a training step of one layer costs the host, on tensors of a few numbers "
        "of a CPU, with the decisions that the library takes on a GPU; what a kernel of Triton would cost is stood for "
        f"by small products. Medians over {repeats} repeats, in which the methods take turns; the last columns are "
        "the medians of the ratios within each repeat. Above 1, eager steps that wait for the host are slower than "
        "LoRA's. *Prepared* is FLoRA with `flora.prepare`, where it forms layers together: of 8 layers, unless the row "
        "says otherwise. The machine was shared."
    )
    return ["## What the host pays", text, tables.host(result["rows"])]


def _is_one_graph(method: Row) -> bool:
    """Whether a step is one graph for a shape, one more for all other batches, and could be captured."""
    unbroken = not (method["breaks"] or method["recompiled"] or method["uncapturable"])
    return unbroken and sum(method.get("graphs_by_batch", ())) <= 2 and "cpu" not in method.get("devices", ())


SECTIONS: dict[str, Any] = {
    "layers": _layers,
    "counts": _counts,
    "models": _models,
    "attach": _attach,
    "compiled": _compiled,
    "host": _host,
    "gpu": gpu_tables.section,
}
