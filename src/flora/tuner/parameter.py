"""``ParamWrapper``: FLoRA adapters on a raw parameter of any number of dimensions, such as a stack of fused experts."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from flora.errors import UserError
from flora.layers.experts.stack import ExpertStack
from flora.layers.shell import call_with
from flora.layers.table import Layer
from flora.tuner.forward import choice_for
from flora.tuner.layer import FloraLayer


def _only(name: str, module: nn.Module) -> dict[str, tuple[str, ...]]:
    return {name: ()}


class ParamWrapper(FloraLayer):
    """A module of any type with FLoRA adapters on one of its parameters, of any number of dimensions.

    PEFT finds it by this class name. Several parameters of one module are wrapped one in the other.

    Args:
        base_layer: the module that holds the parameter, or a ``ParamWrapper`` of it.
        parameter_name: of the parameter, in the module itself.
    """

    def __init__(self, base_layer: nn.Module, parameter_name: str) -> None:
        super().__init__(base_layer, row=Layer("parameter", partial(_only, parameter_name)))
        self.parameter_name = parameter_name

    def _adapted(self, active: list[str], *args: Any, **kwargs: Any) -> Any:
        """Stacks of experts run with an ``ExpertStack`` in place of the parameter, other parameters with W + dW."""
        name = self.parameter_name
        stand_in: Any

        if choice_for(self, active, None).way == "called":
            stand_in = self.summed(active, name)
        else:
            deltas = [self.delta(adapter, name) for adapter in active]
            stand_in = ExpertStack.of(self.stored(name), [(delta.stored_form, delta.scale) for delta in deltas])

        wrappers_inside = sum(isinstance(part, ParamWrapper) for part in self.modules()) - 1

        return call_with(self.base_layer, {"base_layer." * wrappers_inside + name: stand_in}, *args, **kwargs)

    def _mixed(self, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        if not any(name in self.settings for name in names):
            return self.base_layer(*args, **kwargs)  # type: ignore[no-any-return]
        raise UserError(
            "adapter_names (an adapter for each sample) cannot be used with target_parameters; "
            "run one batch per adapter, with set_adapter"
        )

    def __getitem__(self, index: Any) -> Any:
        """Refused: what is indexed instead of called, as the spectral weights of neuraloperator, runs no adapter.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"{self.place} of target_parameters is held by a {type(self.get_base_layer()).__name__}, which its owner "
            "indexes instead of calling, so no adapter can stand in its place; leave it out, or register the tensor as "
            "a parameter of the module that uses it"
        )

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module itself, with the updates of this and of the wrappers inside merged if asked."""
        layer: nn.Module = self
        while isinstance(layer, ParamWrapper):
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            layer = layer.base_layer
        return layer
