"""What is promised, line by line, and what the results say."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.ratios import CLOCKS, ratio

Row = dict[str, Any]


@dataclass(frozen=True)
class Check:
    """One line.

    Attributes:
        line: in words.
        question: the result that answers it.
        of: which rows count.
        value: (row, clock) -> the figure, or None where a row has none.
        limit: of the figure.
        over: "geomean" of the rows, or "every" row.
        sense: "<=" or ">=".
        timed: whether the figure is a time.
        reason: why it fails, printed where it does.
    """

    line: str
    question: str
    of: Callable[[Row], bool]
    value: Callable[[Row, str], float | None]
    limit: float
    over: str = "every"
    sense: str = "<="
    timed: bool = True
    reason: str = ""


@dataclass(frozen=True)
class Verdict:
    """A check and what was found: the geometric mean or the worst row, and the figures of all rows."""

    check: Check
    clock: str
    figure: float
    worst: str
    values: dict[str, float]

    @property
    def holds(self) -> bool:
        """Whether the line is met."""
        return self._within(self.figure)

    @property
    def beyond(self) -> list[str]:
        """The rows that lie beyond the limit by themselves, with their figures."""
        return [f"{name} ({value:.3g})" for name, value in self.values.items() if not self._within(value)]

    def _within(self, figure: float) -> bool:
        return figure <= self.check.limit if self.check.sense == "<=" else figure >= self.check.limit


def times(method: str, other: str, mode: str | None = None) -> Callable[[Row, str], float | None]:
    """The ratio of two methods' times."""
    return lambda row, clock: ratio(row, method, other, clock, mode)


def kept(method: str, other: str | None = None) -> Callable[[Row, str], float | None]:
    """The ratio of two methods' kept bytes; without another, to what the frozen layer keeps and the input."""

    def value(row: Row, clock: str) -> float | None:
        own = row["methods"][method].get("kept")
        limit = row["frozen_and_input"] if other is None else row["methods"].get(other, {}).get("kept")
        return own / limit if own is not None and limit else None

    return value


def in_group(*groups: str) -> Callable[[Row], bool]:
    """Rows of these groups."""
    return lambda row: row["group"] in groups


def always(row: Row) -> bool:
    """Every row."""
    return True


def merged(row: Row, clock: str) -> float | None:
    """How far the merged model's time lies above the slower of two runs of the base model's, in units of their noise.

    The noise is the larger of the base's interquartile range and the difference of the two.
    """
    figures = row.get("inference_ms")
    if not figures:
        return None
    base, again, ours = (figures[name] for name in ("base", "base again", "merged"))
    noise = max(base["q3"] - base["q1"], again["q3"] - again["q1"], abs(base["median"] - again["median"]))
    return max(0.0, ours["median"] - max(base["median"], again["median"])) / noise


def _same_layers(row: Row, clock: str) -> float | None:
    """FLoRA over LoRA where both adapt the same layers; None where that was not measured."""
    found = row["methods"]
    alike = [
        name for name in ("flora-same", "flora") if name in found and found[name]["layers"] == found["lora"]["layers"]
    ]
    return times(alike[0], "lora")(row, clock) if alike else None


def choice(row: Row, clock: str) -> float | None:
    """The time of the way that "auto" takes over that of the best way; None where a way has none."""
    ways = {name: ratio(row, f"flora-{name}", "frozen", clock) for name in ("summed", "beside")}
    chosen, known = ways.get(row["methods"]["flora"]["note"]), [value for value in ways.values() if value]
    return chosen / min(known) if chosen else None


def _attach(row: Row, clock: str) -> float | None:
    own, other = (row["methods"][name]["attach_ms"][clock] for name in ("flora", "lora"))
    return median(mine / theirs for mine, theirs in zip(own, other, strict=True))


def _saved(row: Row, clock: str) -> float | None:
    return float(row["methods"]["flora"]["saves_without_base_weights"])


