"""Object detection: what is wrong with images, JSON and boxes, what becomes of boxes, average precision by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as Pillow
from transformers import EvalPrediction

from flora.data.coco import check_annotation, find_files
from flora.data.samples import locate
from flora.recipes import vision_detect as recipe
from flora.runs.settings import read
from flora.runs.training import make_trainer, training_arguments


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The sample data and model, made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        return {name: locate(f"sample:vision/{name}") for name in ("boxes", "rtdetr")}


@pytest.fixture
def data(samples: dict[str, str], tmp_path: Path) -> Path:
    """A copy of the data to spoil."""
    return Path(shutil.copytree(samples["boxes"], tmp_path / "data"))


@pytest.fixture
def task(samples: dict[str, str], data: Path) -> Callable[..., recipe.Task]:
    return lambda **given: recipe.Task(**{"data": str(data), "model": samples["rtdetr"], **given})


def change(data: Path, **changes: Any) -> None:
    """Changes the first annotation of the training part."""
    path = data / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    content["annotations"][0].update(changes)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bbox": [4, 4, 0, 9]}, r"the box \[4, 4, 0, 9\] .* has no size"),
        ({"bbox": [4, 4, 5, -1]}, "has no size"),
        ({"bbox": [4, 4, float("nan"), 5]}, "has no size"),
        ({"bbox": [60, 4, 30, 9]}, r"lies outside its image, which has \(\d+, \d+\) pixels"),
        ({"bbox": [-9, 4, 5, 9]}, "lies outside its image"),
        ({"bbox": [4, 4, 5]}, "not enough values"),
        ({"category_id": 2}, "category 2 is out of range, not one of circle, square, triangle"),
        ({"image_id": 777}, "there is no image 777 that can be used"),
    ],
)
def test_bad_annotations_are_named_or_left_out(changes: dict[str, Any], message: str, task: Any, data: Path) -> None:
    change(data, **changes)
    place = "48 train annotations cannot be used: .*instances_train.json: annotation 1: "
    with pytest.raises(ValueError, match=f"1 of {place}.*{message}"):
        recipe.load_data(task(), 0)
    found = recipe.load_data(task(bad_data="skip"), 0).train
    assert sum(len(one.objects) for one in found.examples) == 47  # type: ignore[attr-defined]


def test_an_annotation_without_a_key() -> None:
    with pytest.raises(ValueError, match="lacks category_id, bbox"):
        check_annotation({"image_id": 1}, {1: (5, 5)}, {}, [])


def test_a_corrupt_image_and_one_that_is_missing(task: Any, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "train" / "0.png").write_bytes(b"no image")
    (data / "train" / "1.png").unlink()
    with pytest.raises(ValueError, match=r"2 of 32 train images .*0.png: cannot identify .*1.png: .*No such file"):
        recipe.load_data(task(), 0)
    assert len(recipe.load_data(task(bad_data="skip"), 0).train) == 30  # type: ignore[arg-type]
    printed = capsys.readouterr().out
    assert "left out: 2 of 32 train images" in printed
    assert "left out: 3 of 48 train annotations" in printed


def test_json_that_does_not_parse_is_named_with_its_line(task: Any, data: Path) -> None:
    path = data / "annotations" / "instances_train.json"
    path.write_text('{\n"images": [,]}')
    with pytest.raises(ValueError, match=r"instances_train.json:2: not valid JSON \(Expecting value at column 12\)"):
        recipe.load_data(task(), 0)
    path.write_text('{"images": []}')
    with pytest.raises(ValueError, match="instances_train.json is not in COCO's format: KeyError 'categories'"):
        recipe.load_data(task(), 0)


def test_a_folder_without_json(task: Any, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="none has 0 JSON files, expected one"):
        recipe.load_data(task(data=str(tmp_path / "none")), 0)


def test_layouts(tmp_path: Path) -> None:
    """COCO's own names, images in a folder of their own, and a folder for each part with its JSON file in it."""
    for name in ("train2017", "val2017"):
        (tmp_path / "coco" / "images" / name).mkdir(parents=True)
    (tmp_path / "coco" / "annotations").mkdir()
    for name in ("train2017", "val2017", "default"):
        (tmp_path / "coco" / "annotations" / f"instances_{name}.json").touch()
    found = find_files(tmp_path / "coco")
    assert {split: (path.stem, folder.name) for split, (path, folder) in found.items()} == {
        "train": ("instances_train2017", "train2017"),
        "validation": ("instances_val2017", "val2017"),
    }
    for name in ("train", "valid", "test"):
        (tmp_path / "parts" / name).mkdir(parents=True)
        (tmp_path / "parts" / name / "_annotations.coco.json").touch()
    parts = find_files(tmp_path / "parts")
    assert {split: folder.name for split, (_, folder) in parts.items()} == {
        "train": "train", "validation": "valid", "test": "test"
    }  # fmt: skip
    assert find_files(tmp_path / "parts" / "train")["train"][1].name == "train"


