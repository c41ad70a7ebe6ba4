"""``predict``: what a trained folder makes of new inputs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from flora.errors import UserError
from flora.recipes import Request, optional
from flora.runs.reloading import load_adapter, load_base, read_run
from flora.runs.run_folder import PREDICTIONS
from flora.storage.atomic import staged, write_json

RESULTS = "predictions.json"


def predict(
    folder: Path,
    inputs: Sequence[str],
    out: Path | None = None,
    prompt: str | None = None,
    *,
    run_recipe_file: bool = False,
) -> list[dict[str, Any]]:
    """Runs the model of a trained folder on new inputs.

    Args:
        folder: That ``flora train`` wrote.
        inputs: What the recipe takes: files, folders of such files, or texts.
        out: The folder for label maps, pictures and ``predictions.json``; ``<folder>/predictions`` unless given.
        prompt: The question or instruction that belongs to every input, for recipes that take one with a file.
        run_recipe_file: Runs the Python file that the folder names as its recipe; only for folders of your own.

    Returns:
        One dict for each input: ``input``, and what was found, as the recipe says it. The same list is written to
        ``predictions.json``. All files appear at once, at the end; others that are in the folder stay.

    Raises:
        FileNotFoundError, ValueError: The folder or an input cannot be used.
    """
    settings = read_run(folder, run_recipe_file=run_recipe_file)
    recipe = settings.load_recipe()
    make = optional(recipe, "predictor")
    if make is None:
        raise UserError(f"the recipe {settings.recipe} cannot predict: it has no function `predictor`")

    if prompt is not None and not optional(recipe, "TAKES_PROMPT"):
        raise UserError(f"--prompt is {prompt!r}, but the recipe {settings.recipe} takes no question; leave it out")

    endings = optional(recipe, "INPUT_FILES")
    given = expand(inputs, endings)
    names = file_names(given, endings)
    out = out or folder / PREDICTIONS
    check_place(out, given if endings else ())
    model = load_adapter(load_base(folder, run_recipe_file=run_recipe_file), folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    answer = make(settings.task, model.to(device), folder)

    with staged(out, overwrite=True, keep_others=True) as new:
        new.mkdir()

        with torch.inference_mode():
            found = [
                {"input": one, **answer(Request(one, number, name, new, prompt))}
                for number, (one, name) in enumerate(zip(given, names, strict=True))
            ]

        results = cast("list[dict[str, Any]]", _moved(found, new, out))
        write_json(new / RESULTS, results)

    return results


def _moved(value: Any, new: Path, out: Path) -> Any:
    """A result with every file that it names under the folder where the files will be."""
    if isinstance(value, dict):
        return {key: _moved(item, new, out) for key, item in value.items()}
    if isinstance(value, list):
        return [_moved(item, new, out) for item in value]

    if isinstance(value, str) and value.startswith(f"{new}{os.sep}"):
        return str(out / value.removeprefix(f"{new}{os.sep}"))

    return value


def check_place(out: Path, inputs: Sequence[str]) -> None:
    """Checks that no result can replace a file which is not one of an earlier prediction.

    Args:
        out: The folder for results.
        inputs: The files to predict on; none where the inputs are texts.

    Raises:
        UserError: It is no folder, holds an input, or holds files of something else.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out} is a file; give a folder with --out")

    place = os.path.realpath(out)
    inside = next((one for one in inputs if os.path.dirname(os.path.realpath(one)) == place), None)  # noqa: PTH120
    if inside is not None:
        raise UserError(f"{out} holds the input {inside}, which a result could replace; give another folder with --out")
    if any(out.iterdir()) and not (out / RESULTS).is_file():
        raise UserError(
            f"{out} holds files and no {RESULTS}, so flora predict did not write them; give another folder with --out"
        )


def expand(inputs: Sequence[str], endings: Sequence[str]) -> list[str]:
    """The inputs, with each folder replaced by its files.

    Args:
        inputs: Files, folders or texts.
        endings: Of the files that the recipe takes; none where it takes text.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: A folder has no such file.
    """
    if not endings:
        return list(inputs)

    found = []
    for one in inputs:
        path = Path(one).expanduser()
        if path.is_dir():
            files = sorted(str(file) for file in path.iterdir() if file.name.lower().endswith(tuple(endings)))
            if not files:
                raise UserError(f"{one} has no files to predict on ({', '.join(endings)})")

            found += files
        elif path.is_file():
            found.append(str(path))
        else:
            raise FileNotFoundError(f"{one}: no such file or folder; this recipe takes files ({', '.join(endings)})")

    return found


def file_names(inputs: Sequence[str], endings: Sequence[str]) -> list[str]:
    """A name for what is written for each input: that of its file, with its number where two files have the same.

    Examples:
        >>> file_names(["a/scan.nii.gz", "b/scan.nii.gz", "b/other.nii"], (".nii", ".nii.gz"))
        ['scan-0', 'scan-1', 'other']
        >>> file_names(["a text"], ())
        ['0']
    """
    if not endings:
        return [str(number) for number in range(len(inputs))]

    names = []
    for one in inputs:
        name = Path(one).name
        fitting = [ending for ending in endings if name.lower().endswith(ending)] or [Path(name).suffix]
        names.append(name[: len(name) - len(max(fitting, key=len))])

    return [name if names.count(name) == 1 else f"{name}-{number}" for number, name in enumerate(names)]


def result_line(result: dict[str, Any]) -> str:
    """A result as one line for people: the input and the short values."""
    shown = {key: value for key, value in result.items() if key not in {"input", "scores"}}
    if "boxes" in shown:
        boxes = shown.pop("boxes")
        shown = {"boxes": ", ".join(f"{box['class']} {box['score']:.2f}" for box in boxes) or "none", **shown}
    return f"{result['input']}: " + "  ".join(f"{key} {value}" for key, value in shown.items())
