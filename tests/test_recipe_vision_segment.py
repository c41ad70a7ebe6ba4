"""Semantic segmentation: what is wrong with images and label maps, what becomes of labels, the metrics."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image
from PIL import Image as Pillow
from sklearn.metrics import confusion_matrix
from transformers import EvalPrediction

from flora.data.samples import locate
from flora.errors import UserError
from flora.recipes import vision_segment as recipe
from flora.runs.settings import read
from flora.runs.training import make_trainer, training_arguments


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The sample data and model, made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        return {name: locate(f"sample:vision/{name}") for name in ("scenes", "upernet")}


@pytest.fixture
def data(samples: dict[str, str], tmp_path: Path) -> Path:
    """A copy of the data to spoil."""
    return Path(shutil.copytree(samples["scenes"], tmp_path / "data"))


@pytest.fixture
def task(samples: dict[str, str], data: Path) -> Callable[..., recipe.Task]:
    given = {"data": str(data), "model": samples["upernet"], "reduce_labels": True}
    return lambda **more: recipe.Task(**{**given, **more})


def corrupt(data: Path) -> None:
    (data / "images" / "training" / "3.png").write_bytes(b"not an image")


def corrupt_map(data: Path) -> None:
    path = data / "annotations" / "training" / "3.png"
    path.write_bytes(path.read_bytes()[:100])


def missing_map(data: Path) -> None:
    (data / "annotations" / "training" / "3.png").unlink()


def other_size(data: Path) -> None:
    Pillow.new("L", (5, 7)).save(data / "annotations" / "training" / "3.png")


def size_of(data: Path) -> tuple[int, int]:
    with Pillow.open(data / "images" / "training" / "3.png") as image:
        return image.size


def out_of_range(data: Path) -> None:
    Pillow.new("L", size_of(data), 4).save(data / "annotations" / "training" / "3.png")


def colours(data: Path) -> None:
    Pillow.new("RGB", size_of(data)).save(data / "annotations" / "training" / "3.png")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (corrupt, "cannot identify image file"),
        (corrupt_map, "truncated"),
        (missing_map, "No such file or directory: '.*annotations/training/3.png'"),
        (other_size, r"pixels \(width, height\), its label map \(5, 7\)"),
        (out_of_range, "label 4 is out of range: there are 3 classes, reduce_labels is True"),
        (colours, "its label map has 3 channels, expected one"),
    ],
)
def test_bad_pairs_are_named_or_left_out(
    spoil: Callable[[Path], None], message: str, task: Any, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(data)
    with pytest.raises(ValueError, match=f"1 of 32 train images cannot be used: .*training/3.png: .*{message}"):
        recipe.load_data(task(), 0)
    assert len(recipe.load_data(task(bad_data="skip"), 0).train) == 31  # type: ignore[arg-type]
    assert "left out: 1 of 32 train images" in capsys.readouterr().out


def test_a_folder_without_images(task: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no folder `images`"):
        recipe.load_data(task(data=str(tmp_path)), 0)
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match="images has no images"):
        recipe.load_data(task(data=str(tmp_path)), 0)


@pytest.mark.parametrize(("reduce", "expected"), [(True, [255, 0, 1, 2, 255]), (False, [0, 1, 2, 3, 255])])
def test_labels_are_reduced_and_255_stays_ignored(reduce: bool, expected: list[int], task: Any, data: Path) -> None:
    """Five stripes with the labels 0, 1, 2, 3, 255, on an image of awkward size."""
    for part in ("training", "validation", "test"):
        stripes = np.repeat(np.array([0, 1, 2, 3, 255], np.uint8), 13)[None].repeat(37, 0)
        Pillow.fromarray(stripes).save(data / "annotations" / part / "0.png")
        Pillow.new("RGB", (65, 37)).save(data / "images" / part / "0.png")
    names = ["a", "b", "c"] if reduce else ["a", "b", "c", "d"]
    found = recipe.load_data(task(reduce_labels=reduce, labels=names), 0)
    sample = found.test[0]
    assert sample["pixel_values"].shape == (3, 64, 64)
    assert sample["labels"].shape == (64, 64)
    assert sample["labels"].dtype == torch.int64
    middles = sample["labels"][32, [6, 19, 32, 45, 58]]
    assert middles.tolist() == expected
    with_draws = [found.train[0]["labels"] for _ in range(2)]
    assert torch.equal(*with_draws)
    assert set(with_draws[0].unique().tolist()) <= set(expected)


def test_image_and_map_are_cropped_alike(task: Any, data: Path) -> None:
    """A label map drawn from the image: after any augmentation it still fits the image."""
    for path in (data / "images" / "training").glob("*.png"):
        bright = np.random.default_rng(0).integers(0, 2, (4, 5), dtype=np.uint8).repeat(12, 0).repeat(12, 1)
        Pillow.fromarray(bright[..., None].repeat(3, 2) * 255).save(path)
        Pillow.fromarray(bright + 1).save(data / "annotations" / "training" / path.name)
    found = recipe.load_data(task(), 0).train
    for epoch in range(4):
        found.set_epoch(epoch)  # type: ignore[attr-defined]
        sample = found[epoch]
        assert ((sample["pixel_values"][0] > 0) == (sample["labels"] == 1)).float().mean() > 0.9


def test_a_data_set_of_the_hub(task: Any, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {
        name: [{"path": str(data / folder / "training" / f"{number}.png"), "bytes": None} for number in range(8)]
        for name, folder in (("image", "images"), ("annotated", "annotations"))
    }
    features = Features({"image": Image(), "annotated": Image()})
    monkeypatch.setattr(recipe, "hub", lambda where: {"train": Dataset.from_dict(rows, features=features)})
    found = recipe.load_data(task(data="org/name", label_column="annotated"), 0)
    assert [len(part) for part in (found.train, found.validation, found.test)] == [6, 1, 1]  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"8 of 8 train .*\(train\), row 0: label 3 is out of range: there are 2"):
        recipe.load_data(task(data="org/name", label_column="annotated", labels=["a", "b"], reduce_labels=False), 0)


def test_other_classes_get_a_new_last_layer(task: Any) -> None:
    model = recipe.load_base(task(labels=["a", "b", "c", "d", "e"]))
    assert model.decode_head.classifier.weight.shape[0] == 5
    assert model.auxiliary_head.classifier.weight.shape[0] == 5
    assert recipe.load_base(task()).config.id2label == {0: "circle", 1: "square", 2: "triangle"}


@pytest.mark.parametrize(("count", "reduce"), [(256, False), (255, True)])
def test_more_classes_than_a_byte_holds_are_refused(count: int, reduce: bool, task: Any) -> None:
    """Their numbers would wrap in the label maps that are written, and 255 means that a pixel does not count."""
    labels = [f"class {number}" for number in range(count)]
    with pytest.raises(ValueError, match=f"there are {count} classes, expected at most {count - 1}"):
        recipe.class_names(task(labels=labels, reduce_labels=reduce))
    assert len(recipe.class_names(task(labels=labels[1:], reduce_labels=reduce))) == count - 1


def test_metrics_by_hand() -> None:
    """Two images of 2 x 3 pixels; class 3 occurs nowhere, class 2 is only found where there is none."""
    found = torch.tensor([[[0, 0, 1], [1, 1, 2]], [[0, 1, 0], [0, 0, 0]]])
    labels = torch.tensor([[[0, 0, 1], [1, 0, 255]], [[0, 1, 0], [255, 1, 1]]])
    counts = recipe.pixel_counts(found, labels, 4)
    assert counts.shape == (2, 4, 3)
    metrics = recipe.compute_metrics(EvalPrediction(*(part.numpy() for part in counts.split([2, 1], -1))))
    # class 0: right 4, found 6, true 5; class 1: right 3, found 4, true 5
    assert metrics == pytest.approx(
        {"miou": (4 / 7 + 3 / 6) / 2, "macc": (4 / 5 + 3 / 5) / 2, "pixel_accuracy": 7 / 10}
    )


def test_metrics_equal_those_of_a_confusion_matrix() -> None:
    torch.manual_seed(1)
    found, labels = torch.randint(0, 5, (3, 7, 11)), torch.randint(0, 5, (3, 7, 11))
    counts = recipe.pixel_counts(found, labels, 5)
    matrix = confusion_matrix(labels.flatten(), found.flatten()).astype(float)
    right = matrix.diagonal()
    metrics = recipe.compute_metrics(EvalPrediction(*(part.numpy() for part in counts.split([2, 1], -1))))
    assert metrics["miou"] == pytest.approx((right / (matrix.sum(0) + matrix.sum(1) - right)).mean())
    assert metrics["macc"] == pytest.approx((right / matrix.sum(1)).mean())
    assert metrics["pixel_accuracy"] == pytest.approx(right.sum() / matrix.sum())


def test_an_evaluation_keeps_counts_and_no_maps(task: Any, tmp_path: Path) -> None:
    settings = read("vision_segment-tiny", ["training.disable_tqdm=true", "training.per_device_eval_batch_size=3"])
    found = recipe.load_data(task(), 0)
    trainer = make_trainer(recipe.load_base(task()), recipe, found, training_arguments(settings, tmp_path))
    loop = trainer.evaluation_loop(trainer.get_eval_dataloader(found.test), "evaluation")
    assert loop.predictions.shape == (8, 3, 2)  # type: ignore[union-attr]
    assert loop.label_ids.shape == (8, 3, 1)  # type: ignore[union-attr]
    true = sum(int((found.test[at]["labels"] != 255).sum()) for at in range(8))
    assert loop.label_ids.sum() == true  # type: ignore[union-attr]
