"""What one training step of a layer costs the host, with the branch of a GPU taken, on tensors of a few numbers.

``python benchmarks/host.py [--rows NAME,...] [--repeats N] [--quick] [--out FOLDER]`` writes ``host.json``.

On a GPU the host only prepares and launches, and where layers are small, that is what a step takes. On tiny tensors of
a CPU an operation costs little but its preparation, so the time is the host's: Python, the autograd engine and torch's
dispatch, measured as processor time of the process. Several layers of a kind run as in a network, all forward and then
all backward; the figure is that of one. ``gpu_branch`` says how the branch of a GPU is taken and what stands for
kernels of Triton. Methods take turns within a repeat; figures are medians over repeats. *prepared* is FLoRA with
``flora.prepare``, where that forms these layers together.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path[:1] = [str(Path(__file__).resolve().parents[1])]  # run as a script: the folder above, not this one

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

METHODS = ("frozen", "flora", "prepared", "lora")
RANK = 2
DEFAULT_RANK = 8  # of FloraConfig and LoraConfig
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Row:
    """One layer.

    Attributes:
        build: makes it.
        shape: of the input; what it holds is ``fill``.
        choice: the way that a GPU's plan takes for layers of a usual size, ``(way, gradient)``; None asks the plan.
        fill: makes the input from its shape.
        inside: where in it the layer is that is adapted.
        targets: raw parameters that are adapted.
        rank: of both methods.
        lora_rank: instead, where LoRA needs one that the groups divide.
        lora: whether PEFT's LoRA adapts it.
        args: makes the other arguments of the forward.
        copies: of the layer, as a network has them: all forward, then all backward.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    choice: tuple[str, str] | None = None
    fill: Callable[..., Tensor] = torch.randn
    inside: str = ""
    targets: tuple[str, ...] = ()
    rank: int = RANK
    lora_rank: int | None = None
    lora: bool = True
    args: Callable[[Tensor], tuple[Any, ...]] = field(default=lambda x: ())
    copies: int = 8


class Copies(nn.ModuleList):
    """Layers of one kind, each with weights of its own, on the same input."""

    def forward(self, *args: Any) -> list[Tensor]:
        """The outputs."""
        return [layer(*args) for layer in self]


class SelfAttention(nn.Module):
    """Multi-head attention of a sequence to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, tokens, width)."""
        out: Tensor = self.inner(x, x, x, need_weights=False)[0]
        return out


def experts() -> nn.Module:
    """Two experts of Mixtral by grouped products."""
    from benchmarks.grid import Experts

    return Experts(16, 16, 2, "grouped_mm")


def routed(x: Tensor) -> tuple[Any, ...]:
    """Each token to both experts."""
    return torch.tensor([[0, 1]] * len(x)), torch.full((len(x), 2), 0.5, dtype=x.dtype)


def ids(shape: tuple[int, ...], **options: Any) -> Tensor:
    """Tokens."""
    return torch.zeros(shape, dtype=torch.long)


LINEAR = (lambda: nn.Linear(8, 8), (4, 8))
FLAT = (lambda: nn.Conv2d(8, 8, 3, padding=1), (1, 8, 4, 4))
SOLID = (lambda: nn.Conv3d(8, 8, 3, padding=1), (1, 8, 3, 3, 3))
ROWS: dict[str, Row] = {
    "linear, through the whole weight": Row(*LINEAR, ("summed", "dense")),
    "linear, summed by narrow products": Row(*LINEAR, ("summed", "narrow")),
    "linear, beside": Row(*LINEAR, ("beside", "narrow")),
    "1-D": Row(lambda: nn.Conv1d(8, 8, 3, padding=1), (1, 8, 5)),
    "3x3": Row(*FLAT),
    "3x3x3": Row(*SOLID),
    "1x1": Row(lambda: nn.Conv2d(8, 8, 1), (1, 8, 4, 4)),
    "depthwise, 7x7": Row(lambda: nn.Conv2d(8, 8, 7, padding=3, groups=8), (1, 8, 4, 4), lora_rank=8),
    "transposed, 1-D": Row(lambda: nn.ConvTranspose1d(8, 8, 2, stride=2), (1, 8, 4), lora=False),
    "transposed, 2x2": Row(lambda: nn.ConvTranspose2d(8, 8, 2, stride=2), (1, 8, 4, 4), lora=False),
    "transposed, 2x2x2": Row(lambda: nn.ConvTranspose3d(8, 8, 2, stride=2), (1, 8, 3, 3, 3), lora=False),
    "embedding": Row(lambda: nn.Embedding(16, 8), (1, 4), ("beside", "narrow"), fill=ids),
    "attention": Row(SelfAttention, (1, 4, 8), inside=".inner"),
    "experts": Row(experts, (4, 16), targets=("experts.gate_up_proj", "experts.down_proj"), args=routed),
    "linear, default rank": Row(lambda: nn.Linear(16, 16), (4, 16), ("summed", "dense"), rank=DEFAULT_RANK),
    "3x3, default rank": Row(lambda: nn.Conv2d(16, 16, 3, padding=1), (1, 16, 4, 4), rank=DEFAULT_RANK),
    "3x3x3, default rank": Row(lambda: nn.Conv3d(16, 16, 3, padding=1), (1, 16, 3, 3, 3), rank=DEFAULT_RANK),
    "1x1, default rank": Row(lambda: nn.Conv2d(16, 16, 1), (1, 16, 4, 4), rank=DEFAULT_RANK),
    "3x3, 4 layers": Row(*FLAT, copies=4),
    "3x3, 16 layers": Row(*FLAT, copies=16),
    "3x3x3, 4 layers": Row(*SOLID, copies=4),
    "3x3x3, 16 layers": Row(*SOLID, copies=16),
}  # fmt: skip


