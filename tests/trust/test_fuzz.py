"""Broken and hostile inputs end in one line about them: never in a traceback, a hang, or a file where none belongs."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import soundfile
import torch
from fuzzing import mutate
from killing import is_change, is_inside
from PIL import Image
from safetensors.torch import save_file

from convert_cases import random_adapter
from flora.convert import convert, load, save
from flora.convert.streaming import stream_merged
from flora.data.coco import examples, read_coco
from flora.data.files import Item, check_image, json_entries, parsed, table_rows
from flora.data.records import sift
from flora.data.splits import class_folders
from flora.data.volume_files import Pair, Reading, read_pair
from flora.errors import UserError
from flora.recipes.audio_classify import Clip, read_sound
from flora.report.anatomy import anatomy
from flora.runs.settings import read
from foreign_models import build
from test_extract import save_model
from test_merge import picked

COCO = {
    "images": [{"id": 1, "file_name": "a.png", "width": 7, "height": 5}],
    "categories": [{"id": 3, "name": "cat"}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 1, 3, 2], "area": 6, "iscrowd": 0}],
}
FEW, MANY = 300, 50_000
SECONDS = 10
MEMORY = 1 << 20  # KiB


class HangError(BaseException):
    """An input took too long."""


def read_adapter(path: Path, scratch: Path) -> None:
    """As `flora inspect` and `flora convert` do."""
    target = path / "adapter" if (path / "adapter").is_dir() else next(path.iterdir())
    anatomy(target)
    convert(target, scratch / "lora", to="lora")


def read_base(path: Path, scratch: Path) -> None:
    """As `flora merge` does."""
    stream_merged(path / "base", load(path / "adapter", base=path / "base"), scratch / "merged")


def read_config(path: Path, scratch: Path) -> None:
    read(str(path / "my.yaml"))


def read_data(path: Path, scratch: Path) -> None:
    """As the recipes do."""
    for file in sorted(path.glob("*.jsonl")):
        sift(json_entries(file), lambda line: parsed(line, ["text"]), bad="skip", what="lines")
    for file in sorted(path.glob("*.csv")):
        sift(table_rows(file, ["text", "label"]), parsed, bad="skip", what="rows")
    items, _ = class_folders(path / "images")
    sift(items, check_image, bad="skip", what="images")
    part = read_coco(path / "coco.json", path / "images" / "cat")
    examples(part, list(part.categories.values()), "skip", "images")
    sift(
        [Item("a.wav", Clip(lambda: path / "a.wav", 0))],
        lambda clip: read_sound(clip, 8_000),
        bad="skip",
        what="sounds",
    )
    pair = Pair(path / "a.nii.gz", path / "b.nii")
    sift([Item("a.nii.gz", pair)], lambda pair: read_pair(pair, READING), bad="skip", what="volumes")


READING = Reading(num_channels=1, classes=2, spacing=[1, 1, 1])
ACTIONS: dict[str, Callable[[Path, Path], None]] = {
    "flora": read_adapter,
    "lora": read_adapter,
    "kohya": read_adapter,
    "dense": read_adapter,
    "pickle": read_adapter,
    "base": read_base,
    "config": read_config,
    "data": read_data,
}


# What is looked at in turn: a config and a base model take ten times as long as the others.
TURNS = [
    *(name for name in ACTIONS if name not in ("base", "config")),
    "flora",
    "lora",
    "kohya",
    "data",
    "base",
    "config",
]


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of sound inputs for each action."""
    root = tmp_path_factory.mktemp("seeds")
    adapter = random_adapter(build("mixed"), picked, 0.02)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for form in ("flora", "lora"):
            (root / form).mkdir()
            save(adapter, root / form / "adapter", format=form)  # type: ignore[arg-type]
        for form in ("kohya", "dense"):
            (root / form).mkdir()
            save(adapter, root / form / "adapter.safetensors", format=form)  # type: ignore[arg-type]
    (root / "pickle").mkdir()
    torch.save({"a.weight": torch.ones(3, 2), "step": 3}, root / "pickle" / "adapter.pt")

    save_model(build("gpt2"), root / "base" / "base")
    save(random_adapter(build("gpt2"), picked, 0.02), root / "base" / "adapter")
    (root / "config").mkdir()
    settings = read("digits-tiny")
    (root / "config" / "my.yaml").write_text(settings.text())
    data = root / "data"
    for name in ("cat", "dog"):
        (data / "images" / name).mkdir(parents=True)
        Image.new("RGB", (7, 5)).save(data / "images" / name / "a.png")
        Image.new("L", (7, 5)).save(data / "images" / name / "b.jpg")
    (data / "a.jsonl").write_text('{"text": "x", "label": 1}\n' * 3)
    (data / "a.csv").write_text("text,label\nx,1\ny,2\n")
    (data / "coco.json").write_text(json.dumps(COCO))
    soundfile.write(data / "a.wav", np.linspace(-1, 1, 50), 8_000)
    for name in ("a.nii.gz", "b.nii"):
        nibabel.save(nibabel.Nifti1Image(np.ones((5, 4, 3), np.uint8), np.eye(4)), data / name)
    return root


