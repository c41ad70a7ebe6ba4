"""``merge``: base + adapter as one ordinary model, compared with the unmerged one before anything is written."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from flora.folders import staged_folder
from flora.progress import hidden_bars
from flora.reloading import load_adapter, load_base

TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}  # of the largest output
COMPANIONS = ("*token*", "preprocessor_config.json", "processor_config.json", "chat_template*", "vocab*", "merges.txt")


@dataclass(frozen=True)
class Merged:
    """What a merge did.

    Attributes:
        folder: where the model was written.
        difference: the largest absolute difference of the outputs of the merged and the unmerged model.
        magnitude: the largest absolute output.
    """

    folder: Path
    difference: float
    magnitude: float


def merge(folder: Path, out: Path, *, base: str | None = None, overwrite: bool = False) -> Merged:
    """Merges an adapter into its base model and writes the result, whole or not at all.

    Args:
        folder: of the adapter.
        out: the folder to write, for ``from_pretrained``.
        base: instead of the base model that the adapter names.
        overwrite: whether ``out`` may exist; it is then replaced.

    Raises:
        ValueError: ``out`` exists, a weight would not be finite, or the merged model computes something else.
    """
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists; give another --out, or --overwrite to replace it")
    if out.exists() and (out.resolve() == folder.resolve() or not (out / "config.json").is_file()):
        raise ValueError(f"{out} exists and is not a merged model; give another --out")
    unadapted = load_base(folder, base)
    sources = [folder, Path(unadapted.name_or_path or folder)]
    inputs = random_inputs(unadapted)
    model = load_adapter(unadapted, folder)
    merged, difference, magnitude = verified_merge(model, inputs)
    with staged_folder(out) as staged, hidden_bars():
        merged.save_pretrained(staged)
        for source in reversed(sources):  # the adapter's own files last, they win
            for pattern in COMPANIONS if source.is_dir() else ():
                for path in filter(Path.is_file, source.glob(pattern)):
                    shutil.copy(path, staged)
    return Merged(out, difference, magnitude)


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
    after = _outputs(merged, inputs)
    difference = float((after.double() - before.double()).abs().max())
    magnitude = float(before.double().abs().max())
    allowed = TOLERANCE.get(before.dtype, 1e-4) * max(1.0, magnitude)
    if not difference <= allowed:
        raise ValueError(
            f"the merged model differs from the unmerged one by {difference:.3g} (outputs up to {magnitude:.3g}, "
            f"allowed {allowed:.3g}); nothing was written"
        )
    return merged, difference, magnitude


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
        raise ValueError(
            f"{type(model).__name__} takes {name!r}, and only images (pixel_values), token ids (input_ids) and sound "
            "(input_values, input_features) can be made at random; use merge_and_unload(safe_merge=True) of PEFT"
        )
    return {name: sample.to(model.device, model.dtype if sample.is_floating_point() else sample.dtype)}


def _image_shape(config: Any) -> tuple[int, ...]:
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", 224)
    return getattr(vision, "num_channels", 3), *((size, size) if isinstance(size, int) else size)
