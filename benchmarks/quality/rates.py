"""Which learning rate is best for which kind of layer and rank: ``python -m benchmarks.quality.rates [--quick]``.

One frozen layer learns the outputs of the same layer with a changed weight. The change is random with a spectrum that
falls, and a tenth of the size of the weight. Each adapter is trained at seven rates; the best one is that of the
lowest error on other inputs, the mean over seeds. A scale that needs no choice would have the same best rate in every
row. What was found goes to ``benchmarks/results/quality/rates.json``.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

RATES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
RANKS = (2, 8, 64)
SEEDS = (0, 1)
STEPS, SAMPLES, CHANGE = 150, 512, 0.1
RESULT = Path(__file__).parents[1] / "results" / "quality" / "rates.json"


class Kind(NamedTuple):
    """A kind of layer."""

    build: Callable[[], Any]
    shape: tuple[int, ...]  # of one input


def kinds() -> dict[str, Kind]:
    """The layers that are tried."""
    from torch import nn

    return {
        "Linear 128 -> 128": Kind(lambda: nn.Linear(128, 128), (128,)),
        "Linear 64 -> 256": Kind(lambda: nn.Linear(64, 256), (64,)),
        "Conv1d 64, 3": Kind(lambda: nn.Conv1d(64, 64, 3, padding=1), (64, 6)),
        "Conv2d 64, 3x3": Kind(lambda: nn.Conv2d(64, 64, 3, padding=1), (64, 4, 4)),
        "Conv2d 64, 1x1": Kind(lambda: nn.Conv2d(64, 64, 1), (64, 3, 3)),
        "Conv2d 64, 7x7, depthwise": Kind(lambda: nn.Conv2d(64, 64, 7, padding=3, groups=64), (64, 5, 5)),
        "Conv3d 32, 3x3x3": Kind(lambda: nn.Conv3d(32, 32, 3, padding=1), (32, 3, 3, 3)),
    }


def changed(weight: Any) -> Any:
    """A random change of the weight with a spectrum that falls as 1 / n in its first two modes."""
    import torch

    delta = torch.randn_like(weight).flatten(1)
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    delta = (left / torch.arange(1, len(values) + 1)) @ right
    return weight + CHANGE * float(weight.norm() / delta.norm()) * delta.view_as(weight)


def error_after(method: str, kind: Kind, rank: int, rate: float, seed: int) -> float:
    """The relative error on other inputs after training; 1 is that of the frozen layer."""
    import torch
    from peft import LoraConfig, get_peft_model

    import flora

    torch.manual_seed(seed)
    base = torch.nn.Sequential(kind.build()).requires_grad_(False)
    teacher = copy.deepcopy(base)
    teacher[0].weight.copy_(changed(base[0].weight))
    x, other = torch.randn(SAMPLES, *kind.shape), torch.randn(SAMPLES, *kind.shape)
    wanted, kept = teacher(x), teacher(other)
    before = float((base(other) - kept).square().mean())

    config: Any
    if method == "flora":
        config = flora.FloraConfig(r=rank, target_modules=["0"])
    else:
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0"])
    model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], rate, weight_decay=0)

    for step in range(STEPS):
        rows = torch.arange(64 * step, 64 * step + 64) % SAMPLES
        loss = (model(x[rows]) - wanted[rows]).square().mean() / before
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with torch.no_grad():
        return float((model(other) - kept).square().mean()) / before


def refused(method: str, kind: Kind, rank: int) -> bool:
    """LoRA needs ranks that the groups divide."""
    groups = getattr(kind.build(), "groups", 1)
    return method == "lora" and rank % groups != 0


def main() -> None:
    """Trains everything and writes what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, two ranks; nothing is written")
    asked = parser.parse_args()
    import warnings

    import torch

    from flora.report.provenance import provenance

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = []

    for name, kind in kinds().items():
        for rank in RANKS[:2] if asked.quick else RANKS:
            for method in ("flora", "lora"):
                if refused(method, kind, rank):
                    continue

                seeds = SEEDS[:1] if asked.quick else SEEDS
                errors = {
                    rate: sum(error_after(method, kind, rank, rate, seed) for seed in seeds) / len(seeds)
                    for rate in RATES
                }
                best = min(RATES, key=errors.__getitem__)
                rows.append({"layer": name, "rank": rank, "method": method, "best": best, "errors": errors})
                told = " ".join(f"{error:.3f}" for error in errors.values())
                print(f"{name:<28}{rank:>4} {method:<6} best {best:<7g} {told}", flush=True)

    if not asked.quick:
        result = {"rates": RATES, "seeds": SEEDS, "steps": STEPS, "change": CHANGE, "rows": rows, **provenance()}
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