writes: list[str] = []
watching: list[str] = []


def _watch(event: str, args: tuple[Any, ...]) -> None:
    if not watching or not is_change(event, args):
        return

    # A folder is removed by names inside its handle.
    if event in ("os.remove", "os.rmdir") and args[1] >= 0:
        args = (f"{os.readlink(f'/proc/self/fd/{args[1]}')}/{os.fsdecode(args[0])}",)  # noqa: PTH115 (as a string)
    if any(is_inside(value, watching[0]) for value in args):
        return

    if not str(args[0]).startswith(("/dev/", "/proc/")):
        writes.append(f"{event} {args}")


@pytest.fixture(scope="module", autouse=True)
def watched() -> None:
    """Notes every change of the file system outside the folder of the case."""
    sys.addaudithook(_watch)


def _hangs(*args: object) -> None:
    raise HangError


def outcome(action: str, number: int, seeds: Path, scratch: Path) -> str | None:
    """What is wrong with how flora takes the input of that number; None if nothing is."""
    draw = random.Random(f"{action} {number}")
    place = scratch / "place"
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(seeds / action, place / "in")
    files = sorted(path for path in (place / "in").rglob("*") if path.is_file())
    for _ in range(draw.choice([1, 1, 1, 2])):
        mutate(draw.choice(files), draw)

    before = signal.signal(signal.SIGALRM, _hangs)
    signal.alarm(SECONDS)
    watching.append(str(scratch))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ACTIONS[action](place / "in", place)
    except (UserError, OSError) as error:
        if not str(error):
            return "an error without a message"
    except HangError:
        return f"hangs for {SECONDS} s"
    except Exception as error:
        place_of = error.__traceback__
        while place_of is not None and place_of.tb_next is not None:
            place_of = place_of.tb_next
        line = "" if place_of is None else f"{place_of.tb_frame.f_code.co_filename}:{place_of.tb_lineno}"
        return f"{type(error).__name__} at {line}: {str(error)[:200]}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        watching.clear()
    if writes:
        return f"writes outside: {writes.pop()}"
    return None


def fuzz(count: int, seeds: Path, scratch: Path) -> Iterator[str]:
    """Every fault in that many inputs, spread over the actions."""
    for number in range(count):
        action = TURNS[number % len(TURNS)]
        wrong = outcome(action, number, seeds, scratch / "case")
        if wrong is not None:
            yield f"{action} {number}: {wrong}"


