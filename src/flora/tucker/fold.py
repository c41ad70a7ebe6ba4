"""How a stored weight is seen as an N-d tensor: heads, gates, experts or patches, in einops' notation."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import EinopsError, rearrange
from torch import Tensor

from flora.errors import UserError
from flora.tucker.form import Tucker, kronecker, mode_product


@dataclass(frozen=True)
class Fold:
    """A view of a stored weight with composite axes split, ``"(three heads dim) embed, three=3 heads=12"``.

    Attributes:
        axes: the names of the folded dimensions.
        shape: their sizes; the product over each group is the stored size.
        groups: for each stored dimension, which folded dimensions it is made of.
    """

    axes: tuple[str, ...]
    shape: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the weight as the model holds it."""
        return tuple([math.prod([self.shape[axis] for axis in group]) for group in self.groups])

    def stored_form(self, form: Tucker) -> Tucker:
        """The same tensor in Tucker form over the stored dimensions.

        The factors of a composite dimension become one: their Kronecker product where that is narrower than the
        dimension, else they are absorbed into the core.
        """
        # A stored dimension made of several folded ones runs over all combinations of their indices. Its factor is
        # therefore the Kronecker product of theirs, and the core's dimensions are flattened in the same order. If that
        # product has as many columns as rows, it restricts nothing: the factors go into the core and the mode is whole.
        core, factors = form.core, list(form.factors)
        merged: list[Tensor | None] = []
        sizes = []
        for group in self.groups:
            ranks = [core.shape[axis] for axis in group]
            if len(group) > 1 and math.prod(ranks) >= math.prod([self.shape[axis] for axis in group]):
                for axis in group:
                    factor = factors[axis]
                    if factor is not None:
                        core = mode_product(core, factor, axis)

                    factors[axis] = None

            parts = [factors[axis] for axis in group]
            merged.append(kronecker(parts, ranks))
            sizes.append(math.prod([core.shape[axis] for axis in group]))

        return Tucker(core.reshape(sizes), tuple(merged))


def parse_fold(pattern: str, shape: Sequence[int], name: str = "weight") -> Fold:
    """Reads a fold and checks it against the shape of a weight.

    Args:
        pattern: the stored dimensions, composite ones in brackets, then the sizes that are not implied:
            ``"(three heads dim) embed, three=3 heads=12"``.
        shape: of the stored weight.
        name: of the weight, for messages.

    Raises:
        ValueError: the pattern is not of this form, or does not fit the shape.

    Examples:
        >>> parse_fold("(gates hidden) input, gates=4", (20, 7)).shape
        (4, 5, 7)
    """
    left, _, sizes = pattern.partition(",")
    given = re.findall(r"(\w+)\s*=\s*(\d+)", sizes)
    groups_text = re.findall(r"\([^()]*\)|\w+", left)
    names = re.findall(r"\w+", left)
    example = 'write it as "(three heads dim) embed, three=3 heads=12"'

    odd = "->" in pattern or len(set(names)) != len(names) or re.sub(r"[\w\s=,]", "", sizes)
    if odd or any(int(size) == 0 for _, size in given):
        raise UserError(f"fold {pattern!r} of {name} is not a list of the stored dimensions and sizes; {example}")

    # einops solves for the sizes that are not given and checks them. It runs on the meta device, so nothing is
    # allocated. It refuses axes that are Python keywords, such as "in".
    prefixed = re.sub(r"(\w+)", r"axis_\1", left)

    try:
        folded = rearrange(
            torch.empty(tuple(shape), device="meta"),
            f"{prefixed} -> {' '.join(f'axis_{axis}' for axis in names)}",
            **{f"axis_{key}": int(value) for key, value in given},
        )
    except EinopsError as error:
        reason = str(error).strip().splitlines()[-1].strip().replace("axis_", "")
        raise UserError(f"fold {pattern!r} does not fit {name} of shape {tuple(shape)}: {reason}; {example}") from None

    # Folded dimensions are numbered from left to right; a pair of brackets holds those of one stored dimension.
    groups, count = [], 0
    for text in groups_text:
        width = len(re.findall(r"\w+", text))
        groups.append(tuple(range(count, count + width)))
        count += width

    return Fold(tuple(names), tuple(folded.shape), tuple(groups))
