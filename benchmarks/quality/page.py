"""Writes docs/quality.md and its picture from what is in benchmarks/results/quality, and from nothing else.

``python -m benchmarks.quality.page``
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from tabulate import tabulate

from benchmarks.quality.pairs import (
    OURS,
    PLAIN_OURS,
    SEARCH_SEEDS,
    Cell,
    Difference,
    Setting,
    at_rate,
    best,
    budgets_of,
    cells,
    difference,
    holm,
    interval,
    relative_steps,
    settings,
)
from benchmarks.quality.plot import quality_over_parameters
from benchmarks.quality.run import RATE, ROOT, stored
from flora.comparison.methods import METHODS
from flora.comparison.starts import NOT_CUT
from flora.storage.atomic import read_json

RESULTS = ROOT / "benchmarks" / "results" / "quality"
TRIED, COSTS, BEST_RATES = RESULTS / "tried.json", RESULTS / "cost.json", RESULTS / "rates.json"
PAGE = ROOT / "docs" / "quality.md"
PICTURE = ROOT / "docs" / "quality.png"
TASKS = {
    "cifar": "4-D: CIFAR (accuracy)",
    "hippocampus": "5-D: hippocampus (Dice)",
    "spoken": "Conv1d, new head: spoken digits (accuracy)",
    "sst2": "text, new head: SST-2 (accuracy)",
    "digits": "depthwise: digits (accuracy)",
    "experts": "fused experts: film reviews (next character)",
}
HEAD = """# Quality at equal parameters

Written by `python -m benchmarks.quality.page` from the trainings in
[benchmarks/results/quality](../benchmarks/results/quality), a JSON line each with machine, versions, commit and seed,
and not by hand. `python -m benchmarks.quality.run` makes more of them.

Every adapter may train the same number of parameters, the head not counted, on those of FLoRA's layers that it can
adapt.

* *FLoRA* starts as its config says, with equal ranks.
* *FLoRA, gradient start* is `flora.adapt` and `adapter.start: gradient`: a first step along the gradient of the first
  training batches, whose size is judged on other batches.
* *FLoRA, gradient start and ranks* is `choose_ranks=True` and `adapter.start: gradient-ranks`: the ranks per mode go
  where that gradient is. *LoRA, our start*, where it was trained, is LoRA's form with that start: it tells the start
  from the structure.
* *FLoRA, gradient start, blocks* has `fold="blocks"` too: convolutions that are wide enough for their rank are cut into
  blocks. Of these tasks, only spoken digits has such layers. On the others every weight stays as it is, and the row
  repeats the one above it. **This method is called "ours", and is compared with the others.**
* *FLoRA, gradient start, norms too* also adapts the scales of the norms (`all-norm`), within the same budget.

± is half the 95 % interval of Student's t over the seeds. Differences are paired by seed: the seed draws the training
samples and the order, the same for all methods.

![test score against trainable parameters](quality.png)

Adapters of one budget are drawn side by side, so that none hides another. The picture shows the setting without tuning;
only full fine-tuning is at the best rate it was tried at, as a mark to reach.

What the tables say, in short: without tuning ours has the best mean over the tasks, at both lengths, and no other
method of the same size is better on any task beyond the interval. It is ahead of LoRA, told apart, on CIFAR, on the
hippocampus, on spoken digits and on fused experts, and ahead of LoCon-Tucker on the first three. On text and on the
handwritten digits it is level with both. Many other methods have three seeds, so that only large differences are told
apart. With three times the steps there are five seeds, and ours is told apart on CIFAR only, from LoRA and from LoKr.

With a learning rate for each method and task, it is ahead of LoRA on the same four tasks, and of LoCon-Tucker on
CIFAR and on spoken digits. On the hippocampus LoCon-Tucker collapsed once in 20 seeds at its rate, which makes the
interval wide; ten of them were added after the first ten had been seen. LoKr is level with ours on spoken digits;
without blocks, ours is clearly behind it there. Full fine-tuning is behind ours on spoken digits, level with it on
CIFAR, and ahead on the hippocampus, on digits and on experts. On text nothing is told apart: the rate 0.003 has three
seeds there. Full fine-tuning at its best rate, with ten, is level with ours at 0.01 (picture).

