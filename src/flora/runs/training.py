"""``train`` and ``evaluate``: any recipe on transformers' Trainer, into an output folder that is whole at any time."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from flora.errors import UserError, user_errors
from flora.gradient.start import Adapted, adapt_and_tell
from flora.recipes import Data, Recipe, optional
from flora.report.card import model_card
from flora.report.plots import loss_curve
from flora.report.provenance import provenance
from flora.runs.reloading import ADAPTER, ADAPTER_CONFIG, LABELS, load_adapter, load_base
from flora.runs.run_folder import last_checkpoint
from flora.runs.schedule import check_schedule, fit_to_data
from flora.runs.settings import FILE, Settings, read
from flora.storage.atomic import claim, put, read_json, staged_files, write_json, write_text
from flora.storage.progress import show_loss
from flora.tuner.config import FloraConfig

METRICS = "metrics.json"
SAME = 1e-6  # an evaluation of the same model on the same data may differ by this much


def make_trainer(model: nn.Module, recipe: Recipe, data: Data, arguments: TrainingArguments) -> Trainer:
    """A Trainer for this model and recipe; quiet but for a progress bar with the loss."""
    keep_statistics(model)
    trainer = optional(recipe, "TRAINER")(
        model,
        arguments,
        data_collator=data.collate,
        train_dataset=data.train,
        eval_dataset=data.validation,
        processing_class=data.processor,
        compute_metrics=recipe.compute_metrics,
        preprocess_logits_for_metrics=optional(recipe, "preprocess_logits"),
    )
    show_loss(trainer)
    if hasattr(data.train, "set_epoch"):
        trainer.add_callback(TellEpoch(data.train))
    return cast("Trainer", trainer)


def begin_along_gradient(
    base: nn.Module, settings: Settings, recipe: Recipe, data: Data, arguments: TrainingArguments
) -> Adapted:
    """The adapter on its base model, begun along the gradient of the first training batches.

    The loss is that of the recipe's own trainer. The random numbers are those of a run without this afterwards.
    """
    config = FloraConfig(**settings.adapter)
    trainer = optional(recipe, "TRAINER")(
        base, arguments, data_collator=data.collate, train_dataset=data.train, processing_class=data.processor
    )
    batches = trainer.get_train_dataloader()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with trainer.compute_loss_context_manager():
            return cast("Tensor", trainer.compute_loss(model, trainer._prepare_inputs(batch)))

    adapted = adapt_and_tell(base, config, batches, loss=loss)
    set_seed(settings.seed)
    return adapted


def _config(settings: Settings, checkpoint: Path | None) -> FloraConfig:
    """Of the adapter; that of a checkpoint has the ranks which the gradient gave."""
    if settings.start == "gradient" and checkpoint is not None:
        config = cast("FloraConfig", FloraConfig.from_pretrained(str(checkpoint)))
        config.inference_mode = False
        return config
    return FloraConfig(**settings.adapter)


class TellEpoch(TrainerCallback):
    """Tells a training set that draws anew in each epoch which one it is; accelerate does so in one process only."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Also where a run goes on in the middle of an epoch."""
        self.dataset.set_epoch(int((state.epoch or 0) + 1e-6))


def keep_statistics(model: nn.Module) -> None:
    """Makes every batch norm that is not trained use its running statistics and leave them as they are.

    They belong to the base model: what training changed there no adapter file would hold.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not any(value.requires_grad for value in module.parameters()):
            module.register_forward_pre_hook(_evaluate)


def _evaluate(module: nn.Module, inputs: object) -> None:
    module.eval()


def training_arguments(settings: Settings, output: Path, **changes: Any) -> TrainingArguments:
    """The Trainer's arguments: those of the config over a few defaults, ``changes`` over both."""
    defaults = {"dataloader_pin_memory": torch.cuda.is_available(), "label_names": ["labels"], "report_to": "none"}
    given = {**defaults, **settings.training, "seed": settings.seed, **changes}
    if given.get("save_strategy") == "no":  # without checkpoints there is no best one to load, and none to look for
        given = {**given, "eval_strategy": "no", "load_best_model_at_end": False}
    try:
        arguments = cast("TrainingArguments", optional(settings.load_recipe(), "ARGUMENTS")(str(output), **given))
    except ValueError as error:
        if "bf16" in str(error):
            remedy = "; this machine cannot train in bfloat16: set training.bf16=false"
        else:
            remedy = ""
        raise UserError(f"the settings under 'training' do not go together here: {error}{remedy}") from None
    check_schedule(arguments)
    return arguments


