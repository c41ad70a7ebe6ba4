"""The model card of an adapter folder: how to load it, what it was trained on, its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

CARD = "README.md"
BLANK = "[More Information Needed]"  # PEFT's template is made of it
HOME = "https://pypi.org/project/flora-peft"

AUTO_CLASSES = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_CLS": "AutoModelForSequenceClassification"}

LOAD = """## Load

`import flora` comes first: it tells PEFT what the adapter is (`pip install flora-peft`).

```python
import flora
from peft import PeftModel
{library}
{base}
model = PeftModel.from_pretrained(base, "{folder}")
```
"""


def adapter_card(
    config: Mapping[str, Any],
    *,
    title: str = "A FLoRA adapter",
    folder: str = "path/to/this/folder",
    options: str = "",
    about: str = "",
    tags: Sequence[str] = (),
    results: Sequence[EvalResult] = (),
) -> str:
    """The text of a card, with metadata as the hub checks it.

    Args:
        config: What is in ``adapter_config.json``.
        title: The heading.
        folder: The folder as it is written in the example.
        options: What the base model's ``from_pretrained`` needs besides its name, such as ``", num_labels=3"``.
        about: Markdown after the example.
        tags: For the hub, beside ours.
        results: Measurements, for the hub.
    """
    base = str(config.get("base_model_name_or_path") or "")
    data = ModelCardData(
        library_name="peft",
        tags=["flora", "tucker", *tags],
        base_model=base if is_hub_id(base) else None,
        model_name=title if results else None,
        eval_results=list(results) or None,
    )

    if is_hub_id(base):
        told = f"the base model `{base}`"
    else:
        told = "a base model that is not on the hub"

    lead = (
        f"A FLoRA adapter for {told}: the change of each weight is a small Tucker form with as many dimensions as the "
        f"weight. Written by [flora-peft]({HOME})."
    )
    library, loading = _how_to_load(config, base, options)
    load = LOAD.format(library=library, base=loading, folder=folder)
    parts = [f"---\n{data.to_yaml()}\n---", f"# {title}", lead, load.rstrip(), about.strip()]

    return "\n\n".join(part for part in parts if part) + "\n"


def is_hub_id(name: str) -> bool:
    """Whether a base model's name is ``owner/name`` or ``name``, and no path of some machine."""
    return bool(name) and not name.startswith((".", "/", "~")) and name.count("/") < 2 and not Path(name).exists()


def _how_to_load(config: Mapping[str, Any], base: str, options: str) -> tuple[str, str]:
    """The lines that import and make the base model."""
    mapping = config.get("auto_mapping") or {}
    module, name = mapping.get("parent_library", ""), mapping.get("base_model_class", "")
    known = module.partition(".")[0] in ("transformers", "diffusers", "flora")
    if not base or (mapping and not known):
        return "", "base = ...  # the model as it was before the adapter was attached"

    if not mapping:
        task = str(config.get("task_type"))
        name = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_CLS": "AutoModelForSequenceClassification"}.get(
            task, "AutoModel"
        )
        module = "transformers"

    library = module if module.startswith("flora.") else module.partition(".")[0]

    where = base if is_hub_id(base) else "path/to/the/base/model"

    return f"from {library} import {name}\n", f'base = {name}.from_pretrained("{where}"{options})'


def fill_blank_card(folder: Path, config: Mapping[str, Any]) -> None:
    """Writes a card into a folder that has none, or replaces the blank one that PEFT writes; others stay."""
    path, card = folder / CARD, ModelCard(adapter_card(config))
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        if "import flora" in text or BLANK not in text:
            return

        # PEFT promises this entry to its readers, also where it is no id of the hub.
        card.data["base_model"] = ModelCard(text, ignore_metadata_errors=True).data.get("base_model")

    card.save(path)
