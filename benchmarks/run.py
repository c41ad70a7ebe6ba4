"""Runs the benchmarks and writes docs/benchmarks.md from their results; ``--help`` has examples."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path[:1] = [str(Path(__file__).resolve().parents[1])]  # run as a script: the folder above, not this one

QUESTIONS = ("layers", "counts", "models", "attach")
EXAMPLES = """\
examples:
  python benchmarks/run.py                        everything, then docs/benchmarks.md
  python benchmarks/run.py --quick                a smoke run of everything; writes under outputs/
  python benchmarks/run.py --only layers,counts   two questions; the page keeps the other results as they are
  python benchmarks/run.py --threads 1            the headline only
  python benchmarks/run.py --only page            only the page, from the results that are there
  python benchmarks/gpu.py                        the same on a CUDA device
"""


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", type=_questions, default=QUESTIONS, help=f"of {', '.join(QUESTIONS)}, page")
    parser.add_argument("--threads", type=_counts, default=(1, 2), help="thread counts, the headline first (1,2)")
    parser.add_argument("--quick", action="store_true", help="small inputs, few repeats, results elsewhere")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def _questions(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = sorted(set(names) - {*QUESTIONS, "page"})
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}; there are {', '.join(QUESTIONS)}, page")
    return names


def _counts(text: str) -> tuple[int, ...]:
    counts = tuple(int(part) for part in text.split(","))
    if min(counts) < 1:
        raise argparse.ArgumentTypeError(f"thread counts must be at least 1, got {text}")
    return counts


def main(argv: Sequence[str] | None = None) -> int:
    """Asks each question in a process of its own, so that memory and threads of one do not touch the next."""
    options = arguments(argv)
    questions = [name for name in options.only if name != "page"]
    if len(options.only) == 1:
        return answer(options) if questions else page(options)
    failed = []
    for name in questions:
        print(f"{name} ...", flush=True)
        begun = time.perf_counter()
        done = subprocess.run([sys.executable, __file__, "--only", name, *_passed_on(options)], check=False)
        print(f"{name}: {'failed' if done.returncode else 'done'} in {time.perf_counter() - begun:.0f} s", flush=True)
        failed += [name] if done.returncode else []
    return page(options) or len(failed)


def _passed_on(options: argparse.Namespace) -> list[str]:
    passed = ["--threads", ",".join(map(str, options.threads)), "--seed", str(options.seed)]
    passed += ["--quick"] if options.quick else []
    return passed + (["--out", str(options.out)] if options.out else [])


def answer(options: argparse.Namespace) -> int:
    """Measures one question and writes its result."""
    from benchmarks import quiet

    quiet.settle()
    from benchmarks import results

    asked = results.Options(options.quick, options.threads, options.seed, results.load())
    measured = importlib.import_module(f"benchmarks.{options.only[0]}").measure(asked)
    path = results.write(options.only[0], measured, asked, folder(options))
    print(f"written {path}")
    return 0


def page(options: argparse.Namespace) -> int:
    """Writes the page and the plot from the results that are there."""
    from benchmarks import quiet

    quiet.settle()
    from benchmarks import page as pages

    where = folder(options)
    out = where if options.quick or options.out else pages.DOCS
    for path in pages.write(where, out):
        print(f"written {path}")
    return 0


def folder(options: argparse.Namespace) -> Path:
    """Where the results lie."""
    from benchmarks.results import QUICK, RESULTS

    return options.out or (QUICK if options.quick else RESULTS)


if __name__ == "__main__":
    sys.exit(main())
