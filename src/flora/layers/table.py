"""Which layers can be adapted and how: one row per module type.

A row says which parameters are adapted, what their dimensions are called, how a stored weight is seen as an N-d tensor
(its fold), how to run the layer with another weight in place of its own, and, for the hot kinds, the factored kernel.
To add a kind, add a row here and a case in ``tests/cases.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from flora.layers import plain
from flora.layers.axes import KERNELS
from flora.layers.conv import fused as fused_conv
from flora.layers.linear import fused as linear
from flora.layers.shell import forward_is_replaced

Axes = tuple[str, ...]


def no_folds(module: Any) -> dict[str, str]:
    """The weights are seen as they are stored."""
    return {}


@dataclass(frozen=True)
class Layer:
    """How one kind of layer is adapted.

    Attributes:
        kind: what ``flora.plan`` and the shorthands of ``target_modules`` go by: "linear", "conv", "embedding",
            "bilinear", "attention", "recurrent" or "norm".
        weights: ``module -> {parameter name: axes}``, a name of ``flora.layers.axes.ROLES`` for each dimension, in the
            order of ``weight.shape``.
        apply: ``(module, weight, bias, *args, **kwargs) -> output``: what the layer computes with that weight, linear
            in ``weight``, with the arguments of its forward. None where there is no such form; the layer is then run
            as a shell with W + dW (``flora.layers.shell``).
        factored: ``(module, form, scale, *args, **kwargs) -> change of the output``, without forming the dense update.
        fused: ``(choice, module, weight, bias, delta, *args, **kwargs) -> output`` of the layer and its change in one
            function, in the way that the plan chose, or None for arguments that it does not take.
        folds: ``module -> {parameter name: fold}``, how the stored weight is seen as an N-d tensor by default.
    """

    kind: str
    weights: Callable[[Any], dict[str, Axes]]
    apply: Callable[..., Tensor] | None = None
    factored: Callable[..., Tensor] | None = None
    fused: Callable[..., Tensor | None] | None = None
    folds: Callable[[Any], dict[str, str]] = no_folds


def _weight_axes(axes: Axes, module: Any) -> dict[str, Axes]:
    return {"weight": axes}


def _one(*axes: str) -> Callable[[Any], dict[str, Axes]]:
    """A single weight with these axes; a partial and no closure, so that adapted models can be pickled."""
    return partial(_weight_axes, axes)


def _linear(module: nn.Module, weight: Tensor, bias: Tensor | None, input: Tensor) -> Tensor:
    return F.linear(input, weight, bias)


def _linear_transposed(module: nn.Module, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return F.linear(x, weight.T, bias)


def _conv(module: Any, weight: Tensor, bias: Tensor | None, input: Tensor) -> Tensor:
    return module._conv_forward(input, weight, bias)  # type: ignore[no-any-return]


def _conv_transpose(
    module: Any, weight: Tensor, bias: Tensor | None, input: Tensor, output_size: list[int] | None = None
) -> Tensor:
    run = plain.CONV_TRANSPOSE[weight.ndim - 2]
    extra = plain.output_padding(module, input, output_size)
    return run(input, weight, bias, module.stride, module.padding, extra, module.groups, module.dilation)


def _embedding(module: Any, weight: Tensor, bias: Tensor | None, input: Tensor) -> Tensor:
    return F.embedding(input, weight, module.padding_idx, scale_grad_by_freq=module.scale_grad_by_freq)


def _bilinear(module: Any, weight: Tensor, bias: Tensor | None, input1: Tensor, input2: Tensor) -> Tensor:
    return F.bilinear(input1, input2, weight, bias)


def _attention_weights(module: nn.MultiheadAttention) -> dict[str, Axes]:
    # torch stores the three projections as one matrix (3 * embed, embed) if queries, keys and values have one width.
    if module._qkv_same_embed_dim:
        return {"in_proj_weight": ("out", "in"), "out_proj.weight": ("out", "in")}
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")
    return dict.fromkeys(names, ("out", "in"))


def _attention_folds(module: nn.MultiheadAttention) -> dict[str, str]:
    heads = f"heads={module.num_heads}"
    if module._qkv_same_embed_dim:
        return {"in_proj_weight": f"(qkv heads dim) embed, qkv=3 {heads}"}
    return dict.fromkeys(("q_proj_weight", "k_proj_weight", "v_proj_weight"), f"(heads dim) embed, {heads}")


def _recurrent_weights(module: nn.RNNBase | nn.RNNCellBase) -> dict[str, Axes]:
    # Names are weight_ih_l0, weight_hh_l0_reverse and the like; the second word says what the weight is applied to: the
    # input, the hidden state, or the hidden state for the projection of an LSTM.
    axes = {"ih": ("gates", "in"), "hh": ("gates", "hidden"), "hr": ("out", "hidden")}
    names = [name for name, _ in module.named_parameters(recurse=False) if name.startswith("weight_")]
    return {name: axes[name.split("_")[1]] for name in names}


def _gate_folds(count: int, module: Any) -> dict[str, str]:
    """The gate dimension folded out: (4 hidden) -> 4, hidden for an LSTM; projections have none."""
    names = [name for name in _recurrent_weights(module) if not name.startswith("weight_hr")]
    return dict.fromkeys(names, f"(gates hidden) input, gates={count}")


def _recurrent(gates: int) -> Layer:
    return Layer("recurrent", _recurrent_weights, folds=partial(_gate_folds, gates) if gates > 1 else no_folds)


def _conv_rows() -> dict[type[nn.Module], Layer]:
    straight = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
    transposed = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
    rows: dict[type[nn.Module], Layer] = {
        cls: Layer("conv", _one("out", "in", *KERNELS[dims]), _conv, plain.conv, fused_conv.conv)
        for dims, cls in straight.items()
    }

    for dims, cls in transposed.items():
        rows[cls] = Layer(
            "conv", _one("in", "out", *KERNELS[dims]), _conv_transpose, plain.conv_transpose, fused_conv.conv_transpose
        )

    return rows


def _norm_weights(module: Any) -> dict[str, Axes]:
    """One scale for each channel; a layer norm over several dimensions has one for each of their entries."""
    dims = len(module.normalized_shape) if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) else 1
    return {"weight": ("channels",) if dims == 1 else tuple(f"channels{mode}" for mode in range(dims))}


_NORM = Layer("norm", _norm_weights)

LAYERS: dict[type[nn.Module], Layer] = {
    nn.Linear: Layer("linear", _one("out", "in"), _linear, plain.linear, linear.linear),
    Conv1D: Layer("linear", _one("in", "out"), _linear_transposed, plain.linear_transposed, linear.linear_transposed),
    **_conv_rows(),
    nn.Embedding: Layer("embedding", _one("vocab", "dim"), _embedding, plain.embedding),
    nn.EmbeddingBag: Layer("embedding", _one("vocab", "dim"), None, plain.embedding_bag),
    nn.Bilinear: Layer("bilinear", _one("out", "in1", "in2"), _bilinear, plain.bilinear),
    nn.MultiheadAttention: Layer("attention", _attention_weights, folds=_attention_folds),
    nn.LSTM: _recurrent(4),
    nn.GRU: _recurrent(3),
    nn.RNN: _recurrent(1),
    nn.LSTMCell: _recurrent(4),
    nn.GRUCell: _recurrent(3),
    nn.RNNCell: _recurrent(1),
    nn.LayerNorm: _NORM,
    nn.GroupNorm: _NORM,
    nn.RMSNorm: _NORM,
    nn.BatchNorm1d: _NORM,
    nn.BatchNorm2d: _NORM,
    nn.BatchNorm3d: _NORM,
}


def find_layer(module: nn.Module) -> tuple[type[nn.Module], Layer] | None:
    """The row for a module and the type it is listed under (a subclass is found by its base), or None.

    Norms and linear layers of a model's own have the rows of ``nn.RMSNorm`` and ``nn.Linear``: ``LlamaRMSNorm``, or
    the ``Linear`` of PyTorch Geometric. They run as shells.
    """
    for cls in type(module).__mro__:
        if cls in LAYERS:
            return cls, LAYERS[cls]

    if _is_norm(module):
        return nn.RMSNorm, _NORM
    if _is_linear(module):
        return nn.Linear, LAYERS[nn.Linear]

    return None


def _is_norm(module: nn.Module) -> bool:
    """Whether a class that calls itself a norm holds one scale for each channel, and at most a shift beside it."""
    if "norm" not in type(module).__name__.lower() or not _holds_only_a_weight(module):
        return False
    return module._parameters["weight"].ndim == 1  # type: ignore[union-attr]


def _is_linear(module: nn.Module) -> bool:
    """Whether a class that calls itself linear holds one matrix of the shape that it states, and at most a bias."""
    if "linear" not in type(module).__name__.lower() or not _holds_only_a_weight(module) or module._buffers:
        return False

    weight, own = cast("Tensor", module._parameters["weight"]), vars(module)
    sizes = (own.get("out_features", own.get("out_channels")), own.get("in_features", own.get("in_channels")))

    if is_lazy(weight):
        return True
    return weight.is_floating_point() and tuple(weight.shape) == sizes


def _holds_only_a_weight(module: nn.Module) -> bool:
    own = module._parameters
    return own.get("weight") is not None and own.keys() <= {"weight", "bias"} and not module._modules


def parameter(module: nn.Module, name: str) -> Tensor:
    """The parameter of a (dotted) name, as the module sees it now."""
    owner, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(owner), leaf)  # type: ignore[no-any-return]


def refusal(module: nn.Module) -> str | None:
    """Why a module cannot be adapted, with what to do about it; None if it can."""
    found = find_layer(module)
    if found is None:
        kinds = ", ".join(cls.__name__ for cls in LAYERS)
        leaves = ", ".join(name for name, _ in module.named_parameters(recurse=False))
        remedy = f"name its parameters ({leaves}) in target_parameters"
        if not leaves:
            remedy = "it has no weights of its own, so leave it out, or name layers inside it"

        return f"{type(module).__name__} is not in the table of layers ({kinds}); {remedy}"

    for name in found[1].weights(module):
        owner, leaf = module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if parametrize.is_parametrized(owner, leaf):
            continue

        held = owner._parameters.get(leaf)
        if held is None:
            if leaf in owner._parameters:
                return f"it has no {name} (affine=False)"

            if hasattr(owner, f"{leaf}_mask"):
                return (
                    f"its {name} is pruned: it is masked before every forward; make that permanent first, with "
                    f"torch.nn.utils.prune.remove(module, {leaf!r})"
                )

            return (
                f"its {name} is recomputed before every forward (old-style weight_norm or spectral_norm); use "
                "torch.nn.utils.parametrizations instead, or remove the norm first"
            )

        if is_lazy(held):
            return f"its {name} has no shape yet (lazy module); run one forward through the model first"

    return None


def weight_shape(module: nn.Module, name: str) -> tuple[int, ...]:
    """The shape of a weight, also where DeepSpeed ZeRO-3 has partitioned it or a quantised linear has packed it."""
    weight = parameter(module, name)
    if hasattr(weight, "ds_shape"):
        return tuple(weight.ds_shape)

    # Only a linear layer has the shape that it states: a gate of as many outputs as inputs holds a vector.
    if name == "weight" and (isinstance(module, nn.Linear) or not (weight.is_floating_point() or weight.is_complex())):
        stated = (getattr(module, "out_features", 0), getattr(module, "in_features", 0))
        if all(stated) and weight.numel() != math.prod(stated):
            return stated

    return tuple(weight.shape)


def is_plain(module: nn.Module) -> bool:
    """Whether the module computes exactly what its row says: its forward is the listed type's own, nothing is renormed.

    Where it is not (a scaled embedding, a weight-standardised conv, ``max_norm``), the layer is run as a
    shell with W + dW, which is exact for whatever its forward does.
    """
    found = find_layer(module)
    if found is None or type(module).forward is not found[0].forward or forward_is_replaced(module):
        return False
    # What an embedding is set to; cheaper to ask than the module itself.
    own = vars(module)
    return own.get("max_norm") is None and own.get("mode") != "max"
