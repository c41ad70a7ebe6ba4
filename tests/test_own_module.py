"""A network of one's own on the command line, as ``file.py:function``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

import flora
import flora_cli
from flora.runs.own_module import own_module

SOURCE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 17, (3, 5)), nn.BatchNorm2d(17), nn.ReLU(), nn.Conv2d(17, 23, 5))
        self.head = nn.Linear(23, 5)

    def forward(self, images):
        return self.head(self.features(images).mean((2, 3)))


def make():
    torch.manual_seed(3)
    return Net()


def loose():
    return Net()


def number():
    return 3


def broken():
    raise RuntimeError("no weights here")
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "net.py"
    path.write_text(SOURCE)
    return path


@pytest.fixture
def adapted(file: Path, tmp_path: Path) -> torch.nn.Module:
    """The network with a trained adapter, which is saved as ``adapter``."""
    config = flora.FloraConfig(
        r=4, target_modules=["features.0", "features.3"], modules_to_save=["head"], freeze_batch_norm=True
    )
    model = get_peft_model(own_module(f"{file}:make", run_code=True), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    model.eval()
    model.save_pretrained(str(tmp_path / "adapter"))
    return model


def test_code_is_not_run_unasked(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(f"open({str(file.with_name('ran'))!r}, 'w')\n{SOURCE}")
    for arguments in (
        ["plan", f"{file}:make"],
        ["merge", str(file.parent), "--base", f"{file}:make", "--out", str(file.with_name("out"))],
        ["inspect", str(file.parent), "--base", f"{file}:make"],
        ["convert", str(file.parent), "--base", f"{file}:make", "--to", "lora", "--out", str(file.with_name("out"))],
    ):
        assert flora_cli.main(arguments) == 2
        assert "is not run unasked" in capsys.readouterr().err
    assert not file.with_name("ran").exists()


def test_a_plan(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert flora_cli.main(["plan", f"{file}:make", "--target-modules", "all-conv", "--run-code"]) == 0
    out = capsys.readouterr().out
    assert "17x3x3x5" in out
    assert out.count("\nNet: ") == 1


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("mak", "has no function 'mak'; did you mean 'make'?"),
        ("number", "returned 3, expected a torch.nn.Module"),
        ("broken", "RuntimeError: no weights here"),
        ("loose", "gives other weights each time"),
    ],
)
def test_what_is_refused(
    function: str, message: str, file: Path, adapted: torch.nn.Module, capsys: pytest.CaptureFixture[str]
) -> None:
    out = file.with_name("merged")
    command = ["merge", str(file.with_name("adapter")), "--base", f"{file}:{function}", "--run-code", "--out", str(out)]
    assert flora_cli.main(command) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_a_merge_gives_the_outputs_of_the_adapted_network(file: Path, adapted: torch.nn.Module) -> None:
    out = file.with_name("merged")
    adapter = str(file.with_name("adapter"))
    assert flora_cli.main(["merge", adapter, "--base", f"{file}:make", "--run-code", "--out", str(out)]) == 0
    merged = own_module(f"{file}:loose", run_code=True)
    merged.load_state_dict(load_file(out / "model.safetensors"))
    images = torch.randn(2, 3, 11, 13)
    with torch.no_grad():
        torch.testing.assert_close(merged(images), adapted(images), rtol=1e-4, atol=1e-5)


def test_inspect_takes_the_base_where_the_file_does_not_tell_its_layers(
    file: Path, adapted: torch.nn.Module, capsys: pytest.CaptureFixture[str]
) -> None:
    other = file.with_name("other.safetensors")
    base = ["--base", f"{file}:make", "--run-code"]
    command = ["convert", str(file.with_name("adapter")), "--to", "kohya", "--drop-extras", "--out", str(other), *base]
    assert flora_cli.main(command) == 0
    assert flora_cli.main(["inspect", str(other), *base]) == 0
    assert "23x17x5x5" in capsys.readouterr().out
