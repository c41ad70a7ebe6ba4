"""What a command meets that is nobody's mistake: limits, signals, odd places and surroundings. Nothing is ever lost."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from killing import Ended, contents, copy_of, run_command
from test_kills import CASES, SPARSE, TRAININGS, Case, Undisturbed, undisturbed, warm, workshop, world  # noqa: F401

from flora.storage.atomic import LOCK, PART

COMMANDS = {name: case for name, case in (CASES | TRAININGS).items() if "two" not in name}
LONG_AGO, FAR_AHEAD = 0, 2**33  # seconds: 1970, and 2242
NOBODY = 65534


def limit(kind: int, most: int) -> Callable[[], None]:
    """A limit of the system on what a process may have."""

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(kind, (most, most))

    return limited


def few_handles(free: int) -> Callable[[], None]:
    """So many more files may be open at once."""

    def limited() -> None:
        limit(resource.RLIMIT_NOFILE, 100)()
        taken = []
        with suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))

        for handle in taken[:free]:
            os.close(handle)

    return limited


def little_memory(free: int) -> Callable[[], None]:
    """So many more KiB may be asked for."""

    def limited() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limit(resource.RLIMIT_AS, used + (free << 10))()

    return limited


def closed(*handles: int) -> Callable[[], None]:
    """Standard streams that are closed, as Python sees them then."""

    def close() -> None:
        for handle in handles:
            os.close(handle)
            setattr(sys, ("stdin", "stdout", "stderr")[handle], None)

    return close


def environment(**values: str | None) -> Callable[[], None]:
    """Variables that are set, or are not there."""

    def change() -> None:
        tempfile.tempdir = None  # is looked up once
        for name, value in values.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value

    return change


def dated(moment: int) -> Callable[[], None]:
    """Files of another time, as when a clock is put right."""

    def date() -> None:
        for path in Path().rglob("*"):
            os.utime(path, (moment, moment))

    return date


def clock(moment: float) -> Callable[[], None]:
    """A clock that stands."""

    def stop() -> None:
        time.time = lambda: moment

    return stop


def full_scratch() -> None:
    """No room for temporary files, in the system's folder."""
    make = tempfile.mkdtemp

    def refused(*args: object, dir: str | Path | None = None, **options: object) -> str:
        if dir is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(Path(tempfile.gettempdir()) / "x"))
        return make(*args, dir=dir, **options)  # type: ignore[call-overload, no-any-return]

    tempfile.mkdtemp = refused  # type: ignore[assignment]


SITUATIONS: dict[str, Callable[[], object]] = {
    **{f"files of {size} bytes": limit(resource.RLIMIT_FSIZE, size) for size in (0, 100, 1000, 5000, 20_000)},
    **{f"{free} handles": few_handles(free) for free in (1, 2, 3, 4, 5, 7, 10)},
    **{f"{free} KiB": little_memory(free) for free in (0, 100, 200, 500, 1000, 5000)},
    **{f"umask {mask:o}": lambda mask=mask: os.umask(mask) for mask in (0o000, 0o077)},
    **{f"closed {handles}": closed(*handles) for handles in ((0,), (1,), (2,), (0, 1, 2))},
    "no home": environment(HOME=None, XDG_CACHE_HOME=None),
    "a home that is not there": environment(HOME="/proc/absent", XDG_CACHE_HOME=None),
    "no folder for temporary files": environment(TMPDIR="/proc/absent"),
    "a full folder for temporary files": full_scratch,
    "files of the future": dated(FAR_AHEAD),
    "files of long ago": dated(LONG_AGO),
    "a clock of long ago": clock(LONG_AGO),
    "SIGPIPE": lambda: os.kill(os.getpid(), signal.SIGPIPE),
    "terminal gone": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
}


@pytest.fixture(scope="module")
def known(
    world: Path,  # noqa: F811
    workshop: Path,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[str], Undisturbed]]:
    """What each command does when nothing happens to it."""
    found: dict[str, Undisturbed] = {}

    with pytest.MonkeyPatch.context() as patch:

        def get(name: str) -> Undisturbed:
            if name not in found:
                start, scratch = workshop if name in TRAININGS else world, tmp_path_factory.mktemp("known")
                warm(COMMANDS[name], start, scratch, patch)
                found[name] = undisturbed(COMMANDS[name], start, scratch)
            return found[name]

        yield get


def check_ended(ended: Ended, about: object, *, codes: tuple[int | None, ...] = (0, 2)) -> None:
    """It came to its end, or said why not in one line."""
    assert ended.code in codes, f"{about}: {ended}"
    assert "Traceback" not in ended.printed + ended.errors, f"{about}: {ended}"

    lines = ended.errors.splitlines()
    told = [line for line in lines if line.startswith("flora: error: ")]
    assert len(told) == (ended.code != 0 and ended.code is not None), f"{about}: {ended}"
    assert told == lines[-len(told) :] if told else True, f"{about}: {ended}"


