"""Files of data that say more than is good: refused by their size, or left out, before anything is allocated."""

from __future__ import annotations

import gzip
import json
import os
import struct
import zlib
from functools import partial
from pathlib import Path

import nibabel
import numpy as np
import psutil
import pytest
import soundfile
from PIL import Image

from flora.data.coco import read_coco
from flora.data.files import Item, check_image, json_entries, regular, table_rows, text_of
from flora.data.images import read_image
from flora.data.records import sift
from flora.data.volume_files import Pair, Reading, read_file, read_pair, resampled
from flora.errors import UserError
from flora.recipes.audio_classify import Clip, read_sound
from flora.recipes.diffusion import read_picture

FLOOR = 1 << 28  # bytes by which memory may grow


@pytest.fixture(autouse=True)
def flat() -> object:
    """Memory stays as it is, whatever the files say."""
    before = psutil.Process().memory_info().rss
    yield
    assert psutil.Process().memory_info().rss - before < FLOOR


def write_volume(path: Path, *, sides: tuple[int, int, int] = (5, 4, 3), said: tuple[int, ...] | None = None) -> Path:
    """A volume, whose header may say another size than it has."""
    nibabel.save(nibabel.Nifti1Image(np.ones(sides, np.uint8), np.eye(4)), path)
    if said is not None:
        data = bytearray(gzip.decompress(path.read_bytes()))
        data[40:56] = struct.pack("<8h", 3, *said, 1, 1, 1, 1)
        path.write_bytes(gzip.compress(bytes(data)))
    return path


def test_a_volume_of_terabytes_in_a_file_of_bytes(tmp_path: Path) -> None:
    path = write_volume(tmp_path / "huge.nii.gz", said=(32767, 32767, 32767))
    with pytest.raises(UserError, match=r"huge.nii.gz claims the size \(32767, 32767, 32767\)"):
        read_file(path)


def test_voxels_as_wide_as_a_kilometre(tmp_path: Path) -> None:
    path = tmp_path / "wide.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.ones((5, 4, 3), np.uint8), np.diag([1e6, 1e6, 1e6, 1])), path)
    with pytest.raises(UserError, match="it would have 5000000 x 4000000 x 3000000 voxels, too many to hold in memory"):
        resampled(read_file(path), Reading(num_channels=1, classes=2, spacing=[1, 1, 1]))


def test_bad_volumes_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reading = Reading(num_channels=1, classes=2)
    good = write_volume(tmp_path / "good.nii.gz")
    bad = [write_volume(tmp_path / "huge.nii.gz", said=(32767, 32767, 32767)), tmp_path / "device.nii.gz"]
    bad[1].symlink_to("/dev/zero")
    cut = tmp_path / "cut.nii.gz"
    cut.write_bytes(good.read_bytes()[:60])
    pairs = [Item(path.name, Pair(path, good)) for path in (good, *bad, cut)]
    check = partial(read_pair, reading=reading)

    assert [item.place for item in sift(pairs, check, bad="skip", what="volumes")] == ["good.nii.gz"]
    printed = capsys.readouterr().out
    assert "3 of 4 volumes cannot be used" in printed
    assert "claims the size" in printed
    assert "is not a regular file" in printed

    with pytest.raises(UserError, match="3 of 4 volumes cannot be used: .*or set task.bad_data=skip"):
        sift(pairs, check, bad="error", what="volumes")


def png_that_says(width: int, height: int, path: Path) -> Path:
    """A PNG file whose header speaks of so many pixels."""
    Image.new("L", (1, 1)).save(path)
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">2I", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path.write_bytes(bytes(data))
    return path


@pytest.mark.parametrize("read", [check_image, read_image, lambda path: read_picture(lambda: path, 8)])
def test_a_picture_that_unpacks_into_gigabytes(read: object, tmp_path: Path) -> None:
    path = png_that_says(60_000, 60_000, tmp_path / "bomb.png")
    with pytest.raises(Image.DecompressionBombError):
        read(path)  # type: ignore[operator]


def flac_that_says(samples: int, path: Path) -> Path:
    """A FLAC file whose header speaks of so many samples."""
    soundfile.write(path, np.zeros(100, np.float32), 16_000)
    data = bytearray(path.read_bytes())
    # The low 36 bits of the eight bytes at 18 of the stream's description, which has no more before it than that.
    packed = int.from_bytes(data[18:26], "big")
    data[18:26] = ((packed >> 36 << 36) | samples).to_bytes(8, "big")
    path.write_bytes(bytes(data))
    return path


def test_sounds_that_are_longer_than_can_be_read(tmp_path: Path) -> None:
    long = flac_that_says(2**35, tmp_path / "long.flac")
    with pytest.raises(UserError, match="claims .* samples at 16000 Hz|cannot be decoded"):
        read_sound(Clip(partial(Path, long), 0), 16_000)

    quick = tmp_path / "quick.wav"
    soundfile.write(quick, np.zeros(100, np.float32), 2_147_483_629)
    with pytest.raises(UserError, match="claims 100 samples at 2147483629 Hz"):
        read_sound(Clip(partial(Path, quick), 0), 16_000)

    slow = tmp_path / "slow.wav"
    soundfile.write(slow, np.zeros(100_000, np.float32), 1)
    with pytest.raises(UserError, match="claims 100000 samples at 1 Hz"):
        read_sound(Clip(partial(Path, slow), 0), 16_000)


READERS = {
    "image": check_image,
    "picture": read_image,
    "text": text_of,
    "entries": lambda path: json_entries(path.with_suffix(".json")),
    "table": lambda path: table_rows(path, ["text"]),
    "coco": lambda path: read_coco(path, path.parent),
    "volume": read_file,
    "sound": lambda path: read_sound(Clip(partial(regular, path), 0), 16_000),
}


@pytest.mark.parametrize("kind", ["device", "pipe", "folder"])
@pytest.mark.parametrize("name", READERS)
def test_nothing_but_regular_files_is_opened(name: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    if kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(UserError, match="is not a regular file"):
        READERS[name](path)


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, '{"images": 1' * 3])
def test_json_that_python_refuses(text: str, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(text)
    for read in (lambda: json_entries(path), lambda: read_coco(path, tmp_path)):
        with pytest.raises(UserError, match="data.json.*not valid JSON|of COCO's format|must be one list"):
            read()


def test_a_table_with_a_field_that_is_too_large(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("text,label\n" + json.dumps("x" * 200_000) + ",1\n")
    with pytest.raises(UserError, match="field larger than field limit"):
        table_rows(path, ["text", "label"])
