"""Outputs are whole or absent: locks, leftovers, exchange, what may be replaced, links and modes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flora.errors import UserError
from flora.storage import atomic
from flora.storage.atomic import PART, check_target, claim, staged, staged_folder, write_text
from flora.storage.replacing import ADAPTER, MODEL, TENSORS


def write_adapter(folder: Path, text: str = "new") -> None:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(text)
    save_file({"core": torch.ones(3)}, folder / "adapter_model.safetensors")


def text_of(folder: Path) -> str:
    return (folder / "adapter_config.json").read_text()


@pytest.fixture
def old(tmp_path: Path) -> Path:
    write_adapter(tmp_path / "out", "old")
    return tmp_path / "out"


@pytest.fixture(params=["exchange", "two renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With and without a system that can exchange."""
    if request.param != "exchange":
        monkeypatch.setattr(atomic, "exchange", lambda first, second: False)
    return str(request.param)


def test_a_folder_takes_the_place_of_another(old: Path, way: str) -> None:
    with staged(old, ADAPTER, overwrite=True) as new:
        write_adapter(new)
        assert text_of(old) == "old"
    assert text_of(old) == "new"
    assert [path.name for path in old.parent.iterdir()] == ["out"]


def test_a_failure_changes_nothing(old: Path, way: str) -> None:
    def fails(target: Path) -> None:
        with staged(target, ADAPTER, overwrite=True) as new:
            write_adapter(new)
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fails(old)
    with pytest.raises(RuntimeError, match="in the middle"):
        fails(old.parent / "deep" / "er" / "out")
    assert text_of(old) == "old"
    assert [path.name for path in old.parent.iterdir()] == ["out"], "folders that were made for it go too"


def test_what_else_a_folder_holds_can_stay(old: Path, way: str) -> None:
    (old / "deep").mkdir()
    (old / "deep" / "notes.txt").write_text("mine")
    (old / "notes.txt").write_text("mine")
    (old / "notes.txt").chmod(0o640)
    (old / "link").symlink_to("absent")

    with staged(old, overwrite=True, keep_others=True) as new:
        write_adapter(new)

    assert text_of(old) == "new"
    assert (old / "deep" / "notes.txt").read_text() == (old / "notes.txt").read_text() == "mine"
    assert (old / "notes.txt").stat().st_mode & 0o777 == 0o640
    assert (old / "link").readlink() == Path("absent")
    assert [path.name for path in old.parent.iterdir()] == ["out"]


def test_what_stays_is_copied_where_a_file_has_one_name(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    (old / "notes.txt").write_text("mine")
    monkeypatch.setattr(os, "link", refused)
    with staged(old, overwrite=True, keep_others=True) as new:
        write_adapter(new)
    assert (text_of(old), (old / "notes.txt").read_text()) == ("new", "mine")


def test_the_root_of_a_file_system_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path)
    with pytest.raises(UserError, match="is the root of a file system, which cannot be replaced; give a folder in it"):
        check_target(tmp_path, overwrite=True)


def test_what_a_kill_between_two_renames_moved_aside_comes_back(old: Path) -> None:
    part = old.parent / f".out{PART}"
    part.mkdir()
    old.rename(part / "old")
    (part / "new").mkdir()
    write_adapter(part / "new" / "out")
    with claim(old):
        assert text_of(old) == "old"
    assert [path.name for path in old.parent.iterdir()] == ["out"]


def test_leftovers_of_this_output_go_and_nothing_else(old: Path) -> None:
    for name in (f".out{PART}", f".other{PART}", ".out.part", ".out.1234.part"):
        (old.parent / name / "new" / "out").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="exists; choose another output or ask to overwrite"), claim(old):
        check_target(old)
    assert {path.name for path in old.parent.iterdir()} == {"out", f".other{PART}", ".out.part", ".out.1234.part"}


def test_a_second_writer_is_told(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from flora.storage.atomic import claim\n"
        "with claim(Path(sys.argv[1])): print('has it', flush=True); sys.stdin.read(1)\n"
    )
    target = tmp_path / "out"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "has it\n"
    with pytest.raises(UserError, match=f"another flora process is writing {target}"), claim(target):
        pass
    other.kill()
    other.wait()
    other.communicate()
    with claim(target):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_second_thread_is_told_and_the_first_may_nest(tmp_path: Path) -> None:
    refused = []

    def second() -> None:
        try:
            with claim(tmp_path / "out"):
                pass
        except UserError as error:
            refused.append(str(error))

    with claim(tmp_path / "out") as outer, claim(tmp_path / "out") as inner:
        assert outer == inner
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(refused) == 1
    assert list(tmp_path.iterdir()) == []