def check_situation(known: Undisturbed, name: str, scratch: Path) -> None:
    """A right result, or one line; nothing lost, and nothing left over."""
    place = copy_of(known.start, scratch / "place")
    ended = run_command(known.case.argv.split(), place, under=SITUATIONS[name])
    silent = name in ("closed (2,)", "closed (0, 1, 2)")
    if silent:
        assert ended.code in (0, 2), ended
    else:
        check_ended(ended, name)

    if ended.code == 0:
        assert known.case.look(place) == known.new, f"{name}: {ended}"
    known.check_safe(place, f"{name}: {ended}")
    known.check_next(place, name)


def gather(checks: dict[str, Callable[[], None]]) -> list[str]:
    """What fails of many checks."""
    failed = []
    for name, check in checks.items():
        try:
            check()
        except AssertionError as error:
            failed.append(f"{name}: {error}")
    return failed


# What the default suite takes of all that the slow one runs.
OFTEN = ("convert", "train")
SOME = ("files of 1000 bytes", "2 handles", "0 KiB", "closed (0, 1, 2)", "files of the future")


@pytest.mark.parametrize("command", OFTEN)
def test_some_situations(command: str, known: Callable[[str], Undisturbed], tmp_path: Path) -> None:
    one = known(command)
    for name in SOME:
        check_situation(one, name, tmp_path)
    check_signal(one, signal.SIGINT, one.changes // 2, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_situation(command: str, known: Callable[[str], Undisturbed], tmp_path: Path) -> None:
    one = known(command)
    failed = gather({name: lambda name=name: check_situation(one, name, tmp_path) for name in SITUATIONS})
    assert failed == [], "\n".join(failed)


SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: None, signal.SIGHUP: None}