@contextmanager
def decided(choice: tuple[str, str] | None) -> Iterator[None]:
    """Within, the plan decides so for every layer."""
    from flora.layers.planning import Choice
    from flora.tuner import forward

    own = forward.choose
    if choice is not None:
        forward.choose = lambda *args, **kwargs: Choice(*choice)
    try:
        yield
    finally:
        forward.choose = own


def under(method: str, row: Row, dtype: torch.dtype) -> nn.Module:
    """The layer as that method trains it."""
    from peft import LoraConfig, get_peft_model

    import flora

    torch.manual_seed(0)
    base = Copies([row.build() for _ in range(row.copies)]).to(dtype).requires_grad_(False)
    if method == "frozen":
        return base

    if row.targets:
        names = []
    else:
        names = [f"{place}{row.inside}" for place in range(row.copies)]

    targets: dict[str, Any] = {"target_modules": names, "target_parameters": list(row.targets) or None}
    config: Any
    if method == "lora":
        rank = row.lora_rank or row.rank
        config = LoraConfig(r=rank, lora_alpha=2 * rank, **targets)
    else:
        config = flora.FloraConfig(r=row.rank, **targets)

    model = get_peft_model(base, config)
    if method == "prepared":
        flora.prepare(model)

    return model


def training_step(model: nn.Module, row: Row, dtype: torch.dtype) -> Callable[[], None]:
    """Forward, and backward to the input and to what is trained."""
    x = row.fill(row.shape, dtype=dtype)
    if x.is_floating_point():
        x.requires_grad_(True)
    args = (x, *row.args(x))
    trained = [value for value in model.parameters() if value.requires_grad]
    grads = [torch.ones_like(out) for out in model(*args)]
    differentiable = model(*args)[0].requires_grad

    def step() -> None:
        for value in (x, *trained):
            value.grad = None
        outs = model(*args)
        if differentiable:
            torch.autograd.backward(outs, grads)

    return step


def measure(name: str, dtype: str, repeats: int, seed: int = 0) -> dict[str, Any]:
    """One row in one dtype: microseconds of a layer's step under each method, and FLoRA relative to LoRA."""
    from benchmarks import clock, gpu_branch

    row, kind, steps = ROWS[name], DTYPES[dtype], {}
    with gpu_branch.taken(with_stand_ins=True), decided(row.choice):
        for method in METHODS if row.lora else METHODS[:-1]:
            model = under(method, row, kind)
            step = training_step(model, row, kind)
            if method != "prepared" or is_prepared(model):
                steps[method] = step

        times = clock.interleave(steps, clock.Budget(20, repeats, repeats, 600.0), seed)

    busy = {method: [processor for _, processor in values] for method, values in times.items()}
    found: dict[str, Any] = {"case": name, "dtype": dtype, "rank": row.rank, "copies": row.copies, "repeats": repeats}
    found["us"] = {method: round(1e6 * statistics.median(values) / row.copies, 1) for method, values in busy.items()}
    for method in ("flora", "prepared"):
        if "lora" in busy and method in busy:
            pairs = zip(busy[method], busy["lora"], strict=True)
            found[f"{method}_to_lora"] = round(statistics.median(ours / theirs for ours, theirs in pairs), 3)

    return found


def is_prepared(model: nn.Module) -> bool:
    """Whether the last forward has shown layers that can be formed together."""
    import flora

    return bool(flora.prepare(model).groups)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures every row and writes what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=lambda text: text.split(";"), default=list(ROWS), help="names, parted by ;")
    parser.add_argument("--repeats", type=int, default=400)
    parser.add_argument("--quick", action="store_true", help="few repeats, results elsewhere")
    parser.add_argument("--out", type=Path, help="folder of the result")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(argv)
    from benchmarks import quiet

    quiet.settle()
    torch.set_num_threads(1)
    from benchmarks import results

    options = results.Options(asked.quick, (1,), asked.seed, results.load())
    rows = []
    for name in asked.rows:
        for dtype in DTYPES:
            found = measure(name, dtype, 20 if asked.quick else asked.repeats, asked.seed)
            rows.append(found)
            times = "  ".join(f"{method} {value:7.1f}" for method, value in found["us"].items())
            print(
                f"{name:<36}{dtype:<10}{times}  {found.get('flora_to_lora', '')}  {found.get('prepared_to_lora', '')}",
                flush=True,
            )

    folder = asked.out or (results.QUICK if asked.quick else results.RESULTS)
    print(f"written {results.write('host', {'rank': RANK, 'rows': rows}, options, folder)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
