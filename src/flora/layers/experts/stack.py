"""A stack of expert matrices W + dW that is never formed: ``ExpertStack`` stands in for the parameter.

The expert layers of transformers do few things with a parameter of shape (experts, m, n): take the matrix of one expert
or of several, transpose, multiply. Those are done on W and on the update side by side, in one autograd function where
that is possible. Anything else gets the dense sum, so every forward stays exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from flora.layers import device
from flora.layers.experts.grouped import grouped, row_by_row
from flora.layers.gate import prepare
from flora.layers.linear import fused as fused_linear
from flora.layers.planning import Work, choose_narrow
from flora.layers.summed import with_update
from flora.tucker.form import Tucker, mode_product


@dataclass(frozen=True)
class Term:
    """One update ``left @ middle @ right.T`` of a matrix (m, n), or of a stack of them.

    Attributes:
        left: shape (m, p), shared by all experts; None for the identity.
        middle: shape (..., p, q), a small matrix for each expert.
        right: shape (n, q), as left.
    """

    left: Tensor | None
    middle: Tensor
    right: Tensor | None

    @property
    def transposed(self) -> Term:
        """The update of the transposed matrix."""
        return Term(self.right, self.middle.mT, self.left)

    def dense(self) -> Tensor:
        """The update itself, (..., m, n)."""
        out = self.middle if self.left is None else self.left @ self.middle

        if self.right is None:
            return out

        return out @ self.right.T

    def after(self, x: Tensor, product: Callable[[Tensor, Tensor], Tensor] = torch.matmul) -> Tensor:
        """``x @ update`` with the middle product as given: x (..., m) -> (..., n)."""
        hidden = product(x if self.left is None else x @ self.left.to(x.dtype), self.middle.to(x.dtype))
        if self.right is None:
            return hidden
        return hidden @ self.right.T.to(x.dtype)


class ExpertStack:
    """W plus low-rank updates, for W of (E, m, n), one matrix (m, n) of it, or a batch of them.

    Args:
        weight: (..., m, n).
        terms: the updates.
    """

    def __init__(self, weight: Tensor, terms: Sequence[Term]) -> None:
        self.weight = weight
        self.terms = tuple(terms)
        self._sum: Tensor | None = None

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """It passes for a tensor: layers ask ``isinstance(weight, torch.Tensor)`` before they use its dtype."""
        return Tensor

    @classmethod
    def of(cls, weight: Tensor, forms: Sequence[tuple[Tucker, float]]) -> ExpertStack:
        """From a parameter (E, m, n) and the forms and scales of its adapters."""
        terms = []
        for form, scale in forms:
            experts, left, right = form.factors
            middle = form.scaled(scale).core

            # The factor of the experts is multiplied into the core, which gives each expert a small matrix of its own.
            # shape: (experts, p, q), from a core (J1, p, q)
            if experts is not None:
                middle = mode_product(middle, experts, 0)

            terms.append(Term(left, middle, right))

        return cls(weight, terms)

    @property
    def transposed(self) -> ExpertStack:
        """The stack of the transposed matrices."""
        return ExpertStack(self.weight.mT, [term.transposed for term in self.terms])

    def transpose(self, first: int, second: int) -> Any:
        """As of a tensor; lazy for the two dimensions of the matrices."""
        dims = self.weight.ndim
        if {first % dims, second % dims} == {dims - 1, dims - 2}:
            return self.transposed
        return self.dense().transpose(first, second)

    def __getitem__(self, index: Any) -> Any:
        # Experts are taken by a number or by a list of numbers. Only ``middle`` has a dimension for the experts, so the
        # same index is applied to W and to ``middle``. A mask, a slice or an index into the matrices gets the sum.
        if isinstance(index, Tensor):
            takes_experts = index.ndim < 2 and not index.is_floating_point() and index.dtype != torch.bool
        else:
            takes_experts = isinstance(index, int)

        if self.weight.ndim != 3 or not takes_experts:
            return self.dense()[index]

        terms = [Term(term.left, term.middle[index], term.right) for term in self.terms]

        return ExpertStack(self.weight[index], terms)

    def dense(self) -> Tensor:
        """W + dW, for an operation that needs all of it; formed once for each stack."""
        if self._sum is None:
            total = self.weight
            for term in self.terms:
                total = with_update(total, term.dense())

            self._sum = total
        return self._sum

    def after(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x @ (W + dW) + bias``."""
        out, beside = self._fused(x, bias), self.terms[1:]
        if out is None:
            out, beside = x @ self.weight, self.terms

            if bias is not None:
                out = out + bias

        for term in beside:
            out = out + term.after(x)

        return out

    def _fused(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """The product with one matrix and its first update, where one function may do both."""
        if self.weight.ndim != 2 or not self._may_fuse():
            return None

        # A product x @ W' is a linear layer whose weight (out, in) is the transposed matrix.
        term = self.terms[0].transposed
        form = Tucker(term.middle, (term.left, term.right))
        work = Work(
            "linear",
            form.shape,
            form.ranks,
            x.numel() // max(1, x.shape[-1]),
            x.numel() // max(1, x.shape[-1]),
            cpu=device.on_cpu(x),
            element_size=self.weight.element_size(),
        )

        return fused_linear.small(choose_narrow(work), self.weight.mT, bias, form, 1.0, x)

    def grouped(self, x: Tensor, offs: Tensor, run: Callable[..., Tensor], **options: Any) -> Tensor:
        """A grouped product. x: (rows, m), sorted by expert; the rows up to ``offs[e]`` belong to expert e."""
        plain = all(value is None for value in options.values())
        out, beside = self._fused_grouped(x, offs, run) if plain else None, self.terms[1:]
        if out is None:
            out, beside = run(x, self.weight, offs=offs, **options), self.terms

        for term in beside:
            out = out + term.after(x, partial(row_by_row, ends=offs))

        return out

    def _fused_grouped(self, x: Tensor, offs: Tensor, run: Callable[..., Tensor]) -> Tensor | None:
        """The grouped product with the first update, where one function may do both."""
        ready = prepare(x, self.weight, None)
        if ready is None or not ready.fused or not self._may_fuse():
            return None

        # Autocast leaves grouped products alone: they run in the dtype of their operands.
        if ready.x.dtype != x.dtype or x.dtype != self.weight.dtype:
            return None

        term = self.terms[0]
        with ready.autocast:
            return grouped(self.weight, term.left, term.middle, term.right, x, offs, run)

    def _may_fuse(self) -> bool:
        """Whether there is an update, and W is an ordinary tensor: a sharded or quantised one has its own products."""
        return bool(self.terms) and type(self.weight) in (Tensor, nn.Parameter)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # torch calls this for every function that is given a stack: the few that are known work on W and the terms,
        # all others on the dense sum.
        kwargs = kwargs or {}
        handler = HANDLERS.get(func)
        if handler is not None:
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result

        args, kwargs = tree_map_only(ExpertStack, ExpertStack.dense, (args, kwargs))

        return func(*args, **kwargs)

    def __len__(self) -> int:
        return len(self.weight)

    def __matmul__(self, other: Any) -> Any:
        return torch.matmul(self, other)  # type: ignore[arg-type]

    def __rmatmul__(self, x: Tensor) -> Tensor:
        return self.after(x)

    def __getattr__(self, name: str) -> Any:
        if name == "mT":
            return self.transposed
        if name in ("shape", "ndim", "dtype", "device", "size", "dim", "data_ptr", "requires_grad", "is_cuda"):
            return getattr(self.weight, name)
        return getattr(self.dense(), name)


def _by_dense(name: str) -> Callable[..., Any]:
    """An operator that the sum W + dW answers."""

    def operator(self: ExpertStack, *others: Any) -> Any:
        others = tree_map_only(ExpertStack, ExpertStack.dense, others)
        return getattr(self.dense(), name)(*others)

    return operator


# Python looks operators up on the class, past __getattr__. Comparisons too: ``__eq__`` of a tensor is by entry.
for _name in (
    "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "rfloordiv", "mod", "pow", "rpow",
    "neg", "pos", "abs", "invert", "lt", "le", "gt", "ge", "eq", "ne", "iter", "float", "int", "bool", "contains",
):  # fmt: skip
    if hasattr(Tensor, f"__{_name}__"):
        setattr(ExpertStack, f"__{_name}__", _by_dense(f"__{_name}__"))


def _linear(x: Any, weight: Any, bias: Tensor | None = None) -> Any:
    if not isinstance(weight, ExpertStack) or isinstance(x, ExpertStack) or weight.weight.ndim != 2:
        return NotImplemented
    return weight.transposed.after(x, bias)


def _matmul(x: Any, weight: Any) -> Any:
    # W' @ y = (y.T @ W'.T).T, so that the stack always stands on the right.
    if isinstance(x, ExpertStack) and isinstance(weight, Tensor) and weight.ndim >= 2:
        return x.transposed.after(weight.mT).mT
    if isinstance(weight, ExpertStack) and isinstance(x, Tensor):
        return weight.after(x)
    return NotImplemented


def _grouped_by(run: Callable[..., Tensor]) -> Callable[..., Any]:
    def grouped(x: Any, weight: Any, *, offs: Tensor | None = None, **options: Any) -> Any:
        if not isinstance(weight, ExpertStack) or isinstance(x, ExpertStack) or offs is None or x.ndim != 2:
            return NotImplemented
        return weight.grouped(x, offs, run, **options)

    return grouped


HANDLERS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    torch.bmm: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    **{
        run: _grouped_by(run)
        for run in (getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None))
        if run is not None
    },
}