Choosing the ranks where the gradient is makes a difference that is told apart on experts only, where equal ranks are
better. The norms gain on CIFAR only, and there they are ahead of what is compared here. So both are options.
"""
AWAY = "2c697203"  # begins the commit of the lines that another machine made
AWAY_NOTE = """The lines of the commit 2c69720 were made on another machine, whose tree may have been that of the commit
before or after. MiniLM-L6 was sent there in half precision, with the embeddings of unused words set to zero. Trainings
of one seed on two machines have the same samples in the same order, and differ by rounding."""
RENAMED_NOTE = """Up to the commit a6b8d7e the code called the gradient start `flora-equal`, and the one with chosen
ranks `flora-gradient`; their lines have the present names. Lines of starts with larger steps than are tried now were
taken out."""
SHORT = ("lora", "lycoris", "lokr", "flora", OURS, "full")  # the table of the README
RIVALS = ("lora", "lycoris", "full")  # what the method is claimed to be better than, or level with
PARTS = {
    "the start": (PLAIN_OURS, "flora"),
    "the blocks, with the start": (OURS, PLAIN_OURS),
    "the ranks, with the start": ("flora-ranks", PLAIN_OURS),
    "ranks and start": ("flora-ranks", "flora"),
    "the norms, with the start": ("flora-norms", PLAIN_OURS),
    "the start, on LoRA's form": ("lora-gradient", "lora"),
    "the form, with the start": (PLAIN_OURS, "lora-gradient"),
}
Found = Mapping[tuple[str, str], Sequence[Cell]]
Chosen = Mapping[tuple[str, str], Cell]


class Pair(NamedTuple):
    """Ours against another method on a task."""

    task: str
    method: str
    found: Difference


def table(
    chosen: Chosen,
    tasks: Sequence[str],
    edges: Collection[tuple[str, str]] = (),
    methods: Iterable[str] = METHODS,
) -> str:
    """A line per method: the test score on each task, and the mean over the tasks that all methods of the page have.

    Args:
        chosen: (task, method) -> its trainings.
        tasks: a column each.
        edges: the places whose rate is at the edge of those that were tried; they get a star.
        methods: a line each, where there are trainings.
    """
    rows = []
    for method in methods:
        scores = {task: chosen[task, method] for task in tasks if (task, method) in chosen}
        if not scores:
            continue

        row = {"method": _title(method)}
        for task in tasks:
            row[TASKS[task]] = score(scores.get(task)) + "*" * ((task, method) in edges)

        row["mean"] = ""
        if len(scores) == len(tasks):
            row["mean"] = f"{statistics.fmean(interval(cell.test)[0] for cell in scores.values()):.3f}"

        rows.append(row)

    return _markdown(rows)


def _title(method: str) -> str:
    if method == OURS:
        return f"**{METHODS[method].title}**"
    return METHODS[method].title


def _markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    return str(tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True))


def score(cell: Cell | None) -> str:
    """Mean and half the interval, with how many seeds there are and the rate."""
    if cell is None:
        return ""

    mean, half = interval(cell.test)
    told = f"(n={len(cell.test)}, {cell.rate:g})"
    if math.isnan(half):
        return f"{mean:.3f} {told}"

    return f"{mean:.3f} ± {half:.3f} {told}"


def differences(chosen: Chosen, tasks: Sequence[str]) -> list[str]:
    """Ours minus the others: what is claimed, and behind it the rest."""
    others = [method for method in METHODS if method != OURS and method not in RIVALS]
    parts = _difference_table(chosen, tasks, RIVALS)
    rest = _difference_table(chosen, tasks, others)
    if rest:
        parts += ["<details markdown><summary>Ours minus the other methods</summary>", *rest, "</details>"]
    return parts


def _difference_table(chosen: Chosen, tasks: Sequence[str], methods: Sequence[str]) -> list[str]:
    """A line per method and a column per task, corrected over all the pairs that the table shows."""
    pairs = [pair for task in tasks for method in methods if (pair := _pair(chosen, task, method)) is not None]
    if not pairs:
        return []

    corrected = holm({f"{pair.task} {pair.method}": pair.found.p for pair in pairs})
    cells = {(pair.task, pair.method): _told(pair.found, corrected[f"{pair.task} {pair.method}"]) for pair in pairs}
    rows = [
        {"ours minus": METHODS[method].title} | {TASKS[task]: cells.get((task, method), "") for task in tasks}
        for method in methods
        if any((task, method) in cells for task in tasks)
    ]

    return [_markdown(rows), _corrected_over(len(pairs))]


def _corrected_over(pairs: int) -> str:
    return (
        f"Bold: told apart from zero at 5 %, p by Holm's correction over the {pairs} pairs of this table. The "
        "other pairs are not told apart."
    )


def _pair(chosen: Chosen, task: str, method: str) -> Pair | None:
    ours, theirs = chosen.get((task, OURS)), chosen.get((task, method))
    # Where nothing is cut into blocks, ours and the same without blocks are one.
    if ours is None or theirs is None or ours is theirs:
        return None

    found = difference(ours.test, theirs.test)
    if found is None or math.isnan(found.half):
        return None

    return Pair(task, method, found)


def _told(found: Difference, p: float) -> str:
    told = f"{found.mean:+.3f} ± {found.half:.3f}, n={found.count}, p={p:.3f}"
    if p < 0.05:
        return f"**{told}**"
    return told


def starts(found: Found) -> str:
    """What the start chose."""
    rows = []
    for task, title in TASKS.items():
        for method in ("lora-gradient", PLAIN_OURS, OURS, "flora-ranks", "flora-norms"):
            cell = at_rate(found.get((task, method), []), RATE)
            if cell is None or (method == OURS and cell.lines[0]["method"] != OURS):
                continue

            own = [line for line in cell.lines if line.get("start")]
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
                    "time, in training steps": f"{statistics.median(cost):.0f}",
                }
            )
    return _markdown(rows)


def refused(lines: Sequence[Mapping[str, Any]]) -> str:
    """The methods that a task has no layer for, and trainings that failed."""
    places: dict[tuple[str, str], dict[str, None]] = {}
    for line in lines:
        reason = line.get("refused") or line.get("failed")
        if reason is not None and reason != NOT_CUT:
            method = METHODS[line["method"]].title
            places.setdefault((method, reason), {})[TASKS[line["task"]].partition(":")[0]] = None

    told = [f"* {method}: {reason} ({'; '.join(tasks)})" for (method, reason), tasks in sorted(places.items())]
    return "\n".join(told) or "None."


def origin(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where the numbers come from."""
    told: dict[str, int] = {}
    for line in lines:
        versions = ", ".join(f"{name} {value}" for name, value in line["versions"].items())
        device = "cpu"
        if line["task"] == "sst2":
            device = line["machine"]["device"]

        place = f"{line['machine']['cores']} cores, {device}; {versions}; commit {line['commit']}"
        told[place] = told.get(place, 0) + 1

    listed = "\n".join(f"* {count} trainings: {place}" for place, count in told.items())
    if any(line["commit"].startswith(AWAY) for line in lines):
        return [listed, AWAY_NOTE, RENAMED_NOTE]
    return [listed, RENAMED_NOTE]