NARROW_LORA = (
    "There LoRA's own step lies near the frozen one; both adapters do nearly the same skinny products, and what FLoRA "
    "saves by adding in place is small beside the frozen step."
)
DENSE_RUN = (
    "There the rank is a large part of the channels, or the activations far outnumber the weights: each pass over them "
    "costs a good part of the frozen step, while the scheme's second full run costs no more than on other rows."
)
SMALL_CORES = (
    "In 3-D convolutions of few channels over many voxels, as in the U-Net, the small core's own convolutions and "
    "their backward cost a good part of the frozen step."
)
LORA_LEAVES_OUT = "PEFT's LoRA takes no depthwise convolution and leaves those layers out; see the line below."
ONE_LAYER = (
    "A step of one layer waits for the host, which launches two kernels for the frozen layer and a dozen or more "
    "beside them for an adapter; the next line has the time of the device alone."
)
NARROW_LAYER = (
    "The input is read twice more, the gradient of the output twice more, and output and input gradient are written "
    "once more: at the speed of the memory, beside two products at that of the tensor cores. In 4096 -> 1024 one pass "
    "over the input costs about a tenth of the frozen step."
)
LINEAR, CONV, MOE = in_group("linear"), in_group("conv"), in_group("moe")
CHECKS = [
    Check(
        "Linear grid, FLoRA / LoRA at equal rank",
        "layers",
        LINEAR,
        times("flora", "lora"),
        0.85,
        "geomean",
        reason=NARROW_LORA,
    ),
    Check("Linear grid, FLoRA / frozen", "layers", LINEAR, times("flora", "frozen"), 1.20, "geomean"),
    Check(
        "Conv grid, FLoRA / LoRA at equal rank",
        "layers",
        CONV,
        times("flora", "lora"),
        0.90,
        "geomean",
        reason=NARROW_LORA,
    ),
    Check(
        "Conv grid, FLoRA / LoRA at equal parameters",
        "layers",
        CONV,
        times("flora", "lora-params"),
        1.0,
        "geomean",
        reason=NARROW_LORA,
    ),
    Check("Conv grid, FLoRA / frozen", "layers", CONV, times("flora", "frozen"), 1.30, "geomean"),
    Check("Conv grid, FLoRA / full fine-tuning, every row", "layers", CONV, times("flora", "full"), 1.0),
    Check(
        "The authors' scheme / FLoRA, every row",
        "layers",
        always,
        times("authors", "flora"),
        2.0,
        sense=">=",
        reason=DENSE_RUN,
    ),
    Check("The plan's way / the best way, every row", "layers", always, choice, 1.1),
    Check("MoE, FLoRA / LoRA, time", "layers", MOE, times("flora", "lora"), 1.0),
    Check(
        "Whole models, FLoRA / LoRA, every model",
        "models",
        always,
        times("flora", "lora"),
        1.0,
        reason=LORA_LEAVES_OUT,
    ),
    Check("The same with FLoRA on LoRA's layers only", "models", always, _same_layers, 1.0),
    Check(
        "Whole models, FLoRA / frozen", "models", always, times("flora", "frozen"), 1.25, "geomean", reason=SMALL_CORES
    ),
    Check("Bytes kept, FLoRA / LoRA, every row", "counts", always, kept("flora", "lora"), 1.0, timed=False),
    Check(
        "Bytes kept, FLoRA / (frozen layer's and its input once), every conv row",
        "counts",
        in_group("conv", "other"),
        kept("flora"),
        1.05,
        timed=False,
    ),
    Check("MoE, FLoRA / LoRA, bytes kept", "counts", MOE, kept("flora", "lora"), 1.0, timed=False),
    Check("Merged inference above the base model, in units of its noise", "models", always, merged, 1.0, timed=False),
    Check("Attaching to a model of a billion parameters, FLoRA / LoRA", "attach", always, _attach, 1.0),
    Check("Saving without base weights (1: yes)", "attach", always, _saved, 1.0, sense=">=", timed=False),
    Check(
        "GPU, linear layers, compiled, FLoRA / frozen",
        "gpu",
        LINEAR,
        times("flora", "frozen", "compiled"),
        1.10,
        "geomean",
        timed=False,
        reason=ONE_LAYER,
    ),
    Check(
        "The same, the eager step replayed as a CUDA graph",
        "gpu",
        LINEAR,
        times("flora", "frozen", "captured"),
        1.10,
        "geomean",
        timed=False,
        reason=NARROW_LAYER,
    ),
    Check(
        "Largest relative error against the dense W + dW, float32, every row",
        "layers",
        always,
        lambda row, clock: row["error"],
        1e-5,
        timed=False,
    ),
]


def verdicts(results: Mapping[str, Row]) -> Iterator[tuple[Check, list[Verdict]]]:
    """Each line with its verdicts, one for each clock; none where nothing was measured."""
    for check in CHECKS:
        clocks = list(CLOCKS) if check.timed else ["raw"]
        found = [judge(check, results[check.question], clock) for clock in clocks if check.question in results]
        yield check, [verdict for verdict in found if verdict is not None]


def judge(check: Check, result: Row, clock: str) -> Verdict | None:
    """One line by one clock."""
    rows = {name_of(row): check.value(row, clock) for row in rows_of(result) if "skipped" not in row and check.of(row)}
    values = {name: value for name, value in rows.items() if value is not None}
    if not values:
        return None
    worst = (max if check.sense == "<=" else min)(values, key=values.__getitem__)
    figure = geomean(list(values.values())) if check.over == "geomean" else values[worst]
    return Verdict(check, clock, figure, f"{worst} ({values[worst]:.3g})", values)


def rows_of(result: Row) -> list[Row]:
    """The rows of a result; a result without rows is one."""
    return result.get("rows") or [{**result, "group": "attach"}]


def name_of(row: Row) -> str:
    """Of a layer, a model or the only row."""
    return row.get("case") or row.get("model") or "Llama"


def geomean(values: list[float]) -> float:
    """The geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))


def slow_choices(rows: list[Row], clock: str = "raw") -> dict[str, float]:
    """Rows where the way that "auto" takes is more than a tenth slower than the best one -> how many times."""
    found = {row["case"]: choice(row, clock) for row in rows}
    return {name: times for name, times in found.items() if times and times > 1.1}
