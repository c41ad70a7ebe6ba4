"""What a config says of one weight: its rank, its scale and its fold. The tuner and every reader of a file ask here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

from flora.errors import UserError, WrongTypeError
from flora.layers.patterns import Patterns
from flora.tucker.ranks import Ranks, check_rank, check_request

DEFAULT_RANK = 8
DEFAULT_KERNEL_RANK = 2
DEFAULT_SCALE = 1.0
# The fold that the shapes decide (``tucker/blocks.py``), instead of a table.
BLOCKS = "blocks"
# The largest number of float32.
LARGEST = 3.4e38


class Entries:
    """The fields of a config that speak of single weights, checked and ready to be asked.

    Args:
        config: ``r``, ``kernel_r``, ``scale``, ``alpha``, ``rank_pattern``, ``scale_pattern`` and ``fold``, as
            ``FloraConfig`` or the ``adapter_config.json`` of a file has them; what is missing has its default.

    Raises:
        UserError, WrongTypeError: a field has a value that cannot be used; the message names it.

    Examples:
        >>> entries = Entries({"r": 8, "alpha": 16, "rank_pattern": {"attn": 4}})
        >>> entries.scale(("layers.0.attn.out_proj.weight", "layers.0.attn.out_proj", "layers.0.attn"))
        4.0
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        check_entries(config)
        given = config.get("r")
        self.r: Ranks = DEFAULT_RANK if given is None else given
        self.kernel_r: int | None = config.get("kernel_r", DEFAULT_KERNEL_RANK)
        self.given_scale: float | None = config.get("scale")
        self.alpha: float | None = config.get("alpha")
        self.ranks: Patterns[Ranks] = Patterns(config.get("rank_pattern") or {}, "rank_pattern")
        self.scales: Patterns[float] = Patterns(config.get("scale_pattern") or {}, "scale_pattern")
        self.in_blocks = config.get("fold") == BLOCKS
        self.folds: Patterns[str] = Patterns({} if self.in_blocks else config.get("fold") or {}, "fold")

    def rank(self, names: Sequence[str]) -> Ranks:
        """The rank request for a weight: of ``rank_pattern``, else ``r``."""
        found = self.ranks.find(names)
        if found is None:
            return self.r
        return found.value

    def scale(self, names: Sequence[str]) -> float:
        """The constant s for a weight: of ``scale_pattern``, else ``alpha / rank``, else ``scale``, else 1.

        Raises:
            UserError: ``alpha`` is to be divided by a list of ranks.
        """
        # The closest word wins: of this weight, then alpha over its rank, then the scale of all.
        found = self.scales.find(names)
        if found is not None:
            return float(found.value)

        if self.alpha is None:
            if self.given_scale is None:
                return DEFAULT_SCALE
            return float(self.given_scale)

        rank = self.rank(names)
        if not isinstance(rank, int):
            raise UserError(f"alpha needs an int rank, but {names[-1]} has the ranks {list(rank)}; give scale")

        return self.alpha / rank

    def fold(self, names: Sequence[str]) -> str | None:
        """How a weight is seen as an N-d tensor, as far as the config says."""
        found = self.folds.find(names)
        if found is None:
            return None
        return found.value or None


def check_entries(config: Mapping[str, Any]) -> None:
    """Raises a UserError that names the field unless the values of the fields can be used."""
    if config.get("r") is not None:
        check_request(config["r"])
    if config.get("kernel_r") is not None:
        check_rank(config["kernel_r"], "kernel_r")

    for field in ("rank_pattern", "scale_pattern"):
        _check_table(config.get(field), field)

    _check_folds(config.get("fold"))

    for key, rank in (config.get("rank_pattern") or {}).items():
        check_request(rank, f"rank_pattern[{key!r}]")

    for key, scale in (config.get("scale_pattern") or {}).items():
        check_number(scale, f"scale_pattern[{key!r}]")

    _check_scale(config.get("scale"), config.get("alpha"))


def _check_scale(scale: object, alpha: object) -> None:
    for field, value in (("scale", scale), ("alpha", alpha)):
        if value is not None:
            check_number(value, field)

    if scale is not None and alpha is not None:
        raise UserError(
            f"scale={scale} and alpha={alpha} are both given; scale is the constant s itself, alpha sets s = alpha / "
            "r: give one of them"
        )


def check_number(value: object, field: str) -> None:
    """Raises unless ``value`` is a finite number that float32 can hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise WrongTypeError(f"{field} must be a number, got {value!r} of type {type(value).__name__}")
    # The size first: a whole number of any length is compared, but not asked whether it is finite.
    if abs(value) > LARGEST or not math.isfinite(value):
        raise UserError(f"{field} must be a finite number of at most {LARGEST:g}, got {value}")


def _check_folds(value: object) -> None:
    if value == BLOCKS:
        return

    _check_table(value, "fold", f", or be the word {BLOCKS!r}")
    for key, fold in (cast("Mapping[str, object]", value) or {}).items():
        if not isinstance(fold, str):
            raise WrongTypeError(f"fold[{key!r}] must be a text such as '(heads dim) in, heads=12', got {fold!r}")


def _check_table(value: object, field: str, other: str = "") -> None:
    if value is None:
        return
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise WrongTypeError(
            f"{field} must map names or regular expressions to values{other}, got {value!r} of type "
            f"{type(value).__name__}"
        )
