"""The output folder of a run: what is in it."""

from __future__ import annotations

from pathlib import Path

from flora.storage.atomic import read_json

WEIGHTS = ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")
CHECKPOINT_FILES = ("optimizer.pt", "scheduler.pt", "trainer_state.json")


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete ``checkpoint-*`` of a run, or None.

    The Trainer writes ``trainer_state.json`` last, so a checkpoint without a readable one was cut short; one whose
    removal was cut short lacks other files. Both are passed over.
    """
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(found, key=lambda path: -int(path.name.removeprefix("checkpoint-"))):
        if _is_complete(path):
            return path
    return None


def _is_complete(checkpoint: Path) -> bool:
    if not all((checkpoint / name).is_file() for name in CHECKPOINT_FILES):
        return False
    if not any((checkpoint / name).is_file() for name in WEIGHTS) or not any(checkpoint.glob("rng_state*.pth")):
        return False
    try:
        return "global_step" in read_json(checkpoint / "trainer_state.json")
    except ValueError:
        return False