def check_signal(known: Undisturbed, by: signal.Signals, at: int, scratch: Path) -> None:
    """Ctrl-C is told in one line; the others end a process as a kill does."""
    place = copy_of(known.start, scratch / "place")
    ended = run_command(known.case.argv.split(), place, kill_at=at, by=by)
    about = f"{by.name} at {at}: {ended}"
    check_ended(ended, about, codes=(SIGNALS[by],))
    known.check_safe(place, about)
    known.check_next(place, about)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_signals(command: str, known: Callable[[str], Undisturbed], tmp_path: Path) -> None:
    """Ctrl-C at every seventh change, the others at a few."""
    one = known(command)
    moments = [(signal.SIGINT, at) for at in range(1, one.changes, 7)]
    moments += [(by, at) for by in (signal.SIGTERM, signal.SIGHUP) for at in (3, one.changes // 2)]

    failed = gather({f"{by.name} {at}": lambda by=by, at=at: check_signal(one, by, at, tmp_path) for by, at in moments})
    assert failed == [], "\n".join(failed)


def drop_powers() -> None:
    """What a mode forbids is then forbidden to the system's administrator too."""
    version, pid = 0x20080522, 0
    none = struct.pack("6I", *(0,) * 6)
    assert ctypes.CDLL(None).capset(struct.pack("Ii", version, pid), none) == 0


def nothing(out: Path) -> None:
    """Only a name."""


def pipe(out: Path) -> None:
    """The output is a pipe."""
    os.mkfifo(out)


def door(out: Path) -> None:
    """The output is a socket."""
    with socket.socket(socket.AF_UNIX) as listener, pytest.MonkeyPatch.context() as patch:
        patch.chdir(out.parent)
        listener.bind(out.name)


def device(out: Path) -> None:
    """The output is a link to a device."""
    out.symlink_to("/dev/null")


def closed_folder(out: Path) -> None:
    """The folder of the output cannot be written."""
    out.parent.mkdir(mode=0o555)


def hidden_folder(out: Path) -> None:
    """The folder of the output cannot even be looked into."""
    out.parent.mkdir(mode=0o000)


def lock_of_another(out: Path) -> None:
    """Somebody else's process was killed here."""
    part = out.with_name(f".{out.name}{PART}")
    part.mkdir(mode=0o755)
    (part / LOCK).touch(mode=0o600)
    for path in (part / LOCK, part):
        os.chown(path, NOBODY, NOBODY)


def elsewhere(out: Path) -> None:
    """The output is on another file system, through a link."""
    out.parent.symlink_to(tempfile.mkdtemp(dir="/dev/shm"))


def gone() -> None:
    """The working folder is removed."""
    Path("gone").mkdir()
    os.chdir("gone")
    Path("../gone").rmdir()


class Odd(NamedTuple):
    """An output that is somewhere odd.

    Attributes:
        out: its name.
        set_up: makes what is there, from the whole path of the output.
        code: of the command.
        under: what the command must cope with.
        options: that are given too.
    """

    out: str
    set_up: Callable[[Path], None] = nothing
    code: int = 0
    under: Callable[[], object] = lambda: None
    options: tuple[str, ...] = ()


PLACES = {
    "a line's end in the name": Odd("new\nline"),
    "no text in the name": Odd(os.fsdecode(b"bad\xff"), nothing, 2),
    "a pipe": Odd("out", pipe, 2),
    "a socket": Odd("out", door, 2),
    "a device": Odd("out", device, 2),
    "a pipe to replace": Odd("out", pipe, 2, options=("--overwrite",)),
    "a device to replace": Odd("out", device, 2, options=("--overwrite",)),
    "a folder that is read only": Odd("shut/out", closed_folder, 2, drop_powers),
    "a folder that is hidden": Odd("shut/out", hidden_folder, 2, drop_powers),
    "a lock of somebody else": Odd("out", lock_of_another, 2, drop_powers),
    "another file system": Odd("away/out", elsewhere),
    "a working folder that is gone": Odd("out", nothing, 2, gone),
}


# From any folder; {in} is that of the inputs.
WRITERS = {
    "convert": "convert {in}/adapter --to lora --out {out}",
    "convert to a file": "convert {in}/adapter --to kohya --out {out}.safetensors",
    "merge": "merge {in}/adapter --base {in}/base --out {out}",
    "extract": "extract {in}/base {in}/tuned --rank 2 --out {out}",
    "inspect": "inspect {in}/adapter --html {out}.html",
    "train": "train {in}/tiny.yaml recipe={in}/tiny_recipe.py output={out}",
    "compare": "compare {in}/tiny.yaml recipe={in}/tiny_recipe.py output={out} --methods frozen --seeds 0",
    "predict": "predict {in}/run 1 2 --out {out} --run-recipe-file",
}
ENDINGS = {"convert to a file": ".safetensors", "inspect": ".html", "compare": "-compare"}


@pytest.fixture(scope="module")
def inputs(
    world: Path,  # noqa: F811
    workshop: Path,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """All that a command reads."""
    place = copy_of(world, tmp_path_factory.mktemp("inputs") / "inputs")
    shutil.copytree(workshop, place, dirs_exist_ok=True)
    assert run_command(["train", "tiny.yaml", f"recipe={place / 'tiny_recipe.py'}", "output=run"], place).code == 0
    return place


def check_place(command: str, name: str, inputs: Path, scratch: Path) -> None:
    """A command writes there, or says in one line why not; what was there stays as it was."""
    odd, place = PLACES[name], scratch / "place"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    target = place / (odd.out + ENDINGS.get(command, ""))
    # Only the system's administrator can give a file to somebody else.
    if odd.set_up is lock_of_another and os.getuid() != 0:
        return

    odd.set_up(target)
    before = {path.name for path in place.iterdir()}

    words = [word.format(**{"in": inputs, "out": odd.out}) for word in WRITERS[command].split()]
    about = f"{command} into {name}"
    options = [] if command == "predict" else odd.options
    ended = run_command([*words, *options], place, under=odd.under)
    check_ended(ended, about, codes=(odd.code,))

    made = {target.name} if odd.code == 0 and target.parent == place else set()
    assert {path.name for path in place.iterdir()} == before | made, f"{about}: {ended}"
    assert os.path.lexists(target) or odd.code == 2, about

    if target.parent.is_symlink():
        shutil.rmtree(target.parent.resolve())


@pytest.mark.parametrize("command", OFTEN)
def test_some_places(command: str, inputs: Path, tmp_path: Path) -> None:
    for name in ("no text in the name", "a pipe to replace", "a folder that is read only", "a lock of somebody else"):
        check_place(command, name, inputs, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("command", WRITERS)
def test_odd_places(command: str, inputs: Path, tmp_path: Path) -> None:
    before = contents(inputs)
    failed = gather({name: lambda name=name: check_place(command, name, inputs, tmp_path) for name in PLACES})
    assert failed == [], "\n".join(failed)
    assert contents(inputs) == before


@pytest.mark.slow
def test_a_system_that_knows_ascii_only(inputs: Path, tmp_path: Path) -> None:
    """Outputs and what is printed are the same; a name that is not ASCII is refused there by name."""
    program = (
        "import flora_cli, sys\n"
        "for line in sys.stdin.read().splitlines():\n"
        "    print('code', flora_cli.main(line.split()), flush=True)\n"
    )
    lines = [words.format(**{"in": inputs, "out": name.replace(" ", "-")}) for name, words in WRITERS.items()]
    lines += [f"convert {inputs / 'adapter'} --to lora --out \u00fcn\u00ef"]
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    importable = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])

    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        input="\n".join(lines).encode(),
        env={**os.environ, **ascii_only, "PYTHONPATH": importable},
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    codes = [line for line in done.stdout.decode().splitlines() if line.startswith("code ")]
    assert codes == ["code 0"] * len(WRITERS) + ["code 2"], done.stderr
    assert b"Traceback" not in done.stderr
    assert b"has a name that is not UTF-8 text" in done.stderr
