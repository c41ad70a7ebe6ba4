"""The card of an output folder: that of its adapter, with the recipe and the numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult

from flora.storage.card import adapter_card, is_hub_id

ABOUT = """## Use it

```console
$ flora predict {folder} INPUT...                # what it makes of new inputs
$ flora eval {folder}                            # the numbers below, measured again
$ flora merge {folder} --out {folder}-merged     # an ordinary model, verified before it is written
$ flora inspect {folder}                         # what is in it, layer by layer
```

## Numbers

Trained by the recipe `{recipe}`.

| | |
|---|---|
{numbers}

Settings: `config.yaml`. Everything measured, with machine and versions: `metrics.json`.
"""


def model_card(
    metrics: Mapping[str, Any], adapter_config: Mapping[str, Any], folder: str, classes: int | None = None
) -> str:
    """The text of ``README.md``.

    Args:
        metrics: what is in ``metrics.json``.
        adapter_config: what is in ``adapter_config.json``.
        folder: the output folder; only its name is written, so that no path of a machine is published.
        classes: of the head that the base model was given, if it was.
    """
    mapping, base = adapter_config.get("auto_mapping") or {}, str(adapter_config["base_model_name_or_path"])
    name, recipe = folder.rstrip("/").rpartition("/")[2], metrics["recipe"]
    measured = [(split, metric, value) for split in ("validation", "test") for metric, value in metrics[split].items()]
    numbers = [
        *((f"{split} {metric}", f"{value:.4f}") for split, metric, value in measured),
        ("trainable parameters", f"{metrics['trainable_parameters']:,} of {metrics['total_parameters']:,}"),
        ("adapter file", f"{metrics['adapter_bytes']:,} bytes"),
        ("training", f"{metrics['seconds']:.1f} s, {metrics['steps']} steps"),
        ("seed", str(metrics["seed"])),
    ]

    options = f", num_labels={classes}, ignore_mismatched_sizes=True" if classes else ""

    if mapping.get("parent_library", "").startswith("diffusers") and is_hub_id(base):
        options = ', subfolder="unet"'

    return adapter_card(
        adapter_config,
        title=name,
        folder=name,
        options=options,
        about=ABOUT.format(
            folder=name, recipe=recipe, numbers="\n".join(f"| {what} | {value} |" for what, value in numbers)
        ),
        tags=[recipe.rpartition("/")[2].removesuffix(".py")],
        results=[
            EvalResult(recipe, "data of the user", recipe, metric, float(value), dataset_split=split)
            for split, metric, value in measured
            if split == "test" and metric != "loss"
        ],
    )
