"""What the verbs convert, extract and merge of the command line do, from their parsed arguments."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from flora.convert import convert, load, save
from flora.convert.files import check_target
from flora.convert.finetune import extract
from flora.convert.merge import merge


def run_convert(args: argparse.Namespace) -> int:
    """Converts and prints the report."""
    report = convert(
        args.source,
        args.out,
        to=args.to,
        base=args.base,
        scale=args.scale,
        prefix=args.prefix,
        mid=not args.no_mid,
        drop_extras=args.drop_extras,
        overwrite=args.overwrite,
    )
    print(report)
    return 0


def run_extract(args: argparse.Namespace) -> int:
    """Extracts, saves and prints the table of errors; finished layers are kept beside the output until then."""
    out = Path(args.out)
    check_target(out, args.overwrite)
    work = out.with_name(f".{out.name}.extract")
    resumed = work.exists()
    try:
        found = extract(
            args.base,
            args.tuned,
            rank=args.rank,
            energy=args.energy,
            budget=args.budget,
            kernel_r=args.kernel_r,
            carry=args.carry,
            work=work,
            progress=sys.stderr.isatty(),
        )
    except ValueError:  # of the request or the models: there is nothing to go on with
        if not resumed:
            shutil.rmtree(work, ignore_errors=True)
        raise
    report = save(found, out, overwrite=args.overwrite)
    shutil.rmtree(work)
    print(found.table())
    print(report)
    return 0


def run_merge(args: argparse.Namespace) -> int:
    """Merges adapters of any format into a local base folder, streamed."""
    weights = args.weights or [1.0] * len(args.folder)
    if len(weights) != len(args.folder):
        raise ValueError(f"--weights has {len(weights)} numbers for {len(args.folder)} adapters; give one for each")
    adapters = [load(folder, base=args.base) for folder in args.folder]
    base = args.base or adapters[0].config.get("base_model_name_or_path")
    if base is None or not Path(base).is_dir():
        raise ValueError(f"the base model {base or ''} is not a local folder; give one with --base")
    pairs = list(zip(adapters, weights, strict=True))
    print(merge(base, pairs, args.out, overwrite=args.overwrite, progress=sys.stderr.isatty()))
    return 0
