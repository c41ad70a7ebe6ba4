"""One thing for a text-to-image model: the UNet of Stable Diffusion learns a few pictures under a prompt (DreamBooth).

Data: a folder with pictures of the thing, or a data set of the hub with a column of images. Latents of the pictures and
the embedding of the prompt are computed once, before training; autoencoder and text encoder stay as they are. A sample
is a picture with one drawn noise at one drawn timestep. The draw of a sample depends on its number and the seed alone,
so a run that is resumed sees what it would have seen; validation and test draw noises that training does not.

DreamBooth: arXiv 2208.12242 (without its prior preservation).
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image, ImageOps
from sklearn.metrics import r2_score
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import Dataset
from transformers import CLIPTextModel, CLIPTokenizer, EvalPrediction, Trainer

from flora.data.records import IMAGES, Bad, Item, hub, is_local, load_pretrained, row_file, sift, split_paths
from flora.data.samples import locate
from flora.data.shown import Findings, Shown
from flora.errors import UserError
from flora.recipes import Data, Request, Tested

METRIC = "explained"
EVALUATED = 64  # draws of each picture in validation and test
Source = Callable[[], "Path | io.BytesIO"]  # gives the file of a picture when it is needed


@dataclass
class Task:
    """Settings of the data and the base model.

    Args:
        model: a folder or hub id in the layout of Stable Diffusion 1 or 2 (unet, vae, text_encoder, ...).
        data: a folder with pictures, or the hub id of a data set. Where it has no parts validation and test, the
            pictures of training are measured, with other noises.
        prompt: that stands for the thing, with a rare word for its name.
        image_column: of the hub data set.
        resolution: pixels of a side; pictures are scaled and cropped to squares.
        draws: noises of each picture in an epoch.
        bad_data: "error" stops at pictures that cannot be used, "skip" leaves them out.
    """

    model: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    data: str = "diffusers/dog-example"
    prompt: str = "a photo of sks dog"
    image_column: str = "image"
    resolution: int = 512
    draws: int = 160
    bad_data: Bad = "error"

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise UserError("task.prompt is empty, expected words that stand for the thing, as 'a photo of sks dog'")
        if self.resolution < 8 or self.resolution % 8:
            raise UserError(f"task.resolution is {self.resolution}, expected a multiple of 8")
        if self.draws < 1:
            raise UserError(f"task.draws is {self.draws}, expected 1 or more")


class NoiseTrainer(Trainer):
    """The loss is the mean squared error of the predicted noise."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss, and on request what the UNet gives."""
        outputs = model(**{key: value for key, value in inputs.items() if key != "labels"})
        loss = mse_loss(outputs.sample.float(), inputs["labels"].float())
        if return_outputs:
            return (loss, outputs)
        return loss


TRAINER = NoiseTrainer


class Noised(Dataset[dict[str, Tensor]]):
    """``draws`` of noise for each of the latents (pictures, channels, height, width), as the UNet takes them.

    The embedding of the prompt is (tokens, width); another ``stream`` draws other noises; labels are what to predict.
    """

    def __init__(self, latents: Tensor, embedding: Tensor, scheduler: Any, draws: int, stream: int) -> None:
        self.latents, self.embedding, self.scheduler = latents, embedding, scheduler
        self.draws, self.stream = draws, stream

    def __len__(self) -> int:
        return len(self.latents) * self.draws

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        random = np.random.default_rng([self.stream, index])
        clean = self.latents[index % len(self.latents)][None]
        noise = torch.tensor(random.standard_normal(clean.shape, dtype=np.float32))
        time = torch.tensor(random.integers(self.scheduler.config.num_train_timesteps, size=1))
        velocity = self.scheduler.config.prediction_type == "v_prediction"

        return {
            "sample": self.scheduler.add_noise(clean, noise, time)[0],
            "timestep": time[0],
            "encoder_hidden_states": self.embedding,
            "labels": (self.scheduler.get_velocity(clean, noise, time) if velocity else noise)[0],
        }


def read_picture(source: Source, resolution: int) -> Tensor:
    """The picture, scaled and cropped from its middle, (3, resolution, resolution) in [-1, 1]; raises as PIL does."""
    with Image.open(source()) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    square = ImageOps.fit(upright, (resolution, resolution), Image.Resampling.BICUBIC)
    return torch.tensor(np.asarray(square)).permute(2, 0, 1) / 127.5 - 1


def pictures(task: Task) -> dict[str, list[Item[Source]]]:
    """The pictures of each part that the data has.

    Raises:
        FileNotFoundError, ValueError: the data is not there, a folder is empty, or a column is missing.
    """
    where = locate(task.data)
    if not is_local(where):
        return {split: _rows(where, split, rows, task.image_column) for split, rows in hub(where).items()}

    parts = {}
    for split, folder in split_paths(Path(where)).items():
        files = sorted(path for path in folder.glob("*") if path.suffix.lower() in IMAGES)
        if not files:
            raise UserError(f"{folder} has no pictures ({', '.join(IMAGES)}); put those of the thing there")

        parts[split] = [Item(str(path), cast("Source", partial(Path, path))) for path in files]

    return parts