def untuned(found: Found) -> dict[tuple[str, str], Cell]:
    """What was trained at the one rate for everything."""
    return {place: cell for place, listed in found.items() if (cell := at_rate(listed, RATE)) is not None}


def no_tuning(lines: Sequence[Mapping[str, Any]], setting: Setting) -> list[str]:
    """One learning rate for everything."""
    chosen = untuned(cells(lines, setting))
    tasks = [task for task in TASKS if (task, OURS) in chosen]
    if not tasks:
        return []

    title = "## No tuning"
    if setting.length > 1:
        title += f", {setting.length} times the steps"
    if setting.budget:
        title += f", budget {setting.budget + 1}"
    if setting.probe:
        title += f", new heads trained alone for {setting.probe:g} epochs before"

    spent = ", ".join(f"{budgets_of(lines)[task][setting.budget]:,} on {task}" for task in tasks)

    return [
        title,
        f"The learning rate {RATE:g} and all defaults, on every task. Parameters of the adapters: {spent}.",
        table(chosen, tasks),
        summary(chosen, tasks),
        *differences(chosen, tasks),
    ]


def ablation(found: Found) -> list[str]:
    """What each part adds: a method with it minus one without."""
    chosen = untuned(found)
    pairs = [
        (label, task, gain)
        for label, (more, less) in PARTS.items()
        for task in TASKS
        if (task, more) in chosen and (task, less) in chosen
        if chosen[task, more] is not chosen[task, less]
        if (gain := difference(chosen[task, more].test, chosen[task, less].test)) is not None and gain.count > 1
    ]
    if not pairs:
        return []

    tasks = [task for task in TASKS if any(place == task for _, place, _ in pairs)]
    corrected = holm({f"{label} {task}": gain.p for label, task, gain in pairs})
    told = {(label, task): _told(gain, corrected[f"{label} {task}"]) for label, task, gain in pairs}
    rows = [
        {"part": label} | {TASKS[task]: told.get((label, task), "") for task in tasks}
        for label in PARTS
        if any(place == label for place, _, _ in pairs)
    ]

    return ["## What each part adds", "Without tuning. " + _corrected_over(len(pairs)), _markdown(rows)]


