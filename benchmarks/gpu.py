"""The same questions on a CUDA device in bfloat16, eager, compiled and as CUDA graphs; stops where there is none.

``python benchmarks/gpu.py [--quick] [--out FOLDER] [--seed N]`` writes ``gpu.json`` beside the other results; then
``python benchmarks/run.py --only page`` puts it on the page.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[:1] = [str(Path(__file__).resolve().parents[1])]  # run as a script: the folder above, not this one


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes, or says that there is no CUDA device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small layer")
    parser.add_argument("--out", type=Path, help="folder of the result")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(argv)
    from benchmarks import quiet

    quiet.settle()
    import torch

    if not torch.cuda.is_available():
        print("torch sees no CUDA device: nothing was measured and nothing was written", file=sys.stderr)
        return 1
    from benchmarks import accelerator, results

    options = results.Options(asked.quick, (1,), asked.seed, results.load())
    folder = asked.out or (results.QUICK if asked.quick else results.RESULTS)
    for found in accelerator.measure(options):  # written after each row, so that a kill loses one at most
        path = results.write("gpu", found, options, folder)
    print(f"written {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
