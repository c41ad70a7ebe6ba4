"""Runs the parametrised test-suite of PEFT against a method that lives outside PEFT.

    python peft_acceptance.py --peft PATH --config flora:FloraConfig --spec spec.json [--files F,F] [-- pytest options]

PATH is the unpacked source distribution of the installed version (``pip download peft==X --no-deps --no-binary peft``),
which ships its tests; nothing of PEFT is kept here. They are copied to a temporary folder, and while pytest collects,
every ``parametrize`` mark that lists PEFT methods gets the rows of our method instead. Tests that take no method as a
parameter are left out. Keys of the spec, all optional:

    kwargs      passed to the config in every case
    kinds       model kind -> its cases; the kinds are the ids that PEFT's test_custom_models.py gives to its toy models
    init_off    fields under which the adapter is not the identity
    lr          {part of a node id: learning rate}; PEFT hard-codes such exceptions per method
    deselect    {part of a node id: why it cannot apply}
    models      local models in place of the Hub's, for the files of the model families
    lm_kwargs   fields of the config in those files
"""

from __future__ import annotations

import argparse
import importlib
import importlib.machinery
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

ENVIRONMENT = "PEFT_ACCEPTANCE"
CASE_ARGUMENTS = ["test_name", "model_id", "config_cls", "config_kwargs"]
PAIR_ARGUMENTS = ["test_name", "tuner_method", "config_cls", "config_kwargs_1", "config_kwargs_2"]
PAIRS = ((["lin0"], ["lin0"], "Same"), (["lin0"], ["lin1"], "Different"))  # two adapters on the kind "MLP"
FIELDS_BESIDE = ("config_kwargs", "mandatory_kwargs", "kwargs")  # second argument of marks (config class, its fields)


class Plugin:
    """Puts the rows of our method in the place of PEFT's own."""

    def __init__(self, config: str, spec: dict[str, Any]) -> None:
        module, _, name = config.partition(":")
        self.config_cls = getattr(importlib.import_module(module), name)
        self.spec = spec
        self.label = name.removesuffix("Config")
        self.common = spec.get("kwargs", {})

    def cases(self) -> Iterator[tuple[Any, ...]]:
        for kind, cases in self.spec.get("kinds", {}).items():
            for count, case in enumerate(cases, 1):
                fields = case if isinstance(case, dict) else {"target_modules": case}
                yield f"{kind} {count} {self.label}", kind, self.config_cls, {**self.common, **fields}

    def pairs(self) -> Iterator[tuple[Any, ...]]:
        fields = {**self.common, **self.spec.get("init_off", {"init_weights": False})}
        for first, second, word in PAIRS:
            one, two = ({**fields, "target_modules": targets} for targets in (first, second))
            yield f"{self.label} {word}", self.label.lower(), self.config_cls, one, two

    def rows_for(self, arguments: str | Sequence[str], values: list[Any]) -> list[Any] | None:
        """Our values for a parametrize mark, or None where it does not list methods."""
        from peft import PeftConfig

        names = [name.strip() for name in arguments.split(",")] if isinstance(arguments, str) else list(arguments)
        if names == CASE_ARGUMENTS:
            return list(self.cases())
        if names == PAIR_ARGUMENTS:
            return list(self.pairs())
        if names == ["model_id"]:
            return self.spec.get("models")
        plain = [getattr(value, "values", value) for value in values]  # pytest.param(...) unpacked
        first = [value[0] if isinstance(value, (tuple, list)) and value else value for value in plain]
        if not first or not all(isinstance(value, type) and issubclass(value, PeftConfig) for value in first):
            return None
        if len(names) == 1:
            return [self.config_cls]
        if names[1] not in FIELDS_BESIDE:
            return None
        fields = {} if names[1] == "mandatory_kwargs" else {**self.common, **self.spec.get("lm_kwargs", {})}
        return [(self.config_cls, fields)]

    @pytest.hookimpl(tryfirst=True)  # before pytest itself reads the marks
    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        marks = metafunc.definition.own_markers
        for at, mark in enumerate(marks):
            if mark.name != "parametrize" or len(mark.args) < 2:
                continue
            rows = self.rows_for(mark.args[0], list(mark.args[1]))
            if rows is not None:
                options = {key: value for key, value in mark.kwargs.items() if key != "ids"}
                marks[at] = pytest.mark.parametrize(mark.args[0], rows, **options).mark

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        rates = [rate for part, rate in self.spec.get("lr", {}).items() if part in item.nodeid]
        with pytest.MonkeyPatch.context() as patch:
            for name in ("SGD", "Adam") if rates else ():
                make = getattr(importlib.import_module("torch.optim"), name)
                patch.setattr(f"torch.optim.{name}", _at_rate(make, rates[-1]))
            return (yield)

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        kept = [item for item in items if self._wanted(item)]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept

    def _wanted(self, item: pytest.Item) -> bool:
        values = getattr(getattr(item, "callspec", None), "params", {}).values()
        takes_ours = any(value is self.config_cls for value in values)
        return takes_ours and not any(part in item.nodeid for part in self.spec.get("deselect", {}))


