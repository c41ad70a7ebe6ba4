"""``train``: any recipe on transformers' Trainer. The output folder is complete at any time."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.trainer_utils import EvalLoopOutput

from flora.errors import UserError, nearest, user_errors
from flora.recipes import SPLITS, Data, Recipe, Tested, optional
from flora.report.card import model_card
from flora.report.plots import training_curves, training_plot
from flora.report.provenance import provenance, subject
from flora.report.training_page import training_page
from flora.runs.best_checkpoint import settling_ties
from flora.runs.divergence import check_weights, stopping_where_it_diverges
from flora.runs.resuming import check_same, is_done
from flora.runs.run_folder import (
    ADAPTER,
    ADAPTER_CONFIG,
    CARD,
    CURVE,
    METRICS,
    PAGE,
    STATE,
    RunFolder,
    choose_folder,
    claim_run,
    take_place,
)
from flora.runs.schedule import check_schedule, fit_to_data
from flora.runs.settings import Settings
from flora.storage.atomic import Claim, read_json, write_json, write_text
from flora.storage.progress import show_loss
from flora.storage.system import sync
from flora.tuner.config import FloraConfig
from flora.tuner.gradient.collect import TooFewBatchesError
from flora.tuner.gradient.start import adapt_and_tell
from flora.tuner.model import FloraModel
from flora.tuner.statistics import hold_untrained_statistics


def make_trainer(model: nn.Module, recipe: Recipe, data: Data, arguments: TrainingArguments) -> Trainer:
    """A Trainer for this model and recipe; quiet but for a progress bar with the loss."""
    if not isinstance(getattr(model, "base_model", None), FloraModel):
        hold_untrained_statistics(model)

    trainer = _trainer_of(
        stopping_where_it_diverges(settling_ties(optional(recipe, "TRAINER"))),
        model,
        data,
        arguments,
        compute_metrics=recipe.compute_metrics,
        preprocess_logits_for_metrics=optional(recipe, "preprocess_logits"),
    )
    show_loss(trainer)
    trainer.add_callback(KeepCheckpoints())

    if hasattr(data.train, "set_epoch"):
        trainer.add_callback(TellEpoch(data.train))

    return trainer


def _trainer_of(
    kind: type[Trainer], model: nn.Module, data: Data, arguments: TrainingArguments, **options: Any
) -> Trainer:
    return kind(
        cast("Any", model),
        arguments,
        data_collator=data.collate,
        train_dataset=data.train,
        eval_dataset=data.validation,
        processing_class=data.processor,
        **options,
    )


class First(NamedTuple):
    """The first batches of the training set, and the loss that the recipe's own trainer gives them."""

    batches: Iterable[Any]
    loss: Callable[[nn.Module, Any], Tensor]


def first_batches(base: nn.Module, recipe: Recipe, data: Data, arguments: TrainingArguments) -> First:
    """What the start from the gradient is given."""
    trainer = _trainer_of(optional(recipe, "TRAINER"), base, data, arguments)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with trainer.compute_loss_context_manager():
            return cast("Tensor", trainer.compute_loss(model, trainer._prepare_inputs(batch)))

    return First(trainer.get_train_dataloader(), loss)


def _config(settings: Settings, checkpoint: Path | None) -> FloraConfig:
    """Of the adapter; that of a checkpoint has the ranks which the gradient gave."""
    if settings.start != "init" and checkpoint is not None:
        config = cast("FloraConfig", FloraConfig.from_pretrained(str(checkpoint)))
        config.inference_mode = False
        return config
    return FloraConfig(**settings.adapter)


class TellEpoch(TrainerCallback):
    """Tells a training set that draws new samples in each epoch its number; accelerate does so in one process only."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Also when a run resumes in the middle of an epoch."""
        self.dataset.set_epoch(int((state.epoch or 0) + 1e-6))


class KeepCheckpoints(TrainerCallback):
    """Waits until a checkpoint is on the disk, so that a power cut loses nothing before it."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After the Trainer has written one."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            sync(folder, mode=folder.stat().st_mode)
            sync(folder.parent, deep=False)


def training_arguments(settings: Settings, output: Path, **changes: Any) -> TrainingArguments:
    """The Trainer's arguments: those of the config over a few defaults, ``changes`` over both."""
    defaults = {"dataloader_pin_memory": torch.cuda.is_available(), "label_names": ["labels"], "report_to": "none"}
    given = {**defaults, **settings.training, "seed": settings.seed, **changes}
    # Without checkpoints there is no best one to load, and none to look for.
    if given.get("save_strategy") == "no":
        given = {**given, "eval_strategy": "no", "load_best_model_at_end": False}

    try:
        arguments = cast("TrainingArguments", optional(settings.load_recipe(), "ARGUMENTS")(str(output), **given))
    except ValueError as error:
        raise UserError(_what_is_wrong(str(error), given)) from None

    check_schedule(arguments)

    return arguments


