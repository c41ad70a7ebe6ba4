"""The recipe audio_classify: reading sounds, bad data, the model with a new head."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile
import torch
from transformers import EvalPrediction

from flora.data.samples import locate
from flora.recipes.audio_classify import Clip, Task, compute_metrics, load_base, load_data, read_sound


@pytest.fixture
def tones(tmp_path: Path) -> Path:
    return Path(shutil.copytree(locate("sample:signals/tones"), tmp_path / "tones"))


def task(data: Path | str, **changes: Any) -> Task:
    return Task(**{"model": "sample:signals/wav2vec2", "data": str(data), "seconds": 0.5, **changes})


def wav(wave: np.ndarray, rate: int) -> Clip:
    stream = io.BytesIO()
    soundfile.write(stream, wave, rate, format="WAV", subtype="FLOAT")
    return Clip(lambda: io.BytesIO(stream.getvalue()), 0)


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 44100])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_any_rate_and_any_channels_become_one_channel_at_the_rate_of_the_model(rate: int, channels: int) -> None:
    time = np.arange(rate // 2 + 1) / rate
    wave = np.stack([np.sin(2 * np.pi * 440 * time)] * channels, axis=1)
    read = read_sound(wav(wave, rate), 16000)
    assert read.dtype == np.float32
    assert abs(len(read) - 8000) <= 2
    expected = np.sin(2 * np.pi * 440 * np.arange(len(read)) / 16000)
    assert np.abs(read - expected)[200:-200].max() < 0.02


@pytest.mark.parametrize("samples", [1, 7999, 8000, 8001, 30000])
def test_every_length_is_padded_or_cut(tones: Path, samples: int) -> None:
    soundfile.write(tones / "train" / "low" / "0.wav", np.full(samples, 0.5), 16000)
    train = load_data(task(tones), 0).train
    item = next(train[index] for index in range(len(train)) if train[index]["labels"] == 1)  # type: ignore[arg-type]
    assert item["input_values"].shape == (8000,)
    assert torch.isfinite(item["input_values"]).all()
    assert len(item["input_values"][samples:].unique()) <= 1  # silence; the extractor moves it with the mean


def test_labels_are_the_folders_in_order(tones: Path) -> None:
    data = load_data(task(tones), 0)
    assert [len(data.split(name)) for name in ("train", "validation", "test")] == [24, 12, 24]  # type: ignore[arg-type]
    assert [int(data.test[index]["labels"]) for index in (0, 8, 23)] == [0, 1, 2]
    assert load_base(task(tones)).config.id2label == {0: "high", 1: "low", 2: "middle"}


def test_a_head_of_other_classes_starts_the_same_always(tones: Path) -> None:
    shutil.copytree(tones / "train" / "low", tones / "train" / "lower")
    shutil.rmtree(tones / "test")
    heads = [load_base(task(tones)).get_parameter("classifier.weight") for _ in range(2)]
    assert heads[0].shape[0] == 4
    assert torch.equal(*heads)


def corrupt(tones: Path) -> str:
    (tones / "train" / "low" / "3.wav").write_bytes(b"RIFF no sound")
    return "1 of 24 train sounds cannot be used: .*low/3.wav: cannot be decoded"


def empty_file(tones: Path) -> str:
    (tones / "test" / "high" / "3.wav").write_bytes(b"")
    return "1 of 24 test sounds cannot be used: .*high/3.wav: cannot be decoded"


def no_samples(tones: Path) -> str:
    soundfile.write(tones / "train" / "low" / "2.wav", np.zeros(0), 16000)
    return "low/2.wav: has no samples"


def not_finite(tones: Path) -> str:
    soundfile.write(tones / "train" / "low" / "2.wav", np.array([0.0, np.nan]), 16000, subtype="FLOAT")
    return "low/2.wav: has samples that are NaN or infinite"


@pytest.mark.parametrize("spoil", [corrupt, empty_file, no_samples, not_finite])
def test_a_sound_that_cannot_be_used(tones: Path, spoil: Any, capsys: pytest.CaptureFixture[str]) -> None:
    message = spoil(tones)
    with pytest.raises(ValueError, match=message):
        load_data(task(tones), 0)
    data = load_data(task(tones, bad_data="skip"), 0)
    assert len(data.train) + len(data.test) == 47  # type: ignore[arg-type]
    assert "left out: 1 of 24" in capsys.readouterr().out


def test_an_empty_class_folder(tones: Path) -> None:
    (tones / "train" / "nothing").mkdir()
    with pytest.raises(ValueError, match="the class folder .*nothing has no files"):
        load_data(task(tones), 0)


def test_a_class_that_training_does_not_have(tones: Path) -> None:
    (tones / "test" / "low").rename(tones / "test" / "owl")
    with pytest.raises(ValueError, match="owl: .*train has no such class, only high, low, middle"):
        load_data(task(tones), 0)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"task.data is .*nowhere"):
        load_data(task(tmp_path / "nowhere"), 0)


def test_a_model_that_is_not_there(tones: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"task.model is .*AutoFeatureExtractor cannot load it"):
        load_data(task(tones, model=str(tmp_path)), 0)


def hub_like(labels: list[int]) -> Any:
    """What load_dataset gives for a set of the hub: the files as bytes, labels with names."""
    sounds = []
    for index in range(len(labels)):
        stream = io.BytesIO()
        soundfile.write(stream, np.full(4000 + index, 0.1), 16000, format="WAV")
        sounds.append({"bytes": stream.getvalue(), "path": None})
    rows = datasets.Dataset.from_dict({"audio": sounds, "label": labels})
    rows = rows.cast_column("audio", datasets.Audio()).cast_column("label", datasets.ClassLabel(names=["no", "yes"]))
    return {"train": rows}


def test_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: hub_like([0, 1] * 10))
    data = load_data(task("org/words"), 0)
    assert len(data.train) + len(data.validation) + len(data.test) == 20  # type: ignore[arg-type]
    assert data.train[0]["input_values"].shape == (8000,)
    with pytest.raises(ValueError, match="the data set has no column 'word', only audio, label"):
        load_data(task("org/words", label_column="word"), 0)


def test_a_label_out_of_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: hub_like([0, 1, -1, 1]))
    with pytest.raises(ValueError, match="org/words, train row 2: label -1 is not one of the 2 classes, 0 to 1"):
        load_data(task("org/words"), 0)


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match=r"task.seconds is 0, expected a length above 0"):
        Task(seconds=0)


def test_accuracy() -> None:
    logits = np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert compute_metrics(EvalPrediction(logits, np.array([1, 0, 0, 1]))) == {"accuracy": 0.75}
