"""What other packages print and warn while they are imported or adapted, silenced: the numbers are what is read."""

from __future__ import annotations

import logging
import os
import warnings


def settle() -> None:
    """Called once, before the packages are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