def test_boxes_are_scaled_and_mirrored_with_their_image(task: Any) -> None:
    example = recipe.Example(Path("x"), [{"bbox": [5, 2, 10, 4], "category_id": 1, "area": 40, "iscrowd": 0}])

    class Tails:
        random = staticmethod(lambda: 0.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "read_image", lambda _: Pillow.new("RGB", (50, 20)))
        plain, mirrored = (recipe.prepare(example, draw) for draw in (None, Tails()))  # type: ignore[arg-type]
    assert mirrored["labels"][0]["bbox"] == [35, 2, 10, 4]
    assert example.objects[0]["bbox"] == [5, 2, 10, 4]
    batch = recipe.load_data(task(), 0).collate([plain, mirrored])  # type: ignore[misc]
    assert batch["pixel_values"].shape == (2, 3, 64, 64)
    centres = [label["boxes"][0].tolist() for label in batch["labels"]]
    assert centres[0] == pytest.approx([10 / 50, 4 / 20, 10 / 50, 4 / 20])
    assert centres[1] == pytest.approx([40 / 50, 4 / 20, 10 / 50, 4 / 20])
    assert batch["labels"][0]["truth"].tolist() == [[5, 2, 10, 4, 1, 0]]


def test_a_data_set_of_the_hub(task: Any, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["zebra", "ant"]
    rows: dict[str, list[Any]] = {
        "image": [{"path": str(data / "train" / f"{at}.png"), "bytes": None} for at in range(8)],
        "objects": [{"bbox": [[1.0, 2.0, 10.0, 5.0]] * (at % 3), "category": [at % 2] * (at % 3)} for at in range(8)],
    }
    objects = {"bbox": List(List(Value("float32"))), "category": List(ClassLabel(names=names))}
    features = Features({"image": Image(), "objects": objects})
    monkeypatch.setattr(recipe, "hub", lambda where: {"train": Dataset.from_dict(rows, features=features)})
    found = recipe.load_data(task(data="org/name"), 0)
    assert found.labels == names
    examples = [one for part in (found.train, found.validation, found.test) for one in part.examples]  # type: ignore[attr-defined]
    assert sorted(len(one.objects) for one in examples) == [0, 0, 0, 1, 1, 1, 2, 2]
    rows["objects"][4]["bbox"] = [[1.0, 2.0, 100.0, 5.0]]
    with pytest.raises(ValueError, match=r"1 of 7 train annotations .*org/name \(train\), row 4: the box .* outside"):
        recipe.load_data(task(data="org/name"), 0)


def test_images_without_objects_train_and_count(task: Any, tmp_path: Path) -> None:
    """A batch whose images differ in objects, none among them, goes through the model and the evaluation."""
    found = recipe.load_data(task(), 0)
    for dataset in (found.train, found.test):
        dataset.examples[0].objects.clear()  # type: ignore[attr-defined]
    settings = read("vision_detect-tiny", ["training.disable_tqdm=true", "training.per_device_eval_batch_size=3"])
    model = recipe.load_base(task()).train()
    batch = found.collate([found.train[at] for at in range(3)])  # type: ignore[misc]
    assert torch.isfinite(model(**batch).loss)
    trainer = make_trainer(model, recipe, found, training_arguments(settings, tmp_path))
    loop = trainer.evaluation_loop(trainer.get_eval_dataloader(found.test), "evaluation")
    assert loop.predictions.shape == (8, 12, 6)  # type: ignore[union-attr]
    assert loop.label_ids.shape == (8, 2, 6)  # type: ignore[union-attr]
    assert set(loop.metrics) >= {"eval_loss", "eval_map", "eval_map_50", "eval_map_75"}  # type: ignore[arg-type]


def test_predictions_are_boxes_in_pixels_of_the_stored_image(task: Any, tmp_path: Path) -> None:
    """A model whose answer is known: one box over the right half, whatever the image."""
    found = recipe.load_data(task(), 0)
    settings = read("vision_detect-tiny", ["training.disable_tqdm=true"])
    trainer = make_trainer(recipe.load_base(task()), recipe, found, training_arguments(settings, tmp_path))
    outputs = type("Outputs", (), {"logits": torch.tensor([[[-9.0, 3.0, -9.0]]])})()
    outputs.pred_boxes = torch.tensor([[[0.75, 0.5, 0.5, 1.0]]])
    trainer.compute_loss = lambda *_, **__: (torch.tensor(1.0), outputs)  # type: ignore[method-assign]
    inputs = found.collate([found.test[0]])  # type: ignore[misc]
    height, width = inputs["labels"][0]["orig_size"].tolist()
    _, boxes, truth = trainer.prediction_step(trainer.model, inputs, prediction_loss_only=False)
    assert boxes[0, 0].tolist() == pytest.approx([width / 2, 0, width / 2, height, 1, 1 / (1 + np.exp(-3))])
    assert torch.equal(truth[0], inputs["labels"][0]["truth"])


def metrics_of(found: list[list[list[float]]], truth: list[list[list[float]]]) -> dict[str, float]:
    most = max(map(len, found + truth))
    padded = [np.array([rows + [[-100.0] * 6] * (most - len(rows)) for rows in images]) for images in (found, truth)]
    return recipe.compute_metrics(EvalPrediction(*padded))


def test_average_precision_by_hand() -> None:
    box, other = [10.0, 10.0, 20.0, 20.0], [50.0, 50.0, 10.0, 10.0]
    truth = [[[*box, 0, 0]], [[*other, 0, 0]]]
    assert metrics_of([[[*box, 0, 0.9]], [[*other, 0, 0.8]]], truth) == {"map": 1.0, "map_50": 1.0, "map_75": 1.0}
    # found in one of two images: recall 1/2 at precision 1, so 51 of the 101 points of recall
    half = metrics_of([[[*box, 0, 0.9]], [[*box, 0, 0.8]]], truth)
    assert half == pytest.approx(dict.fromkeys(("map", "map_50", "map_75"), 51 / 101))
    # overlap 0.6: right at 0.5, 0.55 and 0.6, three of the ten thresholds
    near = metrics_of([[[10.0, 10.0, 20.0, 12.0 + 1e-6, 0, 0.9]]], [[[*box, 0, 0]]])
    assert near == pytest.approx({"map": 0.3, "map_50": 1.0, "map_75": 0.0})
    wrong = metrics_of([[[*box, 1, 0.9]]], [[[*box, 0, 0]]])
    assert wrong == {"map": 0.0, "map_50": 0.0, "map_75": 0.0}


def test_a_crowd_is_neither_missed_nor_a_false_alarm() -> None:
    box, crowd = [10.0, 10.0, 20.0, 20.0], [50.0, 50.0, 40.0, 40.0]
    found = [[[*box, 0, 0.5], [60.0, 60.0, 5.0, 5.0, 0, 0.9]]]
    assert metrics_of(found, [[[*box, 0, 0], [*crowd, 0, 1]]])["map"] == pytest.approx(1.0)
    assert metrics_of(found, [[[*box, 0, 0]]])["map"] == pytest.approx(0.5)


def test_nothing_found_is_zero() -> None:
    assert metrics_of([[]], [[[1.0, 2.0, 3.0, 4.0, 0, 0]]]) == {"map": 0.0, "map_50": 0.0, "map_75": 0.0}


def test_heads_are_made_for_the_categories(task: Any) -> None:
    model = recipe.load_base(task())
    assert model.config.id2label == {0: "circle", 1: "square", 2: "triangle"}
    assert model.model.enc_score_head.weight.shape[0] == 3
