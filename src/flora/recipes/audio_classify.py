"""Classes of sounds: wav2vec2 and its kin of transformers, their one-dimensional convolutions adapted too.

Data: a folder with one sub-folder of sound files for each class (inside ``train``, ``validation``, ``test`` where there
are such), or a data set of the hub with a column of sounds and one of labels. Every clip is mixed to one channel,
brought to the sampling rate of the model, and padded or cut to ``seconds``, so that no result depends on its batch.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import soundfile
import torch
from scipy.signal import resample_poly
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification, PreTrainedModel

from flora.data.files import Item, regular
from flora.data.hub import hub, hub_column, hub_files
from flora.data.pretrained import head_options, load_pretrained
from flora.data.records import Bad, sift
from flora.data.results import accuracy, class_names, ranked
from flora.data.samples import locate
from flora.data.shown import Findings, Shown, Sound, classified
from flora.data.splits import class_folders, is_local, split_paths, with_held_out
from flora.errors import UserError
from flora.recipes import Data, Request, Tested

METRIC = "accuracy"
SOUNDS = (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif")
# The longest sound, which is hours, and the highest sampling rate in Hz.
MOST_SAMPLES, MOST_RATE = 2**28, 2**20
# The seed of a head that the base model does not have yet.
HEAD_SEED = 0


@dataclass
class Task:
    """Settings of the data and the base model.

    Args:
        model: a folder or hub id of an audio model that takes waveforms, with its feature extractor.
        data: a folder with class folders, or the hub id of a data set.
        data_name: of a configuration of the hub data set.
        data_revision: a branch of the hub data set.
        audio_column: of the hub data set, the sounds.
        label_column: of the hub data set, the classes.
        seconds: every clip is padded or cut to this length.
        bad_data: "error" stops at sounds that cannot be used, "skip" leaves them out.
    """

    model: str = "facebook/wav2vec2-base"
    data: str = "google/speech_commands"
    data_name: str | None = None
    data_revision: str | None = None
    audio_column: str = "audio"
    label_column: str = "label"
    seconds: float = 1.0
    bad_data: Bad = "error"

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise UserError(f"task.seconds is {self.seconds}, expected a length above 0")


@dataclass(frozen=True)
class Clip:
    """A sound that is read when it is needed: ``open`` gives its file, or the bytes of one; ``label`` its class."""

    open: Callable[[], Path | io.BytesIO]
    label: int


def read_sound(clip: Clip, rate: int) -> np.ndarray:
    """The sound as one channel of float32 at this sampling rate.

    Raises:
        ValueError: it cannot be decoded, has no samples, or some that are not finite.
    """
    try:
        with soundfile.SoundFile(clip.open()) as sound:
            own = sound.samplerate

            # The header says this before anything is allocated.
            if not 0 < own <= MOST_RATE or sound.frames * max(sound.channels, rate / own) > MOST_SAMPLES:
                raise UserError(f"claims {sound.frames} samples at {own} Hz, more than can be read")

            wave = sound.read(dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise UserError(f"cannot be decoded ({error})") from None

    if not len(wave):
        raise UserError("has no samples")
    if not np.isfinite(wave).all():
        raise UserError("has samples that are NaN or infinite")

    ratio = Fraction(rate, own)
    mono: np.ndarray = resample_poly(wave.mean(axis=1), ratio.numerator, ratio.denominator)

    return mono.astype(np.float32)


def clips(task: Task) -> tuple[dict[str, list[Item[Clip]]], list[str]]:
    """The clips of each split that the data has, and the names of the classes in the order of their labels.

    Raises:
        FileNotFoundError, ValueError: the data is not there, or not of a layout that is known.
    """
    where = locate(task.data)
    if is_local(where):
        return _of_folder(Path(where))
    return _of_hub(where, task)


def _of_folder(root: Path) -> tuple[dict[str, list[Item[Clip]]], list[str]]:
    paths = split_paths(root)
    _, classes = class_folders(paths["train"], SOUNDS)
    parts = {}
    for split, path in paths.items():
        files, own = class_folders(path, SOUNDS)
        if unknown := [name for name in own if name not in classes]:
            raise UserError(f"{path / unknown[0]}: {paths['train']} has no such class, only {', '.join(classes)}")

        label_of = {item.place: classes.index(item.value.relative_to(path).parts[0]) for item in files}
        parts[split] = [Item(item.place, Clip(partial(regular, item.value), label_of[item.place])) for item in files]

    return parts, classes


def _of_hub(where: str, task: Task) -> tuple[dict[str, list[Item[Clip]]], list[str]]:
    from datasets import Audio, ClassLabel

    loaded = hub(where, task.data_name, task.data_revision)
    learnt = hub_column(loaded["train"], task.label_column)
    numbered = isinstance(learnt.features[task.label_column], ClassLabel)
    if numbered:
        classes = learnt.features[task.label_column].names
    else:
        classes = sorted(map(str, set(learnt[task.label_column])))

    parts = {}
    for split, rows in loaded.items():
        labels = hub_column(rows, task.label_column)[task.label_column]
        if not numbered:
            labels = [classes.index(str(label)) if str(label) in classes else -1 for label in labels]

        files = hub_files(rows, task.audio_column, Audio(decode=False))
        parts[split] = [
            Item(f"{where}, {split} row {row}", Clip(file.source, int(label)))
            for row, (file, label) in enumerate(zip(files, labels, strict=True))
        ]

    return parts, classes


class Sounds(Dataset[dict[str, Any]]):
    """Clips as the model takes them: input_values (samples,), and attention_mask where it wants one."""

    def __init__(self, items: Sequence[Item[Clip]], extractor: Any, seconds: float) -> None:
        self.clips = [item.value for item in items]
        self.extractor = extractor
        self.samples = round(seconds * extractor.sampling_rate)

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rate, samples = self.extractor.sampling_rate, self.samples
        wave = read_sound(self.clips[index], rate)
        features = self.extractor(
            wave, sampling_rate=rate, max_length=samples, padding="max_length", truncation=True, return_tensors="pt"
        )
        return {**{name: value[0] for name, value in features.items()}, "labels": torch.tensor(self.clips[index].label)}


def load_data(task: Task, seed: int) -> Data:
    """The data, every clip decoded once to see that it can be; nothing is random.

    Raises:
        FileNotFoundError, ValueError: data or feature extractor cannot be used; names file and reason.
    """
    extractor = load_pretrained(AutoFeatureExtractor, locate(task.model))
    parts, classes = clips(task)

    def check(clip: Clip) -> None:
        if not 0 <= clip.label < len(classes):
            raise UserError(f"label {clip.label} is not one of the {len(classes)} classes, 0 to {len(classes) - 1}")
        read_sound(clip, extractor.sampling_rate)

    good = {split: sift(items, check, bad=task.bad_data, what=f"{split} sounds") for split, items in parts.items()}
    sets = {split: Sounds(items, extractor, task.seconds) for split, items in with_held_out(good).items()}

    return Data(sets["train"], sets["validation"], sets["test"], processor=extractor, labels=list(classes))


def load_base(task: Task) -> PreTrainedModel:
    """The model, with a head for the classes of the data; a head that it does not have yet starts the same always."""
    _, classes = clips(task)
    with torch.random.fork_rng():
        torch.manual_seed(HEAD_SEED)
        model = load_pretrained(AutoModelForAudioClassification, locate(task.model), **head_options(classes))
    return cast("PreTrainedModel", model)


INPUT_FILES = SOUNDS


def predictor(task: Task, model: Any, folder: Path) -> Callable[[Request], dict[str, Any]]:
    """Gives the class of a sound and its score."""
    extractor = load_pretrained(AutoFeatureExtractor, str(folder))
    names = class_names(model.config)

    def answer(request: Request) -> dict[str, Any]:
        sounds = Sounds([Item(request.given, Clip(partial(Path, request.given), 0))], extractor, task.seconds)
        inputs = {name: value[None].to(model.device) for name, value in sounds[0].items() if name != "labels"}
        return ranked(model(**inputs).logits[0], names)

    return answer


def findings(tested: Tested) -> Findings:
    """Which classes are taken for which, and the worst errors, to listen to."""
    test = cast("Sounds", tested.data.test)
    rate = test.extractor.sampling_rate

    def show(index: int) -> Shown:
        return Shown(sound=Sound(read_sound(test.clips[index], rate)[: test.samples], rate))

    return classified(tested.predictions, tested.labels, cast("list[str]", tested.data.labels), show)


compute_metrics = accuracy
