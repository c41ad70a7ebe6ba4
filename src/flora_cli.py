"""The ``flora`` command. It stands outside the package because ``import flora`` imports PEFT, which takes seconds.

A verb is a function in ``COMMANDS``, whose docstring is its help and which imports what it needs itself; its arguments
are in ``flora_arguments``. ``main`` runs one and turns what goes wrong into one line and an exit code.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from flora_arguments import asks_for_keys, how_to_go_on, parse, quiet_bars

READER_ENDED = 128 + 13  # what a shell reports of a program that a broken pipe ended, as in `flora recipes | head`


def train(args: argparse.Namespace) -> int:
    """Fine-tune with FLoRA and write an output folder.

    CONFIG is a YAML file or the name of a packaged config (`flora recipes`); key=value items replace what it says.
    The folder gets the adapter, a model card, metrics.json, report.html and the checkpoints. --resume continues
    from the last complete checkpoint; --overwrite replaces an earlier run.

    Examples:
      flora train digits
      flora train digits adapter.r=4 training.learning_rate=1e-3 output=outputs/small
      flora train my.yaml --resume
      accelerate launch --num_processes 4 -m flora_cli train my.yaml
    """
    from flora.runs.settings import read, split_flags
    from flora.runs.training import train

    flags, overrides = split_flags(args.overrides)
    settings = read(args.config, overrides)
    resume, overwrite = args.resume or flags.get("resume", False), args.overwrite or flags.get("overwrite", False)
    metrics = train(settings, resume=resume, overwrite=overwrite)
    # One of several processes, and not the first.
    if not metrics:
        return 0

    for split in ("validation", "test"):
        say(f"{split:<11} {_line(metrics[split])}")

    trained, total = metrics["trainable_parameters"], metrics["total_parameters"]
    say(f"trained     {trained:,} of {total:,} parameters in {metrics['seconds']:.1f} s, {metrics['steps']} steps")
    say(f"written     {settings.output} (adapter file {metrics['adapter_bytes']:,} bytes)")

    return 0


def evaluate(args: argparse.Namespace) -> int:
    """Measure a trained folder, on the data it was trained with or on other data.

    Loads the base model and the adapter from disk. On the same data the numbers must be those from the end of training;
    if they are not, the exit code is 1. task.key=value items choose other data for the same recipe.

    Examples:
      flora eval outputs/digits
      flora eval outputs/digits --split validation
      flora eval outputs/digits task.rotation=0
    """
    from flora.runs.evaluating import evaluate

    found = evaluate(Path(args.folder), args.overrides, args.split, run_recipe_file=args.run_recipe_file)
    say(f"{args.split:<11} {_line(found.metrics)}")

    if found.same is None:
        return 0

    if found.same:
        say("the same as at the end of training")
        return 0

    say("NOT the same as at the end of training (metrics.json):")
    for line in found.report:
        say(f"  {line}")

    return 1


def predict(args: argparse.Namespace) -> int:
    """Run a trained model on new inputs: files, folders of files, or texts.

    Prints one line per input: a class with its score, boxes, or the generated text. Label maps (PNG, NIfTI), images
    with boxes and generated images are written to DIR, together with predictions.json, which holds every number.

    Examples:
      flora predict outputs/vision_classify photo.jpg more-photos/
      flora predict outputs/volume_segment scan.nii.gz --out masks
      flora predict outputs/text_causal "Name three rivers."
      flora predict outputs/multimodal_chat photo.jpg --prompt "What is this?"
    """
    from flora.runs.predicting import predict, result_line

    out = Path(args.out) if args.out else None
    results = predict(Path(args.folder), args.inputs, out, args.prompt, run_recipe_file=args.run_recipe_file)
    for result in results:
        say(result_line(result))

    return 0


def compare(args: argparse.Namespace) -> int:
    """Compare methods on one task, over several seeds, with adapters of one size; or finished runs, with --runs.

    Each method's learning rate is chosen on the validation data from the grid compare.learning_rates. The table, page,
    plot and JSON are written to the folder <output>-compare. Run the command again to continue an interrupted
    comparison; --overwrite starts it from the beginning. --runs takes folders that `flora train` wrote, and shows their
    numbers, their curves and the settings in which they differ.

    Examples:
      flora compare digits --methods frozen,flora,lora,full --seeds 0,1,2
      flora compare my.yaml --methods all --seeds 0,1,2,3,4 'compare.budgets=[50000, 200000]'
      flora compare --runs outputs/rank-8 outputs/rank-16 --html runs.html
    """
    from flora.errors import UserError
    from flora.report.page import page_target, write_page

    if bool(args.config) == bool(args.runs):
        raise UserError("give either a CONFIG whose methods are compared, or --runs with the folders of finished runs")

    page = None if args.html is None else page_target(args.html, overwrite=args.overwrite)

    if args.runs:
        from flora.comparison.finished import finished_runs
        from flora.report.finished_runs import finished_page, finished_text

        report = finished_runs([Path(folder) for folder in args.runs])
        show, text = finished_page, finished_text(report)
    else:
        from flora.comparison.compare import compare
        from flora.report.comparison import comparison_text
        from flora.report.comparison_html import comparison_html
        from flora.runs.settings import read

        report = compare(read(args.config, args.overrides), args.methods, args.seeds, overwrite=args.overwrite)
        show, text = comparison_html, comparison_text(report)

    say(text)

    if page is not None:
        say(write_page(page, show(report), overwrite=args.overwrite))

    return 0


def plan(args: argparse.Namespace) -> int:
    """Show which layers of a model would be adapted and what that costs; no weights are loaded.

    MODEL is a hub id, a local folder, a config.json of transformers, or file.py:function, a function of your own that
    takes nothing and returns a torch module. A model of transformers is built on the meta device, so even 70B
    parameters need no memory. Identical layers share one line.

    Examples:
      flora plan facebook/convnextv2-tiny-1k-224 --r 16
      flora plan meta-llama/Llama-2-70b-hf --r 32 --target-modules all-linear
      flora plan mistralai/Mixtral-8x7B-v0.1 --target-parameters experts.gate_up_proj,experts.down_proj
      flora plan ./config.json --budget 0.01 --json
      flora plan net.py:make --r 16 --run-code
    """
    from flora.report.model_plan import model_plan, plan_text
    from flora.runs.own_module import model_or_name

    settings = {"r": args.r, "kernel_r": args.kernel_r, "budget": args.budget}
    modules = args.target_modules or ([] if args.target_parameters else ["all"])
    if modules:
        settings["target_modules"] = modules

    if args.target_parameters:
        settings["target_parameters"] = args.target_parameters

    report = model_plan(model_or_name(args.model, args.run_code), settings, positions=args.positions)
    say(json.dumps(report, indent=2) if args.json else plan_text(report))

    return 0


def inspect(args: argparse.Namespace) -> int:
    """Show what is in an adapter: the shape, ranks, size of the change, energy per mode and parameters of each layer.

    energy is the share of the squared norm in the stronger half of each mode's directions; near 100 %, a smaller rank
    would do.

    Examples:
      flora inspect outputs/digits
      flora inspect outputs/digits --html adapter.html
      flora inspect style.safetensors --base ./base-model
    """
    from flora.report.anatomy import anatomy, anatomy_text
    from flora.runs.own_module import model_or_name

    base = model_or_name(args.base, args.run_code)
    if not args.html:
        say(anatomy_text(anatomy(Path(args.folder), base)))
        return 0

    from flora.report.anatomy_page import anatomy_page
    from flora.report.page import page_target, write_page

    page = page_target(args.html, overwrite=args.overwrite)
    report = anatomy(Path(args.folder), base)
    say(anatomy_text(report))
    say(write_page(page, anatomy_page(report), overwrite=args.overwrite))

    return 0


def merge(args: argparse.Namespace) -> int:
    """Merge adapters into their base model and write an ordinary model, verified before it appears.

    The base folder is streamed, one weight in memory at a time. Each merged layer is compared with the unmerged one on
    random inputs, and if the model fits into memory its outputs are compared too. The folder appears only if they agree
    up to rounding and every weight is finite. Adapters may have any format that convert reads.

    Examples:
      flora merge outputs/digits --out outputs/digits-merged
      flora merge my-adapter --out merged --base ./base-model --overwrite
      flora merge style.safetensors subject --weights 0.8 -0.3 --base ./base-model --out merged
      flora merge net-adapter --base net.py:make --run-code --out merged
    """
    from flora.runs.merging import merge
    from flora.runs.own_module import model_or_name

    report = merge(
        [Path(folder) for folder in args.folder],
        Path(args.out),
        weights=args.weights,
        base=model_or_name(args.base, args.run_code, same=True),
        overwrite=args.overwrite,
        progress=sys.stderr.isatty(),
        run_recipe_file=args.run_recipe_file,
    )
    say(report)

    return 0


def convert(args: argparse.Namespace) -> int:
    """Convert an adapter to another format exactly, and print the largest error and the sizes.

    Reads FLoRA and PEFT LoRA folders, LyCORIS/Kohya and dense files, and the checkpoints of the paper's authors. The
    format of SRC is detected from its files. The output is read back and compared before it appears.

    Examples:
      flora convert my-adapter --to lora --out my-adapter-lora
      flora convert my-adapter --to kohya --prefix lora_unet --out style.safetensors
      flora convert authors.pth --scale 4 --base ./base-model --to flora --out my-adapter
    """
    from flora.convert import convert
    from flora.runs.own_module import model_or_name

    report = convert(
        args.source,
        args.out,
        to=args.to,
        base=model_or_name(args.base, args.run_code),
        scale=args.scale,
        prefix=args.prefix,
        mid=not args.no_mid,
        drop_extras=args.drop_extras,
        overwrite=args.overwrite,
    )
    say(report)

    return 0


def extract(args: argparse.Namespace) -> int:
    """Turn a full fine-tune into an adapter, layer by layer, and print each layer's error.

    Both models are folders with safetensors files, sharded or not. Run the command again to continue an interrupted
    extraction.

    Examples:
      flora extract ./base ./tuned --rank 16 --out my-adapter
      flora extract ./base ./tuned --energy 0.9 --carry --out my-adapter
      flora extract ./base ./tuned --budget 2000000 --out my-adapter
    """
    from flora.convert.extraction.output import extract_to

    size = {"rank": args.rank, "energy": args.energy, "budget": args.budget, "kernel_r": args.kernel_r}
    options = {"carry": args.carry, "overwrite": args.overwrite, "progress": sys.stderr.isatty()}
    written = extract_to(args.base, args.tuned, Path(args.out), **size, **options)
    say(written.found.table())
    say(written.report)

    return 0


def recipes(args: argparse.Namespace) -> int:
    """List the packaged configs, copy one to edit it, or explain the keys of one.

    Examples:
      flora recipes
      flora recipes copy digits
      flora recipes keys vision_classify
    """
    from flora.errors import UserError, nearest
    from flora.recipes import config_names, config_path
    from flora.report.recipe_list import recipe_table
    from flora.runs.recipe_keys import task_keys
    from flora.storage.atomic import check_target, write_text

    if args.action == "list":
        say(recipe_table())
        return 0

    if args.name is None:
        raise UserError(f"missing NAME: flora recipes {args.action} NAME, with NAME one of {', '.join(config_names())}")
    if args.action == "keys":
        say(task_keys(args.name))
        return 0

    names = config_names()
    if args.name not in names:
        raise UserError(f"no config {args.name!r} is packaged{nearest(args.name, names)}; there are {', '.join(names)}")

    target = Path(f"{args.name}.yaml")
    check_target(target, overwrite=args.overwrite)
    write_text(target, config_path(args.name).read_text(encoding="utf-8"))
    say(f"written to {target}; edit it, then: flora train {target}")

    return 0


def say(text: object) -> None:
    """Prints what a verb has found, which may hold names from files that somebody sent."""
    from flora.errors import printable

    print(printable(str(text)))


def _warning_line(message: Warning | str, *_: object, **__: object) -> str:
    """A warning without the place in the code that raised it, which says nothing to users of the command."""
    from flora.errors import printable

    return f"warning: {printable(' '.join(str(message).split()))}\n"


def _line(metrics: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "train": train,
    "eval": evaluate,
    "predict": predict,
    "compare": compare,
    "plan": plan,
    "inspect": inspect,
    "merge": merge,
    "convert": convert,
    "extract": extract,
    "recipes": recipes,
}


def main(argv: list[str] | None = None) -> int:
    """Runs one verb. An error of the user or the system is one line and exit code 2; a traceback is a bug of flora."""
    given = sys.argv[1:] if argv is None else argv
    prepare_streams()

    if asks_for_keys(given):
        given = ["recipes", "keys", given[1]]

    args = parse(given, COMMANDS)

    if not sys.stderr.isatty():
        quiet_bars()

    with _warnings_for_users():
        return _run(args)


@contextmanager
def _warnings_for_users() -> Iterator[None]:
    """Within it a warning is one line, and what users of the command cannot change is not warned of."""
    before = warnings.formatwarning

    with warnings.catch_warnings():
        # PEFT reads an attribute that transformers has renamed.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        warnings.formatwarning = _warning_line

        try:
            yield
        finally:
            warnings.formatwarning = before


def _run(args: argparse.Namespace) -> int:
    """Runs a verb and turns what goes wrong into one line and an exit code."""
    try:
        code = COMMANDS[args.verb](args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _fail(f"interrupted{how_to_go_on(args)}", code=130)
    except ModuleNotFoundError as error:
        return _missing(error, args)
    except OSError as error:  # whatever the system refuses: no such file, no permission, no space left
        return _refused(error)
    except MemoryError:
        return _fail("out of memory")
    except Exception as error:
        return _not_by_type(error)


def _not_by_type(error: Exception) -> int:
    """Reports an error of the user's, of the system that compiled code tells of, or of ours."""
    from flora.errors import system_refusal

    users_code, refusal = _users_code(error), system_refusal(error)
    if users_code is not None:
        return _fail(str(error), users_code)
    if refusal is not None:
        return _fail(refusal)
    return _report_bug()


