"""What other libraries would do wrong with an adapter of ours, because they look for LoRA's names: refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial, wraps
from typing import Any, cast

from torch import nn

from flora.errors import UserError

# The names of our parameters begin with it.
PREFIX = "tucker_"


def guard_optimizers() -> None:
    """Makes PEFT's optimisers for LoRA refuse an adapter of ours: they would find no ``lora_A`` and ``lora_B`` in it.

    LoRA+ would put all of it into one group, LoRA-FA would freeze nothing: both would be plain AdamW, silently. Each is
    stopped at a name of its module that it looks up when it is called, so that it does not matter when it was imported.
    Called when an adapter is put on a model: ``import flora`` stays light.
    """
    from peft.optimizers import lorafa, loraplus

    if not hasattr(loraplus.get_parameter_names, "__wrapped__"):
        loraplus.get_parameter_names = _guarded("create_loraplus_optimizer", loraplus.get_parameter_names, _of_model)
        optimizer = cast("Any", lorafa.LoraFAOptimizer)
        optimizer.__init__ = _guarded("create_lorafa_optimizer", optimizer.__init__, _of_groups)


def _guarded(name: str, function: Callable[..., Any], trained: Callable[..., Iterable[str]]) -> Callable[..., Any]:
    """The function, unless there is a parameter of ours in what it is given."""

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if any(PREFIX in parameter for parameter in trained(*args)):
            raise UserError(
                f"{name} knows LoRA's matrices A and B only, and would train a FLoRA adapter like plain AdamW; use "
                "torch.optim.AdamW, with your own parameter groups for several learning rates: names end in core, "
                "factor_0, factor_1, ..., and factor_0 is the one that starts at zero"
            )

        return function(*args, **kwargs)

    return guarded


def _of_model(model: nn.Module, *_: Any) -> Iterable[str]:
    return (name for name, value in model.named_parameters() if value.requires_grad)


def _of_groups(optimizer: object, groups: Iterable[Mapping[str, Any]], *_: Any) -> Iterable[str]:
    return (name for group in groups for name in group.get("names", ()))


def guard_saving(model: nn.Module) -> None:
    """Makes ``save_lora_adapter`` of a diffusers model refuse an adapter of ours: nothing could load its file again."""
    if hasattr(type(model), "save_lora_adapter"):
        cast("Any", model).save_lora_adapter = partial(_save_lora_adapter, model)


def _save_lora_adapter(
    model: Any, save_directory: Any, adapter_name: str = "default", *args: Any, **kwargs: Any
) -> None:
    """Replaces the method of a diffusers model, which still handles adapters of other kinds."""
    configs: Mapping[str, Any] = getattr(model, "peft_config", {})
    config = configs.get(adapter_name)

    if getattr(config, "peft_type", None) == "TUCKER":
        raise UserError(
            f"save_lora_adapter writes LoRA, and {adapter_name!r} is a FLoRA adapter, which diffusers would not load "
            "again; attach it with get_peft_model(unet, config) and save that with save_pretrained, then "
            "`flora convert FOLDER --to kohya --prefix lora_unet --no-mid --out FILE.safetensors` writes what "
            "pipeline.load_lora_weights reads"
        )

    type(model).save_lora_adapter(model, save_directory, adapter_name, *args, **kwargs)
