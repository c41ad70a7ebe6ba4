"""What to install for a module that cannot be imported: the smallest extra that brings it."""

from __future__ import annotations

import re

# An extra of pyproject.toml -> the modules that it brings, the smallest extra first.
EXTRAS: dict[str, set[str]] = {
    "recipes": {"PIL", "matplotlib", "scipy", "sklearn"},
    "medical": {"monai", "nibabel"},
    "quantized": {"bitsandbytes"},
    "rivals": {"lycoris"},
    "vision": {"datasets", "pycocotools"},
    "text": {"datasets", "sentencepiece", "trl"},
    "audio": {"datasets", "soundfile"},
    "diffusion": {"datasets", "diffusers"},
}
# The first word of a recipe's name -> the extra of its field.
FIELDS = {
    "vision": "vision",
    "text": "text",
    "multimodal": "text",
    "volume": "medical",
    "audio": "audio",
    "diffusion": "diffusion",
}


def install_hint(module: str, config: str = "") -> str:
    """What to do about a module that cannot be imported.

    Args:
        module: The name that was imported, such as ``"trl"`` or ``"PIL.Image"``.
        config: The config that is being run, if any; its field decides where several extras bring the module.

    Returns:
        Half a sentence, to be put behind "needs ...".

    Examples:
        >>> install_hint("datasets", "text_causal-tiny")
        'datasets, which is not installed: pip install "flora-peft[text]"'
    """
    # importlib.metadata puts a whole sentence here, with what is required in quotes.
    required = re.search(r"'([\w-]+)[^']*' distribution was not found", module)
    if required:
        return f"{required[1]}, which is not installed: pip install {required[1]}"

    package = module.partition(".")[0]
    bringing = [extra for extra, modules in EXTRAS.items() if package in modules]
    if not bringing:
        return (
            f"the module {package!r}, which cannot be imported and is not part of flora-peft: install the package that "
            f"has it, or add the folder of {package}.py to PYTHONPATH"
        )

    field = FIELDS.get(config.partition("_")[0].partition("-")[0])
    extra = field if field in bringing else bringing[0]

    return f'{package}, which is not installed: pip install "flora-peft[{extra}]"'
