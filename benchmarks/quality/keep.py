"""Takes finished comparisons into the results, ``quality-NAME.json``: the rows without their single runs.

``python -m benchmarks.quality.keep outputs/quality/cifar-compare ...``; then ``python benchmarks/run.py --only page``.
"""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path
from typing import Any

from benchmarks import results
from flora.storage.atomic import read_json


def kept(report: dict[str, Any]) -> dict[str, Any]:
    """What the page needs of ``compare.json``, and every number that a row is made of."""
    name = f"quality-{Path(report['recipe']).stem}"
    settings = {key: report["settings"][key] for key in ("adapter", "training", "compare")}
    task = {key: value for key, value in report["settings"]["task"].items() if key not in ("data", "model")}
    rows = [{key: value for key, value in row.items() if key != "runs"} for row in report["rows"]]
    shared = {key: report[key] for key in ("recipe", "metric", "seeds", "budgets", "versions", "commit")}
    return {
        "question": name,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        **shared,
        "machine": {**report["machine"], "cpu": results.cpu(), "load_before": None},
        "seed": report["seeds"][0],
        "quick": False,
        "settings": {"task": task, **settings},
        "rows": rows,
    }


def main() -> None:
    """Writes the results of the folders that are given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="that flora compare wrote")
    for folder in parser.parse_args().folders:
        result = kept(read_json(folder / "compare.json"))
        path = results.RESULTS / f"{result['question']}.json"
        path.write_text(results.dumps(result), encoding="utf-8")
        print(f"written {path}")


if __name__ == "__main__":
    main()
