"""What a GPU would be asked to launch for one training step, beyond the frozen layer; counted without a GPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from peft import get_peft_model
from torch import nn

import flora
from flora import FloraConfig
from launches import step

MOST_LINEAR = {torch.float32: 9, torch.bfloat16: 12}
MOST_CONV = {torch.float32: 12, torch.bfloat16: 16}
ROWS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(512, 384), (64, 512)),
    "linear of few channels": (lambda: nn.Linear(64, 256), (8192, 64)),
    "linear of many channels": (lambda: nn.Linear(4096, 4096), (4, 2048, 4096)),
    "1-D": (lambda: nn.Conv1d(64, 96, 5, padding=2), (8, 64, 100)),
    "1x1": (lambda: nn.Conv2d(64, 96, 1), (8, 64, 28, 28)),
    "3x3": (lambda: nn.Conv2d(64, 96, 3, padding=1), (8, 64, 28, 28)),
    "3x3 on few pixels": (lambda: nn.Conv2d(512, 512, 3, padding=1), (2, 512, 7, 7)),
    "5x3, strided": (lambda: nn.Conv2d(64, 96, (5, 3), padding=1, stride=2), (8, 64, 28, 28)),
    "3x3x3": (lambda: nn.Conv3d(32, 64, 3, padding=1), (2, 32, 16, 16, 16)),
    "3x3x3 on few voxels": (lambda: nn.Conv3d(256, 256, 3, padding=1), (1, 256, 4, 4, 4)),
    "1x3x3": (lambda: nn.Conv3d(32, 64, (1, 3, 3), padding=1), (2, 32, 16, 16, 16)),
    "transposed, 1-D": (lambda: nn.ConvTranspose1d(64, 96, 4, stride=2), (8, 64, 28)),
    "transposed, 2x2": (lambda: nn.ConvTranspose2d(64, 96, 2, stride=2), (8, 64, 28, 28)),
    "transposed, 3x3x3": (lambda: nn.ConvTranspose3d(64, 32, 3, stride=2, padding=1), (2, 64, 8, 8, 8)),
    "depthwise, 7x7": (lambda: nn.Conv2d(64, 64, 7, padding=3, groups=64), (8, 64, 28, 28)),
    "depthwise, 3x3x3": (lambda: nn.Conv3d(64, 64, 3, padding=1, groups=64), (2, 64, 8, 8, 8)),
    "stem": (lambda: nn.Conv2d(3, 64, 7, padding=3, stride=2), (8, 3, 64, 64)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_launches_beyond_the_frozen_layer(name: str, dtype: torch.dtype) -> None:
    build, size = ROWS[name]
    with torch.device("meta"):
        x = torch.empty(size, dtype=dtype, requires_grad=True)
        frozen = nn.Sequential(build()).to(dtype).requires_grad_(False)
        adapted = get_peft_model(nn.Sequential(build()).to(dtype), FloraConfig(r=16, target_modules=["0"]))  # type: ignore[arg-type]
    more = step(adapted, x)
    more.subtract(step(frozen, x))
    most = (MOST_LINEAR if name.startswith("linear") else MOST_CONV)[dtype]
    assert sum(more.values()) <= most, {key: count for key, count in more.items() if count}
    assert sum(more.values()) >= 5


LAYERS = 8
PREPARED = {torch.float32: 23, torch.bfloat16: 28}  # of all layers together, whatever their number


class Copies(nn.ModuleList):
    """Layers on the same input; the sum of their outputs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([layer(x) for layer in self]).sum(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["1-D", "3x3", "3x3x3", "1x3x3", "transposed, 2x2", "depthwise, 7x7", "stem"])
def test_launches_of_prepared_layers_do_not_grow_with_their_number(name: str, dtype: torch.dtype) -> None:
    build, size = ROWS[name]
    found = []
    for layers in (LAYERS, 2 * LAYERS):
        with torch.device("meta"):
            x = torch.empty(size, dtype=dtype, requires_grad=True)
            frozen = Copies([build() for _ in range(layers)]).to(dtype).requires_grad_(False)
            config = FloraConfig(r=16, target_modules=[str(place) for place in range(layers)])
            adapted = get_peft_model(Copies([build() for _ in range(layers)]).to(dtype), config)  # type: ignore[arg-type]
        flora.prepare(adapted)
        adapted(x)
        more = step(adapted, x)
        more.subtract(step(frozen, x))
        found.append(sum(more.values()))

    assert found[0] == found[1] <= PREPARED[dtype]


def test_torchs_hint_about_float32_products_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler gives it on every GPU of today; without one, its own function is told that there is."""
    with warnings.catch_warnings(action="ignore"):
        from torch._inductor import compile_fx

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (9, 0))
    said: list[str] = []
    monkeypatch.setattr("warnings.warn", said.append)
    compile_fx._warn_tf32_disabled.__wrapped__()
    monkeypatch.undo()

    assert len(said) == 1
    warnings.warn(said[0], UserWarning, stacklevel=1)
