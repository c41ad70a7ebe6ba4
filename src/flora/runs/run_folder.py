"""The output folder of a run: what is in it, who may write it, and how a run takes the place of another.

A first run works in the output folder itself. A run that replaces a finished one works in the sibling
``<output>.partial`` until it is complete, so that at any time the output is the old run or the new one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from flora.errors import UserError
from flora.storage.atomic import (
    PART,
    Claim,
    claim,
    clear_parts,
    put,
    read_json,
    staged_files,
    write_json,
    write_text,
)
from flora.storage.replacing import Kind, check_replaceable
from flora.storage.system import sync
from flora.storage.tensors import is_whole

CONFIG = "config.yaml"
# The names of the classes, where the base model's head was made new for them.
LABELS = "labels.json"
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
# Written last: a run that has it is finished.
METRICS = "metrics.json"
STATE = "trainer_state.json"
CARD = "README.md"
CURVE = "loss.png"
PAGE = "report.html"
PREDICTIONS = "predictions"
CHECKPOINTS = "checkpoint-*"

WEIGHTS = (ADAPTER, "model.safetensors", "model.safetensors.index.json")
TENSOR_FILES = (".safetensors", ".pt", ".pth")
CHECKPOINT_FILES = ("optimizer.pt", "scheduler.pt", STATE)
# A file in the folder of a claim. It says which folder is the old run while the new one takes its place.
REPLACED = "replaced"

# The names under which a tokenizer or processor is saved.
PROCESSOR = (
    "*token*", "*vocab*", "merges.txt", "normalizer.json", "*.model", "*processor_config.json", "chat_template*",
)  # fmt: skip
NAMES = (
    CONFIG, LABELS, ADAPTER, ADAPTER_CONFIG, METRICS, STATE, CARD, CHECKPOINTS, PAGE, "*.png", PREDICTIONS, "runs",
    PART, f".*{PART}", *PROCESSOR,
)  # fmt: skip
RUN = Kind("a run", lambda folder: (folder / CONFIG).is_file(), NAMES)


@dataclass(frozen=True)
class RunFolder:
    """An output folder, or the place of one that is not there yet.

    Args:
        path: of the folder.
    """

    path: Path

    @property
    def config(self) -> Path:
        """The file with the settings of the run."""
        return self.path / CONFIG

    @property
    def is_begun(self) -> bool:
        """Whether a run has begun here."""
        return self.config.is_file()

    @property
    def is_finished(self) -> bool:
        """Whether a run has ended here as it should."""
        return self.is_begun and (self.path / METRICS).is_file()

    @property
    def is_worth_keeping(self) -> bool:
        """Whether there is something of a run that a new start would lose: its results, or a checkpoint."""
        return self.is_begun and (self.is_finished or any(self.path.glob(CHECKPOINTS)))

    def labels(self) -> list[str] | None:
        """The names of the classes that the head was made for, or None."""
        path = self.path / LABELS
        return cast("list[str]", read_json(path)) if path.is_file() else None

    def metrics(self) -> dict[str, Any]:
        """What was measured at the end of training; empty where there is nothing yet."""
        path = self.path / METRICS
        return cast("dict[str, Any]", read_json(path)) if path.is_file() else {}

    def last_checkpoint(self) -> Path | None:
        """The newest complete ``checkpoint-*``, or None.

        The Trainer writes ``trainer_state.json`` last, so a checkpoint without a readable one was cut short; one whose
        removal was cut short lacks other files. Both are passed over.
        """
        found = [path for path in self.path.glob(CHECKPOINTS) if path.name.removeprefix("checkpoint-").isdecimal()]
        for path in sorted(found, key=lambda path: -int(path.name.removeprefix("checkpoint-"))):
            if _is_complete(path):
                return path
        return None

    def begin(self, config: str, labels: Sequence[str] | None, *, fresh: bool) -> None:
        """Writes what a run has from its start on; ``fresh`` removes what an earlier start has left."""
        if fresh and self.path.exists():
            shutil.rmtree(self.path)
        write_text(self.config, config)
        if labels is not None:
            write_json(self.path / LABELS, labels)

    @contextmanager
    def finish(self) -> Iterator[Path]:
        """A folder for the files of a finished run; they appear in this one when the block ends, the metrics last."""
        with staged_files(self.path, METRICS) as staged:
            yield staged

    def discard_start(self) -> None:
        """Removes a run that failed before it had anything worth keeping, so that the next start finds nothing."""
        if self.is_begun and not self.is_worth_keeping:
            shutil.rmtree(self.path, ignore_errors=True)


def _is_complete(checkpoint: Path) -> bool:
    if not all((checkpoint / name).is_file() for name in CHECKPOINT_FILES):
        return False
    if not any((checkpoint / name).is_file() for name in WEIGHTS) or not any(checkpoint.glob("rng_state*.pth")):
        return False

    try:
        state = read_json(checkpoint / STATE)
    except UserError:
        return False

    # A power cut may take the end of any file that was not on the disk yet.
    return (
        isinstance(state, dict)
        and "global_step" in state
        and all(is_whole(path) for path in checkpoint.iterdir() if path.suffix in TENSOR_FILES)
    )


def partial_of(output: Path) -> Path:
    """Where a run works that replaces the one in ``output``."""
    return output.with_name(f"{output.name}.partial")


def is_first_process() -> bool:
    """Whether this process is the only one of a run, or the first of several: it alone writes."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def claim_run(output: Path) -> Iterator[Claim | None]:
    """Claims an output folder for a run and completes what a killed run left half done; None in all but one process.

    Raises:
        UserError: another run is writing there.
    """
    if not is_first_process():
        yield None
        return

    with claim(output, keep=[REPLACED]) as place:
        _end_replacement(place)

        for folder in (place.target, partial_of(place.target)):
            if (folder / CONFIG).is_file():
                clear_parts(folder)

        yield place


