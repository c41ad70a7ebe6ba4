"""PEFT's own test-suite, from the source distribution of the installed version, on our method."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

FOLDER = Path(__file__).parent / "acceptance"
SPEC = json.loads((FOLDER / "spec.json").read_text())
KINDS = 12


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"$ {' '.join(command)}\n{done.stdout[-6000:]}\n{done.stderr[-2000:]}"


@pytest.fixture(scope="module")
def peft_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution of the installed PEFT, which ships its tests."""
    folder = tmp_path_factory.mktemp("peft")
    wanted = f"peft=={version('peft')}"
    log = run(
        sys.executable, "-m", "pip", "download", wanted, "--no-deps", "--no-binary", "peft", "--dest", str(folder)
    )
    archives = list(folder.glob("peft-*.tar.gz"))
    assert len(archives) == 1, log
    with tarfile.open(archives[0]) as archive:
        archive.extractall(folder, filter="data")
    return folder / archives[0].name.removesuffix(".tar.gz")


def outcome(peft: Path, spec: dict[str, object], file: str, folder: Path) -> tuple[Counter[str], str]:
    """Runs one file of PEFT's tests; returns how many passed, failed and were skipped, and the log."""
    path, report = folder / "spec.json", folder / "report.xml"
    path.write_text(json.dumps(spec))
    script = str(FOLDER / "peft_acceptance.py")
    options = ["--peft", str(peft), "--config", "flora:FloraConfig", "--spec", str(path), "--files", file]
    log = run(sys.executable, script, *options, "--", "-n", "2", f"--junitxml={report}")
    assert report.exists(), log
    counts = Counter(_verdict(case) for case in ET.parse(report).iter("testcase"))
    print(file, dict(counts))  # shown by pytest -rP
    return counts, log


def _verdict(case: ET.Element) -> str:
    verdicts = {"failure": "failed", "error": "failed", "skipped": "skipped"}
    return next((verdicts[child.tag] for child in case if child.tag in verdicts), "passed")


def test_every_deselected_item_is_justified() -> None:
    assert len(SPEC["kinds"]) == KINDS
    assert all(len(reason.split()) >= 6 for reason in SPEC["deselect"].values())
    assert len(SPEC["deselect"]) <= 4


@pytest.mark.slow
def test_toy_models_of_every_kind(peft_source: Path, tmp_path: Path) -> None:
    counts, log = outcome(peft_source, SPEC, "test_custom_models.py", tmp_path)
    assert counts["failed"] == 0, log
    assert counts["passed"] >= 1_000, log


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "at_least"),
    [
        ("test_decoder_models.py", 150),
        ("test_encoder_decoder_models.py", 45),
        ("test_feature_extraction_models.py", 50),
        ("test_seq_classifier.py", 30),
    ],
)
def test_model_families(file: str, at_least: int, peft_source: Path, tmp_path: Path) -> None:
    sys.path.insert(0, str(FOLDER))
    from tiny_models import write_model

    family = SPEC["families"][file]
    models = [str(write_model(name, tmp_path)) for name in family["models"]]
    spec = {**SPEC, "models": models, "lm_kwargs": {"task_type": family["task_type"]}}
    counts, log = outcome(peft_source, spec, file, tmp_path)
    assert counts["failed"] == 0, log
    assert counts["passed"] >= at_least, log
