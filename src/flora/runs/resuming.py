"""Whether a run may resume with settings other than those it began with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from flora.errors import UserError
from flora.runs.run_folder import RunFolder
from flora.runs.settings import Settings, read

LENGTH = ("num_train_epochs", "max_steps")
# Settings of the Trainer that do not change what is learnt. Others would be ignored, since optimiser and schedule come
# from the checkpoint, or would mix two runs.
FREE = (
    *LENGTH,
    "disable_tqdm",
    "log",
    "save_",
    "report_to",
    "run_name",
    "project",
    "trackio",
    "push_to_hub",
    "hub_",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
    "skip_memory_metrics",
    "per_device_eval_batch_size",
    "use_cpu",
)


def check_same(run: RunFolder, settings: Settings) -> None:
    """Checks that a run resumes with the settings that it began with.

    Raises:
        UserError: one that matters differs; names it, with both values.
    """
    before, now = read(str(run.config)).as_dict(), settings.as_dict()
    for key, old, new in _differences(before, now):
        group, _, name = key.partition(".")
        if group in ("output", "compare") or (group == "training" and name.startswith(FREE)):
            continue

        raise UserError(
            f"--resume with another {key}: {run.path} was started with {old!r}, and now it is {new!r}; resume with the "
            "settings of the run, or give another output=FOLDER"
        )

    if run.is_finished and _further(run, before["training"], now["training"]) < 0:
        raise UserError(
            f"{run.path} is a finished run of {_length(before['training'])}, and {_length(now['training'])} are "
            "requested; give a larger number to continue the training, or another output=FOLDER"
        )


def is_done(run: RunFolder, settings: Settings) -> bool:
    """Whether a run is finished and nothing is left to train."""
    return run.is_finished and _further(run, read(str(run.config)).training, settings.training) <= 0


def _differences(before: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Each setting that differs, with both values."""
    if not (isinstance(before, Mapping) and isinstance(now, Mapping)):
        if before != now:
            yield key, before, now
        return
    for name in dict.fromkeys([*before, *now]):
        yield from _differences(before.get(name), now.get(name), f"{key}.{name}" if key else str(name))


def _further(run: RunFolder, before: Mapping[str, Any], now: Mapping[str, Any]) -> float:
    """How many more steps, or epochs, the settings request than the finished run has trained."""
    steps = _number(now, "max_steps")
    if steps > 0:
        return steps - float(run.metrics().get("steps", 0))
    return _number(now, "num_train_epochs") - _number(before, "num_train_epochs")


def _number(training: Mapping[str, Any], name: str) -> float:
    """The epochs, or steps, that are requested; those of the Trainer where none are given."""
    default = 3.0 if name == "num_train_epochs" else -1
    return float(training.get(name) or default)


def _length(training: Mapping[str, Any]) -> str:
    if _number(training, "max_steps") > 0:
        return f"{training['max_steps']} steps"
    return f"{_number(training, 'num_train_epochs'):g} epochs"
