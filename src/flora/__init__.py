"""FLoRA: parameter-efficient fine-tuning for weights of any number of dimensions, as a PEFT method.

Importing ``flora`` registers the method with PEFT; ``FloraConfig`` then works wherever PEFT takes a config.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from flora.layers.plan_report import Plan, plan
from flora.layers.prepared import prepare
from flora.layers.table import LAYERS
from flora.tucker.delta import TuckerDelta
from flora.tucker.form import Tucker
from flora.tucker.initialize import INITIALIZERS
from flora.tuner import register

register()

from flora.tuner.config import FloraConfig  # noqa: E402  (needs the registered type)

if TYPE_CHECKING:
    from flora.convert import Adapter, load, save
    from flora.convert.extraction.finetune import extract
    from flora.tucker.decomposition import decompose
    from flora.tuner.gradient.start import adapt, start

__all__ = [
    "INITIALIZERS",
    "LAYERS",
    "Adapter",
    "FloraConfig",
    "Plan",
    "Tucker",
    "TuckerDelta",
    "adapt",
    "decompose",
    "extract",
    "load",
    "plan",
    "plan_model",
    "prepare",
    "save",
    "start",
]
__version__ = "0.1.0"
# Modules under the names that saved adapters know.
__path__ = [*__path__, str(Path(__path__[0], "runs", "former"))]

_LATER = {
    "Adapter": "flora.convert",
    "load": "flora.convert",
    "save": "flora.convert",
    "extract": "flora.convert.extraction.finetune",
    "decompose": "flora.tucker.decomposition",
    "adapt": "flora.tuner.gradient.start",
    "start": "flora.tuner.gradient.start",
    "plan_model": "flora.report.model_plan",
}


def __getattr__(name: str) -> Any:
    """What works on files is imported when it is first used, so that ``import flora`` adds little to PEFT's."""
    if name not in _LATER:
        import difflib

        near = difflib.get_close_matches(name.lower(), {word.lower(): word for word in __all__}, n=1)
        meant = [word for word in __all__ if word.lower() in near]
        hint = f"; did you mean flora.{meant[0]}?" if meant else ""
        raise AttributeError(f"module 'flora' has no attribute {name!r}{hint}")

    import importlib

    return getattr(importlib.import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    """The public names, those that are imported later among them."""
    return sorted([*__all__, "__version__"])
