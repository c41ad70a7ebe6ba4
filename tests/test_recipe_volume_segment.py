"""The recipe volume_segment: awkward sizes, patches, bad data, Dice, and the network saved and loaded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from transformers import AutoModel, EvalPrediction

from flora.data import volume_files
from flora.data.samples import locate
from flora.data.volume_files import Pair, Reading, Volumes, batch_of
from flora.data.volume_unet import VolumeUNet, VolumeUNetConfig
from flora.recipes.volume_segment import (
    Task,
    compute_metrics,
    dice_of,
    load_base,
    load_data,
    network_config,
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return Path(shutil.copytree(locate("sample:signals/volumes"), tmp_path / "volumes"))


def task(root: Path, **changes: Any) -> Task:
    return Task(**{"model": "sample:signals/unet3d", "data": str(root), **changes})


def write(path: Path, voxels: np.ndarray, affine: np.ndarray | None = None) -> None:
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4) if affine is None else affine), path)


def pair(root: Path, image: np.ndarray, labels: np.ndarray) -> Pair:
    paths = Pair(root / "image.nii", root / "labels.nii")
    for path, voxels in zip(paths, (image, labels), strict=True):
        write(path, voxels)
    return paths


@pytest.mark.parametrize("size", [(1, 1, 1), (5, 13, 7), (8, 16, 24), (17, 2, 9)])
def test_any_size_is_padded_to_what_the_strides_divide(tmp_path: Path, size: tuple[int, int, int]) -> None:
    config = VolumeUNetConfig(channels=[4, 4, 4], strides=[2, 2])
    padded = config.padded(size)
    assert all(
        length % 4 == 0 and least <= length < max(least + 4, 9) for length, least in zip(padded, size, strict=True)
    )
    image, labels = np.random.default_rng(0).standard_normal(size).astype(np.float32), np.ones(size, np.uint8)
    item = Volumes([pair(tmp_path, image, labels)], Reading(1, 3), padded)[0]
    assert item["pixel_values"].shape == (1, *padded)
    assert item["labels"].shape == tuple(padded)
    assert int(item["labels"].sum()) == labels.size  # whole, and the margins are background
    assert (item["pixel_values"][0][item["labels"] == 0] == item["pixel_values"].min()).all()
    logits = VolumeUNet(config)(item["pixel_values"][None]).logits
    assert logits.shape == (1, 3, *padded)


def test_image_and_labels_stay_together(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).integers(0, 3, (9, 20, 14)).astype(np.uint8)
    paths = pair(tmp_path, labels.astype(np.int16) * 10, labels)
    patches = Volumes([paths], Reading(1, 3), [12, 8, 8], patches=6, stream=3)
    seen = set()
    for index in range(6):
        item = patches[index]
        assert item["pixel_values"].shape == (1, 12, 8, 8)
        inside = item["labels"] > 0
        order = [item["pixel_values"][0][item["labels"] == label].unique() for label in (1, 2)]
        assert all(len(values) == 1 for values in order)
        assert order[0] < order[1]
        assert inside.any(dim=2).any(dim=1).sum() <= 9
        seen.add(tuple(item["labels"].flatten().tolist()))
        assert torch.equal(item["labels"], patches[index]["labels"])
    assert len(seen) > 1


@pytest.mark.parametrize("room", [0, 5000, 2**20])
def test_volumes_are_read_again_only_where_there_is_no_room(
    tmp_path: Path, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes 7 * 5 * 11 * (4 + 8) bytes, so that one of the two fits into 5,000."""
    pairs = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        pairs.append(pair(tmp_path / name, np.random.default_rng(1).normal(size=(7, 5, 11)), np.zeros((7, 5, 11))))

    read: list[Pair] = []
    own = volume_files.read_pair
    monkeypatch.setattr(volume_files, "KEPT", room)
    monkeypatch.setattr(volume_files, "read_pair", lambda each, how: read.append(each) or own(each, how))

    drawn = Volumes(pairs, Reading(1, 3), [4, 4, 4], patches=2, stream=5)
    samples = [drawn[index] for index in (*range(4), *range(4))]
    assert len(read) == {0: 8, 5000: 5, 2**20: 2}[room]
    for first, second in zip(samples[:4], samples[4:], strict=True):
        assert torch.equal(first["pixel_values"], second["pixel_values"])


