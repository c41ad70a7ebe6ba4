"""docs/benchmarks.md, written from the results and from nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import gpu_tables, plots, results, tables
from benchmarks.verdicts import Row, slow_choices, verdicts
from flora.report.comparison import comparison_notes, comparison_table
from flora.report.plots import quality_against_parameters

DOCS = results.ROOT / "docs"
HEAD = """# Benchmarks

Written by `make bench` from the files in [benchmarks/results](../benchmarks/results), not by hand.

A *step* is the forward and the backward to the input and to what a method trains, in float32; there is no optimiser in
it. The limit of every adapter is the *frozen* layer's own step, so times are given relative to it. Within every repeat
the methods take turns in an order drawn anew, and a ratio of two methods is taken within each repeat, where both met
the same machine; figures are medians over the repeats, ± is half the interquartile range. One thread is the headline.
With one thread the processor time of the process is read beside the wall clock; the two part where other work holds the
machine.

*FLoRA* is what `get_peft_model` gives, *summed* and *beside* are its two ways by themselves. *LoRA, equal
parameters* has the rank whose parameters are nearest to FLoRA's. *authors' scheme* is our own writing of it: dW formed
at every forward, and a second full-size run of the layer with it. Adapters start from random values, so that no zero is
ever a short cut.
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
    for question in QUALITY.keys() & found.keys():
        written.append(out / f"{question}.png")
        result = found[question]
        quality_against_parameters(written[-1], result["rows"], result["metric"], TITLES[question])
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
    parts += ["Dashes:", "\n".join(tables.refusals(rows))]
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
        f"by small products. Medians over {repeats} repeats, in which the methods take turns; the last column is the "
        "median of the ratios within each repeat. Above 1, eager steps that wait for the host are slower than LoRA's. "
        "The machine was shared."
    )
    return ["## What the host pays", text, tables.host(result["rows"])]


def _is_one_graph(method: Row) -> bool:
    """Whether a step is one graph for a shape, one more for all other batches, and could be captured."""
    unbroken = not (method["breaks"] or method["recompiled"] or method["uncapturable"])
    return unbroken and sum(method.get("graphs_by_batch", ())) <= 2 and "cpu" not in method.get("devices", ())


def _quality(title: str, text: str, result: Row) -> list[str]:
    metric, task = result["metric"], result["question"]
    file = f"{task.removeprefix('quality-')}.yaml"
    return [
        f"## Quality: {title}",
        f"{text} Config: [{file}](../benchmarks/quality/{file}).",
        comparison_table(result["rows"], metric),
        f"![{metric} against trainable parameters]({task}.png)",
        "\n".join(f"* {note}" for note in comparison_notes(result)),
        TUNED,
        "The runs were made while the code was being finished, from commit 2f6ff8d on; the commit above is that of the "
        "checkout when the report was written, not of every run.",
        "The runs shared two cores with each other and with other work, one thread each, so of their times and memory "
        "only large differences tell something; the tables above are measured for that.",
    ]


TUNED = (
    "FLoRA had more tuning than the others: its default start was changed after its validation scores on the CIFAR and "
    "SST-2 tasks with the first seed had been seen, and the scales 1 and 4 were tried there (CIFAR took 4, SST-2 2 in "
    "between, the hippocampus 4 unseen). The authors' scheme has FLoRA's scale, other adapters alpha / r = 2. No test "
    "score was used for that."
)
TITLES = {  # of the pictures: which data, and what is adapted
    "quality-cifar": "CIFAR-10, 4-D convolutions",
    "quality-hippocampus": "hippocampus, 5-D convolutions",
    "quality-sst2": "SST-2, text",
}
QUALITY = {
    "quality-cifar": (
        "4-D convolutions",
        "A ResNet-20 trained on CIFAR-10 (270,000 parameters) is adapted to inverted, blurred JPEG copies from 20 "
        "images of each class, 60 steps.",
    ),
    "quality-hippocampus": (
        "5-D convolutions",
        "A 3-D U-Net of MONAI (35,000 parameters, trained on 120 MRI volumes) is adapted to inverted contrast with "
        "another gamma and noise from 8 volumes, 80 steps. Only FLoRA adapts the transposed convolutions.",
    ),
    "quality-sst2": (
        "text",
        "MiniLM-L6 (22.7 million parameters), trained for sentence similarity, learns sentiment from 128 short "
        "sentences of SST-2, 48 steps.",
    ),
}
SECTIONS: dict[str, Any] = {
    "layers": _layers,
    "counts": _counts,
    "models": _models,
    "attach": _attach,
    "compiled": _compiled,
    "host": _host,
    "gpu": gpu_tables.section,
    **{question: partial(_quality, *texts) for question, texts in QUALITY.items()},
}
