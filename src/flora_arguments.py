"""The command line of ``flora``: the arguments of each verb, how they are parsed, and what to type after a mistake.

Outside the package for the same reason as ``flora_cli``: help must not wait for PEFT.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

Argument = tuple[tuple[str, ...], dict[str, Any]]

DESCRIPTION = "FLoRA: parameter-efficient fine-tuning for weights of any number of dimensions."
EPILOG = """`flora VERB --help` explains a verb, with examples; `flora train RECIPE --help` the settings of a recipe.
Errors of use end with exit code 2."""
TOP_OPTIONS = ("-h", "--help", "--version", "--print-completion")


def argument(*names: str, **options: Any) -> Argument:
    """An argument of a verb: what ``ArgumentParser.add_argument`` takes."""
    return names, options


def numbers(text: str) -> list[int]:
    """``"0,1,2"`` as a list of ints."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 0,1,2") from None


def whole(text: str) -> int:
    """``"8"`` as an int."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number such as 8") from None


def positive(text: str) -> int:
    """A whole number from 1."""
    value = whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is below 1; give a whole number such as 4096")
    return value


def number(text: str) -> float:
    """``"0.9"`` as a float."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 0.9") from None


def fraction_or_count(text: str) -> float | int:
    """A budget: a count of parameters, or a fraction of the model."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a count of parameters such as 500000, or a fraction of the model such as 0.01"
        ) from None

    if value.is_integer():
        return int(value)
    return value


def words(text: str) -> list[str]:
    """``"a,b"`` as a list."""
    return [part.strip() for part in text.split(",") if part.strip()]


CONFIG = argument("config", metavar="CONFIG", help="a YAML file or the name of a packaged config")
FOLDER = argument("folder", metavar="FOLDER", help="the folder of an adapter")
RUN_RECIPE_FILE = argument(
    "--run-recipe-file",
    action="store_true",
    help="allow the Python file that FOLDER names as its recipe to run; only for folders you trust",
)
RUN_CODE = argument(
    "--run-code", action="store_true", help="allow the Python file of file.py:function to run; only for your own code"
)
BASE = "the base model, a folder or file.py:function, for files that do not record the kinds of layers"
OVERRIDES = argument("overrides", nargs="*", default=[], metavar="key=value", help="replaces a value of the config")


def overwrite(what: str) -> Argument:
    """The flag that allows an output to be replaced."""
    return argument("--overwrite", action="store_true", help=f"replace {what}")


ARGUMENTS: dict[str, list[Argument]] = {
    "train": [
        CONFIG,
        OVERRIDES,
        argument("--resume", action="store_true", help="continue from the last complete checkpoint"),
        overwrite("the run in the output folder"),
    ],
    "eval": [
        FOLDER,
        OVERRIDES,
        argument("--split", default="test", help="train, validation or test (the default)"),
        RUN_RECIPE_FILE,
    ],
    "predict": [
        FOLDER,
        argument("inputs", nargs="+", metavar="INPUT", help="a file, a folder of files, or a text"),
        argument("--out", metavar="DIR", help="where files are written (default: FOLDER/predictions)"),
        argument("--prompt", metavar="TEXT", help="the question about each file, for recipes that take one"),
        RUN_RECIPE_FILE,
    ],
    "compare": [
        argument("config", nargs="?", metavar="CONFIG", help="a YAML file or the name of a packaged config"),
        OVERRIDES,
        argument("--methods", type=words, default="frozen,flora,lora,full", help="default: %(default)s; or all"),
        argument("--seeds", type=numbers, default="0,1,2", help="default: %(default)s"),
        argument("--runs", nargs="+", metavar="FOLDER", help="finished runs to show side by side, instead of CONFIG"),
        argument("--html", metavar="FILE", help="also write a page"),
        overwrite("the results of an earlier comparison, and FILE"),
    ],
    "plan": [
        argument("model", metavar="MODEL", help="a hub id, a local folder, a config.json, or file.py:function"),
        RUN_CODE,
        argument("--r", type=whole, default=8, help="rank of the channel modes (default: 8)"),
        argument("--kernel-r", type=whole, default=2, help="rank of each kernel mode (default: 2)"),
        argument(
            "--target-modules",
            type=words,
            help="all (the default), all-linear, all-conv, all-norm, names: q_proj,v_proj",
        ),
        argument("--target-parameters", type=words, metavar="NAMES", help="raw parameters: experts.down_proj,..."),
        argument("--budget", type=fraction_or_count, help="parameters to spend: a fraction below 1, or a count"),
        argument(
            "--positions", type=positive, default=4096, help="output positions per step for the costs (default: 4096)"
        ),
        argument("--json", action="store_true", help="print JSON"),
    ],
    "inspect": [
        argument("folder", metavar="SRC", help="the folder or file of an adapter, of any format that convert reads"),
        argument("--html", metavar="FILE", help="also write a page"),
        argument("--base", help=BASE),
        RUN_CODE,
        overwrite("FILE"),
    ],
    "merge": [
        argument("folder", nargs="+", metavar="SRC", help="adapters, of any format that convert reads"),
        argument("--out", required=True, metavar="DIR", help="the folder to write"),
        argument("--base", help="a folder, hub id or file.py:function instead of the base that the adapter names"),
        RUN_CODE,
        overwrite("DIR"),
        argument("--weights", type=number, nargs="+", metavar="W", help="one factor for each adapter"),
        RUN_RECIPE_FILE,
    ],
    "convert": [
        argument("source", metavar="SRC", help="the folder or file of an adapter"),
        argument("--to", required=True, choices=("flora", "lora", "kohya", "dense"), help="the format to write"),
        argument(
            "--out", required=True, metavar="DST", help="a folder (flora, lora) or .safetensors file (kohya, dense)"
        ),
        argument("--base", help=BASE),
        RUN_CODE,
        argument("--scale", type=number, help="the scale of an authors' checkpoint, which does not store it"),
        argument("--prefix", help="the prefix of Kohya keys: lycoris (the default), lora_unet, lora_te, ..."),
        argument(
            "--no-mid", action="store_true", help="write Kohya files without lora_mid, for sd-scripts and diffusers"
        ),
        argument("--drop-extras", action="store_true", help="leave out biases and modules_to_save"),
        overwrite("DST"),
    ],
    "extract": [
        argument("base", metavar="BASE", help="the base model's folder"),
        argument("tuned", metavar="TUNED", help="the fine-tuned model's folder"),
        argument("--rank", type=whole, help="the rank of every channel mode"),
        argument("--energy", type=number, help="the fraction of each change's squared norm to keep, instead of --rank"),
        argument("--budget", type=whole, help="parameters to spend where they lower the error most, instead of --rank"),
        argument("--kernel-r", type=whole, help="with --rank, the rank of the kernel modes (default: kept whole)"),
        argument("--carry", action="store_true", help="also store biases, norms and new tensors that differ, in full"),
        argument("--out", required=True, metavar="DIR", help="the folder to write"),
        overwrite("DIR"),
    ],
    "recipes": [
        argument("action", nargs="?", choices=("list", "copy", "keys"), default="list"),
        argument("name", nargs="?", metavar="NAME", help="the config to copy or explain"),
        overwrite("NAME.yaml here"),
    ],
}


class Parser(argparse.ArgumentParser):
    """Errors in one line, with the nearest word that would have been right."""

    def error(self, message: str) -> NoReturn:
        """Prints what is wrong and where help is, and ends with exit code 2."""
        found = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if found:
            message += nearest(found[1], re.findall(r"[\w-]+", found[2]))

        self.exit(2, f"{self.prog}: error: {message}; `{self.prog} --help` shows examples\n")


def nearest(word: str, known: list[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest of the words, or nothing when none is near."""
    found = difflib.get_close_matches(word, known, n=1)
    if found:
        return f"; did you mean {found[0]!r}?"
    return ""