def choose_folder(output: Path, *, resume: bool, overwrite: bool) -> RunFolder:
    """The folder that a run works in.

    Args:
        output: where its result goes.
        resume: the run continues one that was interrupted.
        overwrite: the run replaces what is there.

    Raises:
        UserError: something is there that must not be written to.
    """
    partial = partial_of(output)
    _check_ours(output)
    there, working = RunFolder(output), RunFolder(partial)

    if resume:
        if working.is_begun:
            return working
        return there

    occupied = [run for run in (there, working) if run.is_worth_keeping]
    if occupied and not overwrite:
        run = occupied[-1]
        state = "a finished run; " if run.is_finished else "a run that was cut short; --resume continues it, "
        raise UserError(f"{run.path} holds {state}--overwrite replaces it, output=FOLDER keeps it")

    # What goes is only what flora wrote.
    for run in (there, working):
        if run.is_begun:
            check_replaceable(run.path, run.path, RUN)

    if not there.is_worth_keeping:
        return there

    _check_ours(partial)

    return working


def _check_ours(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is not a folder; set output=FOLDER to another place")
    if not folder.is_dir() or (folder / CONFIG).is_file():
        return

    if any(not path.name.endswith(PART) for path in folder.iterdir()):
        raise UserError(
            f"{folder} is not an output folder of flora (it has no {CONFIG}); set output=FOLDER to another one"
        )


def take_place(run: RunFolder, place: Claim) -> None:
    """Puts a finished run in the place of its output, where it has worked elsewhere, and removes the one before.

    After an exchange the old run has the name of the new one. A note says which it is, for the case of a kill there.
    """
    partial = partial_of(place.target)
    if run.path.resolve() != partial:
        return

    note = place.folder / REPLACED

    if place.target.exists():
        note.write_text(_identity(place.target), encoding="utf-8")
        sync(note)
        sync(place.folder, deep=False)

    put(partial, place)
    _end_replacement(place)


def _end_replacement(place: Claim) -> None:
    """Removes the run that was replaced, where it has the name of the one that has replaced it."""
    note, partial = place.folder / REPLACED, partial_of(place.target)
    if note.is_file() and partial.is_dir() and _identity(partial) == note.read_text(encoding="utf-8"):
        shutil.rmtree(partial)
    note.unlink(missing_ok=True)


def _identity(folder: Path) -> str:
    """Of a folder, whatever its name: no other one has it while it exists."""
    found = folder.stat()
    return f"{found.st_dev} {found.st_ino}"
