"""The tables of the page, one function for each: rows of a result -> Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from tabulate import tabulate

from benchmarks.ratios import CLOCKS, ratio, ratios, spread
from benchmarks.verdicts import Check, Row, Verdict, geomean

NAMES = {
    "frozen": "frozen",
    "full": "full",
    "flora": "**FLoRA**",
    "flora-summed": "summed",
    "flora-beside": "beside",
    "lora": "LoRA, equal rank",
    "lora-params": "LoRA, equal parameters",
    "lokr": "LoKr",
    "lycoris": "LyCORIS Tucker",
    "authors": "authors' scheme",
}
MODEL_NAMES = {**NAMES, "flora-same": "FLoRA on LoRA's layers"}
DASH = "-"
MIB = 2**20


def markdown(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
    """A table; the first column left, the others right."""
    align = ["left", *["right"] * (len(headers) - 1)]
    return tabulate(rows, headers, tablefmt="pipe", colalign=align, disable_numparse=True)


def origin(results: Mapping[str, Row]) -> str:
    """Where each result comes from."""
    rows = []
    for name, result in results.items():
        machine = result["machine"]
        versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
        commit = (result["commit"] or "unknown")[:12] + ("-dirty" if "dirty" in str(result["commit"]) else "")
        commit = f"about `{commit}`" if result.get("commit_is_approximate") else f"`{commit}`"
        where = f"{machine['cpu']}, {machine['cores']} cores, {machine['device']}"
        rows.append([name, result["date"], commit, where, f"{machine['load_before']}", result["seed"], versions])
    return markdown(rows, ["question", "date", "commit", "machine", "load before", "seed", "versions"])


def verdict_table(found: Sequence[tuple[Check, list[Verdict]]]) -> str:
    """Every line with its verdict."""
    rows = []
    for check, verdicts in found:
        wanted = f"{check.sense} {check.limit:g}"
        by_clock = {verdict.clock: verdict for verdict in verdicts}
        cells = [_verdict(by_clock.get(clock)) for clock in CLOCKS]
        worst = by_clock["raw"].worst if by_clock else "not measured"
        rows.append([check.line, "geometric mean" if check.over == "geomean" else "worst row", wanted, *cells, worst])
    return markdown(rows, ["line", "over", "wanted", *CLOCKS.values(), "worst row"])


def _verdict(verdict: Verdict | None) -> str:
    if verdict is None:
        return DASH
    figure = f"{verdict.figure:.1e}" if 0 < verdict.figure < 1e-3 else f"{verdict.figure:.3f}"
    return f"{figure} holds" if verdict.holds else f"**{figure} fails**"


def times(rows: Sequence[Row], threads: str) -> str:
    """Relative to the frozen layer, with the frozen layer's own milliseconds, and the geometric means of the grids."""
    names = [name for name in NAMES if name != "frozen"]
    lines = [
        [row["case"], row["size"], f"r = {row['rank']}", _frozen(row, threads), *_relatives(row, names, threads)]
        for row in rows
    ]
    for group in ("linear", "conv"):
        own = [row for row in rows if row["group"] == group]
        lines.append([f"**{group} grid, geometric mean**", "", "", "1.00", *_means(own, names, threads)])
    return markdown(lines, ["layer", "input", "rank", "frozen, ms", *(NAMES[name] for name in names)])


def _frozen(row: Row, threads: str) -> str:
    return f"{row['methods']['frozen']['ms'][threads]['median']:.1f}"


def _relatives(row: Row, names: Sequence[str], threads: str) -> list[str]:
    every = [ratios(row, name, "frozen", mode=threads) for name in names]
    return [f"{median(found):.2f} ± {spread(found):.2f}" if found else DASH for found in every]


def _means(rows: Sequence[Row], names: Sequence[str], threads: str) -> list[str]:
    cells = []
    for name in names:
        values = [value for row in rows if (value := ratio(row, name, "frozen", mode=threads))]
        cells.append(f"{geomean(values):.2f}" if rows and len(values) == len(rows) else DASH)
    return cells


def parameters(rows: Sequence[Row]) -> str:
    """Trainable parameters, and what there is to say of a method."""
    names = [name for name in NAMES if name not in ("frozen", "flora-summed", "flora-beside")]
    lines = [[row["case"], *(_count(row["methods"].get(name, {})) for name in names)] for row in rows]
    return markdown(lines, ["layer", *(NAMES[name] for name in names)])


def _count(method: Row) -> str:
    if "parameters" not in method:
        return DASH
    return f"{method['parameters']:,}" + (f" ({method['note']})" if method["note"] else "")


def refusals(rows: Sequence[Row]) -> list[str]:
    """Every dash and why."""
    return [
        f"* {row['case']}, {NAMES[name].strip('*')}: {method['refused']}."
        for row in rows
        for name, method in row["methods"].items()
        if "refused" in method and name != "lora-params"
    ]


def per_row(rows: Sequence[Row]) -> str:
    """FLoRA against each reference, row by row."""
    others = ("frozen", "full", "lora", "lora-params", "authors")
    lines = []
    for row in rows:
        found = [ratio(row, "flora", other) for other in others]
        lines.append([row["case"], *(f"{times:.2f}" if times else DASH for times in found)])
    return markdown(lines, ["FLoRA's step / that of", *(NAMES[other] for other in others)])


