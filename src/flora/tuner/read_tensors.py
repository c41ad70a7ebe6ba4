"""What a reader of an adapted layer's weight is given: ``Reading``, or ``Unreadable`` where there is no ``W + s dW``.

Both are tensors with the type, shape and device of the weight and without its numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from flora.errors import UserError

NOT_TO_BE_WRITTEN = (
    "the weight of an adapted layer was written to through the layer, where it is W plus the update of the adapters, "
    "formed for this reading; write to the base layer's (layer.get_base_layer()), or merge first; where the model "
    "itself writes in training, leave the layer out (exclude_modules)"
)


class Reading(Tensor):
    """A tensor whose values are formed when an operation first needs them.

    Any operation of torch gets the formed weight in its place. A part of it is a reading as well. Writing into either
    is refused: the change would be lost.
    """

    _form: Callable[[], Tensor]
    _formed: Tensor | None
    # Multiplies by a number and gives the new ``form``.
    _rescale: Callable[[float], Callable[[], Tensor]] | None = None
    # The weight of the base layer.
    _stored: Tensor | None = None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, like: Tensor, form: Callable[[], Tensor]) -> Reading:
        """With the shape, type and device of a tensor; ``form`` gives the values."""
        reading: Reading = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
        )
        reading._form, reading._formed = form, None
        return reading

    def plain(self) -> Tensor:
        """The values, as an ordinary tensor without a graph."""
        if self._formed is None:
            with torch.no_grad():
                self._formed = self._form()
        return self._formed

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return cls(args[0], args[0].plain)

        if func in RESCALING and args[0]._rescale is not None and _is_number(args[1]):
            if func in RESCALING[:2]:
                factor = float(args[1])
            else:
                factor = 1 / float(args[1])

            args[0]._form, args[0]._formed = args[0]._rescale(factor), None
            return args[0]

        # Gemma 3n limits some weights in training. Where they keep to the limits, nothing is written.
        if func in LIMITING and isinstance(args[0], Reading):
            values = args[0].plain()
            if torch.equal(func(values.clone(), *args[1:], **(kwargs or {})), values):
                return args[0]

        # Everything else works on the formed values. A result that shares their memory is a reading again, so that
        # writing into it is refused as well.
        kwargs = kwargs or {}
        if func._schema.is_mutable and any(isinstance(value, Reading) for value in _written(func, args, kwargs)):
            raise RuntimeError(NOT_TO_BE_WRITTEN)

        values, options = tree_map_only(Reading, Reading.plain, (args, kwargs))
        out = func(*values, **options)

        if args and isinstance(args[0], Reading) and _is_view(func):
            return tree_map_only(Tensor, _part, out)

        return out

    @property
    def data(self) -> Tensor:
        """A reading without a gradient."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise RuntimeError(NOT_TO_BE_WRITTEN)

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient reaches the adapter or the stored weight; set, it is set for the stored weight."""
        return Tensor.requires_grad.__get__(self)  # type: ignore[attr-defined, no-any-return]

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        """Of the stored weight; of a detached reading its own."""
        if self._stored is None:
            return super().requires_grad_(requires_grad)

        self._stored.requires_grad_(requires_grad)
        return self

    def __setitem__(self, index: Any, value: Any) -> None:
        raise RuntimeError(NOT_TO_BE_WRITTEN)

    def data_ptr(self) -> int:
        """Of the formed values, for kernels that take addresses."""
        return self.plain().data_ptr()

    def tolist(self) -> Any:
        """The values as nested lists."""
        return self.plain().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """The values as an array of numpy; as of any tensor, not while it requires a gradient."""
        array = self.plain().detach().requires_grad_(self.requires_grad).numpy(force=force)
        array.flags.writeable = False
        return array

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.plain().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain().__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.plain())


# RWKV multiplies and divides its weights in place by a number when it goes from training to inference and back.
RESCALING = (
    torch.ops.aten.mul_.Tensor,
    torch.ops.aten.mul_.Scalar,
    torch.ops.aten.div_.Tensor,
    torch.ops.aten.div_.Scalar,
)


LIMITING = (
    torch.ops.aten.clamp_.default,
    torch.ops.aten.clamp_.Tensor,
    torch.ops.aten.clamp_min_.default,
    torch.ops.aten.clamp_max_.default,
)


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Any]:
    """The arguments that an operation writes to."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue

        if index < len(args):
            yield from tree_leaves(args[index])
        else:
            yield from tree_leaves(kwargs.get(argument.name))


def _is_view(func: Any) -> bool:
    """Whether the results of an operation share the memory of its first argument."""
    infos = [found.alias_info for found in func._schema.returns]
    return any(info is not None and not info.is_write for info in infos)


def _part(value: Tensor) -> Reading:
    part = Reading(value, lambda: value)
    part._formed = value
    return part


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.ndim == 0)


class Unreadable(Tensor):
    """The weight of an adapted layer that has no ``W + s dW``: it says what it is like, and refuses every operation."""

    _like: Tensor
    _why: str

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, like: Tensor, why: str) -> Unreadable:
        """With the shape, type and device of a tensor; ``why`` is the text of the refusal."""
        unreadable: Unreadable = Tensor._make_wrapper_subclass(
            cls, like.shape, dtype=like.dtype, device=like.device, requires_grad=like.requires_grad
        )
        vars(unreadable).update(_like=like, _why=why)
        return unreadable

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        found = next(value for value in tree_leaves((args, kwargs)) if isinstance(value, Unreadable))
        if func is torch.ops.aten.detach.default:
            return cls(found._like, found._why)
        raise UserError(found._why)

    def __getattr__(self, name: str) -> Any:
        """What the weight's own type has beside a tensor: the state of a quantisation, the layout of shards."""
        value = getattr(self._like, name)
        if isinstance(value, Tensor) or callable(value):
            raise UserError(self._why)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        raise UserError(self._why)

    def refuse(self, *args: Any, **kwargs: Any) -> Any:
        """Raises the ``UserError``."""
        raise UserError(self._why)

    data_ptr = untyped_storage = tolist = numpy = requires_grad_ = __setitem__ = refuse
    __deepcopy__ = __reduce_ex__ = refuse

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self._like)