def test_in_a_batch_volumes_are_in_the_middle_of_the_largest() -> None:
    sizes = [(3, 5, 7), (4, 2, 9)]
    samples = [
        {"pixel_values": 2 + torch.rand(2, *size), "labels": torch.ones(size, dtype=torch.uint8)} for size in sizes
    ]
    batch = batch_of(samples)
    assert batch["pixel_values"].shape == (2, 2, 4, 5, 9)
    for number, (size, sample) in enumerate(zip(sizes, samples, strict=True)):
        inside = batch["labels"][number] > 0
        assert torch.equal(batch["pixel_values"][number][:, inside].reshape(2, *size), sample["pixel_values"])
        assert (batch["pixel_values"][number][:, ~inside] == sample["pixel_values"].min()).all()


def test_axes_are_turned_and_channels_go_first(tmp_path: Path) -> None:
    image = np.random.default_rng(0).standard_normal((5, 6, 7, 2)).astype(np.float32)
    labels = (image[..., 0] > 1).astype(np.uint8)
    plain, turned = tmp_path / "plain", tmp_path / "turned"
    for folder, flip, affine in ((plain, 1, np.eye(4)), (turned, -1, np.diag([-1.0, 1, 1, 1]))):
        folder.mkdir()
        write(folder / "image.nii", image[::flip], affine)
        write(folder / "labels.nii", labels[::flip], affine)
    first, second = (
        Volumes([Pair(folder / "image.nii", folder / "labels.nii")], Reading(2, 3), [16, 16, 16])[0]
        for folder in (plain, turned)
    )
    assert first["pixel_values"].shape == (2, 16, 16, 16)
    assert torch.equal(first["pixel_values"], second["pixel_values"])
    assert torch.equal(first["labels"], second["labels"])


def test_few_volumes_drawn_by_the_seed(root: Path) -> None:
    drawn = {seed: load_data(task(root, train_size=3), seed) for seed in (0, 1, 2)}
    pairs = {seed: [pair.image.name for pair in data.train.pairs] for seed, data in drawn.items()}  # type: ignore[attr-defined]
    again = load_data(task(root, train_size=3), 1)
    assert [pair.image.name for pair in again.train.pairs] == pairs[1]  # type: ignore[attr-defined]
    assert len({tuple(sorted(names)) for names in pairs.values()}) > 1
    assert {len(set(names)) for names in pairs.values()} == {3}
    assert [len(drawn[2].split(name)) for name in ("validation", "test")] == [2, 3]  # type: ignore[arg-type]

    for size in (0, 7):
        with pytest.raises(ValueError, match=f"task.train_size is {size}, expected 1 to 6, the number of training vol"):
            load_data(task(root, train_size=size), 0)


def test_parts_of_the_sample(root: Path) -> None:
    data = load_data(task(root), 0)
    assert [len(data.split(name)) for name in ("train", "validation", "test")] == [6, 2, 3]  # type: ignore[arg-type]
    assert len({tuple(data.train[index]["labels"].shape) for index in range(6)}) == 1
    # What is measured keeps its size, up to what the strides divide.
    config = network_config(locate("sample:signals/unet3d"))
    for index, pair in enumerate(data.test.pairs):  # type: ignore[attr-defined]
        own = nibabel.load(pair.labels).shape
        assert list(data.test[index]["labels"].shape) == config.padded(own)
    shutil.rmtree(root / "labelsTs")  # as the Decathlon has it
    data = load_data(task(root, patch=[8, 8, 8], patches=3), 0)
    assert [len(data.split(name)) for name in ("train", "validation", "test")] == [15, 2, 1]  # type: ignore[arg-type]


def case(root: Path, index: int, kind: str = "images") -> Path:
    return root / f"{kind}Tr" / f"case_{index}.nii.gz"


