"""Which layers can be adapted and how: one row per module type.

A row says which parameter is adapted, what its dimensions are called, how to run the layer with another weight in place
of its own, and, for the hot kinds, the factored kernel. To add a kind, add a row here and a case in ``tests/cases.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from flora import kernels
from flora.tucker import Tucker


@dataclass(frozen=True)
class Layer:
    """How one kind of layer is adapted.

    Attributes:
        kind: "linear", "conv" or "embedding", what ``flora.plan`` and the shorthands of ``target_modules`` go by.
        axes: a name for each dimension of the weight, in the order of ``weight.shape``; kernel axes begin with "k".
        apply: ``(module, x, weight, bias) -> output``, what the layer computes with that weight; linear in ``weight``.
        factored: ``(module, x, form, scale) -> change of the output``, without forming the dense update.
        weight: the name of the parameter that is adapted.
    """

    kind: str
    axes: tuple[str, ...]
    apply: Callable[[Any, Tensor, Tensor, Tensor | None], Tensor]
    factored: Callable[[Any, Tensor, Tucker, float], Tensor]
    weight: str = "weight"


def _apply_linear(module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def _apply_transposed_linear(module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.T, bias)


def _apply_conv(module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return module._conv_forward(x, weight, bias)  # type: ignore[no-any-return]


def _apply_embedding(module: Any, ids: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.embedding(ids, weight, module.padding_idx, scale_grad_by_freq=module.scale_grad_by_freq)


LAYERS: dict[type[nn.Module], Layer] = {
    nn.Linear: Layer("linear", ("out", "in"), _apply_linear, kernels.linear),
    Conv1D: Layer("linear", ("in", "out"), _apply_transposed_linear, kernels.linear_transposed),
    nn.Conv1d: Layer("conv", ("out", "in", "kw"), _apply_conv, kernels.conv),
    nn.Conv2d: Layer("conv", ("out", "in", "kh", "kw"), _apply_conv, kernels.conv),
    nn.Conv3d: Layer("conv", ("out", "in", "kd", "kh", "kw"), _apply_conv, kernels.conv),
    nn.Embedding: Layer("embedding", ("vocab", "dim"), _apply_embedding, kernels.embedding),
}


def find_layer(module: nn.Module) -> tuple[type[nn.Module], Layer] | None:
    """The row for a module and the type it is listed under (a subclass is found by its base), or None."""
    return next(((cls, LAYERS[cls]) for cls in type(module).__mro__ if cls in LAYERS), None)


def refusal(module: nn.Module) -> str | None:
    """Why a module cannot be adapted, with what to do about it; None if it can."""
    found = find_layer(module)
    if found is None:
        kinds = ", ".join(cls.__name__ for cls in LAYERS)
        return f"{type(module).__name__} is not in the table of layers ({kinds})"
    weight = found[1].weight
    if parametrize.is_parametrized(module, weight):
        return None
    if weight not in module._parameters:
        return (
            f"its {weight} is recomputed before every forward (old-style weight_norm or spectral_norm); use "
            "torch.nn.utils.parametrizations instead, or remove the norm first"
        )
    if isinstance(module._parameters[weight], nn.parameter.UninitializedParameter):
        return f"its {weight} has no shape yet (lazy module); run one forward through the model first"
    return None


def weight_shape(module: nn.Module, weight: str) -> tuple[int, ...]:
    """The shape of a weight, also when DeepSpeed ZeRO-3 has partitioned it."""
    parameter = getattr(module, weight)
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def is_plain(module: nn.Module) -> bool:
    """Whether the module computes exactly what its row says: its forward is the listed type's own, nothing is renormed.

    Where it is not (a scaled embedding, a weight-standardised conv, ``max_norm``), the layer is run through
    ``torch.func.functional_call`` with W + dW, which is exact for whatever its forward does.
    """
    found = find_layer(module)
    return found is not None and type(module).forward is found[0].forward and getattr(module, "max_norm", None) is None
