"""What a recipe shows of a trained model: its inputs beside what it found, and what it takes for what."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from PIL import Image

# How many errors are shown.
WORST = 12
# How many examples are shown where each takes much room, or another run of the model.
FEW = 6


class Sound(NamedTuple):
    """A sound: samples in -1 to 1, shape (samples,), and how many there are in a second."""

    wave: np.ndarray
    rate: int


@dataclass(frozen=True)
class Shown:
    """One input, and what was made of it.

    Attributes:
        title: A line above it.
        pictures: A caption and an image for each, shown side by side.
        texts: What each is, and the text.
        sound: The input, where it is one.
    """

    title: str = ""
    pictures: Sequence[tuple[str, Image.Image]] = ()
    texts: Sequence[tuple[str, str]] = ()
    sound: Sound | None = None


@dataclass(frozen=True)
class Findings:
    """What a page shows of a model on its test set.

    Attributes:
        heading: Of the examples.
        examples: In the order in which they are shown.
        classes: The names of the classes, where each input has one.
        truth, found: The number of the class of each input, as given and as the model says.
        scores: Of each class, from 0 to 1, where the metric is a mean over such.
        score: What these are.
        colours: That classes have in the pictures.
        wide: Whether an example needs much room.
    """

    heading: str
    examples: Sequence[Shown]
    classes: Sequence[str] = ()
    truth: Sequence[int] = field(default_factory=list)
    found: Sequence[int] = field(default_factory=list)
    scores: Mapping[str, float] = field(default_factory=dict)
    score: str = ""
    colours: Mapping[str, str] = field(default_factory=dict)
    wide: bool = False


def classified(
    logits: np.ndarray, labels: np.ndarray, classes: Sequence[str], show: Callable[[int], Shown]
) -> Findings:
    """What a classifier has made of its test set: every class, and the inputs that it was most wrong about.

    Args:
        logits: Shape (inputs, classes).
        labels: The true classes, shape (inputs,).
        classes: Their names.
        show: Gives the input of a number, without a title.
    """
    raised = np.exp(logits - logits.max(1, keepdims=True))
    scores = raised / raised.sum(1, keepdims=True)
    found = logits.argmax(1)

    # The less the true class was believed, the worse.
    wrong = [
        int(index) for index in np.argsort(scores[np.arange(len(labels)), labels]) if found[index] != labels[index]
    ]
    examples = []
    for index in wrong[:WORST]:
        example, true, taken = show(index), int(labels[index]), int(found[index])
        title = f"{classes[true]}, taken for {classes[taken]} ({scores[index, taken]:.0%})"
        examples.append(Shown(title, example.pictures, example.texts, example.sound))

    if len(wrong) > WORST:
        heading = f"The worst {WORST} of {len(wrong):,} errors in {len(labels):,} inputs"
    elif len(wrong) > 1:
        heading = f"The {len(wrong)} errors in {len(labels):,} inputs, the worst first"
    elif len(wrong) == 1:
        heading = f"The one error in {len(labels):,} inputs"
    else:
        heading = f"No error in {len(labels):,} inputs"

    return Findings(heading, examples, list(classes), labels.tolist(), found.tolist())


def overlaid(image: Image.Image, classes: np.ndarray, palette: Sequence[int]) -> Image.Image:
    """An image with the classes of its pixels in colour over it; class 0 leaves it as it is.

    Args:
        image: Of any size.
        classes: Numbers from 0 to 255, shape (height, width), of the same size as the image.
        palette: Three values from 0 to 255 for each class, as ``flora.data.results.colours`` gives them.
    """
    colours = np.asarray(palette, np.uint8).reshape(-1, 3)[classes]
    under = np.asarray(image.convert("RGB"))
    mixed = np.where((classes > 0)[..., None], 0.45 * under + 0.55 * colours, under)
    return Image.fromarray(mixed.astype(np.uint8))


def grey(values: np.ndarray) -> Image.Image:
    """Numbers as a picture, the least black and the largest white; those far out are cut.

    Args:
        values: Shape (height, width).
    """
    low, high = np.percentile(values, (0.5, 99.5))
    scaled = np.clip((values - low) / max(float(high - low), 1e-12), 0, 1)
    return Image.fromarray((255 * scaled).astype(np.uint8))
