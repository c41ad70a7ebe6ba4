"""The result files: where they are, and what each says about the machine and the versions it comes from."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
QUICK = ROOT / "outputs" / "benchmarks-quick"
PACKAGES = ("flora-peft", "torch", "peft", "transformers", "lycoris-lora", "monai", "diffusers")


@dataclass(frozen=True)
class Options:
    """What a question is asked with.

    Attributes:
        quick: a smoke run: small inputs, few repeats.
        threads: thread counts to time with; the first is the headline.
        seed: of weights, inputs and orders.
        load: of the machine before the question was asked, averaged over the last minute.
        commit: of the code, where the run has no git to ask.
    """

    quick: bool = False
    threads: tuple[int, ...] = (1, 2)
    seed: int = 0
    load: float | None = None
    commit: str | None = None


def provenance(options: Options) -> dict[str, Any]:
    """Machine, versions, commit, date and options of a run."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": options.commit or commit(),
        "machine": {
            "cpu": cpu(),
            "cores": os.cpu_count(),
            "threads": list(options.threads),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "load_before": options.load,
            "python": platform.python_version(),
        },
        "versions": versions(),
        "seed": options.seed,
        "quick": options.quick,
    }


def commit() -> str | None:
    """Of the checkout, marked "-dirty" where the library or a script differs from it.

    A copy without git may have the hash in a file ``COMMIT`` at its root; None where it has not.
    """
    try:
        head = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--", "src", "benchmarks/*.py")
    except (OSError, subprocess.SubprocessError):
        written = ROOT / "COMMIT"
        return written.read_text(encoding="utf-8").strip() if written.exists() else None
    return head + ("-dirty" if changed else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def load() -> float | None:
    """Processes that want a core, averaged over the last minute; None where the system does not tell."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def cpu() -> str:
    """The processor's name and instruction set, as torch uses it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = named[0] if named else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def versions() -> dict[str, str]:
    """Of the packages that a result depends on, of those installed."""
    installed = {name: next(iter(metadata.distributions(name=name)), None) for name in PACKAGES}
    return {name: found.version for name, found in installed.items() if found is not None}


def write(question: str, measured: dict[str, Any], options: Options, folder: Path) -> Path:
    """Writes ``<question>.json``, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{question}.json"
    content = {"question": question, **provenance(options), **measured}
    part = path.with_suffix(".part")
    part.write_text(dumps(content), encoding="utf-8")
    part.replace(path)
    return path


def dumps(content: dict[str, Any]) -> str:
    """Indented JSON, with lists of numbers on one line."""
    text = json.dumps(content, indent=1)
    return re.sub(r"\[\s+([-+.\deE,\s]+?)\s+\]", lambda match: f"[{' '.join(match[1].split())}]", text) + "\n"


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Every result of a folder, by question; files that answer none are left alone."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    return {name: content for name, content in found.items() if content.get("question") == name}