NO_SUCH_VALUE = re.compile(r"(.*) is not a valid \w+, please select one of \[(.*)\]")


def _what_is_wrong(said: str, given: Mapping[str, Any]) -> str:
    """What the Trainer's arguments refuse, by the keys of the config."""
    if "support bf16" in said:
        return "training.bf16 is true, and this machine cannot train in bfloat16: set training.bf16=false"

    if "load_best_model_at_end" in said:
        return (
            "training.load_best_model_at_end needs a checkpoint at every evaluation; "
            "set training.eval_strategy=epoch and training.save_strategy=epoch"
        )

    found = NO_SUCH_VALUE.fullmatch(said)
    keys = [key for key, value in given.items() if found and str(value) == found[1]]
    if found is None or len(keys) != 1:
        return f"the settings under 'training' do not work together: {said}"

    known = found[2].replace("'", "").split(", ")
    return f"training.{keys[0]} is {found[1]!r}, expected one of {', '.join(known)}{nearest(found[1], known)}"


def measure(trainer: Trainer, dataset: Dataset[Any]) -> dict[str, float]:
    """The loss and the recipe's metrics on a dataset."""
    return _numbers(_evaluated(trainer, dataset))


def _evaluated(trainer: Trainer, dataset: Dataset[Any]) -> EvalLoopOutput:
    """What the model gives for every sample of a dataset, and the metrics."""
    return trainer.evaluation_loop(trainer.get_eval_dataloader(dataset), "evaluation", metric_key_prefix="eval")


def _numbers(loop: EvalLoopOutput) -> dict[str, float]:
    found = {key.removeprefix("eval_"): float(value) for key, value in (loop.metrics or {}).items()}
    return {key: value for key, value in found.items() if not key.endswith(("_time", "_runtime", "_per_second"))}


