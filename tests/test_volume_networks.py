"""Networks of MONAI by name: built, saved and loaded, weights that fit or not, bundles, spacing, and a whole run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import monai.networks.nets
import nibabel
import numpy as np
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import save_file

import flora
from flora.data.samples import locate
from flora.data.volume_files import (
    Pair,
    Reading,
    Volumes,
    normalised,
    read_file,
    read_pair,
    resampled,
    turned,
    write_classes,
)
from flora.data.volume_network import VolumeNetwork, VolumeNetworkConfig, check_network, levels, load_weights
from flora.recipes.volume_segment import Task, load_base, load_data, notes
from flora.runs.evaluating import evaluate
from flora.runs.merging import merge
from flora.runs.predicting import predict
from flora.runs.settings import read
from flora.runs.training import train

DYN = {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2], "filters": [3, 5, 7]}
DEEP = {**DYN, "deep_supervision": True, "deep_supr_num": 1}
NETWORKS: list[tuple[str, dict[str, Any]]] = [
    ("UNet", {"channels": [3, 5], "strides": [2]}),
    ("AttentionUnet", {"channels": [3, 5], "strides": [2]}),
    ("DynUNet", DYN),
    ("DynUNet", DEEP),
    ("SegResNet", {"init_filters": 4, "norm": ["GROUP", {"num_groups": 2}], "blocks_down": [1, 1], "blocks_up": [1]}),
    ("UNETR", {"feature_size": 2, "hidden_size": 12, "mlp_dim": 8, "num_heads": 2}),
]
PATCH = [16, 16, 16]


def config_of(name: str, arguments: dict[str, Any], **changes: Any) -> VolumeNetworkConfig:
    return VolumeNetworkConfig(name, arguments, **{"num_channels": 2, "classes": 3, "patch": PATCH, **changes})


def write(path: Path, voxels: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4) if affine is None else affine), path)
    return path


@pytest.mark.parametrize(("name", "arguments"), NETWORKS)
def test_saved_and_loaded_it_computes_what_the_plain_network_computes(
    name: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    config = config_of(name, arguments)
    check_network(config)
    torch.manual_seed(3)
    model = VolumeNetwork(config).eval()
    model.save_pretrained(tmp_path)
    again = VolumeNetwork.from_pretrained(tmp_path).eval()
    plain = getattr(monai.networks.nets, name)(**{**model_arguments(name), **arguments}).eval()
    plain.load_state_dict(model.network.state_dict())
    image = torch.randn(1, 2, *PATCH)

    with torch.no_grad():
        expected = levels(plain(image))[0]
        torch.testing.assert_close(model(image).logits, expected)
        torch.testing.assert_close(again(image).logits, expected)
        assert again(torch.randn(1, 2, 19, 7, 17)).logits.shape == (1, 3, 19, 7, 17)

    again.train()(image, torch.randint(0, 3, (1, *PATCH))).loss.backward()
    assert any(weight.grad.abs().sum() > 0 for weight in again.parameters() if weight.grad is not None)


def model_arguments(name: str) -> dict[str, Any]:
    given: dict[str, Any] = {"spatial_dims": 3, "in_channels": 2, "out_channels": 3}
    if name == "UNETR":
        given["img_size"] = PATCH
    return given


@pytest.mark.slow
def test_a_network_that_computes_its_constants_when_it_is_built(tmp_path: Path) -> None:
    # Of a smaller patch one voxel is left at the coarsest level, which its norms refuse in training.
    patch = [64, 32, 32]
    config = config_of("SwinUNETR", {"feature_size": 12}, patch=patch)
    check_network(config)
    model = VolumeNetwork(config).eval()
    model.save_pretrained(tmp_path)
    image = torch.randn(1, 2, *patch)
    with torch.no_grad():
        assert torch.equal(VolumeNetwork.from_pretrained(tmp_path).eval()(image).logits, model(image).logits)

    model.train()(image, torch.randint(0, 3, (1, *patch))).loss.backward()
    assert all(weight.grad is not None for weight in model.network.parameters())


def test_a_layer_with_two_names_has_one_adapter(tmp_path: Path) -> None:
    network = VolumeNetwork(config_of("DynUNet", DYN))
    layers = [each for each in network.modules() if isinstance(each, (torch.nn.Conv3d, torch.nn.ConvTranspose3d))]
    assert len(network.second_names) > 4
    config = flora.FloraConfig(r=2, target_modules="all", exclude_modules=".*output_block.*")
    get_peft_model(network, config).save_pretrained(tmp_path)
    stored = flora.load(tmp_path).weights
    assert not [name for name in stored if "skip_layers" in name]
    assert len(stored) == len(layers) - 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": "DynUnett"}, r"task.network is 'DynUnett', .* did you mean 'DynUNet'"),
        ({"network": "os.system"}, r"task.network is 'os.system', expected a segmentation network of monai"),
        ({"network": "DenseNet121x", "network_args": {}}, "did you mean 'DenseNet121'"),
        ({"network_args": {"filters": 3}}, r"MONAI's UNet does not take task.network_args \(its arguments: .*channels"),
        ({"network_args": {"channels": [4, 8], "strides": [2], "spatial_dims": 2}}, "spatial_dims=2, but a volume"),
        ({"network_args": {"channels": [4, 8], "strides": [2], "out_channels": 5}}, "out_channels=5, but task.classes"),
        ({"network_args": {"channels": [4], "strides": [2]}}, "MONAI's UNet does not take task.network_args"),
        ({"patch": [9, 8, 8]}, r"MONAI's UNet gives .*10, 8, 8.*expected \(2, 3, 9, 8, 8\)"),
        ({"patch": [2, 2, 2]}, r"MONAI's UNet does not take task.patch=\[2, 2, 2\]: Expected more than 1 spatial"),
        ({"patch": None}, r"task.network needs task.patch"),
        (
            {"network": "DenseNet", "network_args": {}, "patch": [64, 64, 64]},
            "gives .*, expected .*one number for each",
        ),
        ({"weights": "nowhere.pt"}, "task.weights is 'nowhere.pt': no such file"),
        ({"network": None}, "task.network_args, task.weights and task.new_layers belong to task.network"),
        ({"spacing": [1, 0, 1]}, "task.spacing is"),
        ({"orientation": "RAX"}, "task.orientation is 'RAX'"),
        ({"orientation": "RLS"}, "task.orientation is 'RLS'"),
        ({"intensity": [3, 3]}, "task.intensity is"),
        ({"foreground": 2}, "task.foreground is 2"),
    ],
)
def test_what_cannot_be_used_is_named(changes: dict[str, Any], message: str) -> None:
    given = {"network": "UNet", "network_args": {"channels": [4, 8], "strides": [2]}, "patch": [8, 8, 8], **changes}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_base(Task(**given))


UNET: dict[str, Any] = {"network": "UNet", "network_args": {"channels": [3, 5], "strides": [2]}, "patch": [8, 8, 8]}


def plain_unet(classes: int = 3) -> torch.nn.Module:
    torch.manual_seed(11)
    return monai.networks.nets.UNet(3, 1, classes, [3, 5], [2])


@pytest.mark.parametrize("kind", ["safetensors", "torch", "nested", "prefixed"])
def test_weights_of_a_file(kind: str, tmp_path: Path) -> None:
    weights = plain_unet().state_dict()
    path = tmp_path / f"weights.{'safetensors' if kind == 'safetensors' else 'pt'}"
    if kind == "safetensors":
        save_file(weights, path)
    elif kind == "prefixed":
        torch.save({"state_dict": {f"module.{key}": value for key, value in weights.items()}, "epoch": 3}, path)
    else:
        torch.save({"model": weights} if kind == "nested" else weights, path)
    found = load_base(Task(**UNET, weights=str(path))).network.state_dict()
    assert all(torch.equal(found[key], value) for key, value in weights.items())


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    torch.save(plain_unet(classes=5).state_dict(), tmp_path / "five.pt")
    with pytest.raises(ValueError, match=r"2 of another shape \(model.2.*for.*task.new_layers"):
        load_base(Task(**UNET, weights=str(tmp_path / "five.pt")))
    found = load_base(Task(**UNET, weights=str(tmp_path / "five.pt"), new_layers=["model.2"])).network.state_dict()
    same = {key for key, value in plain_unet(5).state_dict().items() if value.equal(found[key])}
    assert same == {key for key in found if not key.startswith("model.2.")}

    weights = plain_unet().state_dict()
    first = next(iter(weights))
    torch.save({("other" if key == first else key): value for key, value in weights.items()}, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=rf"1 missing in the file \({first}\); 1 not in the network \(other\)"):
        load_base(Task(**UNET, weights=str(tmp_path / "odd.pt")))
    with pytest.raises(ValueError, match="task.new_layers has 'head', which no weight"):
        load_base(Task(**UNET, weights=str(tmp_path / "five.pt"), new_layers=["head"]))

    torch.save({"model": weights, "run": print}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match="nothing in it was run"):
        load_base(Task(**UNET, weights=str(tmp_path / "code.pt")))


def test_a_layer_with_two_names_may_be_stored_once(tmp_path: Path) -> None:
    config = config_of("DynUNet", DYN)
    torch.manual_seed(5)
    source, target = VolumeNetwork(config).network, VolumeNetwork(config).network
    save_file(dict(source.named_parameters()), tmp_path / "once.safetensors")
    load_weights(target, tmp_path / "once.safetensors")
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in target.state_dict().items())


def bundle(folder: Path, definition: Any) -> Path:
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    (folder / "configs" / "inference.json").write_text(json.dumps({"network_def": definition}))
    torch.save(plain_unet().state_dict(), folder / "models" / "model.pt")
    return folder


def test_a_bundle(tmp_path: Path) -> None:
    plain = {"_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 3, "channels": [3, 5]}
    folder = bundle(tmp_path / "one", {**plain, "strides": [2]})
    changes = [f"task.network={folder}", "task.patch=[8, 8, 8]", "task.classes=3"]
    task = read("volume_segment-monai", changes).task
    base = load_base(task)
    assert not notes(task)
    (folder / "models" / "model.pt").unlink()
    for untrained in (task, Task(), Task(network="SegResNet", patch=PATCH)):
        assert "starts at random" in notes(untrained)[0]
    assert not notes(Task(network="SegResNet", patch=PATCH, weights="net.pt"))

    assert all(torch.equal(base.network.state_dict()[key], value) for key, value in plain_unet().state_dict().items())

    for number, (change, message) in enumerate(
        [
            ({"strides": "$[2]"}, r"network_def has strides='\$\[2\]', which MONAI would run"),
            ({"strides": ["@stride"]}, "network_def has strides=.*flora runs nothing of a bundle"),
            ({"act": {"_target_": "os.system"}}, "network_def has act=.*flora runs nothing of a bundle"),
            ({"_requires_": "$import os"}, "network_def has _requires_=.*flora runs nothing"),
            ({"_target_": "os.system"}, "the network is os.system, which is not part of monai.networks.nets"),
            ({"_target_": "monai.networks.netsx.UNet"}, "is not part of monai.networks.nets"),
            ({"_target_": 3}, "has no network_def with a _target_"),
        ]
    ):
        odd = bundle(tmp_path / str(number), {**plain, "strides": [2], **change})
        with pytest.raises(ValueError, match=message):
            load_base(Task(network=str(odd), patch=[8, 8, 8]))

    with pytest.raises(FileNotFoundError, match="has none of .*configs/inference.json"):
        load_base(Task(network=f"{tmp_path}/nothing", patch=[8, 8, 8]))


# ---- volumes ---------------------------------------------------------------------------------------------------------


def test_intensities_between_two_values(tmp_path: Path) -> None:
    path = write(tmp_path / "scan.nii", np.array([[[-300, -100, 0, 100, 900]]], np.int16))
    found = normalised(read_file(path), Reading(1, 2, intensity=[-100, 100]))
    torch.testing.assert_close(found.flatten(), torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))


def test_resampled_to_a_spacing_and_back_on_the_grid_of_the_file(tmp_path: Path) -> None:
    size = (11, 14, 9)
    place = np.indices(size).astype(np.float32)
    labels = (sum((axis - length / 2) ** 2 for axis, length in zip(place, size, strict=True)) < 14).astype(np.uint8)
    affine = np.array([[0, -2.0, 0, 5], [1.5, 0, 0, -7], [0, 0, -3, 11], [0, 0, 0, 1]])
    pair = Pair(write(tmp_path / "i.nii", labels * 100.0, affine), write(tmp_path / "l.nii", labels, affine))
    reading = Reading(1, 2, orientation="LPS", spacing=[1, 1, 1.5], intensity=[0, 100])
    image, classes = read_pair(pair, reading)

    # Voxels of 1.5 x 2 x 3 mm, the first two axes exchanged: (14 x 2, 11 x 1.5, 9 x 3) mm.
    assert image.shape[1:] == classes.shape
    assert all(abs(got - wanted) <= 1 for got, wanted in zip(classes.shape, (27, 16, 17), strict=True))
    volume = labels.sum() * 1.5 * 2 * 3
    assert float(classes.sum()) * 1.5 == pytest.approx(volume, rel=0.15)

    upright = turned(read_file(pair.image), reading)
    grid = resampled(upright, reading)
    logits = torch.cat([0.5 - image, image - 0.5])
    write_classes(logits, upright, grid, pair.image, tmp_path / "mask.nii.gz")
    mask = nibabel.load(tmp_path / "mask.nii.gz")
    np.testing.assert_allclose(mask.affine, affine)
    found = np.asanyarray(mask.dataobj)
    assert found.shape == size
    assert (found != labels).mean() < 0.03
    assert 2 * (found * labels).sum() / (found.sum() + labels.sum()) > 0.85


def test_labels_on_another_grid_are_not_resampled(tmp_path: Path) -> None:
    voxels = np.zeros((5, 6, 7), np.uint8)
    pair = Pair(write(tmp_path / "i.nii", voxels), write(tmp_path / "l.nii", voxels, np.diag([1.0, 1, 2, 1])))
    with pytest.raises(ValueError, match="the image and its labels lie on different grids"):
        read_pair(pair, Reading(1, 2, spacing=[1, 1, 1]))


def test_patches_on_the_foreground(tmp_path: Path) -> None:
    labels = np.zeros((30, 31, 29), np.uint8)
    labels[25, 4, 17] = 1
    pair = Pair(write(tmp_path / "i.nii", labels * 1000.0), write(tmp_path / "l.nii", labels))
    drawn = Volumes([pair], Reading(1, 2), [5, 7, 3], patches=9, stream=2, foreground=1)
    for index in range(9):
        item = drawn[index]
        assert item["pixel_values"].shape == (1, 5, 7, 3)
        assert int(item["labels"].sum()) == 1
        assert torch.equal(item["pixel_values"][0] > 1, item["labels"] > 0)
        assert torch.equal(item["pixel_values"], drawn[index]["pixel_values"])


# ---- a whole run -----------------------------------------------------------------------------------------------------


def test_trained_measured_predicted_and_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path / "cache"))
    data = shutil.copytree(locate("sample:signals/volumes"), tmp_path / "volumes")
    torch.manual_seed(7)
    kept = monai.networks.nets.DynUNet(3, 1, 3, **DEEP)
    torch.save({"network_weights": kept.state_dict()}, tmp_path / "dyn.pth")
    items = {
        "output": tmp_path / "run",
        "task.model": "null",
        "task.network": "DynUNet",
        "task.network_args": json.dumps(DEEP),
        "task.weights": tmp_path / "dyn.pth",
        "task.data": data,
        "task.patch": "[8, 8, 8]",
        "task.spacing": "[1.5, 1.5, 1.5]",
        "task.foreground": 0.5,
        "training.max_steps": 2,
        "training.disable_tqdm": "true",
    }
    metrics = train(read("volume_segment-tiny", [f"{key}={value}" for key, value in items.items()]))
    found, same, _ = evaluate(tmp_path / "run")
    assert same is True
    assert found == pytest.approx(metrics["test"], rel=1e-6)

    # The base is made again from the config where the cache was cleared.
    shutil.rmtree(tmp_path / "cache")
    scan = next((data / "imagesTs").glob("*.nii.gz"))
    (result,) = predict(tmp_path / "run", [str(scan)])
    merged = merge(tmp_path / "run", tmp_path / "merged")
    assert merged.difference is not None

    model = VolumeNetwork.from_pretrained(tmp_path / "merged").eval()
    reading = Reading(1, 3, spacing=[1.5, 1.5, 1.5])
    upright = turned(read_file(scan), reading)
    grid = resampled(upright, reading)
    with torch.no_grad():
        logits = model(normalised(grid, reading)[None]).logits[0]
    write_classes(logits, upright, grid, scan, tmp_path / "again.nii.gz")
    first, second = (np.asanyarray(nibabel.load(path).dataobj) for path in (result["file"], tmp_path / "again.nii.gz"))
    assert (first == second).mean() > 0.999

    again = load_data(Task(model=str(tmp_path / "merged"), data=str(data)), 0)
    assert again.train[0]["labels"].shape == (8, 8, 8)
