"""``flora merge``: adapters into their base model, as one ordinary model that is verified before it appears."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.utils import get_max_memory  # type: ignore[import-untyped]
from peft import PeftModel
from safetensors.torch import save_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from flora.convert import Adapter, detect, load, save
from flora.convert.arithmetic import add
from flora.convert.base_model import adapted_class, is_stored_as, local_folder, open_base, try_base
from flora.convert.report import ROUNDING
from flora.convert.streaming import Streamed, files_inside, stream_merged
from flora.errors import REPORT, UserError, user_errors
from flora.layers.merged import MARK, fingerprint
from flora.runs.reloading import attach, load_base, read_run
from flora.runs.run_folder import ADAPTER, ADAPTER_CONFIG, CONFIG
from flora.runs.sample_inputs import random_inputs
from flora.storage.atomic import check_target, claim, read_json, write_json
from flora.storage.checkpoint import Checkpoint
from flora.storage.progress import hidden_bars
from flora.storage.tensors import check_exists

BASE_CONFIG = "config.json"
COMPANIONS = ("*token*", "preprocessor_config.json", "processor_config.json", "chat_template*", "vocab*", "merges.txt")


@dataclass(frozen=True)
class Merged:
    """What a merge did.

    Attributes:
        folder: where the model was written.
        layers: how far each merged layer is from the unmerged one.
        difference: the largest absolute difference of the outputs of the merged and the unmerged model, or None.
        magnitude: the largest absolute output, or None.
        reason: why the whole models were not compared; empty if they were.
    """

    folder: Path
    layers: Streamed
    difference: float | None = None
    magnitude: float | None = None
    reason: str = ""

    def __str__(self) -> str:
        whole = f"whole models not compared: {self.reason}"

        if self.difference is not None:
            whole = (
                f"merged and unmerged model agree on random inputs: largest difference {self.difference:.2e} "
                f"(outputs up to {self.magnitude:.2f})"
            )

        return f"{self.layers}\n{whole}\nwritten to {self.folder}"


@dataclass(frozen=True)
class _Source:
    """One adapter to merge, as the user gave it: where it is, how much of it, and its config (empty for a file)."""

    path: Path
    weight: float
    config: Mapping[str, Any]


def merge(
    adapters: Path | Sequence[Path],
    out: Path,
    *,
    weights: Sequence[float] | None = None,
    base: str | nn.Module | None = None,
    overwrite: bool = False,
    progress: bool = False,
    run_recipe_file: bool = False,
) -> Merged:
    """Writes ``base + sum of weight * adapter`` as a model folder, complete or not at all; the base is only read.

    The base's files are streamed, one weight in memory at a time, and every merged layer is compared with the layer
    that has its adapters beside it. Where the whole model fits into memory too, its outputs are compared as well.

    Args:
        adapters: one or several, of any format that :func:`flora.load` reads.
        out: the folder to write, for ``from_pretrained``.
        weights: one number for each adapter; 1 by default.
        base: a local folder or hub id instead of the base model that the first adapter names; or that model itself,
            with its weights, whose ``state_dict`` is then what is written.
        overwrite: whether ``out`` may exist; it is then replaced.
        progress: shows a progress bar.
        run_recipe_file: runs the Python file that the adapter's ``config.yaml`` names as its recipe, where the base
            model has to be made by it; see :func:`flora.runs.reloading.read_run`.

    Raises:
        FileExistsError: ``out`` exists.
        FileNotFoundError: an adapter, or the base model, does not exist.
        UserError: an adapter does not fit the base, a weight would not be finite, or the merged model, or a layer of
            it, computes something else.
        OSError: it cannot be written; nothing is left behind.
    """
    sources = _check_request(adapters, weights)
    if base is None:
        base = _made_by_recipe(sources[0], run_recipe_file)

    inputs = [source.path for source in sources]
    check_target(out, overwrite=overwrite, sources=[*inputs, base] if isinstance(base, str) else inputs)
    first = sources[0]
    outcome: dict[str, Any] = {}

    with claim(out) as place, _base_folder(first, base, place.folder, run_recipe_file) as folder:
        known = open_base(base) if isinstance(base, nn.Module) else try_base(folder)
        model_class: Any = None if known is None else type(known.model)

        if known is None and first.config.get("auto_mapping"):
            model_class = adapted_class(first.config, first.path)

        pairs = [(load(source.path, base=known), source.weight) for source in sources]
        marks = _marks(folder, [adapter for adapter, _ in pairs])

        def check(work: Path) -> None:
            outcome.update(_compare_models(model_class, folder, work, sources, pairs))
            if marks:
                write_json(work / BASE_CONFIG, {**read_json(work / BASE_CONFIG), MARK: marks})

        layers = stream_merged(
            folder,
            pairs,
            out,
            known=known,
            overwrite=overwrite,
            progress=progress,
            check=check,
            companions=_companions(sources),
        )

    return Merged(out, layers, **outcome)


def _check_request(adapters: Path | Sequence[Path], weights: Sequence[float] | None) -> list[_Source]:
    """The adapters, each checked to exist; no path is checked again below."""
    paths = [adapters] if isinstance(adapters, Path) else list(adapters)

    numbers = [1.0] * len(paths) if weights is None else list(weights)

    if len(numbers) != len(paths):
        raise UserError(f"--weights has {len(numbers)} numbers for {len(paths)} adapters; give one for each")

    sources = []
    for path, number in zip(paths, numbers, strict=True):
        check_exists(path, "adapter")

        config = read_json(path / ADAPTER_CONFIG) if (path / ADAPTER_CONFIG).is_file() else {}

        sources.append(_Source(path, number, config))

    return sources


def _marks(folder: Path, adapters: Sequence[Adapter]) -> list[str]:
    """What the merged model's config will say is in it: what the base's says, and these adapters.

    Returns:
        Nothing for a model that is none of transformers, whose config takes no other keys.

    Raises:
        UserError: the base says that one of them is merged into it already.
    """
    config = read_json(folder / BASE_CONFIG) if (folder / BASE_CONFIG).is_file() else {}

    if "model_type" not in config:
        return []

    before, marks = list(config.get(MARK) or []), []
    for adapter in adapters:
        forms = [entry.form for entry in adapter.weights.values()]
        mark = fingerprint(tensor for form in forms for tensor in (form.core, *form.factors) if tensor is not None)
        if mark in before:
            raise UserError(
                f"this adapter is merged into {folder} already ({MARK} in its {BASE_CONFIG} says so): it would be "
                "applied twice; give the model it was trained on with --base"
            )

        marks.append(mark)

    return before + marks


def _companions(sources: Sequence[_Source]) -> list[Path]:
    """The tokenizers and the like that lie beside the adapters."""
    found = []
    for source in sources:
        if source.path.is_dir():
            paths = [path for pattern in COMPANIONS for path in sorted(source.path.glob(pattern))]
            found += files_inside(source.path, paths)
    return found


def _made_by_recipe(source: _Source, run_recipe_file: bool) -> nn.Module | None:
    """The base model of a run whose recipe makes it and gives it no name; None for every other adapter."""
    if not source.config or source.config.get("base_model_name_or_path") or not (source.path / CONFIG).is_file():
        return None

    settings = read_run(source.path, run_recipe_file=run_recipe_file)
    return settings.load_recipe().load_base(settings.task)


@contextmanager
def _base_folder(source: _Source, base: str | nn.Module | None, scratch: Path, run_recipe_file: bool) -> Iterator[Path]:
    """The base model as a folder of safetensors: the one that is named, or where that cannot be streamed, one saved.

    It is saved, from memory, where the adapter was trained on another class than the files are of (a model with a new
    head), where its recipe has to make it again, or where the files are not safetensors.
    """
    if isinstance(base, nn.Module):
        with TemporaryDirectory(dir=scratch) as saved:
            # Tensors that are shared are written once.
            save_model(base, str(Path(saved) / "model.safetensors"))
            yield Path(saved)
        return

    named = base or source.config.get("base_model_name_or_path")
    if not named:
        # A file that is not an adapter is reported as such.
        detect(source.path)
        raise UserError(f"{source.path} names no base model; give it with --base")

    try:
        folder = local_folder(named)
    except FileNotFoundError:
        # No recipe that could make it.
        if not (source.path / CONFIG).is_file():
            raise

        folder = None

    if folder is not None and _can_stream(folder, source):
        yield folder
        return

    model = load_base(source.path, base, run_recipe_file=run_recipe_file)

    with TemporaryDirectory(dir=scratch) as saved, hidden_bars():
        model.save_pretrained(saved)
        yield Path(saved)


def _can_stream(folder: Path, source: _Source) -> bool:
    """Whether the files are those of the model that the adapter was trained on, head included."""
    if folder.is_file() or not source.config:
        # Nothing says what else the adapter could have been trained on.
        return True
    if not any(folder.glob("*.safetensors")):
        return False
    if not (folder / "config.json").is_file():
        return True
    if not is_stored_as(folder, source.config, source.path):
        return False

    # The class may be the same and its head another, with as many classes as the adapter's data has.
    files, heads = Checkpoint(folder), Checkpoint(source.path / ADAPTER)
    sizes = {key.removeprefix("base_model.model."): heads.shape(key) for key in heads}

    return all(files.shape(key) == shape for key, shape in sizes.items() if key in files)


# ---- the whole model -------------------------------------------------------------------------------------------------


def _compare_models(
    model_class: Any, base: Path, merged: Path, sources: Sequence[_Source], pairs: Sequence[tuple[Adapter, float]]
) -> dict[str, Any]:
    """``difference`` and ``magnitude`` of the outputs of the two models, or the ``reason`` why they were not compared.

    The unmerged model is PEFT's own, from the adapter's files, so that the merging code does not judge itself.

    Raises:
        UserError: the outputs differ by more than rounding.
    """
    if not hasattr(model_class, "from_pretrained"):
        return {"reason": "the base model has no from_pretrained, so nothing says which inputs it takes"}

    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    if 2 * size > get_max_memory()["cpu"]:
        return {"reason": f"{size / 1e9:.0f} GB of weights do not fit into memory"}

    with hidden_bars():
        # A config that transformers has written itself may be one that it does not take back.
        with user_errors(Exception, about=f"the files in {base} cannot be loaded as a {model_class.__name__}"):
            model: Any = model_class.from_pretrained(base).eval()

        try:
            inputs = random_inputs(model)
        except UserError as error:
            return {"reason": str(error)}

        model = _adapted(model, merged, sources, pairs)

        try:
            before = _outputs(model, inputs)
        except Exception as error:
            # Whatever a model may ask of its inputs beyond their shape.
            reason = str(error).partition("\n")[0]
            return {"reason": f"{model_class.__name__} does not run on random inputs ({reason})"}

        del model
        after = _outputs(model_class.from_pretrained(merged).eval(), inputs)

    difference, magnitude = _compare_outputs(before, after)

    return {"difference": difference, "magnitude": magnitude}


def _adapted(
    model: PreTrainedModel, merged: Path, sources: Sequence[_Source], pairs: Sequence[tuple[Adapter, float]]
) -> nn.Module:
    """The model with the adapters on it, by PEFT; what PEFT cannot read, or has weights, goes as one exact sum."""
    if len(sources) == 1 and sources[0].weight == 1 and sources[0].path.is_dir():
        return attach(model, sources[0].path)
    with TemporaryDirectory(dir=merged.parent) as scratch:
        save(add(pairs), Path(scratch) / "sum")
        return attach(model, Path(scratch) / "sum")


def verified_merge(model: PeftModel, inputs: dict[str, Tensor]) -> tuple[PreTrainedModel, float, float]:
    """Merges in place and compares the outputs on ``inputs`` before and after.

    Returns:
        The merged model, the largest absolute difference of its outputs, and the largest absolute output.

    Raises:
        UserError: a weight is not finite after the merge, or the outputs differ by more than rounding.
    """
    model.eval()
    before = _outputs(model, inputs)
    merged = model.merge_and_unload(safe_merge=True)
    return merged, *_compare_outputs(before, _outputs(merged, inputs))


def _compare_outputs(before: Sequence[Tensor], after: Sequence[Tensor]) -> tuple[float, float]:
    """The largest absolute difference, and the largest absolute output."""
    if [output.shape for output in before] != [output.shape for output in after]:
        raise UserError(f"merged and unmerged model have outputs of different shapes; nothing was written; {REPORT}")

    difference, magnitude = 0.0, 0.0
    for first, second in zip(before, after, strict=True):
        apart = float((second.double() - first.double()).abs().max())
        largest = float(first.double().abs().max())
        allowed = ROUNDING.get(first.dtype, ROUNDING[torch.float32]).model * max(1.0, largest)
        if not apart <= allowed:
            raise UserError(
                f"the merged model differs from the unmerged one by {apart:.3g} (outputs up to {largest:.3g}, "
                f"allowed {allowed:.3g}); nothing was written. A base in float32 is merged with less rounding; if "
                f"it is in float32 already: {REPORT}"
            )

        difference, magnitude = max(difference, apart), max(magnitude, largest)

    return difference, magnitude


@torch.no_grad()
def _outputs(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """The floating point tensors that a model returns; its logits alone, where it has them.

    Some models draw random numbers in evaluation mode too, so each call starts from the same seed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        outputs = model(**inputs)

    if isinstance(outputs, Mapping) and "logits" in outputs:
        listed = [outputs["logits"]]
    else:
        listed = _tensors(outputs)

    found = [output for output in listed if output.is_floating_point() and output.numel()]
    if not found:
        raise UserError("it returns no floating point tensor")

    return found


def _tensors(outputs: object) -> list[Tensor]:
    """Every tensor in an output, whatever it is nested in."""
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, Mapping):
        outputs = tuple(outputs.values())
    if isinstance(outputs, (tuple, list)):
        return [tensor for part in outputs for tensor in _tensors(part)]

    return []
