"""Every ``-tiny`` config, offline, by the code that runs a real one: trained, measured again, killed and resumed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from flora.data.samples import locate
from flora.recipes import config_names
from flora.runs.evaluating import evaluate
from flora.runs.predicting import predict, result_line
from flora.runs.settings import Settings, read
from flora.runs.training import train
from flora.storage.atomic import read_json

TINY = [name for name in config_names() if name.endswith("-tiny")]
FILES = {
    "README.md", "adapter_config.json", "adapter_model.safetensors", "config.yaml", "loss.png", "metrics.json",
    "report.html",
}  # fmt: skip
ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The samples are made once; one thread, so that a run can be compared bit for bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
    torch.set_num_threads(threads)


def settings_of(name: str, output: Path) -> Settings:
    return read(name, [f"output={output}", "training.disable_tqdm=true"])


@pytest.mark.parametrize("name", TINY)
def test_trains_and_measures_the_same_and_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    output, again = tmp_path / "run", tmp_path / "again"
    settings = settings_of(name, output)
    metrics = train(settings)
    assert {path.name for path in output.iterdir()} >= FILES
    losses = [entry["loss"] for entry in read_json(output / "trainer_state.json")["log_history"] if "loss" in entry]
    assert len(losses) >= 4
    assert sum(losses[-2:]) < 0.95 * sum(losses[:2])
    assert settings.load_recipe().METRIC in metrics["test"]
    found, same, _ = evaluate(output)
    assert same is True
    assert found == pytest.approx(metrics["test"], rel=1e-6)

    check_predictions(name, output, metrics["test"])

    checkpoint = min(output.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    assert int(checkpoint.name.partition("-")[2]) < metrics["steps"]
    again.mkdir()
    shutil.copytree(checkpoint, again / checkpoint.name)
    settings_of(name, again).save(again)
    resumed = train(settings_of(name, again), resume=True)
    assert resumed["resumed_at"] == int(checkpoint.name.partition("-")[2])
    weights, expected = load_file(again / ADAPTER), load_file(output / ADAPTER)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


TEXTS = {  # what a recipe that reads no files predicts on
    "digits": [str(number) for number in range(20)],
    "diffusion": ["a photo of sks dog"],
    "text_glue": ["the film was fine and lovely , more fine than the last"],
    "text_causal": ["Say the word hot twice ."],
}


def check_predictions(name: str, output: Path, measured: dict[str, float]) -> None:
    """What a trained folder makes of the test files, against what was measured on these."""
    settings = read(str(output / "config.yaml"))
    recipe = settings.recipe
    if recipe in TEXTS:
        inputs = TEXTS[recipe]
    else:
        root = Path(locate(settings.task.data))
        endings = (".png", ".wav", ".nii.gz")
        files = sorted(str(file) for file in root.rglob("*") if file.name.endswith(endings))
        inputs = [file for file in files if "/test/" in file or "/imagesT" in file] or files[:2]
    prompt = "what is the colour of the square ?" if recipe == "multimodal_chat" else None
    results = predict(output, inputs, prompt=prompt)
    assert [result["input"] for result in results] == inputs
    assert read_json(output / "predictions" / "predictions.json") == results
    assert all(result_line(result).startswith(result["input"]) for result in results)

    if recipe in ("vision_classify", "audio_classify"):
        right = [result["class"] == Path(result["input"]).parent.name for result in results]
        assert sum(right) / len(right) == pytest.approx(measured["accuracy"])
    for result in results:
        assert Path(result.get("file", output)).exists()
        assert 0 <= result.get("score", 0) <= 1
        if recipe == "vision_segment":
            with Image.open(result["file"]) as found, Image.open(result["input"]) as given:
                assert found.size == given.size
            assert sum(result["classes"].values()) == pytest.approx(1, abs=1e-3)
        if recipe == "volume_segment":
            found, given = (nibabel.load(result[key]) for key in ("file", "input"))
            assert found.shape == given.shape[:3]
            np.testing.assert_allclose(found.affine, given.affine)


def test_every_recipe_has_a_tiny_config() -> None:
    assert len(TINY) == 11


def test_killed_by_the_system_at_a_random_step_and_resumed(cache: None, tmp_path: Path) -> None:
    train(settings_of("digits-tiny", tmp_path / "whole"))
    command = [sys.executable, "-m", "flora_cli", "train", "digits-tiny", f"output={tmp_path / 'run'}"]
    process = subprocess.Popen(
        [*command, "training.save_steps=1"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    seen, wanted = 0, random.randint(2, 15)
    while process.poll() is None and seen < wanted:
        time.sleep(0.005)
        steps = [path.name.partition("-")[2] for path in (tmp_path / "run").glob("checkpoint-*")]
        seen = max([seen, *(int(step) for step in steps if step.isdigit())])
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    assert not (tmp_path / "run" / "metrics.json").exists()
    resumed = train(read("digits-tiny", [f"output={tmp_path / 'run'}", "training.save_steps=1"]), resume=True)
    assert resumed["steps"] == 20
    weights, expected = load_file(tmp_path / "run" / ADAPTER), load_file(tmp_path / "whole" / ADAPTER)
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
