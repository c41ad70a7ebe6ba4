"""What a training step takes on a CUDA device in bfloat16: frozen, FLoRA, LoRA and full fine-tuning, in three modes.

Eager models are also measured with ``flora.prepare``.

``python benchmarks/gpu.py [--rows NAME,...] [--modes MODE,...] [--minutes N] [--commit HASH] [--out FOLDER]``
writes ``gpu.json`` after every row and mode, and stops when its minutes are over. Every row is first run eager and
captured, then, in the same order, compiled, because compilers take long; the rows that matter most come first.
``--device cpu --quick`` runs small rows on a CPU, to see that everything runs. Rows whose package is missing are
reported as not run.

*eager*: the host prepares each kernel, and the device is waited for after each step. *compiled*: a model with
one block of each shape, each block under ``torch.compile``, which takes the compiler a fraction of the whole model's
time; relative times hold for the blocks. *captured*: the eager step recorded once as a CUDA graph and replayed, which
is the time of the device alone.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path[:1] = [str(Path(__file__).resolve().parents[1])]  # run as a script: the folder above, not this one


class OutOfTimeError(BaseException):
    """The minutes are over. No Exception, so that no library that is at work then takes it for its own."""


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=_words, help="names of rows, by default all; --rows list prints them")
    parser.add_argument("--modes", type=_words, default=("eager", "captured", "compiled"), help="by default all three")
    parser.add_argument("--minutes", type=float, default=8.0, help="stop after this long")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="small rows, two repeats")
    parser.add_argument("--profile", action="store_true", help="also the kernels of FLoRA's and of the full step")
    parser.add_argument("--out", type=Path, help="folder of the result")
    parser.add_argument("--commit", help="hash of the code, where the copy has no git; else that of a file COMMIT")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, writes after every step of it, and says what was left out."""
    begun = time.perf_counter()
    asked = arguments(argv)
    from benchmarks import quiet

    quiet.settle()
    import torch

    if asked.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no CUDA device: nothing was measured and nothing was written", file=sys.stderr)
        return 1
    from benchmarks import accelerator, results

    if asked.rows == ("list",):
        print("\n".join(accelerator.ROWS))
        return 0
    options = results.Options(asked.quick, (1,), asked.seed, results.load(), asked.commit)
    folder = asked.out or (results.QUICK if asked.quick else results.RESULTS)
    found: dict[str, Any] = {
        "device": asked.device,
        "dtype": "bfloat16",
        "minutes": asked.minutes,
        "rows": [],
        "models": [],
    }

    def save() -> None:
        found["took"] = round(time.perf_counter() - begun, 1)
        results.write("gpu", found, options, folder)

    _stop_after(60 * asked.minutes - (time.perf_counter() - begun))
    unknown = sorted(set(asked.rows or ()) - set(accelerator.ROWS))
    if unknown:
        raise SystemExit(f"unknown rows {', '.join(unknown)}; --rows list prints them")
    names = asked.rows or tuple(accelerator.ROWS)
    passes = [("captured", "eager"), ("compiled",)]
    left = [(name, modes) for modes in passes for name in names if set(modes) & set(asked.modes)]

    try:
        while left:
            name, modes = left[0]
            try:
                accelerator.measure(name, [mode for mode in asked.modes if mode in modes], asked, found, save)
            except Exception as error:  # one row that fails must not take the others along
                why = f"{type(error).__name__}: {error}"
                found.setdefault("failed", {})[f"{name}, {' and '.join(modes)}"] = why[:2000]
                print(f"{name} failed: {why}"[:3000], flush=True)
            left.pop(0)
    except OutOfTimeError:
        pass
    if left:
        found["not_run"] = [f"{name}, {' and '.join(modes)}: out of time" for name, modes in left]
    signal.setitimer(signal.ITIMER_REAL, 0)
    save()
    print(accelerator.summary(found), f"took {found['took']} s", sep="\n", flush=True)
    return 0


def _stop_after(seconds: float) -> None:
    def stop(number: int, frame: Any) -> None:
        raise OutOfTimeError

    handler: Callable[[int, Any], None] = stop
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, max(1.0, seconds))


if __name__ == "__main__":
    sys.exit(main())