def train(settings: Settings, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Fine-tunes with FLoRA and writes the output folder.

    The first run writes into ``settings.output`` itself. A run that replaces another one works in the sibling
    ``<output>.partial``, which takes the place of the old folder when it is complete.

    Args:
        settings: of the run.
        resume: continue from the last complete checkpoint of an interrupted run.
        overwrite: replace a run that is in the output folder.

    Returns:
        What is in ``metrics.json``; of several processes only the first one writes it, the others return nothing.

    Raises:
        UserError: the output folder is occupied, or the run to resume has other settings.
        DivergedError: the loss, or a weight, is not finite any more; checkpoints from before are kept.
    """
    output = settings.output
    if output.is_symlink():
        output = Path(os.path.realpath(output))
    if output.is_symlink():
        raise UserError(f"output is {settings.output}, a link that leads nowhere; remove it, or give another folder")

    with claim_run(output) as place:
        run = choose_folder(output, resume=resume, overwrite=overwrite)
        if resume and run.is_begun:
            check_same(run, settings)

            if is_done(run, settings):
                return _result(run, place)

        # The settings are checked before anything is loaded.
        arguments = training_arguments(settings, run.path)

        checkpoint = run.last_checkpoint() if resume else None

        try:
            metrics = _train(settings, run, arguments, checkpoint, fresh=not resume)
        except BaseException:
            if place is not None:
                run.discard_start()

            raise

        if not metrics:
            return {}

        return _result(run, place)


def _train(
    settings: Settings, run: RunFolder, arguments: TrainingArguments, checkpoint: Path | None, *, fresh: bool
) -> dict[str, Any]:
    """Trains, measures and writes; what was measured, or nothing in all but the first of several processes."""
    recipe = settings.load_recipe()
    set_seed(settings.seed)

    # One process fills the cache, the others read it.
    with arguments.main_process_first(local=False, desc="data and base model"):
        data = recipe.load_data(settings.task, settings.seed)
        base = recipe.load_base(settings.task)

    set_seed(settings.seed)
    model, begun = _adapt(base, settings, recipe, data, arguments, checkpoint)
    notes = [*optional(recipe, "notes")(settings.task), *fit_to_data(arguments, len(cast("Any", data.train)))]

    if arguments.process_index == 0:
        run.begin(settings.text(), data.labels, fresh=fresh)

        if checkpoint is not None:
            print(f"resuming from {checkpoint}")
        elif not fresh:
            print(f"no complete checkpoint in {run.path}, starting at step 0")

        print("".join(f"note: {note}\n" for note in notes), end="", flush=True)

    trainer = make_trainer(model, recipe, data, arguments)
    started = time.perf_counter()
    with _naming_unknown_metric():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    seconds = time.perf_counter() - started
    check_weights(trainer)

    tested = _evaluated(trainer, data.test)
    metrics = {
        "recipe": settings.recipe,
        "metric": recipe.METRIC,
        "seed": settings.seed,
        "validation": measure(trainer, data.validation),
        "test": _numbers(tested),
        "trainable_parameters": trainable(model),
        "total_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 2),
        "processes": arguments.world_size,
        "examples": {split: len(cast("Any", data.split(split))) for split in SPLITS if _is_counted(data.split(split))},
        "start": None if begun is None else {"step": begun.step, "seconds": round(begun.seconds, 2)},
        "resumed_at": int(checkpoint.name.rpartition("-")[2]) if checkpoint else None,
        **provenance(),
    }

    # Where the model is sharded, every process gives its part.
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)

    if not trainer.is_world_process_zero():
        return {}

    # A model that is spread over processes cannot be run by this one alone.
    whole = cast("nn.Module", trainer.model) if arguments.world_size == 1 else None

    predictions, labels = cast("Any", tested.predictions), cast("Any", tested.label_ids)
    _write(trainer, state, metrics, run, settings, Tested(settings.task, data, predictions, labels, whole))

    return metrics


def _is_counted(dataset: object) -> bool:
    """A recipe of the user's own may give a stream to measure on."""
    return hasattr(dataset, "__len__")


@contextmanager
def _naming_unknown_metric() -> Iterator[None]:
    """The Trainer looks for ``metric_for_best_model`` at the first evaluation; what it does not find was misspelt."""
    try:
        yield
    except KeyError as error:
        if "metric_for_best_model" not in str(error):
            raise

        found = re.search(r"set to 'eval_(\w+)'.*available evaluation metrics are: \[(.*?)\]", str(error))
        if not found:
            raise UserError(str(error.args[0])) from None

        known = [name for name in re.findall(r"eval_(\w+)", found[2]) if not name.endswith(("runtime", "per_second"))]
        expected = f"expected one of {', '.join(known)}{nearest(found[1], known)}"
        raise UserError(f"training.metric_for_best_model is {found[1]!r}, {expected}") from None


def _adapt(
    base: nn.Module,
    settings: Settings,
    recipe: Recipe,
    data: Data,
    arguments: TrainingArguments,
    checkpoint: Path | None,
) -> tuple[nn.Module, Any]:
    """The base model with its adapter, and how the adapter was started along the gradient, if it was."""
    # PEFT refuses names that the model does not have.
    with user_errors(ValueError, re.error):
        config = _config(settings, checkpoint)
        if settings.start == "init" or checkpoint is not None:
            return get_peft_model(cast("Any", base), config), None

        first, choose_ranks = first_batches(base, recipe, data, arguments), settings.start == "gradient-ranks"
        try:
            model, begun = adapt_and_tell(base, config, first.batches, loss=first.loss, choose_ranks=choose_ranks)
            told = str(begun)
        except TooFewBatchesError as error:
            model, begun = get_peft_model(cast("Any", base), config), None
            told = f"{error}; the adapter begins as configured"

        # The order of the samples is then that of a run without this.
        set_seed(settings.seed)

    if arguments.process_index == 0:
        print(told)

    return model, begun


def _result(run: RunFolder, place: Claim | None) -> dict[str, Any]:
    """What a finished run has measured; its folder takes the place of the output where it worked elsewhere."""
    metrics = run.metrics()
    if place is None:
        return {}
    take_place(run, place)
    return metrics


def _write(
    trainer: Trainer,
    state: dict[str, Tensor],
    metrics: dict[str, Any],
    run: RunFolder,
    settings: Settings,
    tested: Tested,
) -> None:
    """The files of a finished run other than its checkpoints."""
    with run.finish() as staged:
        cast("Any", trainer.model).save_pretrained(staged, state_dict=state)

        if trainer.processing_class is not None:
            cast("Any", trainer.processing_class).save_pretrained(staged)

        metrics["adapter_bytes"] = (staged / ADAPTER).stat().st_size
        trainer.state.save_to_json(str(staged / STATE))
        _show(staged, trainer.state.log_history, metrics, settings, tested)

        labels = run.labels()
        classes = len(labels) if labels is not None else None

        card = model_card(metrics, read_json(staged / ADAPTER_CONFIG), str(settings.output), classes)
        write_text(staged / CARD, card)
        write_json(staged / METRICS, metrics)


def _show(
    staged: Path, history: list[dict[str, Any]], metrics: dict[str, Any], settings: Settings, tested: Tested
) -> None:
    """Writes the curves and the page of a run; a run is worth more than its page, so what goes wrong is only said."""
    title = subject(settings.recipe, settings.task)
    find = optional(settings.load_recipe(), "findings")

    try:
        panels = training_curves(history, metrics["metric"], metrics["validation"], metrics["steps"])
        training_plot(staged / CURVE, panels, title)

        with torch.no_grad():
            findings = None if find is None else find(tested)

        write_text(staged / PAGE, training_page(metrics, title, panels, findings))
    except Exception as error:
        # Whatever a picture, a model that writes, or somebody's own recipe may raise.
        print(f"note: the page {PAGE} could not be written ({type(error).__name__}: {error})", flush=True)


def trainable(model: nn.Module) -> int:
    """How many parameters an optimiser would change."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
