"""Pictures for a text-to-image model: Stable Diffusion 1, 2, XL or 3 learns them under a prompt or their captions.

Data: a folder with pictures, or a data set of the hub with a column of images. The caption of ``NAME.png`` is the text
in ``NAME.txt``; a picture without one stands under the prompt, which for a few pictures of one thing is DreamBooth.
Latents and the embeddings of captions are computed once, before training; autoencoder and text encoders stay as they
are. A sample is a picture with one drawn noise at one drawn timestep. The draw of a sample depends on its number and
the seed alone, so a run that is resumed sees what it would have seen; validation and test draw noises that training
does not.

DreamBooth: arXiv 2208.12242 (without its prior preservation).
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageOps
from sklearn.metrics import r2_score
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import Dataset, default_collate
from transformers import EvalPrediction, Trainer

from flora.data.diffusion_pipeline import Family, add_noise, encode_prompts, family_of, painter
from flora.data.files import Item, regular, text_of
from flora.data.hub import hub, hub_column
from flora.data.images import hub_images
from flora.data.pretrained import load_pretrained
from flora.data.records import Bad, sift
from flora.data.samples import locate
from flora.data.shown import Findings, Shown
from flora.data.splits import IMAGES, is_local, split_paths
from flora.errors import UserError
from flora.recipes import Data, Request, Tested

METRIC = "explained"
# Noises that are drawn for each picture in validation and test.
EVALUATED = 64
# Gives the file of a picture when it is needed.
Source = Callable[[], "Path | io.BytesIO"]


class Picture(NamedTuple):
    """A picture and the text that it stands under."""

    source: Source
    caption: str


@dataclass
class Task:
    """Settings of the data and the base model.

    Args:
        model: a folder or hub id of a pipeline of diffusers: Stable Diffusion 1, 2, XL or 3.
        data: a folder with pictures, or the hub id of a data set. Where it has no parts validation and test, the
            pictures of training are measured, with other noises.
        prompt: of the pictures that have no caption; for one thing, with a rare word for its name.
        image_column: of the hub data set.
        caption_column: of the hub data set, with the captions; null gives all pictures the prompt.
        resolution: pixels of a side; pictures are scaled and cropped to squares.
        draws: noises of each picture in an epoch.
        bad_data: "error" stops at pictures that cannot be used, "skip" leaves them out.
    """

    model: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    data: str = "diffusers/dog-example"
    prompt: str = "a photo of sks dog"
    image_column: str = "image"
    caption_column: str | None = None
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
    """The loss is the mean squared error of what the network predicts."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss, and on request what the network gives."""
        outputs = model(**{key: value for key, value in inputs.items() if key != "labels"})
        loss = mse_loss(outputs.sample.float(), inputs["labels"].float())
        if return_outputs:
            return (loss, outputs)
        return loss


TRAINER = NoiseTrainer


class Noised(Dataset[dict[str, Any]]):
    """Pictures with drawn noise, as the network takes them.

    Args:
        latents: shape (pictures, channels, height, width).
        told: What else the network gets with each picture, such as the embedding of its caption.
        family: Of the pipeline.
        scheduler: Of the noise.
        draws: Of noise for each picture.
        stream: Another one draws other noises.
    """

    def __init__(
        self, latents: Tensor, told: Sequence[dict[str, Any]], family: Family, scheduler: Any, draws: int, stream: int
    ) -> None:
        self.latents, self.told, self.family, self.scheduler = latents, told, family, scheduler
        self.draws, self.stream = draws, stream

    def __len__(self) -> int:
        return len(self.latents) * self.draws

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The arguments of the network for one picture, and what it is to predict as ``labels``."""
        number = index % len(self.latents)
        noisy = add_noise(self.latents[number][None], self.scheduler, np.random.default_rng([self.stream, index]))

        return {
            self.family.picture: noisy.picture[0],
            "timestep": noisy.time[0],
            **self.told[number],
            "labels": noisy.target[0],
        }


def read_picture(source: Source, resolution: int) -> Tensor:
    """The picture, scaled and cropped from its middle, (3, resolution, resolution) in [-1, 1]; raises as PIL does."""
    with Image.open(source()) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    square = ImageOps.fit(upright, (resolution, resolution), Image.Resampling.BICUBIC)
    return torch.tensor(np.asarray(square)).permute(2, 0, 1) / 127.5 - 1


def pictures(task: Task) -> dict[str, list[Item[Picture]]]:
    """The pictures of each part that the data has, with their captions.

    Raises:
        FileNotFoundError, ValueError: the data is not there, a folder is empty, or a column is missing.
    """
    where = locate(task.data)
    if not is_local(where):
        return {split: _rows(where, split, rows, task) for split, rows in hub(where).items()}

    parts = {}
    for split, folder in split_paths(Path(where)).items():
        files = sorted(path for path in folder.glob("*") if path.suffix.lower() in IMAGES)
        if not files:
            raise UserError(f"{folder} has no pictures ({', '.join(IMAGES)}); put those of the thing there")

        parts[split] = [Item(str(path), Picture(partial(regular, path), _caption(path, task.prompt))) for path in files]

    return parts


def _caption(path: Path, prompt: str) -> str:
    """The text beside a picture, or the prompt where there is none."""
    beside = path.with_suffix(".txt")
    if not beside.is_file():
        return prompt

    text = " ".join(text_of(beside).split())
    if not text:
        raise UserError(f"{beside} is empty; write a caption, or remove it: the picture then stands under task.prompt")

    return text


def _rows(where: str, split: str, rows: Any, task: Task) -> list[Item[Picture]]:
    files = hub_images(rows, task.image_column)
    captions = [task.prompt] * len(files)
    if task.caption_column is not None:
        texts = hub_column(rows, task.caption_column)[task.caption_column]
        captions = [str(text or "").strip() or task.prompt for text in texts]

    return [
        Item(f"{where}, {split} row {row}", Picture(file.source, caption))
        for row, (file, caption) in enumerate(zip(files, captions, strict=True))
    ]


@torch.no_grad()
def encode(items: Sequence[Item[Picture]], resolution: int, vae: Any) -> Tensor:
    """The latents of pictures, shape (pictures, channels, height, width); the mode of each, so nothing is drawn."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = vae.to(device)
    images = (read_picture(item.value.source, resolution)[None].to(device) for item in items)
    latents = torch.cat([vae.encode(image).latent_dist.mode() for image in images]).cpu()
    return (latents - float(vae.config.shift_factor or 0)) * float(vae.config.scaling_factor)


