"""The base model of an adapter: which class it is, where its files are, and what is known of it without its weights.

Everything that has to know one of these asks here. Nothing that somebody sent is imported: a class comes from a package
that is installed, or from a module that the running program has imported itself.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from flora.errors import UserError, user_errors
from flora.layers.layout import Layout, of_module
from flora.storage.atomic import read_json
from flora.storage.parsing import read_yaml
from flora.storage.tensors import check_exists, read_object

# Packages that every installation has.
ALWAYS_KNOWN = ("flora", "transformers")
# task_type of an adapter config -> the class of transformers that PEFT pairs it with.
AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "FEATURE_EXTRACTION": "AutoModel",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}
# The files of a model on the hub that are needed.
DOWNLOADED = ("model*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")


# ---- what is known without weights -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Base:
    """A base model without its weights.

    Attributes:
        shapes: the full name of a parameter -> its shape; those of a quantised or sharded weight are left out.
        layouts: the same -> what its dimensions mean.
        model: the model itself, on the meta device unless it was given.
    """

    shapes: Mapping[str, tuple[int, ...]]
    layouts: Mapping[str, Layout]
    model: nn.Module


def open_base(base: Base | nn.Module | str | Path) -> Base:
    """Reads a base model: a module (the meta device will do), or a folder of transformers or diffusers.

    Args:
        base: a folder is built from its ``config.json`` on the meta device, so no weight is read; one that is open
            already comes back as it is.

    Raises:
        FileNotFoundError: the folder or its config does not exist.
        UserError: the config names no class that is installed.
    """
    if isinstance(base, Base):
        return base

    model = base if isinstance(base, nn.Module) else _build(check_exists(Path(base), "base model"))

    shapes = {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.is_floating_point() or parameter.is_complex()
    }

    return Base(shapes, of_module(model), model)


def try_base(folder: Path) -> Base | None:
    """:func:`open_base`, or None where the folder has no config, or its config names no class that is installed."""
    if not (folder / "config.json").is_file():
        return None
    try:
        return open_base(folder)
    except UserError:
        return None


def _build(folder: Path) -> nn.Module:
    settings = read_object(folder / "config.json")
    if "_class_name" in settings:
        return _from_diffusers(settings)

    names = _architectures(settings)
    if not names or stored_class(settings) is None:
        raise UserError(
            f"{folder / 'config.json'} names no installed architecture (architectures: {names}); pass the model "
            "itself as base in Python"
        )

    return meta_model(str(folder))


def _from_diffusers(settings: Mapping[str, Any]) -> nn.Module:
    found = stored_class(settings)
    if found is None:
        import diffusers

        raise UserError(
            f"diffusers {diffusers.__version__} has no class {settings['_class_name']!r}; install a newer one"
        )

    with torch.device("meta"), user_errors(Exception, about=f"the config of a {settings['_class_name']}"):
        return cast("nn.Module", found.from_config(dict(settings)))


def meta_model(source: str) -> nn.Module:
    """A model of transformers without weights, of the class that its config names.

    Args:
        source: a hub id, a folder, or a config as JSON or YAML.

    Raises:
        UserError: there is no such config, or transformers does not know it.
    """
    from transformers import AutoModel

    # Anything that transformers raises here is about a config that it did not write or cannot build.
    try:
        config = _transformers_config(source)
    except Exception as error:
        raise UserError(f"no transformers config found in {source!r}: {_why(source, error)}") from None

    found = stored_class({"architectures": config.architectures})
    build: Any = found
    if found is None:
        build = AutoModel.from_config
        if type(config) not in AutoModel._model_mapping:
            build = _only_class_of(config, source)

    with torch.device("meta"), user_errors(Exception, about=f"no model can be built from the config in {source!r}"):
        return cast("nn.Module", build(config))


def _why(source: str, error: Exception) -> str:
    """What is wrong with what stands for a model, and what to give instead."""
    path = Path(source)
    if path.suffix == ".py":
        return "it is a Python file; name its function that returns the model, as FILE.py:FUNCTION, with --run-code"
    if (path / "adapter_config.json").is_file():
        return "it is an adapter; give the folder or the hub id of its base model"
    if path.is_dir() and not (path / "config.json").is_file():
        return "the folder has no config.json; give one that save_pretrained wrote, or a hub id"
    if path.is_file():
        return f"the file is not its config.json or YAML ({' '.join(str(error).split())[:80]})"
    if not path.exists():
        return f"there is no such file or folder here, and on the hub: {' '.join(str(error).split())[:120]}"

    return " ".join(str(error).split())[:200]


def _only_class_of(config: Any, source: str) -> Any:
    """The one class that takes a config which no auto class knows, such as that of a vocoder."""
    from transformers import PreTrainedModel

    module = importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    classes = [each for each in vars(module).values() if isinstance(each, type) and issubclass(each, PreTrainedModel)]
    takers = [each for each in classes if each.config_class is type(config) and not each.__name__.endswith("Model")]
    if len(takers) != 1:
        names = ", ".join(each.__name__ for each in takers) or "none that is known"
        raise UserError(f'the config in {source!r} names no class; add "architectures" to it, with one of {names}')

    return takers[0]


def _transformers_config(source: str) -> Any:
    from transformers import AutoConfig

    path = Path(source)
    if not path.is_file():
        return AutoConfig.from_pretrained(source)

    values = read_yaml(path) if path.suffix in (".yaml", ".yml") else read_json(path)

    if not isinstance(values, dict) or "model_type" not in values:
        raise UserError("it has no model_type")

    return AutoConfig.for_model(values.pop("model_type"), **values)


# ---- which class -----------------------------------------------------------------------------------------------------


def stored_class(settings: Mapping[str, Any]) -> Any:
    """The installed class that the ``config.json`` of a model names, or None."""
    if "_class_name" in settings:
        try:
            import diffusers
        except ImportError:
            raise UserError(f"the base is a diffusers {settings['_class_name']}: pip install diffusers") from None

        library, names = cast("Any", diffusers), [str(settings["_class_name"])]
    else:
        import transformers

        library, names = transformers, _architectures(settings)

    found = (getattr(library, name, None) for name in names)

    return next((each for each in found if isinstance(each, type) and issubclass(each, nn.Module)), None)


def _architectures(settings: Mapping[str, Any]) -> list[str]:
    """The names of classes in the ``config.json`` of a model; anything else there is ignored."""
    given = settings.get("architectures")
    if not isinstance(given, list | tuple):
        return []
    return [name for name in given if isinstance(name, str)]


def adapted_class(config: Mapping[str, Any], folder: Path) -> Any:
    """The class of the base model, or an auto class of transformers, that the config of an adapter names.

    Args:
        config: of the adapter.
        folder: of the adapter, for messages; nothing in it is imported.

    Raises:
        UserError: it names none, or one that is not installed.
    """
    mapping, task = config.get("auto_mapping"), config.get("task_type")
    if mapping:
        module, name = _named_class(mapping, folder)
        found = getattr(module, name, None)
        if not (isinstance(found, type) and issubclass(found, nn.Module)):
            raise UserError(f"{folder}: auto_mapping names {name!r}, which is not a model in {module.__name__}")

        return found

    if isinstance(task, str) and task in AUTO_CLASSES:
        return getattr(importlib.import_module("transformers"), AUTO_CLASSES[task])

    raise UserError(
        f"{folder / 'adapter_config.json'} says neither the class (auto_mapping) nor a task_type of "
        f"{', '.join(AUTO_CLASSES)}; save the adapter with save_pretrained from its PeftModel"
    )


def _named_class(mapping: object, folder: Path) -> tuple[Any, str]:
    """The module and the name of the class in ``auto_mapping``.

    The module is imported only if it is part of an installed package. Python would also find one in the folder where a
    command runs, and that may be a folder that somebody sent.
    """
    given = mapping if isinstance(mapping, Mapping) else {}
    library, name = given.get("parent_library"), given.get("base_model_class")
    if not isinstance(library, str) or not isinstance(name, str):
        raise UserError(f"{folder}: auto_mapping is {mapping!r}, expected the names of a library and a class in it")
    if library in sys.modules:
        return sys.modules[library], name

    package = library.partition(".")[0]
    if package not in ALWAYS_KNOWN and package not in packages_distributions():
        raise UserError(
            f"{folder}: the base model's class is {library}.{name}, and {package} is not an installed package, so it "
            "is not imported; install it, or import it yourself in Python before this call"
        )

    with user_errors(ImportError, about=f"{folder}: the base model's class is {library}.{name}"):
        return importlib.import_module(library), name


def is_stored_as(folder: Path, config: Mapping[str, Any], adapter: Path) -> bool:
    """Whether the files of a model are of the class that an adapter was trained on.

    They are not where the adapter was trained on a model with a new head, made from the files of another.

    Args:
        folder: of the model.
        config: of the adapter; one that names no class was trained on what the files are.
        adapter: its folder.
    """
    if not (config.get("auto_mapping") or config.get("task_type")):
        return True

    wanted, settings = adapted_class(config, adapter), read_object(folder / "config.json")
    mapping = getattr(wanted, "_model_mapping", None)
    # An auto class: which one it stands for here.
    if mapping is not None:
        with user_errors(Exception, about=f"{folder / 'config.json'}"):
            wanted = mapping.get(type(_transformers_config(str(folder))), wanted)

    return wanted.__name__ in [*_architectures(settings), settings.get("_class_name")]


# ---- where it is -----------------------------------------------------------------------------------------------------


def local_folder(named: str) -> Path:
    """The folder or file of a base model on this machine; one on the hub is downloaded.

    Raises:
        FileNotFoundError: it is neither here nor on the hub.
    """
    if Path(named).exists():
        return Path(named)

    from transformers.utils.hub import snapshot_download

    try:
        return Path(snapshot_download(named, allow_patterns=list(DOWNLOADED)))
    except (OSError, ValueError) as error:
        # Not there, no network, or no name that the hub could have.
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"the base model {named!r} is not a local folder and could not be loaded from the hub ({reason}); give its "
            "folder with --base"
        ) from None