def _rows(where: str, split: str, rows: Any, column: str) -> list[Item[Source]]:
    from datasets import Image as Column

    if column not in rows.column_names:
        raise UserError(f"{where} has no column {column!r}, only {', '.join(rows.column_names)}")
    files = rows.select_columns(column).cast_column(column, Column(decode=False))
    return [Item(f"{where}, {split} row {row}", partial(row_file, files, row, column)) for row in range(len(files))]


@torch.no_grad()
def embed(prompt: str, where: str) -> Tensor:
    """What the text encoder of the model makes of a prompt, (tokens, width)."""
    tokenizer = load_pretrained(CLIPTokenizer, where, subfolder="tokenizer")
    encoder = load_pretrained(CLIPTextModel, where, subfolder="text_encoder")
    tokens = tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt")
    return cast("Tensor", encoder(tokens.input_ids)[0][0])


@torch.no_grad()
def encode(items: Sequence[Item[Source]], resolution: int, vae: Any) -> Tensor:
    """The latents of pictures, (pictures, channels, height, width); the mode of each, so nothing is drawn."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = vae.to(device)
    images = (read_picture(item.value, resolution)[None].to(device) for item in items)
    latents = torch.cat([vae.encode(image).latent_dist.mode() for image in images]).cpu()
    return latents * float(vae.config.scaling_factor)


def load_data(task: Task, seed: int) -> Data:
    """The data; the seed draws the noises and timesteps of training.

    Raises:
        FileNotFoundError, ValueError: pictures or a part of the pipeline cannot be used; names file and reason.
    """
    where = locate(task.model)
    check = partial(read_picture, resolution=task.resolution)
    good = {split: sift(items, check, bad=task.bad_data, what="pictures") for split, items in pictures(task).items()}
    embedding, scheduler = embed(task.prompt, where), load_pretrained(DDPMScheduler, where, subfolder="scheduler")
    vae = load_pretrained(AutoencoderKL, where, subfolder="vae")
    latents = {split: encode(items, task.resolution, vae) for split, items in good.items()}
    validation, test = (
        Noised(latents.get(split, latents["train"]), embedding, scheduler, EVALUATED, stream)
        for stream, split in enumerate(("validation", "test"))
    )

    return Data(Noised(latents["train"], embedding, scheduler, task.draws, seed + 2), validation, test)


def load_base(task: Task) -> Any:
    """The UNet of the pipeline; raises where there is none, or one that takes more than a prompt (XL)."""
    where = locate(task.model)
    unet = load_pretrained(UNet2DConditionModel, where, subfolder="unet")
    if unet.config.addition_embed_type is not None:
        raise UserError(f"task.model {where!r} takes more than a prompt; give a Stable Diffusion 1 or 2")

    unet.name_or_path = str(Path(where) / "unet") if is_local(where) else where

    return unet


STEPS = 30  # of the sampler


def predictor(task: Task, model: Any, folder: Path) -> Callable[[Request], dict[str, Any]]:
    """Paints a prompt: a PNG, always the same for the same number of the input."""
    where = locate(task.model)
    parts = {"vae": AutoencoderKL, "text_encoder": CLIPTextModel, "tokenizer": CLIPTokenizer}
    loaded = {name: load_pretrained(kind, where, subfolder=name) for name, kind in parts.items()}
    trained = load_pretrained(DDPMScheduler, where, subfolder="scheduler").config

    # What Stable Diffusion's own sampler is set to, where the config of the training noise does not say it.
    sampler = {"steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False}
    scheduler = cast("Any", DDIMScheduler).from_config(trained, **sampler)
    options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = cast("Any", StableDiffusionPipeline)(
        **loaded, unet=model.get_base_model(), scheduler=scheduler, **options
    )
    pipeline.to(model.device).set_progress_bar_config(disable=True)

    def answer(request: Request) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(request.number)
        size = {"height": task.resolution, "width": task.resolution}
        picture = pipeline(request.given, num_inference_steps=STEPS, generator=generator, **size).images[0]
        path = request.file(".png")
        picture.save(path)
        return {"file": str(path)}

    return answer


def findings(tested: Tested) -> Findings:
    """Pictures painted from the prompt, beside one of those that were learnt; one where there is no GPU."""
    task, model = tested.task, cast("Any", tested.model)
    if model is None:
        return Findings("Samples", [])

    if model.device.type == "cpu":
        count = 1
    else:
        count = 4

    learnt = read_picture(pictures(task)["train"][0].value, task.resolution)
    values = (127.5 * (learnt.permute(1, 2, 0) + 1)).round().clamp(0, 255).byte().numpy()
    examples = [Shown(pictures=[("a picture that was learnt", Image.fromarray(values))])]

    with tempfile.TemporaryDirectory() as scratch:
        answer = predictor(task, model, Path(scratch))
        for number in range(count):
            path = answer(Request(task.prompt, number, str(number), Path(scratch), None))["file"]
            with Image.open(path) as painted:
                examples.append(Shown(pictures=[(f"painted, noise {number}", painted.copy())]))

    return Findings(f"Painted from {task.prompt!r}", examples)


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """The share of the noise's variance that the prediction explains: 1 - squared error / variance."""
    truth, predicted = (np.ravel(cast("Any", each)) for each in (prediction.label_ids, prediction.predictions))
    return {"explained": float(r2_score(truth, predicted))}
