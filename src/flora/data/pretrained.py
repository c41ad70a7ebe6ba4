"""Base models and their processors, from a local folder or by hub id."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from flora.storage.progress import hidden_bars


def load_pretrained(kind: Any, where: str, **options: Any) -> Any:
    """``kind.from_pretrained(where)``, of a local folder or hub id.

    Raises:
        FileNotFoundError: there is nothing of this kind; says why.
    """
    try:
        # Only a download shows a progress bar.
        with hidden_bars() if Path(where).is_dir() else nullcontext():
            return kind.from_pretrained(where, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        remedy = ""

        if Path(where).is_dir() and any(word in kind.__name__ for word in ("Processor", "Extractor", "Tokenizer")):
            remedy = (
                f'; the folder needs the files that {kind.__name__}.from_pretrained("ORIGINAL MODEL")'
                f'.save_pretrained("{where}") writes'
            )

        if not Path(where).exists():
            remedy = "; it is not a local folder, and an id ORG/NAME needs access to the hub"

        raise FileNotFoundError(f"task.model is {where!r}: {kind.__name__} cannot load it ({reason}){remedy}") from None


def head_options(labels: Sequence[str]) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that give a model a head for these classes."""
    pairs = {"id2label": dict(enumerate(labels)), "label2id": {name: index for index, name in enumerate(labels)}}
    return {**pairs, "ignore_mismatched_sizes": True}
