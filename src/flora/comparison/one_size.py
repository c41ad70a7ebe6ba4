"""PEFT's OFT and MiSS, whose configs have one size for all layers: each layer gets its own here, to spend the budget.

BOFT is OFT wherever its CUDA extension is missing, so it has no row.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from peft import PeftConfig
from torch import Tensor, nn

from flora.comparison.rivals import RefusedError, Request, Targets, attach, fields_of, match, newer, supported


def miss(base: nn.Module, request: Request) -> nn.Module:
    """PEFT's MiSS.

    Raises:
        RefusedError: it can adapt none of the layers, or the smallest size costs too much.
    """

    def configure(ranks: dict[str, int], found: Targets) -> PeftConfig:
        return cast("PeftConfig", newer("MissConfig")(r=1, **_without_size(request, ranks, found)))

    layers = {name: cast("nn.Linear", base.get_submodule(name)) for name in supported(base, request, configure)}

    def rank_of(name: str, step: int) -> int:
        return min(step, layers[name].in_features)

    steps = match(lambda step: {name: rank_of(name, step) * layers[name].out_features for name in layers}, request)
    config = configure(steps, {name: [] for name in steps})

    return _sized(attach(base, config), {name: (rank_of(name, step), config) for name, step in steps.items()})


def oft(base: nn.Module, request: Request) -> nn.Module:
    """PEFT's OFT: it rotates the inputs of linear layers and 1x1 convolutions. Raises as :func:`miss` does."""

    def configure(ranks: dict[str, int], found: Targets) -> PeftConfig:
        return cast("PeftConfig", newer("OFTConfig")(oft_block_size=2, **_without_size(request, ranks, found)))

    with warnings.catch_warnings():
        # Blocks of two do not fit every layer; in the end none has them but where they do.
        warnings.filterwarnings("ignore", "Invalid `oft_block_size`")
        widths = {name: _width(base.get_submodule(name)) for name in supported(base, request, configure)}
        sizes = {name: _block_sizes(width) for name, width in widths.items() if width > 1}

        def size_of(name: str, step: int) -> int:
            return sizes[name][min(step, len(sizes[name])) - 1]

        # Skew-symmetric blocks: width / size of them, size * (size - 1) / 2 parameters each.
        steps = match(lambda step: {name: widths[name] * (size_of(name, step) - 1) // 2 for name in sizes}, request)
        config = configure(steps, {name: [] for name in steps})
        adapted = attach(base, config)

    own = {name: replace(cast("Any", config), oft_block_size=size_of(name, step)) for name, step in steps.items()}

    for name in own:
        if isinstance(base.get_submodule(name).get_base_layer(), nn.Linear):  # type: ignore[operator]
            base.get_submodule(name).register_forward_pre_hook(_refuse_images)

    return _sized(adapted, {name: (0, config) for name, config in own.items()})


def _refuse_images(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    if inputs[0].dim() == 4:
        raise RefusedError("PEFT's OFT takes the inputs of a linear layer that have four dimensions for images")


def _without_size(request: Request, ranks: dict[str, int], found: Targets) -> dict[str, Any]:
    given = fields_of(request, None, ranks, found)
    return {key: value for key, value in given.items() if key not in ("r", "rank_pattern")}


def _sized(adapted: nn.Module, sizes: Mapping[str, tuple[int, PeftConfig]]) -> nn.Module:
    """Gives each layer its rank, and a config of its own."""
    inner = cast("Any", adapted.base_model).model
    for name, (rank, config) in sizes.items():
        inner.get_submodule(name).update_layer("default", rank, config=config)

    return adapted


def _width(layer: nn.Module) -> int:
    """How many inputs a layer has; 0 for one that is left out.

    PEFT rotates the patches of a convolution and adds up where they overlap, so that a kernel of more than one place
    would change the model before it is trained.
    """
    if isinstance(layer, nn.Linear):
        return layer.in_features
    if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):
        return layer.in_channels
    return 0


def _block_sizes(width: int) -> list[int]:
    """The sizes that a layer's blocks may have, from the cheapest."""
    return [size for size in range(2, width + 1) if width % size == 0]