def _at_rate(make: Any, rate: float) -> Any:
    """An optimiser class with another learning rate than the caller's."""
    return lambda parameters, lr=None, **options: make(parameters, lr=rate, **options)


def stub_missing() -> None:
    """PEFT's helpers import these at the top; only tests that need the Hub as well use them."""
    for missing in [name for name in ("diffusers", "datasets") if importlib.util.find_spec(name) is None]:
        stub: Any = types.ModuleType(missing)
        stub.__spec__, stub.__file__ = importlib.machinery.ModuleSpec(missing, None), f"{missing}-stub"
        stub.StableDiffusionPipeline, stub.load_dataset = type("StableDiffusionPipeline", (), {}), None
        sys.modules[missing] = stub


def pytest_configure(config: pytest.Config) -> None:
    """Called because this module is loaded with ``-p peft_acceptance``, in the workers of pytest-xdist too."""
    stub_missing()
    config.pluginmanager.register(Plugin(**json.loads(os.environ[ENVIRONMENT])), "peft-acceptance")


def run(peft: Path, config: str, spec: dict[str, Any], files: Sequence[str], arguments: Sequence[str]) -> int:
    """Copies the tests of ``peft`` to a temporary folder and runs these files there; returns pytest's exit code."""
    with tempfile.TemporaryDirectory(prefix="peft_acceptance_") as folder:
        root, tests = Path(folder), Path(folder, "tests")
        shutil.copytree(peft / "tests", tests, ignore=shutil.ignore_patterns("regression", "training"))
        (tests / "__init__.py").touch()  # the source distribution has none, but the tests import relatively
        markers = "\n".join(
            f"  {name}" for name in ("single_gpu_tests", "multi_gpu_tests", "regression", "bitsandbytes")
        )
        (root / "pytest.ini").write_text(f"[pytest]\nmarkers =\n{markers}\n")  # PEFT's own asks for coverage
        here = str(Path(__file__).resolve().parent)
        sys.path.insert(0, here)
        os.environ["PYTHONPATH"] = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ[ENVIRONMENT] = json.dumps({"config": config, "spec": spec})
        options = ["-c", str(root / "pytest.ini"), "--rootdir", folder, "-p", "peft_acceptance", "--noconftest", "-q"]
        paths = [str(tests / name) for name in files]
        return int(pytest.main([*options, "-p", "no:cacheprovider", *paths, *arguments]))


def main() -> int:
    own, _, rest = " ".join(sys.argv[1:]).partition(" -- ")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peft", required=True, type=Path, help="unpacked source distribution, with a folder tests/")
    parser.add_argument(
        "--config", required=True, help="importable config class, package:Class; importing registers it"
    )
    parser.add_argument("--spec", required=True, type=Path, help="JSON file")
    parser.add_argument("--files", default="test_custom_models.py", help="comma separated files under tests/")
    options = parser.parse_args(own.split())
    spec = json.loads(options.spec.read_text())
    return run(options.peft, options.config, spec, options.files.split(","), rest.split())


if __name__ == "__main__":
    sys.exit(main())
