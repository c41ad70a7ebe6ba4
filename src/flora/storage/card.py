"""The model card of an adapter folder: how to load it, what it was trained on, its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

CARD = "README.md"
# PEFT's template consists of it.
BLANK = "[More Information Needed]"
HOME = "https://pypi.org/project/flora-peft"

LOAD = """## Load

{first}

```python
{imports}
{library}
{base}
model = PeftModel.from_pretrained(base, "{folder}")
```
"""
# The peft_type of an adapter that needs `import flora`.
OURS = "TUCKER"
FIRST = "`import flora` comes first: it tells PEFT what the adapter is (`pip install flora-peft`)."
PLAIN = "Plain PEFT loads it; flora-peft is not needed."


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

    if _is_ours(config):
        kind = "FLoRA"
        form = ": the change of each weight is a small Tucker form with as many dimensions as the weight"
    else:
        kind, form = "LoRA", ", converted from a FLoRA adapter"

    lead = f"A {kind} adapter for {told}{form}. Written by [flora-peft]({HOME})."
    load = _load_section(config, options, folder)
    parts = [f"---\n{data.to_yaml()}\n---", f"# {title}", lead, load.rstrip(), about.strip()]

    return "\n\n".join(part for part in parts if part) + "\n"


def _is_ours(config: Mapping[str, Any]) -> bool:
    return str(config.get("peft_type") or OURS) == OURS


def _load_section(config: Mapping[str, Any], options: str = "", folder: str = "path/to/this/folder") -> str:
    library, base = _how_to_load(config, str(config.get("base_model_name_or_path") or ""), options)
    imports = "from peft import PeftModel"
    first = PLAIN
    if _is_ours(config):
        imports = f"import flora\n{imports}"
        first = FIRST

    return LOAD.format(first=first, imports=imports, library=library, base=base, folder=folder)


def is_hub_id(name: str) -> bool:
    """Whether a base model's name is ``owner/name`` or ``name``, and no path of some machine."""
    return bool(name) and not name.startswith((".", "/", "~")) and name.count("/") < 2 and not Path(name).exists()


def _how_to_load(config: Mapping[str, Any], base: str, options: str) -> tuple[str, str]:
    """The lines that import and make the base model."""
    mapping = config.get("auto_mapping") or {}
    if not isinstance(mapping, Mapping) or not all(isinstance(value, str) for value in mapping.values()):
        mapping = {}

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


def complete_card(folder: Path, config: Mapping[str, Any], results: Sequence[EvalResult] = ()) -> None:
    """Makes the card of an adapter's folder say how to load it.

    A folder without a card gets ours, and so does one with PEFT's blank template. A card that somebody wrote, or TRL or
    transformers' Trainer, stays; what it lacks is added.

    Args:
        folder: Of the adapter.
        config: What is in its ``adapter_config.json``.
        results: Measurements, for a card of ours.
    """
    path, card = folder / CARD, ModelCard(adapter_card(config, results=results))
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        if "import flora" in text:
            return
        if BLANK not in text:
            _add_loading(path, text, config)
            return

        # PEFT promises this entry to its readers, also where it is no id of the hub.
        card.data["base_model"] = ModelCard(text, ignore_metadata_errors=True).data.get("base_model")

    card.save(path)


def _add_loading(path: Path, text: str, config: Mapping[str, Any]) -> None:
    """Adds to a card how the adapter is loaded, and to an example that calls ``pipeline`` the import it needs."""
    card = ModelCard(text, ignore_metadata_errors=True)
    card.data["tags"] = sorted({*(card.data.get("tags") or []), "flora", "tucker"})

    example = "```python\nfrom transformers import pipeline\n"
    told = card.text.replace(example, example.replace("\nfrom", "\nimport flora  # tells PEFT the method\nfrom"))
    card.text = f"{told.rstrip()}\n\n{_load_section(config)}"
    card.save(path)


def results_in(folder: Path) -> list[EvalResult]:
    """The measurements that the card of a folder has for the hub; none where there is no card that can be read."""
    path = folder / CARD
    if not path.is_file():
        return []

    # A card that is no text, or whose head is no YAML, has no results to take along.
    try:
        data = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    except Exception:
        # Whatever the parsers raise about a text that somebody sent.
        return []

    return list(getattr(data, "eval_results", None) or [])