def gain_by_rate(found: Found) -> list[str]:
    """What the start gains at each learning rate that both starts were trained with."""
    gains: dict[tuple[float, str], Difference] = {}
    for task in TASKS:
        for ours in found.get((task, PLAIN_OURS), []):
            usual = at_rate(found.get((task, "flora"), []), ours.rate)
            gain = usual and difference(ours.test, usual.test)
            if gain and gain.count >= SEARCH_SEEDS:
                gains[ours.rate, task] = gain

    rates = sorted({rate for rate, _ in gains})
    if len(rates) < 2:
        return []

    tasks = [task for task in TASKS if any(place == task for _, place in gains)]
    rows = []
    for rate in rates:
        row = {"learning rate": f"{rate:g}"}
        for task in tasks:
            gain = gains.get((rate, task))
            row[TASKS[task]] = ""
            if gain is not None:
                row[TASKS[task]] = f"{gain.mean:+.3f} ± {gain.half:.3f}, n={gain.count}"
        rows.append(row)

    return ["## The start at other learning rates", "The gradient start minus the ordinary one, test.", _markdown(rows)]


def speed(found: Found) -> list[str]:
    """How soon ours is where LoRA ends."""
    chosen = untuned(found)
    rows = []
    for task, title in TASKS.items():
        if (task, OURS) not in chosen or (task, "lora") not in chosen:
            continue

        shares = relative_steps(chosen[task, OURS], chosen[task, "lora"])
        if not shares:
            continue

        middle = statistics.median(shares.values())
        told = f"{middle:.2f}"
        if math.isinf(middle):
            told = "not reached"

        reached = sum(not math.isinf(share) for share in shares.values())
        rows.append(
            {"task": title, "median, in LoRA's steps": told, "seeds that reach it": f"{reached} of {len(shares)}"}
        )

    if not rows:
        return []

    told = (
        "The first step at which ours has LoRA's last validation score, without tuning, as a part of LoRA's steps. "
        "Validation is measured at twelve steps of each training, so that this is exact to a twelfth."
    )

    return ["## Steps to LoRA's final validation score", told, _markdown(rows)]


def summary(chosen: Chosen, tasks: Sequence[str]) -> str:
    """The three methods with the best mean, of those that have all tasks."""
    means = {
        method: statistics.fmean(interval(chosen[task, method].test)[0] for task in tasks)
        for method in METHODS
        if all((task, method) in chosen for task in tasks)
    }
    ahead = sorted(means, key=means.__getitem__, reverse=True)[:3]
    listed = ", ".join(f"{METHODS[method].title} {means[method]:.3f}" for method in ahead)

    return f"The best means over the tasks, of the methods that have all of them: {listed}."


