"""An extraction into an output folder. Run again, an interrupted one continues where it stopped."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from flora.convert import Report, save
from flora.convert.extraction.finetune import Extracted, extract
from flora.errors import UserError
from flora.storage.atomic import check_target, claim
from flora.storage.replacing import ADAPTER

# The finished layers, in the hidden folder beside the output.
LAYERS = "layers"


class Written(NamedTuple):
    """An extraction, and the report of writing it."""

    found: Extracted
    report: Report


def extract_to(base: str | Path, tuned: str | Path, out: Path, *, overwrite: bool = False, **options: Any) -> Written:
    """Extracts an adapter and saves it.

    Args:
        base: the base model.
        tuned: the fine-tuned model.
        out: the folder to write.
        overwrite: replaces an adapter that is there.
        options: of :func:`flora.extract`.

    Raises:
        FileExistsError: ``out`` exists.
        UserError: ``out`` must not be replaced, or as :func:`flora.extract` raises.
        OSError: it cannot be written; the finished layers stay beside the output.
    """
    check_target(out, ADAPTER, overwrite=overwrite, sources=[base, tuned])

    with claim(out, keep=[LAYERS]) as place:
        layers = place.folder / LAYERS
        resumed = layers.exists()

        try:
            found = extract(base, tuned, work=layers, **options)
        except UserError:
            # The request or the models are at fault: there is nothing to continue.
            if not resumed:
                shutil.rmtree(layers, ignore_errors=True)

            raise

        report = save(found, out, overwrite=overwrite)

    return Written(found, replace(report, claim="the file holds what was extracted"))
