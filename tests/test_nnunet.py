"""nnU-Net v2, by its own commands: a network is trained, and a trainer of ours adapts it; skipped without nnunetv2."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

import flora

pytest.importorskip("nnunetv2", reason="nnunetv2 is not installed: pip install nnunetv2")
pytestmark = pytest.mark.slow

COMMANDS = {  # the console scripts of nnU-Net
    "nnUNetv2_plan_and_preprocess": "experiment_planning.plan_and_preprocess_entrypoints:plan_and_preprocess_entry",
    "nnUNetv2_train": "run.run_training:run_training_entry",
    "nnUNetv2_predict": "inference.predict_from_raw_data:predict_entry_point",
}
PAGE = Path(__file__).parents[1] / "docs" / "volumes.md"
SHORT = """
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class Short:
    def initialize(self):
        self.num_iterations_per_epoch, self.num_val_iterations_per_epoch, self.num_epochs = 2, 1, 1
        super().initialize()


class nnUNetTrainerPlain(Short, nnUNetTrainer):
    pass


class nnUNetTrainerShort(Short, nnUNetTrainerMine):
    epochs = 1


class nnUNetTrainerNothing(FloraTrainer):
    pass
"""


def trainers(pretrained: Path) -> str:
    """The file that the page shows, with our own path, and the same trainer with few steps."""
    shown = PAGE.read_text(encoding="utf-8").partition("<<'END'\n")[2].partition("END\n")[0]
    return re.sub('pretrained = ".*"', f'pretrained = "{pretrained}"', shown) + SHORT


FIRST, SECOND = "Dataset001_Balls", "Dataset002_Balls"
FOLDERS = {1: FIRST, 2: SECOND}


def write_data(raw: Path) -> None:
    """A data set in nnU-Net's format: balls in two shells, in noise."""
    random = np.random.default_rng(1)
    for part in ("imagesTr", "labelsTr", "imagesTs"):
        (raw / FIRST / part).mkdir(parents=True)

    for index in range(6):
        size = tuple(int(length) for length in random.integers(17, 24, 3))
        place = np.indices(size).T - random.uniform(7, 11, 3)
        labels = np.zeros(size, np.uint8)
        for label in (1, 2):
            labels[((place**2).sum(-1) < 36 / label).T] = label

        image = (100 * labels + 10 * random.standard_normal(size)).astype(np.float32)
        part = "imagesTr" if index < 5 else "imagesTs"
        nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), raw / FIRST / part / f"ball_{index}_0000.nii.gz")
        if index < 5:
            nibabel.save(nibabel.Nifti1Image(labels, np.eye(4)), raw / FIRST / "labelsTr" / f"ball_{index}.nii.gz")

    names = {"background": 0, "outside": 1, "inside": 2}
    told = {"channel_names": {"0": "noNorm"}, "labels": names, "numTraining": 5, "file_ending": ".nii.gz"}
    (raw / FIRST / "dataset.json").write_text(json.dumps(told))


def shrink(preprocessed: Path) -> None:
    """A network of few channels, so that a step takes no time."""
    path = preprocessed / FIRST / "nnUNetPlans.json"
    plans = json.loads(path.read_text())
    plan = plans["configurations"]["3d_fullres"]
    arguments = plan["architecture"]["arch_kwargs"]
    plan["patch_size"], plan["batch_size"] = [16, 16, 16], 2
    arguments.update(n_stages=3, features_per_stage=[3, 5, 7], strides=[[1, 1, 1], [2, 2, 2], [2, 2, 2]])
    arguments.update(kernel_sizes=[[3, 3, 3]] * 3, n_conv_per_stage=[1, 1, 1], n_conv_per_stage_decoder=[1, 1])
    path.write_text(json.dumps(plans))


def add_a_class(root: Path) -> None:
    """The same data as a second data set, which has one class more."""
    for part in ("raw", "preprocessed"):
        folder = Path(shutil.copytree(root / part / FIRST, root / part / SECOND))
        told = json.loads((folder / "dataset.json").read_text())
        told["labels"]["never"] = 3
        (folder / "dataset.json").write_text(json.dumps(told))
        for path in folder.glob("nnUNetPlans.json"):
            path.write_text(path.read_text().replace(FIRST, SECOND))