def _refused(error: OSError) -> int:
    """Reports an error of the system; if printing itself failed, the rest of the output is discarded."""
    try:
        sys.stdout.flush()
    except OSError:
        # Python flushes once more when it ends, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    if isinstance(error, BrokenPipeError):
        return READER_ENDED

    return _fail(_system_message(error))


def prepare_streams() -> None:
    """Makes everything printable: in any encoding, and where a stream is closed.

    A file opened while a standard stream is closed would get that stream's number, and everything printed.
    """
    # There may be no such device.
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_RDWR)
        while nowhere <= 2:
            nowhere = os.dup(nowhere)
        os.close(nowhere)

    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 (it stays open)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _fail(message: str, code: int = 2) -> int:
    from flora.errors import printable

    print(f"flora: error: {printable(' '.join(message.split()))}", file=sys.stderr)
    return code


def _missing(error: ModuleNotFoundError, args: argparse.Namespace) -> int:
    """A package that is not installed; a module of our own is a bug."""
    if (error.name or "").partition(".")[0] == "flora":
        return _report_bug()

    from flora.runs.missing import install_hint

    return _fail(f"{args.verb} needs {install_hint(error.name or '', getattr(args, 'config', ''))}")


def _system_message(error: OSError) -> str:
    """What the system refuses, and about which file."""
    if error.errno is None or error.strerror is None:
        return str(error)
    if error.filename is not None:
        return f"{error.filename}: {error.strerror}"

    try:
        Path.cwd()
    except FileNotFoundError:
        return "the working folder is gone; change to another one"

    return error.strerror


def _users_code(error: Exception) -> int | None:
    """The exit code of an error about something that the user gave; None for one of ours."""
    from flora.errors import UserError

    if not isinstance(error, UserError):
        return None
    return error.exit_code


def _report_bug() -> int:
    traceback.print_exc()
    own = _own_code()

    if own is not None:
        print(f"flora: the lines above lead through {own}; look there first", file=sys.stderr)
        return 1

    print(
        "flora: this is a bug in flora, not in what you gave it. Please report it with the lines above, the command "
        "that you ran, and the output of `flora --version`.",
        file=sys.stderr,
    )
    return 1


def _own_code() -> str | None:
    """The file of the user's, a recipe or a network, that the exception at hand has come through last."""
    from flora.recipes import OWN_CODE

    found = None
    for frame, _ in traceback.walk_tb(sys.exc_info()[2]):
        if str(frame.f_globals.get("__name__")).startswith(OWN_CODE):
            found = frame.f_code.co_filename

    return found


if __name__ == "__main__":
    sys.exit(main())