def ledger(rows: Sequence[Row], key: str, unit: float) -> str:
    """Operations or bytes of every method."""
    lines = [
        [
            row["case"],
            *(
                f"{row['methods'].get(n, {})[key] / unit:,.2f}" if key in row["methods"].get(n, {}) else DASH
                for n in NAMES
            ),
        ]
        for row in rows
    ]
    return markdown(lines, ["layer", *NAMES.values()])


def growth(rows: Sequence[Row], methods: Sequence[str]) -> str:
    """Operations and bytes as one thing grows; beyond the frozen layer's."""
    lines = []
    for row in rows:
        base = row["methods"]["frozen"]
        found = [row["methods"].get(name, {}) for name in methods]
        cells = [f"{(it['flops'] - base['flops']) / 1e6:,.0f}" if "flops" in it else DASH for it in found]
        cells += [f"{it['kept'] / MIB:.2f}" if "kept" in it else DASH for it in found]
        lines.append([row["of"], row["value"], f"{base['flops'] / 1e6:,.0f}", f"{base['kept'] / MIB:.2f}", *cells])
    heads = [f"{NAMES[name]}, extra MFLOP" for name in methods] + [f"{NAMES[name]}, MiB kept" for name in methods]
    return markdown(lines, ["what grows", "value", "frozen, MFLOP", "frozen, MiB kept", *heads])


def models(rows: Sequence[Row], threads: str) -> str:
    """Whole models: a line for each method of each."""
    lines = []
    for row in rows:
        if "skipped" in row:
            lines.append([row["model"], row["skipped"], *[DASH] * 7])
            continue
        what = f"{row['model']}, {row['size']}, r = {row['rank']}"
        lines += [[what, MODEL_NAMES[name], *_model(row, name, threads)] for name in row["methods"]]
    heads = ["parameters", "layers", "step, ms", "/ frozen", "MiB kept", "peak growth, MiB", "attach, ms"]
    return markdown(lines, ["model", "method", *heads])


def _model(row: Row, name: str, threads: str) -> list[str]:
    method = row["methods"][name]
    step, peak, attach = method["ms"][threads], method["peak_growth"], method.get("attach_ms")
    return [
        f"{method['parameters']:,}",
        str(method["layers"]),
        f"{step['median']:.0f} ({step['q1']:.0f} to {step['q3']:.0f})",
        f"{ratio(row, name, 'frozen', mode=threads):.2f}",
        f"{method['kept'] / MIB:.0f}",
        DASH if peak is None else f"{peak / MIB:.0f}",
        f"{attach['median']:.0f}" if attach else DASH,
    ]


def inference(rows: Sequence[Row]) -> str:
    """The merged model beside two runs of its base."""
    kinds = ("base", "base again", "merged")
    lines = []
    for row in rows:
        found = row.get("inference_ms")
        cells = [
            f"{found[k]['median']:.1f} ({found[k]['q1']:.1f} to {found[k]['q3']:.1f})" if found else DASH for k in kinds
        ]
        lines.append([row["model"], *cells])
    return markdown(lines, ["forward, ms", *kinds])


def attach(result: Row) -> str:
    """Attaching and saving."""
    lines = []
    for name, method in result["methods"].items():
        spreads = [
            f"{method[k]['median']:.0f} ({method[k]['q1']:.0f} to {method[k]['q3']:.0f})"
            for k in ("attach_ms", "save_ms")
        ]
        size, grown = f"{method['bytes'] / MIB:.2f}", method["growth"]
        bare = "yes" if method["saves_without_base_weights"] else "no"
        lines.append(
            [
                NAMES[name],
                f"{method['parameters']:,}",
                *spreads,
                size,
                f"{grown / MIB:.1f}" if grown is not None else DASH,
                bare,
            ]
        )
    heads = ["parameters", "attach, ms", "save, ms", "file, MiB", "memory growth of saving, MiB"]
    return markdown(lines, ["method", *heads, "saved with no base weights there"])


def host(rows: Sequence[Row]) -> str:
    """Microseconds of a layer's step, and FLoRA relative to LoRA where PEFT's LoRA adapts the layer."""
    methods = ("frozen", "flora", "prepared", "lora")
    lines = []
    for row in rows:
        times = [f"{row['us'][method]:.0f}" if method in row["us"] else DASH for method in methods]
        ratios = [f"{row[key]:.2f}" if key in row else DASH for key in ("flora_to_lora", "prepared_to_lora")]
        lines.append([row["case"], row["dtype"], str(row["rank"]), *times, *ratios])

    names = {**NAMES, "prepared": "prepared"}
    heads = [names[method] for method in methods]

    return markdown(lines, ["layer", "dtype", "rank", *heads, "FLoRA / LoRA", "prepared / LoRA"])


def compiled(rows: Sequence[Row]) -> str:
    """Kernels that a compiler generates, and calls of torch's own operations beside them."""
    shown = ("flora", "flora-same", "flora-cpu", "lora")
    lines = []
    for row in rows:
        found = [row["methods"].get(name) for name in shown]
        cells = [DASH if method is None else f"{method['kernels']} + {method['operations']}" for method in found]
        lines.append([row["case"], row["dtype"], *cells, row["commit"][:7]])
    heads = [NAMES["flora"], MODEL_NAMES["flora-same"], "FLoRA, a CPU's decisions", "LoRA", "commit"]
    return markdown(lines, ["block", "dtype", *heads])
