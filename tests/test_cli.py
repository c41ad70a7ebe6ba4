"""The command line: help, errors of use in one line, plan, recipes."""

from __future__ import annotations

import argparse
import errno
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import flora
import flora_arguments
import flora_cli
from flora.errors import UserError, WrongTypeError
from flora.recipes import CONFIGS, config_names


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = flora_cli.main(list(argv))
    out, err = capsys.readouterr()
    return code, out, err


def parse(argv: list[str]) -> argparse.Namespace:
    return flora_arguments.parse(argv, flora_cli.COMMANDS)


def test_every_verb_has_a_function_arguments_and_an_example() -> None:
    assert list(flora_cli.COMMANDS) == list(flora_arguments.ARGUMENTS)
    for verb, command in flora_cli.COMMANDS.items():
        assert f"flora {verb}" in (command.__doc__ or ""), verb


def test_overrides_may_stand_anywhere(capsys: pytest.CaptureFixture[str]) -> None:
    args = parse(["compare", "digits", "seed=1", "--methods", "flora,lora", "task.rotation=0", "--seeds", "3,4"])
    assert (args.overrides, args.methods, args.seeds) == (["seed=1", "task.rotation=0"], ["flora", "lora"], [3, 4])
    assert parse(["compare", "digits"]).methods == ["frozen", "flora", "lora", "full"]
    for wrong in (["inspect", "folder", "seed=1"], ["train", "digits", "--seed"]):
        with pytest.raises(SystemExit):
            parse(wrong)
        assert f"unrecognized arguments: {wrong[-1]}" in capsys.readouterr().err


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, flora_cli\n"
        "for argv in (['--help'], *([verb, '--help'] for verb in flora_cli.COMMANDS)):\n"
        "    try: flora_cli.main(argv)\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'peft', 'flora', 'transformers', 'jsonargparse', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Examples:" in done.stdout


def test_the_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flora", "recipes", "copy", "nothing"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("flora: error: no config 'nothing'")
    assert "Traceback" not in done.stderr