def costs(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The time and the memory of the start, measured apart from the trainings."""
    if not rows:
        return []

    listed = [
        {
            "task": TASKS[row["task"]],
            "time, in training steps": f"{row['steps']:.0f}",
            "peak memory, in that of training": f"{row['memory']:.2f}",
        }
        for row in rows
    ]
    told = (
        "What it costs, with the attaching of the adapter, in the processor's time on one thread "
        "(`python -m benchmarks.quality.cost`):"
    )

    return [told, _markdown(listed)]


def best_rates(report: Mapping[str, Any] | None) -> list[str]:
    """The best learning rate of each kind of layer and rank, by ``rates.py``."""
    if report is None:
        return []

    ranks = sorted({row["rank"] for row in report["rows"]})
    listed = []
    for layer, method in dict.fromkeys((row["layer"], row["method"]) for row in report["rows"]):
        best_of = {
            row["rank"]: row["best"] for row in report["rows"] if (row["layer"], row["method"]) == (layer, method)
        }
        listed.append(
            {"layer": layer, "method": METHODS[method].title}
            | {f"rank {rank}": f"{best_of[rank]:g}" if rank in best_of else "" for rank in ranks}
        )

    told = (
        "One frozen layer learns the outputs of the same layer with a changed weight "
        "(`python -m benchmarks.quality.rates`). Of the rates "
        f"{', '.join(f'{rate:g}' for rate in report['rates'])} this one leaves the lowest error on other inputs, "
        f"by the mean over {len(report['seeds'])} seeds. FLoRA has its default scale, LoRA `lora_alpha` = 2r."
    )

    return ["## The best learning rate of a layer", told, _markdown(listed)]


def tried(notes: Sequence[Mapping[str, Any]], found: Found) -> list[str]:
    """What was tried and did not become the rule, with the score on validation that decided it."""
    if not notes:
        return []

    told = (
        "Validation scores, which alone decided. Ranks were chosen where the gradient is, unless a row says otherwise. "
        "Differences are paired by seed. What became the rule: steps of at most 0.01, and equal ranks.",
        "What became an option: the weights of the norms, by `all-norm`. They gain on CIFAR, whose norms are batch "
        "norms, and LoRA gains from them too. The hippocampus and spoken digits have no norms with weights. Not built: "
        "magnitudes, which gain on CIFAR and are behind on both kinds of digits in the mean; and ranks that move in "
        "training, where no gain is beyond its interval.",
        "Channels in blocks, near to LoKr, gain on spoken digits, and lose on CIFAR and the hippocampus if every layer "
        "is cut. Where the rank grows less than three times they are level or lose, and linear layers gain nothing on "
        'text. So `fold="blocks"` cuts convolutions only, and from three times on. At three times the budget of spoken '
        "digits, a rank that grows less gains too.",
    )

    return ["## What was tried", *told, *_equal_ranks(untuned(found)), _markdown(notes)]


def _equal_ranks(chosen: Chosen) -> list[str]:
    """On validation, equal ranks minus chosen ones."""
    gains = {}
    for task, title in TASKS.items():
        equal, ranks = chosen.get((task, PLAIN_OURS)), chosen.get((task, "flora-ranks"))
        if equal is None or ranks is None:
            continue

        gain = difference(equal.validation, ranks.validation)
        if gain is not None and gain.count > 1:
            gains[title] = f"{gain.mean:+.3f} ± {gain.half:.3f}"

    if not gains:
        return []

    listed = "; ".join(f"{title} {gain}" for title, gain in gains.items())

    return [f"On validation, equal ranks minus chosen ones: {listed}."]


def tuned(found: Found) -> list[str]:
    """Each method at its own best rate."""
    several = {place: listed for place, listed in found.items() if len(listed) > 1}
    chosen = {place: cell for place, listed in several.items() if (cell := best(listed)) is not None}
    tasks = [task for task in TASKS if (task, OURS) in chosen]
    if not tasks:
        return []
    edges = {place for place, cell in chosen.items() if cell.rate in (several[place][0].rate, several[place][-1].rate)}
    return [
        "## Tuned",
        "Each method at the learning rate that is best on validation, by the mean over the seeds; the rate is in the "
        "brackets. Methods that were tried with one rate only are left out. A star: the rate is at the edge of those "
        "that were tried, so that another one may be better.",
        table(chosen, tasks, edges),
        *differences(chosen, tasks),
    ]


def render(
    lines: Sequence[Mapping[str, Any]],
    notes: Sequence[Mapping[str, Any]] = (),
    spent: Sequence[Mapping[str, Any]] = (),
    rates: Mapping[str, Any] | None = None,
) -> str:
    """The page as Markdown.

    Args:
        lines: the trainings.
        notes: rows of what was tried on the way.
        spent: what the start cost on each task.
        rates: what ``rates.py`` found.
    """
    parts = [HEAD]
    for setting in settings(lines):
        parts += no_tuning(lines, setting)

    found = cells(lines)
    parts += [*tuned(found), *ablation(found), *gain_by_rate(found), *speed(found)]
    parts += ["## What the start did", starts(found), *costs(spent), *best_rates(rates), *tried(notes, found)]
    parts += ["## Not possible", refused(lines)]
    parts += ["## Where the numbers come from", *origin(lines)]

    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def main() -> None:
    """Writes the page and the picture."""
    lines = stored(sorted(RESULTS.glob("*.jsonl")))
    notes, spent = (read_json(path) if path.is_file() else [] for path in (TRIED, COSTS))
    rates = read_json(BEST_RATES) if BEST_RATES.is_file() else None
    PAGE.write_text(render(lines, notes, spent, rates), encoding="utf-8")
    found = cells(lines)

    # Full fine-tuning is there as a mark to reach, so that it has its best rate.
    tuned_full = {place: cell for place, listed in found.items() if place[1] == "full" and (cell := best(listed))}
    chosen = untuned(found) | tuned_full
    quality_over_parameters(PICTURE, chosen, [task for task in TASKS if (task, OURS) in chosen], TASKS)
    print(f"written {PAGE} and {PICTURE}")


if __name__ == "__main__":
    main()
