"""The pages of a run, of a comparison and of finished runs; a browser opens them where there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import flora_cli
from flora.comparison.finished import finished_runs
from flora.comparison.methods import METHODS
from flora.data.results import with_boxes
from flora.data.shown import WORST, Findings, Shown, Sound, classified, grey, overlaid
from flora.report.comparison_html import comparison_html
from flora.report.finished_runs import finished_page, finished_text
from flora.report.page import Cell, Page, Table, number, picture, render, words
from flora.report.plots import COLOURS, training_curves
from flora.report.provenance import provenance, subject
from flora.report.training_page import training_page

METRICS: dict[str, Any] = {
    "recipe": "vision_classify",
    "metric": "accuracy",
    "seed": 3,
    "validation": {"loss": 1.25, "accuracy": 0.5},
    "test": {"loss": 1.5, "accuracy": 0.4375},
    "trainable_parameters": 1234,
    "total_parameters": 56789,
    "adapter_bytes": 6543,
    "steps": 6,
    "seconds": 7.5,
    **provenance(),
}
HISTORY = [
    {"step": 2, "loss": 2.0, "learning_rate": 0.1},
    {"step": 4, "loss": 1.0, "learning_rate": 0.05},
    {"step": 4, "eval_loss": 1.3, "eval_accuracy": 0.25},
    {"step": 6, "train_runtime": 7.5},
]
LOGITS = np.array([[4.0, 0, 0], [0, 3, 1], [5, 0, 0], [0, 1, 2], [0, 0, 6]])
LABELS = np.array([0, 2, 1, 1, 2])
CLASSES = ["apple", "<b>pear</b>", "plum"]
NETWORK = re.compile(r"(?:src|href|url\()\s*=?\s*[\"']?(?!data:|#)(?:https?:|//)")


def shown(index: int) -> Shown:
    return Shown(
        pictures=[(f"image {index}", Image.new("RGB", (11, 7), "red"))], texts=[("text", f"it is {index} & more")]
    )


def test_the_curves_are_those_of_the_log_and_end_with_the_last_measurement() -> None:
    curves = training_curves(HISTORY, "accuracy", METRICS["validation"], 6)
    assert list(curves) == ["loss", "accuracy", "learning rate"]
    assert [(curve.label, curve.steps, curve.values) for curve in curves["loss"]] == [
        ("training", [2, 4], [2.0, 1.0]),
        ("validation", [4, 6], [1.3, 1.25]),
    ]
    assert curves["accuracy"][0].values == [0.25, 0.5]
    assert curves["learning rate"][0].steps == [2, 4]


def test_a_run_that_logged_nothing_has_its_last_measurement_and_no_empty_panel() -> None:
    curves = training_curves([], "accuracy", METRICS["validation"], 6)
    assert list(curves) == ["loss", "accuracy"]
    page = training_page(METRICS, "a run", curves, None)
    assert page.count("<svg") == 2
    assert "was never logged" in page


def test_the_worst_errors_come_first_and_every_input_is_counted() -> None:
    findings = classified(LOGITS, LABELS, CLASSES, shown)
    # Input 2 gives its class 1 the least, then inputs 1 and 3.
    assert [example.pictures[0][0] for example in findings.examples] == ["image 2", "image 1", "image 3"]
    assert findings.examples[0].title == "<b>pear</b>, taken for apple (99%)"
    assert findings.heading == "The 3 errors in 5 inputs, the worst first"
    page = training_page(METRICS, "fruit", training_curves(HISTORY, "accuracy", METRICS["validation"], 6), findings)
    assert "&lt;b&gt;pear&lt;/b&gt;" in page
    assert "<b>pear" not in page
    matrix = re.findall(r'data-order="(\d+)" class="heat(?: right)?"', page)
    assert page.count('class="heat right"') == 3
    assert [int(count) for count in matrix] == [1, 0, 0, 1, 0, 1, 0, 1, 1]
    assert page.count("data:image/png;base64,") == 3
    assert not NETWORK.search(page)


def test_a_model_without_an_error_and_one_with_many() -> None:
    assert classified(LOGITS[:1], LABELS[:1], CLASSES, shown).heading == "No error in 1 inputs"
    wrong = classified(np.eye(2)[[1] * 50], np.zeros(50, int), ["a", "b"], shown)
    assert len(wrong.examples) == WORST
    assert wrong.heading == f"The worst {WORST} of 50 errors in 50 inputs"
    assert classified(LOGITS[:2], LABELS[:2], CLASSES, shown).heading == "The one error in 2 inputs"


def test_with_many_classes_the_pairs_are_listed() -> None:
    names = [f"class {index}" for index in range(31)]
    findings = Findings("none", [], names, truth=[1, 1, 2, 3], found=[7, 7, 5, 3])
    page = training_page(METRICS, "many", training_curves(HISTORY, "accuracy", METRICS["validation"], 6), findings)
    first, second = (page.index(f'data-order="{name}" class="words">{name}') for name in ("class 7", "class 5"))
    assert first < second
    assert 'class="heat"' not in page


def test_scores_sounds_and_what_several_processes_cannot_show() -> None:
    wave = np.sin(np.arange(800) / 9)
    curves = training_curves(HISTORY, "accuracy", METRICS["validation"], 6)
    page = training_page(METRICS, "x", curves, Findings("Heard", [Shown("a tone", sound=Sound(wave, 8000))]))
    assert "data:audio/wav;base64,UklGR" in page
    page = training_page(METRICS, "x", curves, Findings("Slices", [], scores={"liver": 0.25}, score="Dice"))
    assert "--share: 0.250" in page
    assert "Only a run with one process" in page


def test_pictures_are_small_and_keep_their_pixels() -> None:
    large = picture("a photo", Image.new("RGB", (3000, 1000)))
    assert large.source.startswith("data:image/jpeg")
    assert not large.tiny
    assert len(large.source) < 10_000
    assert picture("a digit", grey(np.eye(16))).tiny
    over = np.asarray(overlaid(Image.new("RGB", (2, 1), "white"), np.array([[0, 1]]), [0, 0, 0, 200, 0, 0]))
    assert over[0, 0].tolist() == [255, 255, 255]
    assert over[0, 1, 0] > over[0, 1, 1]


def test_a_title_names_the_data_and_no_path(tmp_path: Path) -> None:
    class Task:
        data = str(tmp_path)

    assert subject("my/recipe.py", Task()) == f"recipe on {tmp_path.name}"
    Task.data = "owner/set"
    assert subject("vision_classify", Task()) == "vision_classify on owner/set"
    assert subject("digits", object()) == "digits"


def test_every_method_has_a_colour_of_its_own() -> None:
    assert set(METHODS) <= set(COLOURS)
    assert len(set(COLOURS.values())) == len(COLOURS)


def row(method: str, values: list[float], **changes: Any) -> dict[str, Any]:
    return {
        "method": method, "title": METHODS[method].title, "budget": 500, "trainable_parameters": 600 + len(method),
        "learning_rate": 0.01, "mean": sum(values) / len(values), "std": 0.01, "values": values,
        "search": {"0.001": 0.3, "0.01": 0.5, "0.1": float("-inf")}, "seconds": 3.0, "seconds_per_step": 0.1,
        "peak_memory": None, "file_bytes": 4321, "merge_difference": None, **changes,
    }  # fmt: skip


REPORT = {
    "recipe": "digits", "subject": "digits", "metric": "accuracy", "seeds": [0, 1], "budgets": [500],
    "rows": [row("flora", [0.7, 0.8]), row("lora", [0.6, 0.5]), {"method": "dora", "title": "DoRA", "refused": "no"}],
    **provenance(),
}  # fmt: skip


def test_the_page_of_a_comparison() -> None:
    page = comparison_html(REPORT)
    assert page.count("<svg") == 3
    assert "FLoRA at 500" in page
    assert "DoRA: not possible here (no)" in page
    assert COLOURS["flora"] in page
    assert COLOURS["lora"] in page
    assert "mathdefault" not in page
    assert "+0.2000 ±" in page
    assert not NETWORK.search(page)
    alone = comparison_html({**REPORT, "seeds": [0], "rows": [row("flora", [0.7], search={"0.01": 0.5})]})
    assert alone.count("<svg") == 1
    assert "<svg" not in comparison_html({**REPORT, "rows": REPORT["rows"][2:]})


def test_a_chart_grows_with_its_methods() -> None:
    few = comparison_html(REPORT)
    many = comparison_html({**REPORT, "rows": [row(method, [0.6, 0.7]) for method in METHODS]})

    def heights(page: str) -> list[float]:
        return [float(height) for height in re.findall(r'<svg[^>]* height="([\d.]+)pt"', page)]

    assert len(heights(few)) == len(heights(many)) == 3
    assert all(more > 1.4 * less for less, more in zip(heights(few), heights(many), strict=True))


def test_labels_of_boxes_are_inside_the_picture() -> None:
    boxes = [{"box": [30, 0, 47, 20], "label": "a rather long name of a class"}, {"box": [0, 5, 9, 40], "label": "x"}]
    drawn = np.asarray(with_boxes(Image.new("RGB", (48, 40), "black"), boxes, "lime"))
    assert max(drawn.shape[:2]) >= 288
    # A plate begins left of its box where its text would not fit to the right.
    corner = 30 * drawn.shape[1] // 48
    assert (drawn[0, corner - 8 : corner] == [0, 255, 0]).all()


def finished(folder: Path, rank: int, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    config = f"recipe: vision_classify\noutput: {folder}\nadapter: {{r: {rank}}}\ntask: {{data: photos}}\n"
    (folder / "config.yaml").write_text(config)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": HISTORY}))
    (folder / "metrics.json").write_text(json.dumps({**METRICS, **changes}))
    return folder


def test_finished_runs_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [finished(tmp_path / "one" / "run", 4), finished(tmp_path / "two" / "run", 8)]
    report = finished_runs(runs)
    assert [run["name"] for run in report["runs"]] == ["one/run", "two/run"]
    assert report["differences"] == {"adapter.r": [4, 8]}
    assert "adapter.r: 4 | 8" in finished_text(report)
    page = finished_page(report)
    assert page.count("<svg") == 3
    html = tmp_path / "page.html"
    assert flora_cli.main(["compare", "--runs", *map(str, runs), "--html", str(html)]) == 0
    assert "0.4375" in capsys.readouterr().out
    assert html.read_text().startswith("<!doctype html>")

    other = finished(tmp_path / "other", 4)
    (other / "config.yaml").write_text("recipe: vision_classify\ntask: {data: scans}\n")
    assert "different test sets" in finished_text(finished_runs([runs[0], other]))


def test_what_finished_runs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = str(finished(tmp_path / "good", 4))
    dice = str(finished(tmp_path / "dice", 4, metric="dice"))
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.yaml").write_text("recipe: digits\n")
    for arguments, message in (
        (["compare", "--runs", good], "give two or more"),
        (["compare", "--runs", good, good], "names one folder twice"),
        (["compare", "--runs", good, str(tmp_path)], "not a folder that `flora train` wrote"),
        (["compare", "--runs", good, str(begun)], "has not ended"),
        (["compare", "--runs", good, dice], "different metrics"),
        (["compare"], "either a CONFIG"),
        (["compare", "digits", "--runs", good, good], "either a CONFIG"),
    ):
        assert flora_cli.main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CLICKS = """<script>
