"""Shells complete `flora` by the script that it prints: each case is a line and what the Tab key offers."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

import flora_cli
from flora.recipes import config_names

CASES = {
    "flora co": {"compare", "convert"},
    "flora train vol": {"volume_segment", "volume_segment-monai", "volume_segment-tiny"},
    "flora train m": {"multimodal_chat", "multimodal_chat-tiny", "mine.yaml"},
    "flora compare digits --over": {"--overwrite"},
    "flora eval ou": {"outputs"},
    "flora merge outputs --out ou": {"outputs"},
    "flora recipes k": {"keys"},
    "flora recipes copy text_g": {"text_glue", "text_glue-tiny"},
    "flora convert adapter --to l": {"lora"},
    "flora inspect no": {"notes.txt"},
    "flora extract outputs ou": {"outputs"},
    "flora --print-completion f": {"fish"},
}
PROGRAMS = {
    "bash": """
source ./script
while read -r line; do
  COMP_WORDS=($line)
  COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
  _shtab_flora
  echo "${COMPREPLY[@]}"
done < lines
""",
    "fish": """
source ./script
while read -l line
    echo (complete -C "$line" | cut -f1)
end < lines
""",
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    for name in ("mine.yaml", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "lines").write_text("\n".join(CASES) + "\n")
    return tmp_path


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        flora_cli.main(["--print-completion", shell])
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("shell", PROGRAMS)
def test_the_shell_itself_completes(shell: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")

    (place / "script").write_text(script(shell, capsys))
    done = subprocess.run([shell, "-c", PROGRAMS[shell]], capture_output=True, text=True, check=True)
    offered = [{word.rstrip("/") for word in shlex.split(line)} for line in done.stdout.splitlines()]
    assert dict(zip(CASES, offered, strict=True)) == CASES
    assert not done.stderr


def test_every_shell_gets_every_config(capsys: pytest.CaptureFixture[str]) -> None:
    for shell in ("bash", "zsh", "fish"):
        text = script(shell, capsys)
        assert all(name in text for name in config_names())


def test_another_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        flora_cli.main(["--print-completion=bsh"])
    assert end.value.code == 2
    assert "did you mean 'bash'?" in capsys.readouterr().err
