"""The model card of an adapter folder: what it is, how to load it, its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

CARD = """---
library_name: peft
base_model: {base}
tags: [flora, tucker, {recipe}]
---

# {title}

A FLoRA adapter (the change of each weight is a Tucker form with as many dimensions as the weight), trained with
[flora-peft](https://pypi.org/project/flora-peft) by the recipe `{recipe}` on the base model `{base}`.

## Load

`import flora` comes first: it tells PEFT what the adapter is.

```python
import flora
from peft import PeftModel
from {library} import {model_class}

base = {model_class}.from_pretrained("{base}"{part}{head})
model = PeftModel.from_pretrained(base, "{folder}")
```

## Export

```
flora eval {folder}                            # the numbers below, measured again
flora merge {folder} --out {folder}-merged     # an ordinary model: base + adapter, verified before it is written
flora inspect {folder}                         # what is in it, layer by layer
```

## Numbers

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
        folder: the folder as it is written in the examples.
        classes: of the head that the base model was given, if it was.
    """
    mapping, base = adapter_config.get("auto_mapping") or {}, adapter_config["base_model_name_or_path"]
    module = mapping.get("parent_library", "transformers")
    library = module if module.startswith("flora.") else module.partition(".")[0]
    numbers = [
        *(
            (f"{split} {name}", f"{value:.4f}")
            for split in ("validation", "test")
            for name, value in metrics[split].items()
        ),
        ("trainable parameters", f"{metrics['trainable_parameters']:,} of {metrics['total_parameters']:,}"),
        ("adapter file", f"{metrics['adapter_bytes']:,} bytes"),
        ("training", f"{metrics['seconds']:.1f} s, {metrics['steps']} steps"),
        ("seed", str(metrics["seed"])),
    ]
    return CARD.format(
        title=folder.rstrip("/").rpartition("/")[2],
        base=base,
        part=', subfolder="unet"' if library == "diffusers" and not Path(base).is_dir() else "",
        recipe=metrics["recipe"],
        library=library,
        model_class=mapping.get("base_model_class", "AutoModel"),
        head=f", num_labels={classes}, ignore_mismatched_sizes=True" if classes else "",
        folder=folder,
        numbers="\n".join(f"| {name} | {value} |" for name, value in numbers),
    )
