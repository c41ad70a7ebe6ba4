"""Which modules and raw parameters a config targets: found and checked before the model is changed."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTunerLayer, NoMatchingPeftModuleError
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import nn
from torch.nn.parameter import is_lazy
from transformers import PreTrainedModel

from flora.errors import UserError
from flora.layers.names import unsaved
from flora.layers.patterns import exact_pattern
from flora.layers.table import Layer, parameter, refusal, weight_shape
from flora.tuner.adapted import AdaptedLayer, row_for
from flora.tuner.config import FloraConfig
from flora.tuner.questions import question_about
from flora.tuner.selection import Names, Selection, ends_of, list_of

SHORTHANDS = {
    "all": ("linear", "conv", "embedding", "bilinear", "attention", "recurrent"),
    "all-linear": ("linear",),
    "all-conv": ("conv",),
    "all-norm": ("norm",),
}
# What PEFT adds to modules_to_save by itself, whether the model has it or not.
HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


@dataclass(frozen=True)
class Site:
    """A module that a config targets: its name, itself, and its row (or a row made for one raw parameter)."""

    name: str
    module: nn.Module
    row: Layer


def modules_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module that could be a target: adapted layers unwrapped, what is inside them left out."""
    # What is inside a module follows it at once.
    inside = None
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            inside = f"{name}."

        yield name, module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def shorthands_in(wanted: str | Iterable[str] | None, model: nn.Module) -> set[str]:
    """The words of ``target_modules`` that stand for kinds of layers, as they are written.

    In a list, what ends the name of a module means that module.
    """
    if isinstance(wanted, str):
        return {wanted} if wanted.lower() in SHORTHANDS else set()

    words = {word for word in wanted or () if word.lower() in SHORTHANDS}
    if not words:
        return words

    return words - {name.rpartition(".")[2] for name, _ in modules_of(model)}


def expand(shorthand: str, model: nn.Module) -> set[str]:
    """The list that a key of ``SHORTHANDS`` stands for, the output head of a transformers model excepted.

    Raises:
        NoMatchingPeftModuleError: nothing in the model is of these kinds.
    """
    kinds, head, tied = SHORTHANDS[shorthand], _output_head(model), _tied(model)
    names: set[str] = set()
    left_out: dict[str, list[str]] = {}
    for name, module in modules_of(model):
        row = row_for(module)
        if not name or row is None or row.kind not in kinds or _inside_attention(name, model):
            continue
        if any(name == key or name.startswith(f"{key}.") for key in head):
            continue

        reason = refusal_for(module)
        if reason is None and any(id(parameter(module, weight)) in tied for weight in row.weights(module)):
            reason = "the weight is tied to another module's"
        if reason is None:
            reason = question_about(name, module, model)
        if reason is None and any(f"{name}.{weight}" in unsaved(model) for weight in row.weights(module)):
            reason = "the model computes the weight itself and does not save it"

        if reason is None:
            names.add(name)
        else:
            left_out.setdefault(reason, []).append(name)

    for reason, skipped in left_out.items():
        warnings.warn(f"target_modules={shorthand!r} leaves out {', '.join(sorted(skipped))}: {reason}", stacklevel=2)

    if not names:
        raise NoMatchingPeftModuleError(
            f"target_modules={shorthand!r} matches nothing: {type(model).__name__} has no layer of kind "
            f"{' or '.join(kinds)} that can be adapted outside its head{_own_weights(model)}"
        )

    return list_of(names, [name for name, _ in model.named_modules() if name not in names])


def refusal_for(module: nn.Module) -> str | None:
    """Why a module cannot be adapted; quantised linears of any class can."""
    if row_for(module) is not None and not hasattr(module, "weight"):
        return None
    return refusal(module)


def raw_parameter(name: str, module: nn.Module, leaf: str) -> Site:
    """A site for one raw parameter of a module."""
    count = len(weight_shape(module, leaf))

    if getattr(module, "is_transposed", False):
        stack = ("expert", "in", "out")
    else:
        stack = ("expert", "out", "in")

    names = {1: ("channels",), 2: ("out", "in"), 3: stack}
    axes = names.get(count, tuple(f"d{mode}" for mode in range(count)))

    return Site(name, module, Layer("parameter", lambda _: {leaf: axes}))


def find_sites(config: FloraConfig, model: nn.Module, selection: Selection) -> list[Site]:
    """Every module and raw parameter that the config targets.

    Args:
        config: of the adapter.
        model: the base model, with or without other adapters.
        selection: of the config.

    Raises:
        ValueError: a target cannot be adapted; names it and says why.
    """
    sites = []
    for name, module in modules_of(model):
        if name and selection(name):
            _check_other_methods(name, model)
            row, reason = row_for(module), refusal_for(module)
            if row is None or reason is not None:
                raise UserError(f"Target module {name} ({type(module).__name__}) is not supported: {reason}")

            if _inside_attention(name, model):
                raise UserError(
                    f"Target module {name} is never called: nn.MultiheadAttention reads its weight; "
                    f"target the attention module {name.rpartition('.')[0]} itself"
                )

            sites.append(Site(name, module, row))

    sites += _raw_sites(config, model, selection)
    _check_ties(sites, model)

    for site in sites:
        if question := question_about(site.name, site.module, model):
            warnings.warn(f"Target {site.name}: {question}; exclude it (exclude_modules)", stacklevel=2)

    return sites