def test_no_input_ends_in_a_traceback(seeds: Path, tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert list(fuzz(FEW, seeds, tmp_path)) == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY


@pytest.mark.slow
def test_fifty_thousand_inputs(seeds: Path, tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert list(fuzz(MANY, seeds, tmp_path)) == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY


# Action and number of every input that has ever ended otherwise.
ONCE_FAILED: list[tuple[str, int]] = [
    ("data", 103_557),
    ("flora", 300_036),
    ("lora", 300_079),
    ("flora", 300_456),
    ("flora", 300_858),
    ("lora", 301_231),
    ("lora", 301_309),
    ("base", 418_930),
    ("base", 419_470),
]


@pytest.mark.parametrize(("action", "number"), ONCE_FAILED)
def test_an_input_that_once_failed(action: str, number: int, seeds: Path, tmp_path: Path) -> None:
    assert outcome(action, number, seeds, tmp_path / "case") is None


STEM = "base_model.model.lin.tucker_weight"
ONE = {f"{STEM}.core": torch.ones(2)}
TENSORS = {f"{STEM}.core": torch.ones(2, 2), f"{STEM}.factor_0": torch.ones(5, 2), f"{STEM}.factor_1": torch.ones(3, 2)}
LONG_NAME = {key.replace("lin", "a" * 40): value for key, value in TENSORS.items()}
HOSTILE: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]] = {
    "whole numbers": ({}, {key: value.int() for key, value in TENSORS.items()}),
    "bools": ({}, {key: value.bool() for key, value in TENSORS.items()}),
    "fp8": ({}, {key: value.to(torch.float8_e4m3fn) for key, value in TENSORS.items()}),
    "nothing": ({}, {**TENSORS, f"{STEM}.core": torch.ones(0, 2)}),
    "no dimensions": ({}, {**TENSORS, f"{STEM}.core": torch.tensor(1.0)}),
    "65 dimensions": ({}, {f"{STEM}.core": torch.ones([1] * 64)}),
    "one dimension": ({}, ONE),
    "a name that clears the screen": ({}, {key.replace("lin", "a\x1b[2J"): value for key, value in ONE.items()}),
    "a name with a line's end": ({}, {key.replace("lin", "a\nb"): value for key, value in ONE.items()}),
    "a name of a million letters": ({}, {key.replace("lin", "a" * 1_000_000): value for key, value in ONE.items()}),
    "numbers that are none": ({}, {key.replace("lin", "a.\u00b2." + "9" * 5000): value for key, value in ONE.items()}),
    "infinite scale": ({"scale": float("inf")}, TENSORS),
    "scale as text": ({"scale": "2"}, TENSORS),
    "scale that is true": ({"scale": True}, TENSORS),
    "fold as a list": ({"fold": [1]}, TENSORS),
    "no expression": ({"scale_pattern": {"[": 2}}, TENSORS),
    "an expression that never ends": ({"scale_pattern": {"(a+)+b": 2.0}}, LONG_NAME),
    "ranks as text": ({"rank_pattern": {"lin": "many"}}, TENSORS),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_adapter_is_refused_or_read_at_once(name: str, tmp_path: Path) -> None:
    config, tensors = HOSTILE[name]
    folder = tmp_path / "adapter"
    folder.mkdir()
    text = json.dumps({"peft_type": "TUCKER", "r": 2, "target_modules": ["lin"], **config})
    (folder / "adapter_config.json").write_text(text)
    save_file(tensors, folder / "adapter_model.safetensors")
    before = signal.signal(signal.SIGALRM, _hangs)
    signal.alarm(SECONDS)
    try:
        with suppress(UserError, OSError):
            anatomy(folder)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_devices_and_bombs_among_the_data_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (7, 5)).save(tmp_path / name / "a.png")
    (tmp_path / "cat" / "endless.png").symlink_to("/dev/zero")
    Image.new("1", (40_000, 40_000)).save(tmp_path / "dog" / "bomb.png")
    items, _ = class_folders(tmp_path)
    assert len(sift(items, check_image, bad="skip", what="images")) == 2
    printed = capsys.readouterr().out
    assert "endless.png is not a regular file" in printed
    assert "decompression bomb" in printed
    with pytest.raises(UserError, match="2 of 4 images cannot be used"):
        sift(items, check_image, bad="error", what="images")
