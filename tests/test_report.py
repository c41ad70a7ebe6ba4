"""Tables, plots, cards, and the anatomy of an adapter against its dense updates."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn

import flora
import flora_cli
from flora.convert import load
from flora.convert.arithmetic import core_in_orthonormal_basis
from flora.report.anatomy import anatomy, effective_rank, mode_energy, top_half
from flora.report.anatomy_page import anatomy_page
from flora.report.comparison import comparison_notes, comparison_page, comparison_table, size
from flora.report.plots import quality_against_parameters, training_curves, training_plot
from flora.report.provenance import provenance


def row(method: str, values: list[float], **changes: object) -> dict[str, object]:
    mean = sum(values) / len(values)
    return {
        "method": method,
        "title": {"flora": "FLoRA", "lora": "LoRA"}.get(method, method),
        "budget": None if method == "frozen" else 8592,
        "trainable_parameters": 1234567,
        "learning_rate": 0.01,
        "mean": mean,
        "std": 0.01,
        "values": values,
        "search": {"0.001": 0.5, "0.01": 0.8, "0.1": 0.7},
        "seconds": 4.25,
        "seconds_per_step": 0.0425,
        "peak_memory": None if method == "frozen" else 12_300_000,
        "file_bytes": 43700,
        "merge_difference": None,
        **changes,
    }


ROWS = [
    row("frozen", [0.60, 0.62], learning_rate=0.1),
    row("flora", [0.80, 0.90], merge_difference=1.5e-6),
    row("lora", [0.845, 0.855], merge_difference=2e-6, std=0.005),
]
REPORT = {
    "recipe": "digits",
    "metric": "accuracy",
    "seeds": [0, 1],
    "budgets": [8592],
    "rows": ROWS,
    **provenance(),
}


def test_the_table_has_a_line_per_method() -> None:
    lines = comparison_table(ROWS, "accuracy").splitlines()
    assert len(lines) == 2 + len(ROWS)
    assert [cell.strip() for cell in lines[3].split("|")[1:-1]] == [
        "**FLoRA**", "1,234,567", "0.8500 ± 0.0100", "", "0.01", "0.043", "12.3 MB", "43.7 KB",
    ]  # fmt: skip
    assert [cell.strip() for cell in lines[4].split("|")[4:8]] == ["+0.0000 ± 0.5718", "0.01", "0.043", "12.3 MB"]
    assert comparison_table([{"method": "lora", "title": "LoRA", "refused": "no"}], "accuracy") == ""


def test_the_notes_say_who_wins_and_what_was_not_searched() -> None:
    notes = comparison_notes(REPORT)
    assert "The chosen learning rate is at the edge of the grid for frozen (0.1)." in notes
    assert "FLoRA is not told apart from frozen (+0.2400), LoRA at 8,592 (+0.0000)." in notes
    assert notes[-1] == (
        "Largest difference between the outputs of a merged model and the unmerged one: FLoRA 1.5e-06, LoRA 2.0e-06."
    )
    alone = comparison_notes({**REPORT, "rows": [*ROWS[2:], row("loha", [0.1, 0.2], merge_error="it broke")]})
    assert not [note for note in alone if note.startswith("FLoRA is")]
    assert alone[-1] == "loha cannot be merged here: it broke."


def test_the_page_says_where_it_was_measured() -> None:
    page = comparison_page(REPORT)
    assert f"torch {torch.__version__}" in page
    assert "![accuracy against trainable parameters](compare.png)" in page


@pytest.mark.parametrize(
    ("count", "text"), [(999, "999 B"), (1000, "1.0 KB"), (420700, "420.7 KB"), (141 * 10**9, "141.0 GB")]
)
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])  # type: ignore[return-value]


def test_plots(tmp_path: Path) -> None:
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 1.2}, {"step": 3, "x": 1}]
    training_plot(tmp_path / "loss.png", training_curves(history, "accuracy", {"accuracy": 0.5}, 3), "a run")
    training_plot(tmp_path / "last.png", training_curves([], "accuracy", {"accuracy": 0.5}, 3), "nothing was logged")
    quality_against_parameters(tmp_path / "compare.png", ROWS, "accuracy", "digits")
    for name in ("loss", "last", "compare"):
        assert min(png_size(tmp_path / f"{name}.png")) > 300


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(5, 11, 3)
        self.deep = nn.Conv2d(11, 11, 7, groups=11)
        self.linear = nn.Linear(13, 17)
        self.head = nn.Linear(17, 2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = flora.FloraConfig(
        r=4, target_modules=["conv", "deep", "linear"], modules_to_save=["head"], init_weights=False, scale=0.7
    )
    get_peft_model(Net(), config).save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def test_norms_and_energies_are_those_of_the_dense_updates(folder: Path) -> None:
    report = anatomy(folder)
    adapter = load(folder)
    assert len(report["layers"]) == 3
    for layer in report["layers"]:
        entry = adapter.weights[layer["weight"]]
        dense = entry.dense().double()
        assert layer["norm"] == pytest.approx(float(dense.norm()), rel=1e-5)
        for mode, energy in enumerate(layer["energy"]):
            expected = torch.linalg.svdvals(dense.movedim(mode, 0).flatten(1)) ** 2
            expected = (expected / expected.sum())[: len(energy)]
            torch.testing.assert_close(torch.tensor(energy), expected[: len(energy)].float(), rtol=1e-4, atol=1e-6)
    assert report["extra_parameters"] == 17 * 2 + 2
    assert report["parameters"] == sum(entry.form.num_params for entry in adapter.weights.values())


def test_a_mode_kept_whole_and_a_zero_core() -> None:
    form = flora.Tucker(torch.randn(3, 5), (torch.randn(7, 3), None))
    core = core_in_orthonormal_basis(form)
    assert float(core.norm()) == pytest.approx(float(form.to_dense().norm()), rel=1e-5)
    assert sum(mode_energy(core, 1)) == pytest.approx(1)
    assert mode_energy(torch.zeros(2, 3), 0) == [0, 0]
    assert top_half([0.5, 0.3, 0.2]) == pytest.approx(0.8)


def test_inspect_prints_a_line_per_weight_and_writes_a_page(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert flora_cli.main(["inspect", str(folder), "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert "11x5x3x3" in out
    assert "3 adapted weights" in out
    text = page.read_text()
    assert text.startswith("<!doctype html>")
    assert text.count('<th scope="row"') == 3 + 1 + 2  # weights, their total, tensors saved in full
    assert "deep.weight" in text
    assert text.count("<svg") == 3
    assert not re.findall(r"(?:src|href)=[\"'](?!data:|#)", text.replace('xlink:href="#', 'xlink:href="data:#'))
    assert flora_cli.main(["inspect", str(folder), "--html", str(page)]) == 2
    assert "page.html exists; choose another output or ask to overwrite it (--overwrite)" in capsys.readouterr().err
    assert flora_cli.main(["inspect", str(folder), "--html", str(page), "--overwrite"]) == 0
    assert anatomy_page({**anatomy(folder), "folder": "<b>"}).count("&lt;b&gt;") == 2


def test_a_page_of_an_adapter_without_a_change_has_no_chart(folder: Path) -> None:
    report = anatomy(folder)
    for layer in report["layers"]:
        energy = [[0.0] * rank for rank in layer["ranks"]]
        layer.update(norm=0.0, energy=energy, effective_ranks=[1.0] * len(energy))
    text = anatomy_page(report)
    assert "<svg" not in text
    assert "Every change is zero" in text
    assert "<svg" not in anatomy_page({**report, "layers": [], "extras": {}})


def test_a_layer_whose_ranks_are_all_one_has_a_norm_and_no_other_chart(folder: Path) -> None:
    report = anatomy(folder)
    for layer in report["layers"]:
        layer.update(ranks=[1, 1], energy=[[1.0], [1.0]], effective_ranks=[1.0, 1.0])
    assert anatomy_page(report).count("<svg") == 1


def test_the_effective_rank_counts_equal_directions() -> None:
    assert effective_rank([0.2] * 5) == pytest.approx(5)
    assert effective_rank([0.5, 0.5, 0.0]) == pytest.approx(2)
    assert 1 < effective_rank([0.9, 0.05, 0.05]) < 2


def test_inspect_of_a_corrupt_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    assert flora_cli.main(["inspect", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "adapter_model.safetensors" in error


def test_where_a_number_comes_from_is_json() -> None:
    found = json.loads(json.dumps(provenance()))
    assert found["versions"]["torch"] == torch.__version__
    assert found["machine"]["cores"] >= 1
    assert found["commit"] is None or len(found["commit"]) >= 40


def test_a_plan_of_a_model_leaves_it_alone_and_counts_what_peft_counts() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 13, 3, stride=2), nn.BatchNorm2d(13), nn.ConvTranspose2d(13, 7, 2), nn.LSTM(17, 23)
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = flora.FloraConfig(r=4, target_modules="all")
    plan = flora.plan_model(model, config)
    assert str(plan).startswith("layer")
    assert config.layout is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(isinstance(module, flora.TuckerDelta) for module in model.modules())

    adapted = get_peft_model(model, flora.FloraConfig(r=4, target_modules="all"))
    trained = sum(value.numel() for value in adapted.parameters() if value.requires_grad)
    assert plan.report["trainable_parameters"] == trained