ERRORS = {
    "unknown key": (["train", "digits", "adapter.kernl_r=3"], "did you mean 'adapter.kernel_r'?"),
    "key of another group": (["train", "digits", "learning_rate=1"], "did you mean 'training.learning_rate'?"),
    "unknown top key": (["train", "digits", "sed=1"], "unknown key 'sed' in the command line; did you mean 'seed'?"),
    "wrong type": (
        ["train", "digits", "task.labels_per_class=few"],
        "task.labels_per_class=few: task.labels_per_class is 'few', expected int",
    ),
    "out of range": (["train", "digits", "task.labels_per_class=500"], "expected 1 to"),
    "scale with alpha": (["train", "digits", "adapter.alpha=4"], "are both given"),
    "unknown init": (["train", "digits", "adapter.init=orthogonl"], "did you mean 'orthogonal'?"),
    "unknown trainer argument": (["train", "digits", "training.lerning_rate=1"], "'training.learning_rate'?"),
    "not an override": (["train", "digits", "adapter.r"], "write key=value"),
    "group as value": (["train", "digits", "seed.x=1"], "seed is a value, not a group"),
    "what people say": (["train", "digits", "training.lr=1"], "did you mean 'training.learning_rate'?"),
    "two types": (["train", "digits", "adapter.r=x"], "adapter.r=x: adapter.r is 'x', expected int or list[int]"),
    "no seed": (["train", "digits", "seed=-1"], "seed is -1, expected 0 to 4294967295"),
    "large seed": (["train", "digits", "seed=1099511627776"], "expected 0 to 4294967295"),
    "no output": (["train", "digits", "output="], "output is '', expected the path of a folder"),
    "long number": (["train", "digits", f"seed={'9' * 5000}"], "the value of 'seed=999"),
    "deep value": (["train", "digits", f"task.rotation={'[' * 5000}"], "the value of 'task.rotation=[[["),
    "long name": (["train", "n" * 300], "File name too long"),
    "value as group": (["train", "digits", "adapter=3"], "unknown key 'adapter"),
    "flag": (["train", "digits", "resume=perhaps"], "resume is a flag now; write --resume"),
    "unknown recipe": (["train", "digits", "recipe=digit"], "did you mean 'digits'?"),
    "no config": (["train", "digit"], "no config 'digit'"),
    "settings that clash": (
        ["train", "digits-tiny", "output=x", "training.load_best_model_at_end=true"],
        "training.load_best_model_at_end needs a checkpoint at every evaluation; set training.eval_strategy=epoch",
    ),
    "no folder": (["eval", "nowhere"], "nowhere/config.yaml does not exist"),
    "no adapter": (["merge", "nowhere", "--out", "x"], "nowhere does not exist"),
    "unknown method": (["compare", "digits", "--methods", "flra"], "did you mean 'flora'?"),
    "seed twice": (["compare", "digits", "--seeds", "1,1"], "each of them once"),
    "copy of nothing": (["recipes", "copy"], "with NAME one of audio_classify, audio_classify-tiny, "),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_of_use_are_one_line_and_exit_2(
    case: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    argv, text = ERRORS[case]
    code, _, err = run(capsys, *argv)
    assert code == 2
    assert text in err
    assert err.startswith("flora: error: ")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [("- 1\n", "must be a mapping"), ("a: [", "not valid YAML"), ("seed: 1\n", "needs 'recipe: NAME'")],
)
def test_a_config_that_is_none(text: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(text)
    code, _, err = run(capsys, "train", str(path))
    assert (code, message in err, str(path) in err) == (2, True, True), err


def test_an_error_inside_a_library_keeps_its_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(args: object) -> int:
        return int("a bug, not an error of use")

    monkeypatch.setitem(flora_cli.COMMANDS, "recipes", broken)
    code, _, err = run(capsys, "recipes")
    assert code == 1
    assert err.startswith("Traceback (most recent call last):")
    assert "ValueError: invalid literal" in err
    assert err.splitlines()[-1].startswith("flora: this is a bug in flora, not in what you gave it. Please report it")


@pytest.mark.parametrize(
    ("raised", "code", "text"),
    [
        (UserError("a setting is wrong"), 2, "flora: error: a setting is wrong\n"),
        (WrongTypeError("a\nsetting"), 2, "flora: error: a setting\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "No space left on device\n"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 2, "x: Permission denied\n"),
        (MemoryError(), 2, "flora: error: out of memory\n"),
        (KeyboardInterrupt(), 130, "flora: error: interrupted\n"),
        (ValueError("of a library"), 1, "how to report"),
        (TypeError("len() of int"), 1, "how to report"),
        (KeyError("name"), 1, "how to report"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whose_error_it_is_is_told_by_its_type(
    raised: BaseException, code: int, text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(args: object) -> int:
        raise raised

    monkeypatch.setitem(flora_cli.COMMANDS, "recipes", fails)
    got, _, err = run(capsys, "recipes")
    assert got == code
    if code == 1:
        assert "Traceback" in err
        assert "Please report it" in err
    else:
        assert err.endswith(text)
        assert err.count("\n") == 1


def test_version_and_module(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        flora_cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"flora {flora.__version__} (torch ")


def test_the_public_names_are_listed() -> None:
    assert set(flora.__all__) | {"__version__"} == set(dir(flora))


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("matplotlib.figure", 'needs matplotlib, which is not installed: pip install "flora-peft[recipes]"'),
        ("monai", 'pip install "flora-peft[medical]"'),
        ("net", "add the folder of net.py to PYTHONPATH"),  # a module of the user's own, which no extra brings
    ],
)
def test_a_missing_package_is_named_with_the_smallest_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, module: str, said: str
) -> None:
    def needs(args: object) -> int:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setitem(flora_cli.COMMANDS, "recipes", needs)
    code, _, err = run(capsys, "recipes")
    assert code == 2
    assert said in err
    assert "flora-peft[all]" not in err


def test_recipes_are_listed_and_copied(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert [line.split()[0] for line in run(capsys, "recipes")[1].splitlines()] == config_names()
    assert run(capsys, "recipes", "copy", "digits")[0] == 0
    assert Path("digits.yaml").read_text() == (CONFIGS / "digits.yaml").read_text()
    Path("digits.yaml").write_text("edited")
    assert (
        "digits.yaml exists; choose another output or ask to overwrite it (--overwrite)"
        in run(capsys, "recipes", "copy", "digits")[2]
    )
    assert Path("digits.yaml").read_text() == "edited"
    assert run(capsys, "recipes", "copy", "digits", "--overwrite")[0] == 0
    assert Path("digits.yaml").read_text() == (CONFIGS / "digits.yaml").read_text()


LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
}


def plan(capsys: pytest.CaptureFixture[str], tmp_path: Path, *argv: str, **config: object) -> dict[str, object]:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**LLAMA, **config}))
    code, out, err = run(capsys, "plan", str(path), "--json", *argv)
    assert code == 0, err
    return json.loads(out)  # type: ignore[no-any-return]


def test_plan_counts_equal_layers_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    report = plan(capsys, tmp_path, "--r", "4", "--target-modules", "q_proj,v_proj")
    rows = {row["layer"]: row for row in report["rows"]}  # type: ignore[attr-defined]
    assert set(rows) == {"model.layers.*.self_attn.q_proj", "model.layers.*.self_attn.v_proj"}
    assert {row["count"] for row in rows.values()} == {3}
    assert rows["model.layers.*.self_attn.v_proj"]["parameters"] == 4 * (64 + 32) + 16
    assert report["trainable_parameters"] == 3 * (4 * (64 + 64) + 16 + 4 * (64 + 32) + 16)
    reasons = {item["layer"]: item["reason"] for item in report["left_out"]}  # type: ignore[attr-defined]
    assert reasons["lm_head (Linear)"] == "not among target_modules"


def test_plan_of_raw_parameters_and_of_one_name(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A name alone is a suffix, as in a list; the parameters of one module are each counted once."""
    experts = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4}
    names = "experts.gate_up_proj,experts.down_proj"
    argv = ("--target-parameters", names, "--target-modules", "q_proj", "--r", "4")
    report = plan(capsys, tmp_path, *argv, **experts)
    rows = {row["layer"]: row for row in report["rows"]}  # type: ignore[attr-defined]
    assert {layer: tuple(row["shape"]) for layer, row in rows.items()} == {
        "model.layers.*.self_attn.q_proj": (64, 64),
        "model.layers.*.mlp.experts gate_up_proj": (4, 320, 64),
        "model.layers.*.mlp.experts down_proj": (4, 64, 160),
    }
    assert {row["count"] for row in rows.values()} == {3}
    assert report["trainable_parameters"] == 3 * sum(row["parameters"] for row in rows.values())
    alone = plan(capsys, tmp_path, "--target-parameters", names, "--r", "4", **experts)
    assert len(alone["rows"]) == 2  # type: ignore[arg-type]


def test_plan_spends_a_budget(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    spent = plan(capsys, tmp_path, "--budget", "5000", "--target-modules", "all-linear")["trainable_parameters"]
    assert isinstance(spent, int)
    assert 4000 < spent <= 5000


def test_plan_of_a_model_of_70b_parameters_is_a_short_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    large = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 32000}
    path = tmp_path / "config.yaml"
    config = {**LLAMA, **large, "num_attention_heads": 64, "num_key_value_heads": 8}
    path.write_text(json.dumps(config))  # JSON is YAML
    code, out, _ = run(capsys, "plan", str(path), "--r", "16")
    assert code == 0
    assert "68,976,648,192 parameters" in out
    assert len(out.splitlines()) < 25


def test_plan_of_no_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = run(capsys, "plan", str(tmp_path))
    assert (code, err.count("\n"), "no transformers config found" in err) == (2, 1, True), err


TYPED = ["run #2", "~", "null", "2024-01-01", "1e3", "[x]", "true", "a: b", "0x10", "'quoted'", " spaces ", "*"]


@pytest.mark.parametrize("text", TYPED)
def test_a_path_is_taken_as_it_was_typed(text: str) -> None:
    from flora.runs.settings import read

    assert read("digits", [f"output={text}"]).output == Path(text)
    settings = read("vision_classify", [f"task.data={text}", f"task.model={text}"])
    assert (settings.task.data, settings.task.model) == (text, text)


def test_home_is_known_in_an_output() -> None:
    from flora.runs.settings import read

    assert read("digits", ["output=~/runs"]).output == Path.home() / "runs"


def test_a_config_that_repeats_itself_into_billions_is_refused(tmp_path: Path) -> None:
    from flora.runs.settings import read

    lines = ["a0: &a0 [1, 1]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40))]
    (tmp_path / "c.yaml").write_text("\n".join(lines))
    with pytest.raises(UserError, match="has more than 100,000 values; its parts refer to each other"):
        read(str(tmp_path / "c.yaml"))
    (tmp_path / "c.yaml").write_text("recipe: digits\ntraining:\n")
    assert read(str(tmp_path / "c.yaml"), ["training.max_steps=3"]).training == {"max_steps": 3}


def test_the_flags_of_train_and_how_they_were_once_written(capsys: pytest.CaptureFixture[str]) -> None:
    from flora.runs.settings import split_flags

    args = parse(["train", "digits", "--resume", "seed=1", "--overwrite"])
    assert (args.resume, args.overwrite, args.overrides) == (True, True, ["seed=1"])
    assert split_flags(["resume=true", "seed=1", "overwrite=false"]) == (
        {"resume": True, "overwrite": False},
        ["seed=1"],
    )
    assert "resume=true is a flag now: --resume" in capsys.readouterr().err


def test_the_task_keys_of_a_recipe_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "recipes", "keys", "vision_classify-tiny")
    assert code == 0
    assert "task.data = (must be given)" in out
    assert "task.image_column = 'image'" in out
    assert "labels: The names of the classes" in out
    assert run(capsys, "recipes", "keys")[2].startswith("flora: error: missing NAME")


def test_a_warning_is_one_line_without_the_code_behind_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def warns(_: argparse.Namespace) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            # pytest has a `showwarning` of its own; this is Python's.
            monkeypatch.setattr(warnings, "showwarning", print_warning)
            warnings.warn("two\nlines \x1b[31m", stacklevel=1)
        return 0

    def print_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object) -> None:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno))

    before = warnings.formatwarning
    monkeypatch.setitem(flora_cli.COMMANDS, "recipes", warns)
    code, out, err = run(capsys, "recipes")
    assert (code, out) == (0, "")
    assert err == "warning: two lines \\x1b[31m\n"
    assert warnings.formatwarning is before
