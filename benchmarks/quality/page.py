"""Writes docs/quality.md from the trainings in benchmarks/results/quality, and from nothing else.

``python -m benchmarks.quality.page``
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks.quality.pairs import OURS, Cell, Difference, at_rate, best, cells, difference, holm, interval
from benchmarks.quality.run import RATE, stored
from flora.comparison.methods import METHODS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "quality"
PAGE = ROOT / "docs" / "quality.md"
TASKS = {
    "cifar": "4-D: CIFAR (accuracy)",
    "hippocampus": "5-D: hippocampus (Dice)",
    "spoken": "Conv1d, new head: spoken digits (accuracy)",
    "sst2": "text, new head: SST-2 (accuracy)",
    "digits": "depthwise: digits (accuracy)",
    "experts": "fused experts",
}
HEAD = """# Quality at equal parameters

Written by `python -m benchmarks.quality.page` from the trainings in
[benchmarks/results/quality](../benchmarks/results/quality), a JSON line each with machine, versions, commit and seed,
and not by hand. `python -m benchmarks.quality.run` makes more of them.

Every adapter may train the same number of parameters, the head not counted, on those of FLoRA's layers that it can
adapt. *FLoRA* starts as its config says, with equal ranks. *Begun along the gradient* is `flora.adapt` and
`adapter.start: gradient`: ranks per mode where the gradient of the first training batches is, and a first step along it
whose size is judged on other batches. *LoRA, our start* is LoRA's form with that start, which tells the start from the
structure. ± is half the 95 % interval of Student's t over the seeds.

The start is no default. On text with a new head, at the rate 0.01, every run in which a step was taken (four of nine,
LoRA with our start among them) collapsed to one class; where the start found no step it trained as usual. So recipes
begin as their configs say unless `adapter.start: gradient` is given.
"""
Found = Mapping[tuple[str, str], Sequence[Cell]]


def table(chosen: Mapping[tuple[str, str], Cell], tasks: Sequence[str]) -> str:
    """A line per method: the test score on each task, and the mean over the tasks that all methods of the page have."""
    methods = [method for method in METHODS if any((task, method) in chosen for task in tasks)]
    rows = []
    for method in methods:
        scores = {task: chosen[task, method] for task in tasks if (task, method) in chosen}
        row = {"method": f"**{METHODS[method].title}**" if method == OURS else METHODS[method].title}
        for task in tasks:
            row[TASKS[task]] = score(scores[task]) if task in scores else ""
        complete = len(scores) == len(tasks)
        row["mean"] = f"{statistics.fmean(interval(cell.test)[0] for cell in scores.values()):.3f}" if complete else ""
        rows.append(row)
    return str(tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True))


def score(cell: Cell) -> str:
    """Mean and half the interval, with how many seeds there are and the rate."""
    mean, half = interval(cell.test)
    spread = "" if math.isnan(half) else f" ± {half:.3f}"
    return f"{mean:.3f}{spread} (n={len(cell.test)}, {cell.rate:g})"


def differences(chosen: Mapping[tuple[str, str], Cell], tasks: Sequence[str]) -> str:
    """A line per pair: ours minus the other, its interval, and whether it holds after Holm's correction."""
    pairs: dict[str, tuple[str, str, Difference]] = {}
    for task in tasks:
        ours = chosen.get((task, OURS))
        for method in METHODS:
            theirs = chosen.get((task, method))
            if ours is None or theirs is None or method == OURS:
                continue
            found = difference(ours.test, theirs.test)
            if found is not None and not math.isnan(found.half):
                pairs[f"{task} {method}"] = (task, method, found)
    corrected = holm({name: found.p for name, (_, _, found) in pairs.items()})
    rows = []
    for name, (task, method, found) in pairs.items():
        if corrected[name] >= 0.05:
            verdict = "not told apart"
        elif found.mean > 0:
            verdict = "better"
        else:
            verdict = "worse"
        rows.append(
            {
                "task": TASKS[task],
                "ours minus": METHODS[method].title,
                "difference": f"{found.mean:+.3f} ± {found.half:.3f}",
                "seeds": found.count,
                "p, corrected": f"{corrected[name]:.3f}",
                "ours is": verdict,
            }
        )
    return str(tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True))


