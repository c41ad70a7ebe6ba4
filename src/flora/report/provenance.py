"""Where a number comes from: machine, versions, source commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = ("flora-peft", "torch", "peft", "transformers", "accelerate", "scikit-learn")


def provenance() -> dict[str, object]:
    """Machine, device, package versions and, in a git checkout, the commit."""
    return {"machine": machine(), "versions": versions(), "commit": commit()}


def subject(recipe: str, task: object) -> str:
    """What is trained on which data: ``"vision_classify on photos"``; of a path only the last name.

    Args:
        recipe: Its name, or the path of its file.
        task: The settings of the data and the base model.
    """
    name = Path(recipe).stem
    given = [str(getattr(task, key)) for key in ("data", "name") if getattr(task, key, None)]
    if not given:
        return name

    if Path(given[0]).expanduser().exists():
        given[0] = Path(given[0]).name

    return f"{name} on {' '.join(given)}"


def machine() -> dict[str, object]:
    """The processor, its cores and the accelerator."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"

    return {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device,
    }


def versions() -> dict[str, str]:
    """The versions of the packages that a result depends on, of those installed."""
    installed = {name for name in PACKAGES if next(iter(metadata.distributions(name=name)), None)}
    return {name: metadata.version(name) for name in PACKAGES if name in installed}


def commit() -> str | None:
    """The commit of the checkout this package is run from; None outside of one, or without git."""
    folder = Path(__file__).resolve().parent

    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        tracked = subprocess.run(
            ["git", "-C", str(folder), "ls-files", "--error-unmatch", __file__], capture_output=True
        )
    except (OSError, subprocess.SubprocessError):
        return None

    if tracked.returncode != 0:
        return None

    return done.stdout.strip()