def measure(trainer: Trainer, dataset: Dataset[Any]) -> dict[str, float]:
    """The loss and the recipe's metrics on a dataset."""
    loop = trainer.evaluation_loop(trainer.get_eval_dataloader(dataset), "evaluation", metric_key_prefix="eval")
    found = {key.removeprefix("eval_"): float(value) for key, value in (loop.metrics or {}).items()}
    return {key: value for key, value in found.items() if not key.endswith(("_time", "_runtime", "_per_second"))}


def train(settings: Settings, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Fine-tunes with FLoRA and writes the output folder.

    The first run writes into ``settings.output`` itself. A run that replaces another one works in the sibling
    ``<output>.partial``, which takes the place of the old folder when it is complete.

    Args:
        settings: of the run.
        resume: go on from the last complete checkpoint of a run that was cut short.
        overwrite: replace a run that is in the output folder.

    Returns:
        What is in ``metrics.json``; of several processes only the first one writes it, the others return nothing.

    Raises:
        ValueError: the output folder is occupied, or the run to resume has other settings.
    """
    folder = _place(settings, resume=resume, overwrite=overwrite)
    checkpoint = last_checkpoint(folder) if resume else None
    if resume and _is_finished(folder, settings):
        return _finish(folder, settings.output)
    arguments = training_arguments(settings, folder)
    set_seed(settings.seed)
    recipe = settings.load_recipe()
    with arguments.main_process_first(local=False, desc="data and base model"):  # what is cached is made once
        data = recipe.load_data(settings.task, settings.seed)
        base = recipe.load_base(settings.task)
    set_seed(settings.seed)
    with user_errors(ValueError):  # PEFT refuses names that the model does not have
        begun = None
        if settings.start == "gradient" and checkpoint is None:
            model, begun = begin_along_gradient(base, settings, recipe, data, arguments)
        else:
            model = get_peft_model(base, _config(settings, checkpoint))
    if begun is not None and arguments.process_index == 0:
        print(begun)
    if arguments.process_index == 0:
        if not resume and folder.exists():
            shutil.rmtree(folder)
        settings.save(folder)
        if data.labels is not None:
            write_json(folder / LABELS, data.labels)
    if resume and arguments.process_index == 0:
        print(
            f"resuming from {checkpoint}" if checkpoint else f"no complete checkpoint in {folder}, starting at step 0"
        )
    notes = fit_to_data(arguments, len(cast("Any", data.train)))
    if arguments.process_index == 0:
        print("".join(f"note: {note}\n" for note in notes), end="", flush=True)
    trainer = make_trainer(model, recipe, data, arguments)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.perf_counter() - started
    metrics = {
        "recipe": settings.recipe,
        "metric": recipe.METRIC,
        "seed": settings.seed,
        "validation": measure(trainer, data.validation),
        "test": measure(trainer, data.test),
        "trainable_parameters": trainable(model),
        "total_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 2),
        "processes": arguments.world_size,
        "start": None if begun is None else {"step": begun.step, "seconds": round(begun.seconds, 2)},
        "resumed_at": int(checkpoint.name.rpartition("-")[2]) if checkpoint else None,
        **provenance(),
    }
    state = trainer.accelerator.get_state_dict(
        trainer.model_wrapped
    )  # where it is sharded, every process gives its part
    if not trainer.is_world_process_zero():
        return {}
    _write(trainer, state, metrics, folder, settings)
    return _finish(folder, settings.output)


def _place(settings: Settings, *, resume: bool, overwrite: bool) -> Path:
    """The folder to work in.

    Raises:
        ValueError: the output folder must not be written to, or the run to resume has other settings.
    """
    output = settings.output
    partial = output.with_name(f"{output.name}.partial")
    if output.is_dir() and any(output.iterdir()) and not (output / FILE).is_file():
        raise UserError(
            f"{output} is not an output folder of flora (it has no {FILE}); set output=FOLDER to another one"
        )
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file; set output=FOLDER to another place")
    if resume:
        folder = partial if (partial / FILE).is_file() else output
        _check_same(folder, settings)
        return folder
    occupied = [folder for folder in (output, partial) if (folder / FILE).is_file()]
    if not occupied:
        return output
    if not overwrite:
        state = "a finished run" if (occupied[-1] / METRICS).is_file() else "a run that was cut short"
        again = "" if state == "a finished run" else "resume=true goes on with it, "
        raise UserError(f"{occupied[-1]} holds {state}; {again}overwrite=true replaces it, output=FOLDER keeps it")
    return partial if output.exists() else output


def _check_same(folder: Path, settings: Settings) -> None:
    """Raises where the run in the folder differs in more than the Trainer's arguments."""
    if not (folder / FILE).is_file():
        return
    before, now = read(str(folder / FILE)).as_dict(), settings.as_dict()
    for key in ("recipe", "seed", "task", "adapter"):
        if before[key] != now[key]:
            raise UserError(f"resume=true with another {key!r}: {folder} has {before[key]}, the config has {now[key]}")


def _is_finished(folder: Path, settings: Settings) -> bool:
    if not (folder / METRICS).is_file():
        return False
    return read(str(folder / FILE)).training == settings.training


def _finish(folder: Path, output: Path) -> dict[str, Any]:
    if folder != output:
        with claim(output) as place:
            put(folder, place)
            shutil.rmtree(folder, ignore_errors=True)  # the run that was replaced
    return cast("dict[str, Any]", read_json(output / METRICS))


def _write(
    trainer: Trainer, state: dict[str, Tensor], metrics: dict[str, Any], folder: Path, settings: Settings
) -> None:
    """The files that a finished run has besides its checkpoints; ``metrics.json`` last."""
    with staged_files(folder, METRICS) as staged:
        cast("Any", trainer.model).save_pretrained(staged, state_dict=state)
        if trainer.processing_class is not None:
            cast("Any", trainer.processing_class).save_pretrained(staged)
        metrics["adapter_bytes"] = (staged / ADAPTER).stat().st_size
        trainer.state.save_to_json(str(staged / "trainer_state.json"))
        loss_curve(staged / "loss.png", trainer.state.log_history, f"{settings.recipe}: loss")
        classes = len(read_json(folder / LABELS)) if (folder / LABELS).is_file() else None
        card = model_card(metrics, read_json(staged / ADAPTER_CONFIG), str(settings.output), classes)
        write_text(staged / "README.md", card)
        write_json(staged / METRICS, metrics)


def evaluate(folder: Path, overrides: Iterable[str] = (), split: str = "test") -> tuple[dict[str, float], bool | None]:
    """Loads a trained folder and measures it.

    Args:
        folder: that ``train`` wrote.
        overrides: ``task.key=value`` items, to measure on other data than it was trained for.
        split: "train", "validation" or "test".

    Returns:
        The metrics, and whether they equal those that were measured at the end of training; None where there are none
        to compare with.

    Raises:
        FileNotFoundError, ValueError: the folder, a file in it or an override cannot be used.
    """
    overrides = list(overrides)
    if other := [item for item in overrides if not item.startswith("task.")]:
        raise UserError(f"{other[0]!r}: only the settings of the data can change here, as task.key=value")
    if not (folder / FILE).is_file():
        raise FileNotFoundError(f"{folder / FILE} does not exist; give a folder that `flora train` wrote")
    settings = read(str(folder / FILE), overrides)
    recipe = settings.load_recipe()
    data = recipe.load_data(settings.task, settings.seed)
    dataset = data.split(split)
    trained_for = read_json(folder / LABELS) if (folder / LABELS).is_file() else None
    if trained_for is not None and data.labels != trained_for:
        raise UserError(
            f"the data has the classes {data.labels}, but {folder} was trained for {trained_for}; "
            "give these as task.labels"
        )
    base = recipe.load_base(settings.task) if not overrides else load_base(folder)
    model = load_adapter(base, folder)
    arguments = training_arguments(settings, folder, save_strategy="no")
    metrics = measure(make_trainer(model, recipe, data, arguments), dataset)
    stored = read_json(folder / METRICS) if (folder / METRICS).is_file() and not overrides else {}
    before = dict(stored.get(split, {}))
    if stored.get("processes", 1) > 1:  # several processes weigh the loss of a short last batch like that of a full one
        before.pop("loss", None)
    if not before:
        return metrics, None
    return metrics, all(abs(metrics[key] - value) <= SAME * max(1.0, abs(value)) for key, value in before.items())


def trainable(model: nn.Module) -> int:
    """How many parameters an optimiser would change."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
