"""``merge``: base + adapters as one ordinary model, streamed from the base's files, verified before it appears."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.utils import get_max_memory  # type: ignore[import-untyped]
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils.hub import snapshot_download

from flora.convert import Adapter, load, save
from flora.convert import streaming as streamed
from flora.convert.arithmetic import add
from flora.convert.base_model import open_base
from flora.errors import UserError
from flora.runs.reloading import load_adapter, load_base, model_class
from flora.runs.run_folder import ADAPTER_CONFIG
from flora.runs.run_folder import CONFIG as FILE
from flora.storage.atomic import check_target, claim, read_json
from flora.storage.checkpoint import Checkpoint
from flora.storage.progress import hidden_bars
from flora.storage.tensors import check_exists

TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}  # of the largest output
COMPANIONS = ("*token*", "preprocessor_config.json", "processor_config.json", "chat_template*", "vocab*", "merges.txt")
DOWNLOADED = ("model*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py")


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
    layers: streamed.Merged
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


def merge(
    adapters: Path | Sequence[Path],
    out: Path,
    *,
    weights: Sequence[float] | None = None,
    base: str | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Merged:
    """Writes ``base + sum of weight * adapter`` as a model folder, whole or not at all; the base is only read.

    The base's files are streamed, one weight in memory at a time, and every merged layer is compared with the layer
    that has its adapters beside it. Where the whole model fits into memory too, its outputs are compared as well.

    Args:
        adapters: one or several, of any format that :func:`flora.load` reads.
        out: the folder to write, for ``from_pretrained``.
        weights: one number for each adapter; 1 by default.
        base: a local folder or hub id instead of the base model that the first adapter names.
        overwrite: whether ``out`` may exist; it is then replaced.
        progress: shows a progress bar.

    Raises:
        FileExistsError: ``out`` exists.
        FileNotFoundError: an adapter, or the base model, does not exist.
        ValueError: an adapter does not fit the base, a weight would not be finite, or the merged model, or a layer of
            it, computes something else.
        OSError: it cannot be written; nothing is left behind.
    """
    paths = [adapters] if isinstance(adapters, Path) else list(adapters)
    numbers = [1.0] * len(paths) if weights is None else list(weights)
    if len(numbers) != len(paths):
        raise UserError(f"--weights has {len(numbers)} numbers for {len(paths)} adapters; give one for each")
    check_target(out, overwrite=overwrite, sources=[*paths, *([base] if base else [])])
    for path in paths:
        check_exists(path, "adapter")
    found: dict[str, Any] = {}
    with claim(out) as place, _local_base(paths[0], base, place.folder) as folder:
        model = _known(folder)
        pairs = [(load(path, base=model), number) for path, number in zip(paths, numbers, strict=True)]
        model_type = _own_class(paths[0]) if model is None else type(model)

        def check(work: Path) -> None:
            found.update(_compare_models(model_type, folder, work, paths, pairs))

        folders = [path for path in paths if path.is_dir()]
        beside = [file for path in folders for pattern in COMPANIONS for file in path.glob(pattern)]
        layers = streamed.merge(
            folder,
            pairs,
            out,
            overwrite=overwrite,
            progress=progress,
            check=check,
            companions=filter(Path.is_file, beside),
        )
    return Merged(out, layers, **found)


@contextmanager
def _local_base(path: Path, base: str | None, scratch: Path) -> Iterator[Path]:
    """The base model as a folder of safetensors: the one that is named, or where that cannot be streamed, one saved.

    It is saved, from memory, where the adapter was trained on another class than the files are of (a model with a new
    head), where its recipe has to make it again, or where the files are not safetensors.
    """
    config = read_json(path / ADAPTER_CONFIG) if (path / ADAPTER_CONFIG).is_file() else {}
    named = base or config.get("base_model_name_or_path")
    if not named:
        raise UserError(f"{path} names no base model; give it with --base")
    folder = Path(named) if Path(named).exists() else _download(named, required=not (path / FILE).is_file())
    if folder is not None and _can_stream(folder, path, config):
        yield folder
        return
    model = load_base(path, base)
    with TemporaryDirectory(dir=scratch) as saved, hidden_bars():
        model.save_pretrained(saved)
        yield Path(saved)


def _known(folder: Path) -> nn.Module | None:
    """The base model on the meta device, where its config names a class that is installed."""
    try:
        return open_base(folder).model
    except (ValueError, FileNotFoundError):
        return None


def _own_class(path: Path) -> Any:
    """The class that the config of an adapter names, of a library or of the user's own; None where it names none."""
    config = read_json(path / ADAPTER_CONFIG) if (path / ADAPTER_CONFIG).is_file() else {}
    return model_class(config, path) if config.get("auto_mapping") else None


def _download(name: str, *, required: bool) -> Path | None:
    """The files of a model on the hub."""
    try:
        return Path(snapshot_download(name, allow_patterns=list(DOWNLOADED)))
    except (OSError, ValueError) as error:  # not there, no network, or no name that the hub could have
        if not required:
            return None
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(f"the base model {name!r} cannot be loaded ({reason}); give --base") from None