const found = [];
for (const button of document.querySelectorAll("table.sortable button")) {
  const table = button.closest("table"), column = button.closest("th").cellIndex;
  for (const _ of [0, 1]) {
    button.click();
    found.push([...table.tBodies[0].rows].map(row => row.cells[column].dataset.order));
  }
}
document.body.append(Object.assign(document.createElement("pre"), {id: "found", textContent: JSON.stringify(found)}));
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium or google-chrome")
def test_in_a_browser_tables_sort_and_nothing_is_loaded(tmp_path: Path) -> None:
    rows = [[words(name), number(size), Cell("", "")] for name, size in (("b", 3), ("layer.10", 20), ("layer.2", 100))]
    page = tmp_path / "page.html"
    text = render(Page("a page", "of a test", [], [Table("Table", ("name", "size", "none"), rows)]))
    page.write_text(text.replace("</body>", f"{CLICKS}</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=2000"]
    done = subprocess.run(
        [str(CHROMIUM), *options, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    found = json.loads(re.findall(r'<pre id="found">(.*?)</pre>', done.stdout)[0])
    assert found[:4] == [
        ["b", "layer.2", "layer.10"], ["layer.10", "layer.2", "b"], ["3", "20", "100"], ["100", "20", "3"],
    ]  # fmt: skip
