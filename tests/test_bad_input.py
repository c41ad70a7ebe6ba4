"""What goes wrong with convert, extract and merge: one clear line, exit 2, and everything on disk as it was."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from convert_cases import random_adapter
from flora.convert import load, save
from flora_cli import main
from foreign_models import build
from test_extract import save_model, tuned
from test_merge import digest, picked

WEIGHT = "transformer.h.1.mlp.c_fc.weight"
CORE = "base_model.model.transformer.h.1.mlp.c_fc.tucker_weight.core"
ADAPTER = "adapter/adapter_model.safetensors"
VERBS = {
    "convert": ["convert", "adapter", "--to", "lora", "--out", "out"],
    "extract": ["extract", "base", "tuned", "--rank", "2", "--out", "out"],
    "merge": ["merge", "adapter", "--base", "base", "--out", "out"],
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, a fine-tune of it, both in shards, and an adapter; all is well with them."""
    root = tmp_path_factory.mktemp("whole")
    save_model(build("gpt2"), root / "base")
    save_model(tuned("gpt2"), root / "tuned")
    save(random_adapter(build("gpt2"), picked, 0.02), root / "adapter")
    return root


@pytest.fixture
def place(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which is the working directory."""
    for path in whole.rglob("*"):
        if path.is_file():
            target = tmp_path / path.relative_to(whole)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shard(folder: str) -> Path:
    """The shard that has ``WEIGHT``."""
    index = json.loads(Path(folder, "model.safetensors.index.json").read_text())
    return Path(folder, index["weight_map"][WEIGHT])


def file_of(what: str) -> Path:
    return Path(ADAPTER) if what == "adapter" else shard(what)


def key_of(what: str) -> str:
    return CORE if what == "adapter" else WEIGHT


def cut(what: str) -> None:
    file_of(what).write_bytes(file_of(what).read_bytes()[:-40])


def junk(what: str) -> None:
    file_of(what).write_bytes(b"\xff" * 4096)


def gone(what: str) -> None:
    file_of(what).unlink()


def edit(what: str, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(file_of(what))
    change(tensors)
    save_file(tensors, file_of(what), {"format": "pt"})


def nan(what: str) -> None:
    edit(what, lambda tensors: tensors[key_of(what)].view(-1)[3:4].fill_(float("nan")))


def reshaped(what: str) -> None:
    edit(what, lambda tensors: tensors.update({key_of(what): torch.ones(3, 5)}))


def foreign(what: str) -> None:
    if what == "adapter":
        edit(what, lambda tensors: tensors.update({"lora_unet_x.hada_w1_a": torch.ones(2)}))
        return
    for path in [*Path(what).glob("*.safetensors"), Path(what, "model.safetensors.index.json")]:
        path.unlink()
    save_file({"encoder.weight": torch.ones(3, 5)}, Path(what, "model.safetensors"))


def taken(what: str) -> None:
    Path(what).mkdir()
    Path(what, "precious.txt").write_text("kept")


CASES: list[tuple[str, Callable[[str], None], str, str]] = [
    ("convert", cut, "adapter", "adapter_model.safetensors is truncated or corrupt"),
    ("extract", cut, "base", "is truncated or corrupt"),
    ("extract", cut, "tuned", "is truncated or corrupt"),
    ("merge", cut, "adapter", "adapter_model.safetensors is truncated or corrupt"),
    ("merge", cut, "base", "is truncated or corrupt"),
    ("convert", junk, "adapter", "adapter_model.safetensors is truncated or corrupt"),
    ("extract", junk, "tuned", "is truncated or corrupt"),
    ("merge", junk, "adapter", "adapter_model.safetensors is truncated or corrupt"),
    ("merge", junk, "base", "is truncated or corrupt"),
    ("convert", gone, "adapter", "adapter_model.safetensors does not exist"),
    ("extract", gone, "base", "shards that model.safetensors.index.json names"),
    ("extract", gone, "tuned", "shards that model.safetensors.index.json names"),
    ("merge", gone, "adapter", "adapter_model.safetensors does not exist"),
    ("merge", gone, "base", "shards that model.safetensors.index.json names"),
    ("convert", foreign, "adapter", "has foreign keys: 'lora_unet_x.hada_w1_a'"),
    ("extract", foreign, "tuned", "it is not a fine-tune of that model"),
    ("merge", foreign, "adapter", "has foreign keys: 'lora_unet_x.hada_w1_a'"),
    ("merge", foreign, "base", "give the base model that the adapter was trained on"),
    ("convert", reshaped, "adapter", f"{WEIGHT}: "),
    ("extract", reshaped, "tuned", f"{WEIGHT} has shape (12, 48) in base and (3, 5) in tuned"),
    ("merge", reshaped, "adapter", f"{WEIGHT}: "),
    ("merge", reshaped, "base", f"{WEIGHT} has shape (3, 5) in base and (12, 48) in the adapter"),
    ("convert", nan, "adapter", f"{CORE} has NaN or infinite entries"),
    ("extract", nan, "tuned", f"{WEIGHT} has NaN or infinite entries"),
    ("extract", nan, "base", f"{WEIGHT} has NaN or infinite entries"),
    ("merge", nan, "adapter", f"{CORE} has NaN or infinite entries"),
    ("merge", nan, "base", f"{WEIGHT} would have NaN or infinite entries after the merge; nothing was"),
    ("convert", taken, "out", "out exists; choose another output or ask to overwrite it (--overwrite)"),
    ("extract", taken, "out", "out exists; choose another output or ask to overwrite it (--overwrite)"),
    ("merge", taken, "out", "out exists; choose another output or ask to overwrite it (--overwrite)"),
]


@pytest.mark.parametrize(
    ("verb", "damage", "what", "message"),
    CASES,
    ids=[f"{verb}-{damage.__name__}-{what}" for verb, damage, what, _ in CASES],
)
def test_one_line_exit_2_and_nothing_written(
    place: Path,
    capsys: pytest.CaptureFixture[str],
    verb: str,
    damage: Callable[[str], None],
    what: str,
    message: str,
) -> None:
    damage(what)
    before = digest(place)
    assert main(VERBS[verb]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("flora: error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not printed.out
    assert digest(place) == before
    assert sorted(path.name for path in place.iterdir()) == sorted({"base", "tuned", "adapter", *({what} & {"out"})})


def test_every_verb_meets_every_kind_of_bad_input() -> None:
    met = {verb: {damage for other, damage, _, _ in CASES if other == verb} for verb in VERBS}
    assert all(damages == {cut, junk, gone, foreign, reshaped, nan, taken} for damages in met.values())
    assert len(CASES) == 30


def test_all_is_well_with_what_the_damage_is_done_to(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb, argv in VERBS.items():
        assert main([*argv[:-1], verb]) == 0
    assert {"convert", "extract", "merge"} <= {path.name for path in place.iterdir()}
    assert "error" not in capsys.readouterr().err


ENDS = """
import json, os, resource, signal, sys
from flora.storage import atomic
from flora.storage.checkpoint import Checkpoint
from flora_cli import main

def dies(run, at, calls=[]):
    def counted(*args):
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return run(*args)
    return counted

def end(argv, how, at):
    pid = os.fork()
    if pid:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return code, sorted(name for name in os.listdir() if name.endswith("-part"))
    if how == "full":  # the system refuses in the middle of a file, as it does without space
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (at, resource.RLIM_INFINITY))
    elif how == "rename":
        atomic.put = dies(atomic.put, at)
    else:
        Checkpoint.get = dies(Checkpoint.get, at)
    os._exit(main(argv))

