"""What the tests of trust start from."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def _no_bytecode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders that are looked into hold what flora wrote, and no ``__pycache__`` of a recipe that was imported."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