def build_parser(verbs: Mapping[str, Callable[..., int]]) -> Parser:
    """The parser; the help of a verb is the docstring of its function."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser("flora", description=DESCRIPTION, epilog=EPILOG, formatter_class=raw)
    parser.add_argument("--version", action="version", version=versions())
    parser.add_argument("--print-completion", action=PrintCompletion)
    each = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, command in verbs.items():
        text = inspect.cleandoc(command.__doc__ or "")
        summary = text.partition("\n")[0]
        sub = each.add_parser(verb, help=summary, description=text, formatter_class=raw)
        for names, options in ARGUMENTS[verb]:
            sub.add_argument(*names, **options)

    return parser


def parse(argv: list[str], verbs: Mapping[str, Callable[..., int]]) -> argparse.Namespace:
    """The arguments; key=value items may also stand behind options, which argparse alone does not allow."""
    parser = build_parser(verbs)
    first = (argv or [""])[0]

    if not first:
        parser.error(f"missing VERB, one of {', '.join(verbs)}")
    if first.startswith("-") and first.partition("=")[0] not in TOP_OPTIONS:
        parser.error(f"unrecognized arguments: {first}{nearest(first, list(TOP_OPTIONS))}")

    args, rest = parser.parse_known_args(argv)
    parser.prog = f"flora {args.verb}"

    if strange := [item for item in rest if item.startswith("-") or not hasattr(args, "overrides")]:
        hint = meant(strange[0], ARGUMENTS[args.verb], overrides=hasattr(args, "overrides"))
        parser.error(f"unrecognized arguments: {' '.join(strange)}{hint}")
    if rest:
        args.overrides = [*args.overrides, *rest]

    return args


def versions() -> str:
    """The versions of this package and of those that it stands on, without importing any of them."""
    text = Path(__file__).with_name("flora").joinpath("__init__.py").read_text(encoding="utf-8")
    own = text.partition('__version__ = "')[2].partition('"')[0]
    others = ", ".join(f"{name} {_version_of(name)}" for name in ("torch", "peft", "transformers"))
    return f"flora {own} ({others}, Python {sys.version.split()[0]})"


def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "is not installed"


def meant(strange: str, known: list[Argument], *, overrides: bool) -> str:
    """What an option that the verb does not have was meant to be."""
    options = [name for names, _ in known for name in names if name.startswith("--")]
    word = strange.partition("=")[0]
    near = difflib.get_close_matches(word, options, n=1) or [name for name in options if word.startswith(name)]

    if near:
        return f"; did you mean {near[0]!r}?"
    if overrides:
        return f"; settings are written without dashes, as {word.lstrip('-')}=VALUE"
    if options:
        return f"; its options are {', '.join(options)}"
    return ""


def quiet_bars() -> None:
    """No progress bars of other packages: in a file or a pipe each of their steps would be a line."""
    for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")


def how_to_go_on(args: argparse.Namespace) -> str:
    """What to type after an interruption."""
    if args.verb == "train":
        items = "".join(f" {shlex.quote(item)}" for item in args.overrides)
        return f"; `flora train {shlex.quote(args.config)}{items} --resume` continues from the last checkpoint"
    if args.verb in ("compare", "extract"):
        return f"; the same `flora {args.verb}` command continues where this one stopped"
    return ""


def asks_for_keys(given: list[str]) -> bool:
    """Whether the help of one recipe is wanted, as ``flora train digits --help`` asks."""
    asking = len(given) == 3 and given[0] in ("train", "compare") and given[2] in ("-h", "--help")
    return asking and not given[1].startswith("-")


# ---- completion by the Tab key ---------------------------------------------------------------------------------------

PACKAGED = Path(__file__).parent / "flora" / "recipes" / "configs"
# What completes the words of a usage line.
FOLDERS = {"FOLDER", "DIR", "BASE", "TUNED"}
FILES = {"FILE", "SRC", "DST", "INPUT", "MODEL", "base"}


class PrintCompletion(argparse.Action):
    """Prints the script of a shell, and ends."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(
            option_strings,
            dest,
            choices=("bash", "zsh", "fish"),
            help="print the script that lets this shell complete flora: verbs, options, configs, files",
        )

    def __call__(self, parser: argparse.ArgumentParser, *given: Any) -> NoReturn:
        """Called by argparse with its namespace and the shell."""
        print(completion_script(parser, given[1]))
        parser.exit()


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script that lets a shell complete what is typed; it knows everything itself and never waits for Python.

    Args:
        parser: Of ``flora``.
        shell: bash, zsh or fish.
    """
    import shtab

    names = sorted(path.stem for path in PACKAGED.glob("*.yaml"))
    completers: dict[Any, Any] = {"CONFIG": _configs(names), "NAME": _names(names)}
    completers |= dict.fromkeys(FOLDERS, shtab.DIRECTORY) | dict.fromkeys(FILES, shtab.FILE)

    (verbs,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    for verb in verbs.choices.values():
        for action in verb._actions:
            meaning = action.metavar or action.dest
            if meaning in completers:
                action.complete = completers[meaning]

    return shtab.complete(parser, shell)


def _names(names: list[str]) -> dict[str, Any]:
    """The packaged configs."""
    words = " ".join(names)
    return {
        "bash": "_flora_names",
        "zsh": f"({words})",
        "fish": f"(string split ' ' '{words}')",
        "preamble": {"bash": f"""_flora_names() {{ compgen -W "{words}" -- "$1"; }}"""},
    }


def _configs(names: list[str]) -> dict[str, Any]:
    """The packaged configs, YAML files, and the folders that may hold such."""
    words = " ".join(names)
    bash = f"""
_flora_config_files() {{
  compgen -W "{words}" -- "$1"
  compgen -f -X '!*.y*ml' -- "$1"
  compgen -d -- "$1"
}}"""
    zsh = f"""
_flora_config_files() {{
  compadd -- {words}
  _files -g '*.y(a|)ml'
}}"""

    return {
        "bash": "_flora_config_files",
        "zsh": "_flora_config_files",
        "fish": f"(string split ' ' '{words}'; __fish_complete_suffix .yaml)",
        "preamble": {"bash": bash, "zsh": zsh},
    }
