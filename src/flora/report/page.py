"""One HTML page that stands alone: tiles, charts, tables that sort, examples. Jinja2 writes it, Matplotlib its charts.

A page loads nothing: its policy forbids it. It follows the reader's light or dark setting.
"""

from __future__ import annotations

import base64
import io
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from jinja2 import Environment, StrictUndefined

from flora.storage.atomic import check_target, staged
from flora.storage.replacing import PAGE, PAGE_MARK

TEMPLATE = Path(__file__).with_name("page.html.jinja")
SMALL = 64  # pixels up to which a picture is shown with its pixels as squares
LARGEST = 480  # pixels of the longer side of a picture


class Cell(NamedTuple):
    """A cell of a table.

    Attributes:
        text: What is shown.
        order: What it is sorted by: a number, or a text; empty cells come last.
        share: From 0 to 1, how much of the cell is coloured; None for none.
        look: "share" is a bar, "heat" a background, "heat right" one of the colour of what is right.
        colour: A bar of this colour stands before the heading of a row.
    """

    text: str
    order: float | str
    share: float | None = None
    look: str = "share"
    colour: str = ""


class Chart(NamedTuple):
    """A chart as SVG, and what it shows, in words."""

    what: str
    svg: str


@dataclass(frozen=True)
class Section:
    """A part of a page under a heading; the template shows each kind in its own way."""

    kind: ClassVar[str]
    title: str


@dataclass(frozen=True)
class Charts(Section):
    """Charts, side by side where there is room."""

    kind = "charts"
    charts: Sequence[Chart]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Table(Section):
    """A table; the first cell of each row is its heading.

    Attributes:
        words: The numbers of the columns that hold words, beside the first.
        total: The last line, which stays where it is when the table is sorted.
    """

    kind = "table"
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = ()
    words: Sequence[int] = ()
    total: Sequence[str] = ()
    sortable: bool = True


@dataclass(frozen=True)
class Notes(Section):
    """Sentences."""

    kind = "notes"
    notes: Sequence[str]


class Picture(NamedTuple):
    """A picture as the page has it."""

    caption: str
    source: str
    tiny: bool


class Illustration(NamedTuple):
    """An input and what was made of it, as the page has it."""

    title: str
    pictures: Sequence[Picture]
    texts: Sequence[tuple[str, str]]
    sound: str


@dataclass(frozen=True)
class Examples(Section):
    """Inputs and what was made of them; ``wide`` where each needs room."""

    kind = "examples"
    examples: Sequence[Illustration]
    notes: Sequence[str] = ()
    wide: bool = False


@dataclass(frozen=True)
class Page:
    """A page.

    Attributes:
        title: Its heading.
        lead: A sentence under it.
        tiles: The totals: what each is, and its value.
        sections: In order.
    """

    title: str
    lead: str
    tiles: Sequence[tuple[str, str]]
    sections: Sequence[Section]


def render(page: Page) -> str:
    """The page as HTML; every text in it is escaped."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(page=page) + "\n"


def number(value: float, form: str = ",", share: float | None = None) -> Cell:
    """A cell with a number."""
    return Cell(format(value, form), value, share)


def words(text: str) -> Cell:
    """A cell with a text."""
    return Cell(text, text)


def picture(caption: str, image: Any) -> Picture:
    """A picture of Pillow as part of a page, made smaller where it is large."""
    copy = image.convert("RGB")
    copy.thumbnail((LARGEST, LARGEST))

    # Photographs are smaller as JPEG; what has few pixels is kept to the pixel.
    tiny = max(copy.size) <= SMALL
    kind = "PNG" if tiny else "JPEG"
    stream = io.BytesIO()
    copy.save(stream, kind, quality=85)

    return Picture(caption, _data(f"image/{kind.lower()}", stream.getvalue()), tiny)


def sound(samples: np.ndarray, rate: int) -> str:
    """A sound as part of a page.

    Args:
        samples: In -1 to 1, shape (samples,).
        rate: Samples in a second.
    """
    stream = io.BytesIO()

    with wave.open(stream, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())

    return _data("audio/wav", stream.getvalue())


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def page_target(name: str, *, overwrite: bool) -> Path:
    """The file that a page will be written to.

    Raises:
        FileExistsError, UserError: There is one, and it may not be replaced or is no page of flora.
    """
    path = Path(name)
    check_target(path, PAGE, overwrite=overwrite)

    return path


def write_page(path: Path, text: str, *, overwrite: bool) -> str:
    """Writes a page, complete or not at all; what to say of it."""
    with staged(path, PAGE, overwrite=overwrite) as new:
        new.write_text(text + PAGE_MARK, encoding="utf-8")

    return f"written to {path}"