def _raw_sites(config: FloraConfig, model: nn.Module, selection: Selection) -> list[Site]:
    """Every raw parameter that the config targets; those of ``modules_to_save`` are trained in full instead."""
    wanted = Names(config.target_parameters, "target_parameters")
    sites, in_full = [], []
    for name, module in modules_of(model):
        for leaf, _ in module.named_parameters(recurse=False) if name else ():
            if not wanted.has(f"{name}.{leaf}"):
                continue

            _check_other_methods(name, model)

            if isinstance(module, (nn.ParameterList, nn.ParameterDict)):
                raise UserError(
                    f"{name}.{leaf} of target_parameters is an entry of an nn.{type(module).__name__}, which its owner "
                    "indexes instead of calling, so no adapter can stand in its place; register the tensor as a "
                    "parameter of the module that uses it"
                )

            if selection.is_saved(name):
                in_full.append(f"{name}.{leaf}")
            else:
                sites.append(raw_parameter(name, module, leaf))

    if in_full:
        warnings.warn(
            f"{', '.join(in_full)} of target_parameters is inside modules_to_save: it is trained in full, not adapted",
            stacklevel=2,
        )

    return sites


def explain_no_match(config: FloraConfig, model: nn.Module) -> None:
    """Raises with the nearest names when targets are plainly misspelt; otherwise PEFT's own error follows."""
    wanted = config.target_modules
    if config.exclude_modules or config.layers_to_transform is not None:
        return

    if isinstance(wanted, str):
        listed, said = [wanted], wanted
    else:
        listed = sorted(wanted or ())
        said = str(listed)

    if not listed and config.target_parameters:
        raise NoMatchingPeftModuleError(
            f"target_parameters {config.target_parameters} match no parameter of {type(model).__name__}"
            f"{_near_parameters(config.target_parameters, model)}; "
            "[name for name, _ in model.named_parameters()] lists the names"
        )
    if not listed:
        return

    if config.inference_mode:
        remedy = "The adapter was trained on another model: load it on that one"
    else:
        remedy = (
            "Please check the target modules; print(model) lists the names, and 'all' takes every layer that can be "
            "adapted"
        )

    near = _near_shorthand(wanted) or near_names(listed, model)
    end = "" if near.endswith("?") else "."
    raise NoMatchingPeftModuleError(
        f"Target modules {said} not found in the base model {type(model).__name__}{near}{end} {remedy}"
    )


def _own_weights(model: nn.Module) -> str:
    """The weights that a model holds outside the layers of the table, as ``target_parameters`` names them."""
    names = [
        f"{name}.{leaf}"
        for name, module in modules_of(model)
        for leaf, value in module.named_parameters(recurse=False)
        if name and row_for(module) is None and value.requires_grad and not is_lazy(value) and value.ndim > 1
    ]
    if not names:
        return ""

    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (
        f". It has weights in modules of other classes ({', '.join(names[:5])}{rest}); name those to adapt in "
        "target_parameters"
    )


def _near_shorthand(wanted: str | set[str] | list[str] | None) -> str:
    """The shorthand that was meant, where a lone word is nearly one."""
    words = [wanted] if isinstance(wanted, str) else list(wanted or ())

    found = difflib.get_close_matches(words[0].lower(), SHORTHANDS, n=1, cutoff=0.8) if len(words) == 1 else []
    if not found:
        return ""

    return f"; did you mean target_modules={found[0]!r}?"


def _near_parameters(wanted: Iterable[str], model: nn.Module) -> str:
    """The nearest names of raw parameters."""
    names = [name for name, _ in model.named_parameters()]
    ends = {".".join(name.split(".")[-2:]): name for name in names}
    near = [found for word in wanted for found in difflib.get_close_matches(word, ends, n=1)]
    if near:
        return f"; did you mean {' or '.join(map(repr, near))}?"
    return ""


def warn_unmatched(config: FloraConfig, model: nn.Module) -> None:
    """Warns about entries of a list of targets that matched nothing while others did."""
    if not isinstance(config.target_modules, set):
        return

    names = [name for name, _ in modules_of(model)]
    meant = {end for name in names for end in (exact_pattern(name), *ends_of(name))}
    unmatched = sorted(config.target_modules - meant)
    if unmatched:
        warnings.warn(f"target_modules {unmatched} match nothing{near_names(unmatched, model)}", stacklevel=2)