class Workplace:
    """The folders of nnU-Net and its commands in them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        names = {"nnUNet_raw": "raw", "nnUNet_preprocessed": "preprocessed", "nnUNet_results": "results"}
        places = {name: str(root / folder) for name, folder in names.items()}
        few = {"nnUNet_def_n_proc": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        self.environment = {**os.environ, **places, **few, "nnUNet_extTrainer": str(root / "trainers")}

    def run(self, command: str, *arguments: str | Path, fails: bool = False) -> str:
        module, _, name = COMMANDS[command].partition(":")
        source = f"import sys; from nnunetv2.{module} import {name}; sys.argv[0] = {command!r}; {name}()"
        done = subprocess.run(
            [sys.executable, "-c", source, *map(str, arguments)],
            env=self.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=1500,
        )  # fmt: skip
        assert (done.returncode != 0) == fails, done.stdout[-3000:]
        return done.stdout

    def results(self, number: int, trainer: str) -> Path:
        return self.root / "results" / FOLDERS[number] / f"{trainer}__nnUNetPlans__3d_fullres" / "fold_0"

    def train(self, number: int, trainer: str, *more: str, fails: bool = False) -> str:
        # Batches are made in the process itself.
        self.environment["nnUNet_n_proc_DA"] = "0"
        return self.run(
            "nnUNetv2_train", str(number), "3d_fullres", "0", "-tr", trainer, "-device", "cpu", *more, fails=fails
        )


def test_a_trained_network_is_adapted_predicted_and_continued(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    (tmp_path / "trainers").mkdir()
    base = place.results(1, "nnUNetTrainerPlain") / "checkpoint_final.pth"
    (tmp_path / "trainers" / "mine.py").write_text(trainers(base))
    write_data(tmp_path / "raw")
    place.run("nnUNetv2_plan_and_preprocess", "-d", "1", "-c", "3d_fullres", "-np", "1", "-npfp", "1")
    shrink(tmp_path / "preprocessed")
    add_a_class(tmp_path)

    assert "nnUNetTrainerNothing.pretrained is not set" in place.train(1, "nnUNetTrainerNothing", fails=True)
    assert "there is no such file" in place.train(1, "nnUNetTrainerShort", fails=True)
    place.train(1, "nnUNetTrainerPlain")

    # The same classes: all layers come from the checkpoint.
    told = place.train(1, "nnUNetTrainerShort")
    assert re.search(r"FLoRA trains [\d,]+ numbers on .*checkpoint_final.pth", told)
    assert "start at random" not in told
    folder = place.results(1, "nnUNetTrainerShort")
    before = torch.load(base, weights_only=False)["network_weights"]
    after = torch.load(folder / "checkpoint_final.pth", weights_only=False)["network_weights"]
    adapter = flora.load(folder / "checkpoint_final_adapter")
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    changes = {name: entry.dense() for name, entry in adapter.weights.items()}
    for name, change in changes.items():
        torch.testing.assert_close(after[name] - before[name], change, atol=1e-6, rtol=0)

    # Every other name is a second one of a layer that has one adapter.
    moved = {name for name, change in changes.items() if change.abs().max() > 0}
    assert len(moved) > 5
    assert len(changed) > len(moved)
    assert {after[key].data_ptr() for key in changed} == {after[name].data_ptr() for name in moved}

    # Other classes: the output layers are new.
    assert "start at random" in place.train(2, "nnUNetTrainerShort")
    for number in (1, 2):
        images = tmp_path / "raw" / FOLDERS[number] / "imagesTs"
        out = tmp_path / f"predicted{number}"
        common = ["-d", str(number), "-c", "3d_fullres", "-f", "0", "-tr", "nnUNetTrainerShort", "-device", "cpu"]
        place.run("nnUNetv2_predict", "-i", images, "-o", out, *common, "--disable_tta", "-npp", "1", "-nps", "1")
        given = nibabel.load(images / "ball_5_0000.nii.gz")
        assert nibabel.load(out / "ball_5.nii.gz").shape == given.shape

    # Stopped before its end, it continues.
    (folder / "checkpoint_final.pth").rename(folder / "checkpoint_latest.pth")
    (folder / "checkpoint_final_adapter").rename(folder / "checkpoint_latest_adapter")
    source = tmp_path / "trainers" / "mine.py"
    source.write_text(source.read_text().replace("epochs = 1\n", "epochs = 2\n"))
    assert "Epoch 1" in place.train(1, "nnUNetTrainerShort", "--c")
    again = torch.load(folder / "checkpoint_final.pth", weights_only=False)["network_weights"]
    assert any(not torch.equal(again[key], after[key]) for key in after)
