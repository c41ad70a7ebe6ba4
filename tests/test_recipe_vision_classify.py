"""Image classification: what is wrong with a data set is named; processing, augmentation, the metric."""

from __future__ import annotations

import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pillow
from transformers import ConvNextImageProcessorPil, EvalPrediction, ResNetConfig, ResNetForImageClassification

from flora.data.images import crop_and_mirror
from flora.data.samples import locate
from flora.recipes import vision_classify as recipe
from flora.runs.evaluating import evaluate
from flora.runs.merging import merge
from flora.runs.reloading import load_base
from flora.runs.settings import read
from flora.runs.training import TellEpoch, train


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The sample data and model, made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        return {name: locate(f"sample:vision/{name}") for name in ("shapes", "convnextv2")}


@pytest.fixture
def data(samples: dict[str, str], tmp_path: Path) -> Path:
    """A copy of the data to spoil."""
    return Path(shutil.copytree(samples["shapes"], tmp_path / "data"))


@pytest.fixture
def task(samples: dict[str, str], data: Path) -> Callable[..., recipe.Task]:
    return lambda **given: recipe.Task(**{"data": str(data), "model": samples["convnextv2"], **given})


def corrupt(data: Path) -> None:
    (data / "train" / "circle" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n and nothing more")


def truncate(data: Path) -> None:
    path = data / "train" / "circle" / "0.png"
    path.write_bytes(path.read_bytes()[:200])


def unknown_class(data: Path) -> None:
    shutil.copytree(data / "test" / "circle", data / "test" / "hexagon")


@pytest.mark.parametrize(
    ("spoil", "message", "left"),
    [
        (corrupt, r"1 of 48 train images cannot be used: .*circle/0.png: .*task.bad_data=skip", (47, 18, 18)),
        (truncate, r"1 of 48 train images cannot be used: .*circle/0.png: .*truncated", (47, 18, 18)),
        (
            unknown_class,
            r"6 of 24 test images cannot be used: .*hexagon/0.png: its class 'hexagon' is not",
            (48, 18, 18),
        ),
    ],
)
def test_bad_images_are_named_or_left_out(
    spoil: Callable[[Path], None],
    message: str,
    left: tuple[int, int, int],
    task: Any,
    data: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(data)
    with pytest.raises(ValueError, match=message):
        recipe.load_data(task(), 0)
    found = recipe.load_data(task(bad_data="skip"), 0)
    assert "left out: " in capsys.readouterr().out
    assert tuple(map(len, (found.train, found.validation, found.test))) == left  # type: ignore[arg-type]


def test_an_empty_class_folder_is_named(task: Any, data: Path) -> None:
    (data / "train" / "empty").mkdir()
    with pytest.raises(ValueError, match="the class folder .*train/empty has no files"):
        recipe.load_data(task(), 0)


def test_a_folder_without_classes_and_one_that_is_not_there(task: Any, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="has no sub-folders"):
        recipe.load_data(task(data=str(tmp_path / "none")), 0)
    with pytest.raises(FileNotFoundError, match="no such file or folder here"):
        recipe.load_data(task(data=str(tmp_path / "nowhere")), 0)


def test_a_model_that_is_not_there_is_one_line(task: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"task.model is '.*empty': AutoModelForImageClassification cannot load"
    ):
        recipe.load_base(task(model=str(tmp_path / "empty")))


def test_names_of_classes_are_checked(task: Any) -> None:
    with pytest.raises(ValueError, match="task.labels is .*two or more different names"):
        task(labels=["one", "one"])


def test_class_folders_alone_are_split_without_overlap(task: Any, data: Path) -> None:
    found = recipe.load_data(task(data=str(data / "train")), 0)
    parts = [{str(one.image) for one in part.examples} for part in (found.train, found.validation, found.test)]  # type: ignore[attr-defined]
    assert [len(part) for part in parts] == [35, 7, 6]
    assert len(set.union(*parts)) == 48


@pytest.mark.parametrize("size", [(3, 71), (71, 3), (32, 32), (1, 1)])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_images_of_any_size_and_mode_come_as_the_model_takes_them(
    size: tuple[int, int], mode: str, task: Any, data: Path
) -> None:
    path = data / "train" / "circle" / "0.png"
    Pillow.fromarray(np.full((*size, 3), 200, np.uint8)).convert(mode, palette=Pillow.Palette.ADAPTIVE).save(path)
    found = recipe.load_data(task(), 0)
    at = [str(one.image) for one in found.train.examples].index(str(path))  # type: ignore[attr-defined]
    expected = torch.full((3, 32, 32), (200 / 255 - 0.5) / 0.5)
    torch.testing.assert_close(found.train[at]["pixel_values"], expected, atol=0.02, rtol=0)


def test_augmentation_depends_on_seed_epoch_and_index_alone(task: Any) -> None:
    first, again, other = (recipe.load_data(task(), seed).train for seed in (0, 0, 1))
    torch.rand(5)
    random.random()
    assert torch.equal(first[3]["pixel_values"], again[3]["pixel_values"])
    assert not torch.equal(first[3]["pixel_values"], other[3]["pixel_values"])
    first.set_epoch(2)  # type: ignore[attr-defined]
    assert not torch.equal(first[3]["pixel_values"], again[3]["pixel_values"])
    plain = [recipe.load_data(task(augment=False), seed).train[3]["pixel_values"] for seed in (0, 1)]
    assert torch.equal(*plain)


def test_crops_are_inside_and_as_large_as_promised() -> None:
    image = Pillow.fromarray(np.arange(11 * 7 * 3, dtype=np.uint8).reshape(11, 7, 3))
    pieces = [crop_and_mirror([image, image], 0.7, random.Random(seed)) for seed in range(50)]
    assert all(np.array_equal(*map(np.asarray, pair)) for pair in pieces)
    sizes = {piece.size for piece, _ in pieces}
    assert {5, 6, 7} == {width for width, _ in sizes}
    assert min(height for _, height in sizes) >= 8
    values = set(map(tuple, np.asarray(image).reshape(-1, 3)))
    assert all(set(map(tuple, np.asarray(piece).reshape(-1, 3))) <= values for piece, _ in pieces)


def test_a_data_set_of_the_hub(task: Any, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's rows: the classes by their names, a label out of range and a corrupt image named by row."""
    names = ["zebra", "ant"]
    files = [str(data / "train" / "circle" / f"{number}.png") for number in (0, 3, 6, 9, 12, 15, 18, 21)]
    rows = {"picture": [{"path": None, "bytes": Path(file).read_bytes()} for file in files], "kind": [0, 1] * 4}

    def loaded(labels: Any) -> dict[str, Dataset]:
        features = Features({"picture": Image(), "kind": labels})
        return {"train": Dataset.from_dict(rows, features=features)}

    given = {"data": "org/name", "image_column": "picture", "label_column": "kind"}
    monkeypatch.setattr(recipe, "hub", lambda where: loaded(ClassLabel(names=names)))
    found = recipe.load_data(task(**given), 0)
    assert found.labels == names
    assert len(found.train) == 6  # type: ignore[arg-type]
    assert found.train[0]["pixel_values"].shape == (3, 32, 32)
    rows["kind"][5] = -1
    rows["picture"][2] = {"path": None, "bytes": b"no image"}
    with pytest.raises(
        ValueError, match=r"2 of 8 .*\(train\), row 2: cannot identify .*row 5: its class '-1' is not one"
    ):
        recipe.load_data(task(**given), 0)
    monkeypatch.setattr(recipe, "hub", lambda where: loaded(Value("int64")))
    assert recipe.load_data(task(**given, bad_data="skip"), 0).labels == ["-1", "0", "1"]
    with pytest.raises(ValueError, match="the data set has no column 'label', only picture, kind"):
        recipe.load_data(task(data="org/name", image_column="picture"), 0)


def test_the_head_is_made_for_the_classes_and_the_rest_is_kept(task: Any) -> None:
    model = recipe.load_base(task())
    assert model.config.id2label == {0: "circle", 1: "square", 2: "triangle"}
    assert model.classifier.weight.shape == (3, 32)
    assert Path(model.name_or_path).is_dir()


def test_accuracy() -> None:
    logits = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    assert recipe.compute_metrics(EvalPrediction(logits, np.array([1, 0, 0, 1]))) == {"accuracy": 0.75}


def test_a_network_with_batch_norms_measures_the_same_after_reloading(data: Path, tmp_path: Path) -> None:
    """The statistics of the base model stay as they are; its head is made anew wherever the base is loaded again."""
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=7)
    ResNetForImageClassification(config).save_pretrained(tmp_path / "resnet")
    ConvNextImageProcessorPil(size={"shortest_edge": 32}).save_pretrained(tmp_path / "resnet")
    given = [f"task.data={data}", f"task.model={tmp_path / 'resnet'}", f"output={tmp_path / 'run'}"]
    settings = read("vision_classify-tiny", [*given, "training.max_steps=4", "training.disable_tqdm=true"])
    metrics = train(settings)
    measured, same, _ = evaluate(tmp_path / "run")
    assert same
    assert measured["loss"] == metrics["test"]["loss"]
    assert load_base(tmp_path / "run").config.id2label == {0: "circle", 1: "square", 2: "triangle"}
    assert "num_labels=3, ignore_mismatched_sizes=True" in (tmp_path / "run" / "README.md").read_text()
    merged = ResNetForImageClassification.from_pretrained(merge(tmp_path / "run", tmp_path / "merged").folder)
    base = ResNetForImageClassification.from_pretrained(tmp_path / "resnet")
    norms = [name for name in base.state_dict() if name.endswith(("running_mean", "running_var"))]
    assert len(norms) == 12
    assert all(torch.equal(base.state_dict()[name], merged.state_dict()[name]) for name in norms)
    shutil.rmtree(data / "train" / "circle")
    with pytest.raises(ValueError, match=r"classes \['square', 'triangle'\], but .*run was trained for \['circle'"):
        evaluate(tmp_path / "run", ["task.bad_data=skip"])


def test_what_no_adapter_holds_is_named_where_the_numbers_are_others(data: Path, tmp_path: Path) -> None:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=7)
    ResNetForImageClassification(config).save_pretrained(tmp_path / "resnet")
    ConvNextImageProcessorPil(size={"shortest_edge": 32}).save_pretrained(tmp_path / "resnet")
    given = [f"task.data={data}", f"task.model={tmp_path / 'resnet'}", f"output={tmp_path / 'run'}"]
    careless = ["adapter.modules_to_save=null", "adapter.freeze_batch_norm=false", "adapter.target_modules=all-conv"]
    settings = read("vision_classify-tiny", [*given, *careless, "training.max_steps=1", "training.disable_tqdm=true"])
    with pytest.warns(UserWarning, match="running statistics of 6 norms move"):
        train(settings)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the running statistics")
        found = evaluate(tmp_path / "run")

    assert found.same is False
    assert found.report[0].startswith("loss was ")
    norms, head = found.report[-2:]
    assert "statistics of batch norms moved" in norms
    assert head.startswith("classifier.1.weight, classifier.1.bias start at random")


def test_the_epoch_is_told_where_a_run_goes_on_too(task: Any) -> None:
    found = recipe.load_data(task(), 0).train
    for state, expected in ((None, 0), (1.0, 1), (2.6667, 2), (2.9999999999, 3)):
        TellEpoch(found).on_epoch_begin(None, type("State", (), {"epoch": state}), None)  # type: ignore[arg-type]
        assert found.epoch == expected  # type: ignore[attr-defined]


def test_making_a_sample_leaves_the_random_state_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    locate("sample:vision/convnextv2")
    assert torch.equal(torch.rand(3), expected)