def load_data(task: Task, seed: int) -> Data:
    """The data; the seed draws the noises and timesteps of training.

    Raises:
        FileNotFoundError, ValueError: pictures or a part of the pipeline cannot be used; names file and reason.
    """
    where = locate(task.model)
    family = family_of(where)

    def check(picture: Picture) -> None:
        read_picture(picture.source, task.resolution)

    good = {split: sift(items, check, bad=task.bad_data, what="pictures") for split, items in pictures(task).items()}
    captions = {split: [item.value.caption for item in items] for split, items in good.items()}
    known = encode_prompts(where, family, [text for texts in captions.values() for text in texts], task.resolution)
    told = {split: [known[text] for text in texts] for split, texts in captions.items()}
    scheduler = load_pretrained(family.noise, where, subfolder="scheduler")
    vae = load_pretrained(AutoencoderKL, where, subfolder="vae")
    latents = {split: encode(items, task.resolution, vae) for split, items in good.items()}

    def noised(split: str, draws: int, stream: int) -> Noised:
        # Where there are no pictures to measure, those of training are measured, with other noises.
        if split not in good:
            split = "train"
        return Noised(latents[split], told[split], family, scheduler, draws, stream)

    return Data(
        noised("train", task.draws, seed + 2),
        noised("validation", EVALUATED, 0),
        noised("test", EVALUATED, 1),
        collate=default_collate,
    )


def load_base(task: Task) -> Any:
    """The network of the pipeline that paints: a UNet, or a transformer."""
    where = locate(task.model)
    family = family_of(where)
    network = load_pretrained(family.network, where, subfolder=family.part)

    network.name_or_path = str(Path(where) / family.part) if is_local(where) else where

    return network


# Steps of the sampler.
STEPS = 30


def predictor(task: Task, model: Any, folder: Path) -> Callable[[Request], dict[str, Any]]:
    """Paints a prompt: a PNG, always the same for the same number of the input."""
    where = locate(task.model)
    pipeline = painter(where, family_of(where), model.get_base_model())
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
    """Pictures painted from the text of one that was learnt, beside it; one where there is no GPU."""
    task, model = tested.task, cast("Any", tested.model)
    if model is None:
        return Findings("Samples", [])

    count = 1 if model.device.type == "cpu" else 4
    learnt = pictures(task)["train"][0].value
    values = (
        (127.5 * (read_picture(learnt.source, task.resolution).permute(1, 2, 0) + 1))
        .round()
        .clamp(0, 255)
        .byte()
        .numpy()
    )
    examples = [Shown(pictures=[("a picture that was learnt", Image.fromarray(values))])]

    with tempfile.TemporaryDirectory() as scratch:
        answer = predictor(task, model, Path(scratch))
        for number in range(count):
            path = answer(Request(learnt.caption, number, str(number), Path(scratch), None))["file"]
            with Image.open(path) as painted:
                examples.append(Shown(pictures=[(f"painted, noise {number}", painted.copy())]))

    return Findings(f"Painted from {learnt.caption!r}", examples)


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """The share of the noise's variance that the prediction explains: 1 - squared error / variance."""
    truth, predicted = (np.ravel(cast("Any", each)) for each in (prediction.label_ids, prediction.predictions))
    return {"explained": float(r2_score(truth, predicted))}