def starts(lines: Sequence[Mapping[str, Any]]) -> str:
    """What the start chose, and what it cost in training steps."""
    rows = []
    for task, title in TASKS.items():
        for method in ("lora-gradient", "flora-equal", OURS):
            own = [line for line in lines if line["task"] == task and line["method"] == method and line.get("start")]
            own = [line for line in own if line["learning_rate"] == RATE and line["length"] == 1]
            if not own:
                continue
            steps = [line["start"]["step"] for line in own]
            cost = [line["start"]["seconds"] / (line["seconds"] / line["steps"]) for line in own]
            counts = ", ".join(f"{step:g}: {steps.count(step)}" for step in sorted(set(steps)))
            out = statistics.fmean(len(line["start"]["left_out"]) for line in own)
            rows.append(
                {
                    "task": title,
                    "method": METHODS[method].title,
                    "size of the step: how often": counts,
                    "weights left out": f"{out:.1f}",
                    "cost, in training steps": f"{statistics.median(cost):.0f}",
                }
            )
    return str(tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True))


def refused(lines: Sequence[Mapping[str, Any]]) -> str:
    """The methods that a task has no layer for, and trainings that failed."""
    told = dict.fromkeys(
        f"* {METHODS[line['method']].title} on {TASKS[line['task']]}: {line.get('refused') or line.get('failed')}"
        for line in lines
        if "refused" in line or "failed" in line
    )
    return "\n".join(told) or "None."


def origin(lines: Sequence[Mapping[str, Any]]) -> str:
    """Where the numbers come from."""
    told = {}
    for line in lines:
        versions = ", ".join(f"{name} {value}" for name, value in line["versions"].items())
        device = line["machine"]["device"] if line["task"] == "sst2" else "cpu"
        place = f"{line['machine']['cores']} cores, {device}; {versions}; commit {line['commit']}"
        told[place] = told.get(place, 0) + 1
    return "\n".join(f"* {count} trainings: {place}" for place, count in told.items())


def no_tuning(found: Found, length: int) -> list[str]:
    """One learning rate for everything."""
    chosen = {place: cell for place, listed in found.items() if (cell := at_rate(listed, RATE)) is not None}
    tasks = [task for task in TASKS if (task, OURS) in chosen]
    if not tasks:
        return []
    longer = "" if length == 1 else f", {length} times the steps"
    return [
        f"## No tuning{longer}",
        f"The learning rate {RATE:g} and all defaults, on every task.",
        table(chosen, tasks),
        differences(chosen, tasks),
    ]


def tuned(found: Found) -> list[str]:
    """Each method at its own best rate."""
    several = {place: listed for place, listed in found.items() if len(listed) > 1}
    chosen = {place: cell for place, listed in several.items() if (cell := best(listed)) is not None}
    tasks = [task for task in TASKS if (task, OURS) in chosen]
    if not tasks:
        return []
    edges = [
        f"{METHODS[method].title} on {task}"
        for (task, method), cell in chosen.items()
        if cell.rate in (several[task, method][0].rate, several[task, method][-1].rate)
    ]
    return [
        "## Tuned",
        "Each method at the learning rate that is best on validation, by the mean over the seeds; the rate is in the "
        "brackets. Methods that were tried with one rate only are left out. The chosen rate is at the edge of those "
        f"that were tried, so that another one may be better, for: {', '.join(edges) or 'none'}.",
        table(chosen, tasks),
        differences(chosen, tasks),
    ]


def render(lines: Sequence[Mapping[str, Any]]) -> str:
    """The page as Markdown."""
    parts = [HEAD]
    for length in sorted({line["length"] for line in lines}):
        parts += no_tuning(cells(lines, length), length)
    parts += tuned(cells(lines))
    parts += ["## What the start did", starts(lines), "## Not possible", refused(lines)]
    parts += ["## Where the numbers come from", origin(lines)]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def main() -> None:
    """Writes the page."""
    PAGE.write_text(render(stored(sorted(RESULTS.glob("*.jsonl")))), encoding="utf-8")
    print(f"written {PAGE}")


if __name__ == "__main__":
    main()
