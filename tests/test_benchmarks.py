"""The pieces of the benchmarks: what they count, compare and write. Nothing here is timed."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flora.comparison.authors import AuthorsScheme

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # the benchmarks are no package of the distribution
NAMES = "accelerator clock counts grid layers ledger methods page ratios results tables verdicts"
accelerator, clock, counts, grid, layers, ledger, methods, page, ratios, results, tables, verdicts = (
    importlib.import_module(f"benchmarks.{name}") for name in NAMES.split()
)

SMALL = [
    grid.linear(13, 17, 5, 3),
    grid.conv(6, 7, batch=2),
    grid.conv(6, 7, kernel=5, depthwise=True, batch=2),
    grid.Case("up", "other", lambda: nn.Sequential(nn.ConvTranspose2d(5, 7, 2, stride=2)), (2, 5, 3, 3), 3, "tiny"),
]


def test_the_grid_is_that_of_the_targets() -> None:
    assert len(grid.CASES) == 13
    assert len({case.name for case in grid.CASES}) == 13
    assert [sum(case.group == group for case in grid.CASES) for group in ("linear", "conv", "other", "moe")] == [
        4,
        4,
        3,
        2,
    ]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_the_authors_scheme_computes_what_flora_does(case: Any) -> None:
    adapted = methods.flora_summed(case)
    delta = methods.flora_layers(adapted.module)[0].delta("default")
    scheme = AuthorsScheme(adapted.module[0].get_base_layer(), delta.form.ranks, delta.scale)
    with torch.no_grad():
        scheme.core.copy_(delta.form.core)
        for own, given in zip(scheme.factors, delta.form.factors, strict=True):
            own.copy_(torch.eye(len(own)) if given is None else given)
    x = case.inputs()[0]
    assert torch.allclose(scheme.dense(), delta.dense(), atol=1e-6)
    assert torch.allclose(scheme(x), adapted.module(x), atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # of the other packages
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_every_method_builds_or_says_why_not(case: Any) -> None:
    built, refused = methods.build(case)
    assert built.keys() | refused.keys() == methods.METHODS.keys()
    assert {"frozen", "full", "flora", "flora-summed", "authors"} <= built.keys()
    assert all(refused.values())
    inputs = case.inputs()
    grad = methods.output_grad(built["frozen"], inputs)
    for adapted in built.values():
        gradients = methods.training_step(adapted, inputs, grad)()
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
        assert len(gradients) == 1 + len(adapted.trained)
    assert built["frozen"].count == 0
    assert layers.deviation(case, built["flora"], inputs, grad) < 1e-5


def test_the_rank_of_equal_parameters() -> None:
    assert [methods.nearest_rank(100, count) for count in (20, 140, 150, 151, 460)] == [1, 1, 1, 2, 5]


def test_operations_are_counted_in_place_too() -> None:
    left, right, out = torch.ones(3, 5), torch.ones(5, 7), torch.ones(3, 7)
    assert ledger.flops(lambda: left @ right) == ledger.flops(lambda: out.addmm_(left, right)) == 2 * 3 * 5 * 7
    batch = torch.ones(2, 3, 7)
    assert ledger.flops(lambda: batch.baddbmm_(torch.ones(2, 3, 5), torch.ones(2, 5, 7))) == 2 * 2 * 3 * 5 * 7


def test_bytes_are_counted_once_and_without_parameters() -> None:
    weight, x = nn.Parameter(torch.ones(5, 5)), torch.ones(3, 5, requires_grad=True)
    assert sum(ledger.kept(lambda: x @ weight, [weight]).values()) == 3 * 5 * 4
    assert sum(ledger.kept(lambda: (x * x[:1]).sum(), [weight]).values()) == 3 * 5 * 4
    assert ledger.kept(lambda: x @ weight.detach(), [weight]) == {}


def test_a_row_of_counts() -> None:
    row = counts.row(SMALL[1])
    found = row["methods"]
    assert found["frozen"]["flops"] < found["flora"]["flops"] < found["authors"]["flops"]
    assert row["frozen_and_input"] == row["input"] == 2 * 6 * 7 * 7 * 4
    assert len(list(counts.growth())) > 20


def test_methods_take_turns() -> None:
    ran: list[str] = []
    steps = {name: (lambda name=name: ran.append(name)) for name in "abc"}
    times = clock.interleave(steps, clock.Budget(1, 4, 4, 60.0))
    assert ran[:3] == list("abc")
    turns = [ran[start : start + 3] for start in range(3, len(ran), 3)]
    assert [sorted(turn) for turn in turns] == [list("abc")] * 4
    assert [len(values) for values in times.values()] == [4, 4, 4]
    assert clock.summary([(0.002, 0.001), (0.004, 0.003)])["median"] == pytest.approx(3)


def test_a_busy_spell_stays_out_of_a_ratio() -> None:
    quiet, busy = {"raw": [10.0, 10.0, 10.0]}, {"raw": [11.0, 22.0, 22.0]}
    spells = {"raw": [10.0, 20.0, 20.0]}
    row = {"methods": {"one": {"ms": {"1": busy}}, "other": {"ms": {"1": spells}}, "none": {"refused": "no"}}}
    assert ratios.ratio(row, "one", "other") == pytest.approx(1.1)
    assert ratios.spread(ratios.ratios(row, "one", "other")) == pytest.approx(0)
    assert ratios.ratio(row, "one", "none") is None
    row["methods"]["other"]["ms"]["2"] = quiet
    row["methods"]["one"]["ms"]["2"] = busy
    assert ratios.ratio(row, "one", "other", mode="2") == pytest.approx(2.2)


def fake(flora_ms: float, lora_ms: float) -> dict[str, Any]:
    def method(ms: float) -> dict[str, Any]:
        figures = {"median": ms, "q1": ms, "q3": ms, "raw": [ms, 2 * ms, ms], "cpu_raw": [ms, 2 * ms, ms]}
        return {"parameters": 1, "note": "beside", "ms": {"1": figures}}

    found = {"frozen": method(10), "full": method(15), "flora": method(flora_ms), "lora": method(lora_ms)}
    found |= {"flora-beside": method(flora_ms), "flora-summed": method(11)}
    return {"case": "x", "group": "linear", "size": "tiny", "rank": 3, "error": 1e-7, "methods": found}


@pytest.mark.parametrize(("flora_ms", "holds"), [(11.0, True), (13.0, False)])
def test_verdicts_follow_the_times(flora_ms: float, holds: bool) -> None:
    result = {"layers": {"rows": [fake(flora_ms, 14.0)]}}
    said = {check.line: found for check, found in verdicts.verdicts(result)}
    linear = said["Linear grid, FLoRA / LoRA at equal rank"]
    assert [verdict.holds for verdict in linear] == [holds, holds]
    assert linear[0].figure == pytest.approx(flora_ms / 14)
    assert said["Conv grid, FLoRA / frozen"] == []
    assert linear[0].beyond == ([] if holds else ["x (0.929)"])
    assert bool(verdicts.slow_choices(result["layers"]["rows"])) is not holds


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    options = results.Options(quick=True, threads=(1,))
    measured = {"rows": [fake(11.0, 14.0)], "list": [1, 2.5, -3e-7], "empty": [], "words": ["a"]}
    path = results.write("layers", measured, options, tmp_path)
    read = results.read(tmp_path)["layers"]
    assert {key: read[key] for key in measured} == measured
    assert '"list": [1, 2.5, -3e-07]' in path.read_text()
    assert {"commit", "machine", "versions", "seed", "date"} <= read.keys()
    written = page.write(tmp_path, tmp_path / "docs")
    assert [file.name for file in written] == ["benchmarks.md", "benchmarks.png"]
    assert "**FLoRA**" in written[0].read_text()


def test_the_page_is_up_to_date() -> None:
    found = results.read(results.RESULTS)
    assert found
    assert not any(result["quick"] for result in found.values())
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert page.render(found) == text, "run `python benchmarks/run.py --only page`"


def test_the_rows_of_a_gpu_run_anywhere(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--device", "cpu", "--quick"]
    asked = ["--rows", "linear-4096-1024,resnet", "--modes", "eager", "--out", str(tmp_path), "--minutes", "5"]
    done = subprocess.run([*script, *asked], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert "failed" not in found
    for row in [*found["rows"], *found["models"]]:
        # One layer alone has no other to be prepared with.
        prepared = {"prepared"} if row in found["models"] else set()
        assert row["methods"].keys() == {"frozen", "full", "flora", "lora"} | prepared
        assert all(method["ms"]["eager"]["median"] > 0 for method in row["methods"].values())
    assert len(found["rows"]) == len(found["models"]) == 1


def test_a_method_that_fails_leaves_the_others() -> None:
    def broken() -> None:
        raise RuntimeError("no such kernel")

    methods: dict[str, Any] = {"flora": {}, "lora": {}}
    steps = accelerator.ready({"lora": broken, "flora": lambda: None}, "eager", methods)

    assert steps.keys() == {"flora"}
    assert methods == {"flora": {}, "lora": {"failed": {"eager": "RuntimeError: no such kernel"}}}


@pytest.mark.parametrize("script", ["run.py", "gpu.py"])
def test_help_is_quick_and_has_examples(script: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), "--help"], capture_output=True, text=True, check=True
    )
    assert "python benchmarks/" in done.stdout
