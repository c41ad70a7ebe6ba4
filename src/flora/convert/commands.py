"""What the verbs convert and extract of the command line do, from their parsed arguments."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from flora.convert import convert, save
from flora.convert.extraction.finetune import extract
from flora.storage.atomic import check_target, claim
from flora.storage.replacing import ADAPTER

LAYERS = "layers"  # the finished layers of an extraction, which the next one goes on with


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
    check_target(out, ADAPTER, overwrite=args.overwrite, sources=[args.base, args.tuned])
    with claim(out, keep=[LAYERS]) as place:
        work = place.folder / LAYERS
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
    print(found.table())
    print(report)
    return 0
