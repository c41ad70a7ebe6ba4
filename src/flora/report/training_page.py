"""The page of a finished run: its numbers, its curves, and what the model makes of the test set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from flora.data.shown import Findings, Shown
from flora.report.charts import chart, legend_below
from flora.report.page import (
    Cell,
    Charts,
    Examples,
    Illustration,
    Page,
    Section,
    Table,
    number,
    picture,
    render,
    sound,
    words,
)
from flora.report.plots import Curve, draw_curves
from flora.storage.size import size

MOST_CLASSES = 20  # that are shown as a matrix; beyond, the pairs that are confused are listed
MOST_PAIRS = 100


def training_page(
    metrics: Mapping[str, Any], title: str, panels: Mapping[str, Sequence[Curve]], findings: Findings | None
) -> str:
    """The page, which stands alone.

    Args:
        metrics: What is in ``metrics.json``.
        title: What was trained on which data.
        panels: Of :func:`flora.report.plots.training_curves`.
        findings: What the recipe shows of the test set; None where it shows nothing.
    """
    sections: list[Section] = [_curves(panels)]
    if findings is not None:
        sections += _findings(findings)
    sections.append(_measured(metrics))

    tiles = [
        *((f"test {name}", f"{value:.4f}") for name, value in metrics["test"].items()),
        ("trained parameters", f"{metrics['trainable_parameters']:,}"),
        ("adapter file", size(metrics["adapter_bytes"])),
        ("steps", f"{metrics['steps']:,}"),
        ("time", f"{metrics['seconds']:,.1f} s"),
    ]
    machine = metrics["machine"]
    lead = (
        f"Trained by the recipe {metrics['recipe']} with seed {metrics['seed']} on {machine['system']}, "
        f"{machine['cores']} cores, {machine['device']}."
    )

    return render(Page(title, lead, tiles, sections))


def _curves(panels: Mapping[str, Sequence[Curve]]) -> Charts:
    def drawn(panel: str, curves: Sequence[Curve]) -> Any:
        def draw(axes: Any) -> None:
            draw_curves(axes, panel, curves)
            axes.set_title(panel)

            if len(curves) > 1:
                legend_below(axes)

        return draw

    charts = [chart(f"{panel} against steps", drawn(panel, curves)) for panel, curves in panels.items()]
    notes = []
    if not any(curve.label == "training" for curves in panels.values() for curve in curves):
        notes = ["The training loss was never logged; training.logging_steps sets how often it is."]

    return Charts("Training", charts, notes)


def _findings(findings: Findings) -> list[Section]:
    """What the model takes for what, the scores of the classes, and examples."""
    sections: list[Section] = []
    if findings.classes:
        sections += [_confused(findings), _per_class(findings)]

    if findings.scores:
        rows = [
            [Cell(name, name, colour=findings.colours.get(name, "")), number(value, ".4f", value)]
            for name, value in findings.scores.items()
        ]
        sections.append(Table(f"Classes: {findings.score}", ("class", findings.score), rows))

    examples = [_illustration(example) for example in findings.examples]
    notes: tuple[str, ...] = ()
    if not examples and not findings.classes:
        notes = ("Only a run with one process shows examples.",)

    sections.append(Examples(findings.heading, examples, notes, findings.wide))

    return sections


def _illustration(example: Shown) -> Illustration:
    audio = "" if example.sound is None else sound(*example.sound)
    return Illustration(example.title, [picture(*each) for each in example.pictures], example.texts, audio)


def _confused(findings: Findings) -> Table:
    """Which classes are taken for which: a matrix, or with many classes the pairs."""
    names = findings.classes

    if len(names) > MOST_CLASSES:
        wrong = Counter(
            (true, found) for true, found in zip(findings.truth, findings.found, strict=True) if true != found
        )
        rows = [
            [words(names[true]), words(names[found]), number(count)]
            for (true, found), count in wrong.most_common(MOST_PAIRS)
        ]
        return Table("What is taken for what", ("true class", "taken for", "inputs"), rows, words=(1,))

    counts = confusion_matrix(findings.truth, findings.found, labels=range(len(names)))
    rows = []
    for true, (name, line) in enumerate(zip(names, counts.tolist(), strict=True)):
        total = max(1, sum(line))
        cells = [Cell(f"{count:,}" if count else "", count, count / total, "heat") for count in line]
        cells[true] = cells[true]._replace(look="heat right")
        rows.append([words(name), *cells])

    return Table(
        "What is taken for what",
        ("true class", *names),
        rows,
        ["A row for each true class, a column for each predicted class. Colour: the share of the row; blue is right."],
        sortable=False,
    )


def _per_class(findings: Findings) -> Table:
    """How well each class is found."""
    labels = range(len(findings.classes))
    precision, recall, f1, count = precision_recall_fscore_support(
        findings.truth, findings.found, labels=labels, zero_division=0
    )
    rows = [
        [
            words(name),
            number(int(count[index])),
            number(float(recall[index]), ".3f", float(recall[index])),
            number(float(precision[index]), ".3f", float(precision[index])),
            number(float(f1[index]), ".3f", float(f1[index])),
        ]
        for index, name in enumerate(findings.classes)
    ]
    notes = [
        "Recall: the share of a class that is found. Precision: the share of the predictions of a class that are right."
    ]

    return Table("Class by class", ("class", "test inputs", "recall", "precision", "F1"), rows, notes)


def _measured(metrics: Mapping[str, Any]) -> Table:
    """Everything that was measured, and with which versions."""
    rows = [
        [words(f"{split} {name}"), words(f"{value:.6g}")]
        for split in ("validation", "test")
        for name, value in metrics[split].items()
    ]
    rows += [[words(name), words(version)] for name, version in metrics["versions"].items()]
    rows += [
        [words("parameters of the model"), words(f"{metrics['total_parameters']:,}")],
        [words("commit"), words(str(metrics["commit"] or "unknown"))],
    ]

    return Table("Measured, and with what", ("what", "value"), rows, words=(1,), sortable=False)