def _can_stream(folder: Path, path: Path, config: Mapping[str, Any]) -> bool:
    """Whether the files are those of the model that the adapter was trained on, head included."""
    if folder.is_file():
        return True
    if not any(folder.glob("*.safetensors")):
        return not config  # without a config there is no class to load it with; the error says what is missing
    if not (folder / "config.json").is_file():
        return True
    if config.get("auto_mapping") or config.get("task_type"):
        wanted, settings = model_class(config, path), read_json(folder / "config.json")
        if (mapping := getattr(wanted, "_model_mapping", None)) is not None:
            wanted = mapping.get(type(AutoConfig.from_pretrained(folder)), wanted)
        if wanted.__name__ not in [*(settings.get("architectures") or ()), settings.get("_class_name")]:
            return False
    source = Checkpoint(folder)
    extras = load(path).extras if config else {}
    return all(source.shape(key) == value.shape for key, value in extras.items() if key in source)


def _compare_models(
    model_type: Any, base: Path, merged: Path, paths: Sequence[Path], pairs: Sequence[tuple[Adapter, float]]
) -> dict[str, Any]:
    """``difference`` and ``magnitude`` of the outputs of the two models, or the ``reason`` why they were not compared.

    Raises:
        ValueError: the outputs differ by more than rounding.
    """
    if not hasattr(model_type, "from_pretrained"):
        return {"reason": "neither the base model nor the adapter says which class the model is of"}
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    if 2 * size > get_max_memory()["cpu"]:
        return {"reason": f"{size / 1e9:.0f} GB of weights do not fit into memory"}
    with hidden_bars():
        model: Any = model_type.from_pretrained(base).eval()
        try:
            inputs = random_inputs(model)
        except ValueError as error:
            return {"reason": str(error)}
        model = _adapted(model, merged, paths, pairs)
        try:
            before = _outputs(model, inputs)
        except Exception as error:  # whatever a model may ask of its inputs beyond their shape
            return {
                "reason": f"{model_type.__name__} does not run on random inputs ({str(error).partition(chr(10))[0]})"
            }
        del model
        after = _outputs(model_type.from_pretrained(merged).eval(), inputs)
    difference, magnitude = _compare_outputs(before, after)
    return {"difference": difference, "magnitude": magnitude}


def _adapted(
    model: PreTrainedModel, merged: Path, paths: Sequence[Path], pairs: Sequence[tuple[Adapter, float]]
) -> nn.Module:
    """The model with the adapters on it, by PEFT; what PEFT cannot read, or has weights, goes as one exact sum."""
    if len(pairs) == 1 and pairs[0][1] == 1 and paths[0].is_dir():
        return load_adapter(model, paths[0])
    with TemporaryDirectory(dir=merged.parent) as scratch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the adapter has more parameters")  # a sum may: it is thrown away
        save(add(pairs), Path(scratch) / "sum")
        return load_adapter(model, Path(scratch) / "sum")


def verified_merge(model: PeftModel, inputs: dict[str, Tensor]) -> tuple[PreTrainedModel, float, float]:
    """Merges in place and compares the outputs on ``inputs`` before and after.

    Returns:
        The merged model, the largest absolute difference of its outputs, and the largest absolute output.

    Raises:
        ValueError: a weight is not finite after the merge, or the outputs differ by more than rounding.
    """
    model.eval()
    before = _outputs(model, inputs)
    merged = model.merge_and_unload(safe_merge=True)
    return merged, *_compare_outputs(before, _outputs(merged, inputs))


def _compare_outputs(before: Tensor, after: Tensor) -> tuple[float, float]:
    """The largest absolute difference, and the largest absolute output."""
    difference = float((after.double() - before.double()).abs().max())
    magnitude = float(before.double().abs().max())
    allowed = TOLERANCE.get(before.dtype, 1e-4) * max(1.0, magnitude)
    if not difference <= allowed:
        raise UserError(
            f"the merged model differs from the unmerged one by {difference:.3g} (outputs up to {magnitude:.3g}, "
            f"allowed {allowed:.3g}); nothing was written"
        )
    return difference, magnitude


@torch.no_grad()
def _outputs(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    outputs = model(**inputs)
    return outputs["logits"] if "logits" in outputs else outputs[0]  # type: ignore[no-any-return]


def random_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Two random samples of the kind the model takes: images, volumes, token ids, sound, or noise and a prompt.

    Raises:
        ValueError: the model takes something else.
    """
    name, config = getattr(model, "main_input_name", None), model.config
    random = torch.Generator().manual_seed(0)
    sample: Tensor
    if hasattr(config, "cross_attention_dim") and hasattr(config, "sample_size"):  # a UNet2DConditionModel
        sample = torch.randn(2, config.in_channels, config.sample_size, config.sample_size, generator=random)
        prompt = torch.randn(2, 7, config.cross_attention_dim, generator=random)
        given = {"sample": sample, "timestep": torch.tensor([1.0, 500.0]), "encoder_hidden_states": prompt}
        return {key: value.to(model.device, model.dtype) for key, value in given.items()}
    if name == "pixel_values":
        sample = torch.randn(2, *_image_shape(config), generator=random)
    elif name == "input_ids":
        sample = torch.randint(0, config.get_text_config().vocab_size, (2, 16), generator=random)
    elif name == "input_values":
        sample = torch.randn(2, 16000, generator=random)
    elif name == "input_features":
        sample = torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions, generator=random)
    else:
        raise UserError(
            f"{type(model).__name__} takes {name!r}, and only images (pixel_values), token ids (input_ids) and sound "
            "(input_values, input_features) can be made at random; use merge_and_unload(safe_merge=True) of PEFT"
        )
    return {name: sample.to(model.device, model.dtype if sample.is_floating_point() else sample.dtype)}


def _image_shape(config: Any) -> tuple[int, ...]:
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", 224)
    return getattr(vision, "num_channels", 3), *((size, size) if isinstance(size, int) else size)