def check_saved(config: FloraConfig, model: nn.Module) -> None:
    """What ``modules_to_save`` names has to be in the model; in a file that is loaded, it is only warned of.

    Raises:
        UserError: a name matches nothing, so that the module would neither be trained nor saved.
    """
    names = [name for name, _ in modules_of(model)]
    guessed = HEADS.get(str(getattr(config.task_type, "value", config.task_type)), ())
    unmatched = [
        key
        for key in dict.fromkeys(config.modules_to_save or ())
        if key not in guessed and not any(name.endswith(key) for name in names)
    ]

    if not unmatched:
        return

    words = sorted({name.rpartition(".")[2] for name in names if name} | set(names))
    near = [f"{word!r}" for key in unmatched for word in difflib.get_close_matches(key, words, n=3)]
    hint = f"did you mean {' or '.join(near)}?" if near else "print(model) lists the names"

    text = f"modules_to_save {unmatched} match no module of {type(model).__name__}; {hint}"

    if not config.inference_mode:
        raise UserError(text)

    warnings.warn(text, stacklevel=2)


def name_embeddings_in_full(config: FloraConfig, sites: list[Site], model: nn.Module) -> None:
    """Writes targets called ``embed_tokens`` or ``lm_head`` by their full names.

    PEFT goes by the bare names: it would save the whole frozen embedding beside the adapter.
    """
    names = {site.name for site in sites if site.row.kind != "parameter"}
    embeddings = {name for name in names if name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES}
    wanted = config.target_modules
    if isinstance(wanted, str) and embeddings:
        config.target_modules = list_of(names, [name for name, _ in model.named_modules() if name not in names])
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None

    if isinstance(wanted, set) and wanted & set(EMBEDDING_LAYER_NAMES):
        listed = {exact_pattern(name) for name in embeddings if name.rpartition(".")[2] in wanted}
        config.target_modules = (wanted - set(EMBEDDING_LAYER_NAMES)) | listed


def near_names(unmatched: list[str], model: nn.Module) -> str:
    """What might have been meant: the nearest layer names, or the fused experts' parameters."""
    adaptable = [name for name, module in modules_of(model) if row_for(module) is not None]
    words = sorted({name.rpartition(".")[2] for name in adaptable} | set(adaptable))
    hints = []
    for target in unmatched:
        found = difflib.get_close_matches(target, words, n=3)
        if found:
            hints.append(f"instead of {target!r} try {', '.join(map(repr, found))}")

    fused = {
        f"{name.rpartition('.')[2]}.{leaf}"
        for name, module in modules_of(model)
        for leaf, value in module.named_parameters(recurse=False)
        if value.ndim == 3 and row_for(module) is None
    }

    if fused:
        hints.append(
            f"the experts of this model are fused into 3-D parameters, for those pass target_parameters={sorted(fused)}"
        )

    if hints:
        return f": {'; '.join(hints)}"

    return ""


def _output_head(model: nn.Module) -> list[str]:
    """The modules that make a transformers model's output: its LM head, or what lies outside its backbone."""
    if not isinstance(model, PreTrainedModel):
        return []

    output = model.get_output_embeddings()
    backbone = model.base_model

    if output is not None:
        return [name for name, module in model.named_modules() if module is output]
    if backbone is model:
        return []

    return [name for name, module in model.named_children() if module is not backbone]


def _check_other_methods(name: str, model: nn.Module) -> None:
    """Refuses a target that an adapter of another method of PEFT wraps already."""
    wrapper = model.get_submodule(name)
    if isinstance(wrapper, BaseTunerLayer) and not isinstance(wrapper, AdaptedLayer):
        raise UserError(
            f"Target module {name} already has an adapter of another method ({type(wrapper).__module__}); two methods "
            "on one layer are not possible. Merge that adapter first (merge_and_unload), or leave the layer out "
            "(exclude_modules)"
        )


def _inside_attention(name: str, model: nn.Module) -> bool:
    """Whether the module is the ``out_proj`` of an ``nn.MultiheadAttention``, which is never called as a module."""
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, BaseTunerLayer):
        parent = parent.get_base_layer()
    return isinstance(parent, nn.MultiheadAttention)


def _tied(model: nn.Module) -> dict[int, list[str]]:
    """Parameters that more than one module holds, by id, with their names.

    A module that stands in several places of the tree (nnU-Net's blocks do) holds its parameters once: no tie.
    """
    owners: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for leaf, value in module._parameters.items():
            if value is not None:
                owners.setdefault(id(value), []).append(f"{prefix}.{leaf}".lstrip("."))
    return {key: names for key, names in owners.items() if len(names) > 1}


def _check_ties(sites: list[Site], model: nn.Module) -> None:
    tied = _tied(model)
    for site in sites:
        for weight in site.row.weights(site.module):
            names = tied.get(id(parameter(site.module, weight)))
            if names is None:
                continue

            embedding = any(isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding) for name in names)
            how = f"give one of the modules a copy: module.{weight} = nn.Parameter(module.{weight}.detach().clone())"

            if embedding:
                how = "load the model with tie_word_embeddings=False and copy the embedding into the output head"

            raise UserError(
                f"Target module {site.name} has a tied weight ({' = '.join(names)}): an adapter on one end would "
                "silently untie them, and merging would change both. Exclude it (exclude_modules), or untie first: "
                f"{how}"
            )