print(json.dumps([end(*case) for case in json.loads(sys.argv[1])]))
"""


def test_a_full_disk_and_a_kill_leave_the_output_as_it_was(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files above 2 KB that cannot be written; runs killed in the middle, and at the last moment of a replacement."""
    for verb, argv in VERBS.items():
        assert main([*argv[:-1], f"old-{verb}"]) == 0
    before = digest(place)
    full = [(argv, "full", 2048) for argv in VERBS.values()]
    last = [
        ([*argv[:-1], f"old-{verb}", "--overwrite"], "rename", 4 if verb == "extract" else 1)
        for verb, argv in VERBS.items()
    ]
    middle = [(VERBS[verb], "read", 5) for verb in ("extract", "merge")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ENDS, json.dumps([*full, *last, *middle])],
        capture_output=True,
        text=True,
        check=False,
    )
    ends = json.loads(done.stdout)
    layers = [".out.flora-part"]  # an extraction goes on with those that are finished
    assert ends[:3] == [[2, []], [2, layers], [2, []]], done.stderr
    assert [code for code, _ in ends[3:]] == [-9] * 5, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("flora: error: ")]
    assert len(lines) == 3
    assert all("cannot write" in line for line in lines), lines
    assert {name: value for name, value in digest(place).items() if not name.startswith(".")} == before
    capsys.readouterr()
    assert main(VERBS["extract"]) == 0, "it goes on with the layers that were finished"
    assert len(load(place / "out").weights) == len(load(place / "old-extract").weights)
    assert not (place / ".out.flora-part").exists(), "the next run of an output removes what was left, and only that"
    assert all((place / f".old-{verb}.flora-part").exists() for verb in VERBS)