def test_what_is_kept_for_the_next_run(tmp_path: Path) -> None:
    def fails() -> None:
        with claim(tmp_path / "out", keep=["layers"]) as place:
            (place.folder / "layers").mkdir()
            (place.folder / "other").mkdir()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    with claim(tmp_path / "out", keep=["layers"]) as place:
        assert {path.name for path in place.folder.iterdir()} == {"lock", "layers"}
    assert list(tmp_path.iterdir()) == []


STRANGERS = [
    (ADAPTER, "a thesis beside an adapter", "holds 'thesis.txt', which is not part of an adapter"),
    (ADAPTER, "a thesis", "holds 'thesis.txt', which is not part of an adapter"),
    (ADAPTER, "nothing", "exists and is not an adapter that flora has written"),
    (ADAPTER, "a file", "exists and is a file, not an adapter that flora has written"),
    (MODEL, "a thesis", "holds 'thesis.txt', which is not part of a merged model"),
    (TENSORS, "a thesis", "exists and is a folder, not a tensor file that flora has written"),
    (TENSORS, "a file", "exists and is not a tensor file that flora has written"),
]


@pytest.mark.parametrize(("kind", "there", "message"), STRANGERS, ids=lambda value: str(value)[:20])
def test_only_what_flora_has_written_is_replaced(tmp_path: Path, kind: object, there: str, message: str) -> None:
    target = tmp_path / "out"
    if there == "a file":
        target.write_text("years of work")
    else:
        target.mkdir()
    if "thesis" in there:
        (target / "thesis.txt").write_text("years of work")
    if "adapter" in there:
        (target / "adapter_config.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message), staged(target, kind, overwrite=True) as new:  # type: ignore[arg-type]
        new.write_text("new")
    assert sorted(tmp_path.rglob("*")) == before


def test_source_and_target_are_never_one(old: Path) -> None:
    (old.parent / "link").symlink_to(old)
    for target, source in ((old, old), (old, old.parent / "link"), (old.parent / "link", old), (old, old / "x")):
        with pytest.raises(UserError, match="which is only read; give another output"):
            check_target(target, ADAPTER, overwrite=True, sources=[source])


def test_a_link_stays_a_link(old: Path) -> None:
    (old.parent / "link").symlink_to(old)
    (old.parent / "later").symlink_to(old.parent / "absent")
    for name in ("link", "later"):
        with staged(old.parent / name, ADAPTER, overwrite=True) as new:
            write_adapter(new)
        assert (old.parent / name).is_symlink()
    assert text_of(old) == text_of(old.parent / "absent") == "new"
    assert {path.name for path in old.parent.iterdir()} == {"out", "link", "later", "absent"}


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_modes_are_those_of_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        with staged(tmp_path / "out") as new:
            write_adapter(new)  # safetensors itself writes files that only their owner may read
        write_text(tmp_path / "text", "x")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes.pop("out") == 0o777 & ~mask
    assert set(modes.values()) == {0o666 & ~mask}


@pytest.mark.parametrize("length", [200, 242, 243, 255])
def test_long_names(tmp_path: Path, length: int) -> None:
    with staged_folder(tmp_path / ("n" * length)) as new:
        (new / "file").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["n" * length]
    with pytest.raises(OSError, match="cannot write .*: File name too long; nothing was left behind"):
        write_text(tmp_path / ("n" * 256), "x")


def test_files_are_on_the_disk_before_they_get_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    flush, rename = os.fsync, Path.rename

    def watched(handle: int) -> None:
        happened.append(str(Path(f"/proc/self/fd/{handle}").readlink()))
        flush(handle)

    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setattr(Path, "rename", lambda path, to: (happened.append(f"rename {to}"), rename(path, to)))
    with staged_folder(tmp_path / "out") as new:
        (new / "inner").mkdir()
        (new / "inner" / "file").touch()
    part = str(tmp_path / f".out{PART}" / "new")
    at = happened.index(f"rename {tmp_path / 'out'}")
    assert {part, f"{part}/out", f"{part}/out/inner", f"{part}/out/inner/file"} == set(happened[:at])
    assert happened[at + 1 :] == [str(tmp_path)]
