"""Matplotlib's figures as SVG inside a page: their ink is that of the text around them, in light and in dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from typing import Any, cast

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flora.report.page import Chart

INK = "#010203"  # stands for the colour of the text around a chart
SIZE = (5.2, 3.4)  # inches of a chart; the page scales it
WIDTH = 80  # characters of a legend that fit side by side under a chart
LINE = 0.2  # inches of a line of text
STYLE: Any = {
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlesize": "medium",
    "figure.facecolor": "none",
    "font.family": "sans-serif",
    "grid.color": INK,
    "legend.labelcolor": INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "flora",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
}


def chart(what: str, draw: Callable[[Axes], None], lines: int = 0) -> Chart:
    """A chart for a page.

    Args:
        what: It shows, in words, for those who cannot see it.
        draw: Puts the chart on axes.
        lines: Of text that stand beside it, one under the other; with many of them it grows.
    """
    stream = io.StringIO()

    with mpl.rc_context(STYLE):
        width, height = SIZE
        figure = Figure(figsize=(width, max(height, 1 + LINE * lines)), layout="constrained")
        axes = figure.subplots()
        axes.grid(alpha=0.15)
        draw(axes)
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})

    text = stream.getvalue()
    inline = text[text.index("<svg") :].replace(INK, "currentColor")
    # The names of its parts are the same in every chart of a page.
    inline = re.sub(r' id="[a-z_A-Z]+[0-9]*_[0-9]+"', "", inline)

    return Chart(what, inline)


def legend_below(axes: Axes) -> None:
    """Puts the legend under a chart, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    # So many columns as there is room for, by the longest label.
    columns = max(1, min(4, WIDTH // (8 + max(map(len, labels), default=0))))
    options: Any = {"loc": "outside lower center", "ncols": columns, "frameon": False, "fontsize": "small"}
    figure = cast("Figure", axes.figure)
    figure.legend(handles, labels, **options)

    # Two lines have room as it is.
    lines = math.ceil(len(labels) / columns)
    figure.set_figheight(figure.get_figheight() + LINE * max(0, lines - 2))
