"""Every axis name of a weight and its role in what the layer computes: the only such table.

The role decides how an adapter starts (what the layer sums over starts with columns of length 1) and which modes get
``kernel_r`` instead of ``r``. Shapes and names alone never decide it.
"""

from __future__ import annotations

from collections.abc import Sequence

from flora.tucker.fold import Fold
from flora.tucker.ranks import Role

# The kernel axes of a convolution, by the number of its dimensions.
KERNELS: dict[int, tuple[str, ...]] = {1: ("kw",), 2: ("kh", "kw"), 3: ("kd", "kh", "kw")}

ROLES: dict[str, Role] = {
    # One output for each entry.
    "out": "output",
    "gates": "output",
    "dim": "output",
    "channels": "output",
    # The product of the layer sums over them.
    "in": "summed",
    "in1": "summed",
    "in2": "summed",
    "hidden": "summed",
    # Summed over as well, and small: one entry for each position under a convolution's kernel.
    "kd": "kernel",
    "kh": "kernel",
    "kw": "kernel",
    # One entry is chosen and the others take no part: a token's row, an expert's matrix.
    "vocab": "stack",
    "expert": "stack",
}


def roles_of(axes: Sequence[str], fold: Fold | None = None) -> tuple[Role, ...]:
    """The role of each axis of a stored weight, or of each axis that its fold makes of them.

    A folded axis has the role of the stored axis it is a part of, whatever it is called: in ``"(gates hidden) input"``
    of an LSTM, ``hidden`` is a part of the outputs. Only ``kernel`` goes by the name: a part of a summed axis called
    kd, kh or kw is a kernel mode, and any other part of one is not.

    Args:
        axes: the names of the stored dimensions. A name that the table does not know (``d0``) says nothing; its axis
            is taken for an output.
        fold: how the weight is seen as an N-d tensor.

    Examples:
        >>> from flora.tucker.fold import parse_fold
        >>> roles_of(("gates", "in"), parse_fold("(gates hidden) input, gates=4", (20, 7)))
        ('output', 'output', 'summed')
    """
    stored = tuple(ROLES.get(axis, "output") for axis in axes)

    if fold is None:
        return stored

    return tuple(
        _part(role, fold.axes[mode]) for role, group in zip(stored, fold.groups, strict=True) for mode in group
    )


def _part(role: Role, name: str) -> Role:
    """The role of one part of a stored axis."""
    if role not in ("summed", "kernel"):
        return role
    if ROLES.get(name) == "kernel":
        return "kernel"
    return "summed"
