"""Writes the demo of ``make run`` from the hippocampus task: ``python -m benchmarks.quality.example --data FOLDER``.

The base network, which is trained unless it is there, and the first volumes of the pool, the validation and the test
set of ``hippocampus.py`` in the other contrast, as the recipe ``volume_segment`` reads them. To be small and quick,
they are cut to their middle, which holds 98 % of the hippocampus, and clipped and rounded to few levels, finer than the
noise.
"""

from __future__ import annotations

import argparse
import gzip
import shutil
from pathlib import Path

import nibabel
import numpy as np
from torch import Tensor

from benchmarks.quality.hippocampus import BASE, CLASSES, KNOWN, POOL, TEST, VALIDATION, Task, Volumes
from flora.data.volume_unet import VolumeUNet, VolumeUNetConfig
from flora.storage.cached_model import train_base

PARTS = {"Tr": POOL[:24], "Val": VALIDATION[:12], "Ts": TEST[:36]}
MIDDLE = (slice(4, 28), slice(None), slice(4, 28))  # of 32, 48 and 32 voxels
LEVELS = 10  # between the darkest and the brightest; task.intensity of the config


def write(path: Path, voxels: Tensor) -> None:
    """A NIfTI file of bytes; the same voxels give the same file."""
    image = nibabel.Nifti1Image(voxels.numpy().astype(np.uint8), np.eye(4))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(image.to_bytes(), 9, mtime=0))


def main() -> None:
    """Writes the volumes again, and the network if it is gone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the folder with hippocampus.npz")
    task = Task(parser.parse_args().data)

    train_base(
        BASE,
        lambda: VolumeUNet(VolumeUNetConfig(1, CLASSES, (8, 16, 32), (2, 2), res_units=1)),
        lambda: Volumes(task, KNOWN, shifted=False),
        "volumes as they are",
        num_train_epochs=20,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        warmup_steps=50,
        logging_steps=50,
    )

    for ending, indices in PARTS.items():
        for kind in ("images", "labels"):
            shutil.rmtree(BASE.parent / f"{kind}{ending}", ignore_errors=True)

        volumes = Volumes(task, indices, shifted=True)
        for index, volume, labels in zip(indices, volumes.volumes, volumes.labels, strict=True):
            name = f"volume_{index}.nii.gz"
            write(BASE.parent / f"images{ending}" / name, (volume[0][MIDDLE].clamp(0, 1) * LEVELS).round())
            write(BASE.parent / f"labels{ending}" / name, labels[MIDDLE])


if __name__ == "__main__":
    main()