def truncated(root: Path) -> str:
    whole = case(root, 1).read_bytes()
    case(root, 1).write_bytes(whole[: len(whole) // 2])
    return r"1 of 6 train volumes cannot be used: .*case_1\.nii\.gz: "


def no_nifti(root: Path) -> str:
    case(root, 1).write_bytes(b"not a volume")
    return r"1 of 6 train volumes cannot be used: .*case_1\.nii\.gz: case_1\.nii\.gz cannot be read"


def other_size(root: Path) -> str:
    write(case(root, 2, "labels"), np.zeros((4, 5, 6), np.uint8))
    return r"case_2\.nii\.gz: the image has size \(\d+, \d+, \d+\), its labels \(4, 5, 6\)"


def out_of_range(root: Path) -> str:
    voxels = np.asanyarray(nibabel.load(case(root, 3, "labels")).dataobj).copy()
    voxels[0, 0, 0] = 7
    write(case(root, 3, "labels"), voxels)
    return r"case_3\.nii\.gz: the labels have 7, expected whole numbers from 0 to 2"


def missing(root: Path) -> str:
    case(root, 0, "labels").unlink()
    return r"imagesTr/case_0\.nii\.gz: .*labelsTr/case_0\.nii\.gz"


def not_finite(root: Path) -> str:
    voxels = np.asanyarray(nibabel.load(case(root, 4)).dataobj).astype(np.float32)
    voxels[1, 1, 1:3] = np.nan
    write(case(root, 4), voxels)
    return r"case_4\.nii\.gz: 2 voxels are NaN or infinite"


def other_channels(root: Path) -> str:
    voxels = np.asanyarray(nibabel.load(case(root, 5)).dataobj)
    write(case(root, 5), np.stack([voxels, voxels], axis=-1))
    return r"case_5\.nii\.gz: the image has 2 channels, the network takes 1"


SPOILERS = [truncated, no_nifti, other_size, out_of_range, missing, not_finite, other_channels]


@pytest.mark.parametrize("spoil", SPOILERS)
def test_a_volume_that_cannot_be_used(root: Path, spoil: Any, capsys: pytest.CaptureFixture[str]) -> None:
    message = spoil(root)
    with pytest.raises(ValueError, match=message):
        load_data(task(root), 0)
    assert len(load_data(task(root, bad_data="skip"), 0).train) == 5  # type: ignore[arg-type]
    assert "left out: 1 of 6 train volumes" in capsys.readouterr().out


def test_no_volumes(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no volumes in imagesTr with labels of the same names in labelsTr"):
        load_data(task(tmp_path), 0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"strides": [2]}, r"task.strides \[2\] must be one fewer than task.channels"),
        ({"classes": 1}, "task.classes is 1, expected 2 to 256"),
        ({"patch": [8, 8]}, r"task.patch is \[8, 8\], expected three sizes"),
    ],
)
def test_settings_are_checked(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Task(**wrong)


def test_a_patch_that_the_strides_do_not_divide(root: Path) -> None:
    with pytest.raises(ValueError, match=r"task.patch is \[8, 9, 8\], .* is \[8, 12, 8\]"):
        load_data(task(root, patch=[8, 9, 8]), 0)


def test_a_random_network_is_made_once_and_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = Task(channels=[2, 4], strides=[2], res_units=0, classes=2)
    first = load_base(small)
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path / "other"))
    second = load_base(small)
    assert first.name_or_path != second.name_or_path
    again = AutoModel.from_pretrained(second.name_or_path)
    assert type(again) is VolumeUNet
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
        assert torch.equal(value, again.state_dict()[name])


def test_dice() -> None:
    truth = np.zeros((2, 1, 1, 4), np.int64)
    truth[0, 0, 0] = [0, 1, 1, 2]
    truth[1, 0, 0] = [0, 0, 1, 1]  # no class 2: it does not count
    predicted = np.array([[[[0, 1, 2, 2]]], [[[0, 0, 1, 1]]]])
    logits = torch.nn.functional.one_hot(torch.tensor(predicted), 3).movedim(-1, 1).float()
    scores = dice_of(logits, torch.tensor(truth, dtype=torch.uint8))
    np.testing.assert_allclose(scores, [[2 / 3, 2 / 3], [1, np.nan]], rtol=1e-6)
    assert compute_metrics(EvalPrediction(scores.numpy(), truth))["dice"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    nothing = np.full((2, 2), np.nan)
    assert compute_metrics(EvalPrediction(nothing, truth)) == {"dice": 0.0}
    missed = torch.nn.functional.one_hot(torch.zeros(2, 1, 1, 4, dtype=torch.long), 3).movedim(-1, 1)
    assert compute_metrics(EvalPrediction(dice_of(missed, torch.tensor(truth)).numpy(), truth)) == {"dice": 0.0}
