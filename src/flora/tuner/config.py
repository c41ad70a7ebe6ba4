"""``FloraConfig``: the fields a user sets, in PEFT's words, their checks, and their mapping to the core's words."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from peft.config import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, PeftType

from flora.errors import UserError, WrongTypeError, nearest
from flora.layers.entries import BLOCKS, Entries, check_entries, check_number
from flora.layers.layout import layout_from_json
from flora.storage.card import complete_card
from flora.storage.tensors import open_tensors
from flora.tucker.initialize import INITIALIZERS
from flora.tuner.selection import Selection

WAYS = ("auto", "summed", "beside")
# The words of adapters saved before, in their field ``path``.
OLD_WAYS = {"rebuild": "summed", "factored": "beside"}
# What configs of other methods call it.
FOREIGN = {
    "lora_alpha": "alpha (or scale, the constant itself)",
    "lora_dropout": "dropout",
    "rank": "r",
    "alpha_pattern": "scale_pattern, with scales",
    "use_rslora": "scale, which takes any constant",
    "use_dora": "nothing instead, since FLoRA has no magnitude",
    "ranks": "r, which takes a list too",
    "lr": "nothing instead: the learning rate belongs to your optimiser",
    "init_lora_weights": "init",
}
BIASES = ("none", "all", "tucker_only")


def one_of(value: object, allowed: Iterable[str], what: str) -> None:
    """Raises unless ``value`` is one of the allowed words; the message names the nearest."""
    allowed = list(allowed)
    if value not in allowed:
        expected = f"expected one of {', '.join(allowed)}{nearest(str(value), allowed)}"
        raise UserError(f"{what} is {value!r}, {expected}")


@dataclass
class FloraConfig(PeftConfig):
    """Configuration of FLoRA for ``peft.get_peft_model``.

    Args:
        r: rank of the channel modes; or a list with one rank per dimension of ``weight.shape``, which every target must
            then have. A rank equal to the size of its mode keeps the mode whole.
        kernel_r: rank of each kernel mode of a convolution (lowered to the kernel size); None keeps them whole.
        scale: the constant s of the paper, 1 by default.
        alpha: instead of ``scale``: s = alpha / r. Needs an int ``r``.
        dropout: probability, on the input of the adapter (no effect on embeddings).
        init: a key of ``flora.INITIALIZERS``.
        init_weights: False starts from a random update instead of zero, for tests.
        target_modules: names or suffixes, a regular expression, or "all-linear", "all-conv", "all-norm" or "all" (every
            weight that can be adapted but those of norms), the output head of a transformers model excepted. A list
            may hold them too: ``["all", "all-norm"]``.
        exclude_modules: names, suffixes or a regular expression to leave out.
        target_parameters: names or suffixes of raw parameters of any number of dimensions, such as fused experts
            (``mlp.experts.gate_up_proj``).
        layers_to_transform: as in PEFT.
        layers_pattern: as in PEFT.
        modules_to_save: modules trained in full and saved with the adapter, such as a new head.
        bias: "none", "all" or "tucker_only" (the biases of adapted layers).
        trainable_token_indices: as in PEFT.
        rank_pattern: regular expression or suffix of a module's name -> rank (int or list), instead of ``r``.
        scale_pattern: the same for ``scale``.
        fold: regular expression or suffix of a weight's (or module's) name -> how it is seen as an N-d tensor, in
            einops' notation: ``{"qkv": "(three heads dim) in, three=3 heads=12"}``; ranks are then those of that space.
            Or "blocks": the channels of convolutions are cut into blocks that share their factors, where the update
            then has at least three times the rank for the same parameters; the folds and ranks that this comes to are
            written into the config.
        budget: parameters to spend on the updates, a fraction of the model's below 1, a count from 1; ranks are solved
            per weight and written into ``rank_pattern``. What is trained in full comes on top: ``bias``,
            ``modules_to_save``, ``trainable_token_indices``.
        layout: weight -> kind, axes and groups where name and shape do not tell them, for conversion to other formats;
            filled in when the adapter is put into a model.
        way: how a layer runs: "summed" (once, with W + s dW), "beside" (the layer itself, and small products beside
            it), or "auto", whichever the plan finds cheaper.
        freeze_batch_norm: batch norms use the running statistics of the base model, in train mode too, because no
            adapter file holds them; those in ``modules_to_save`` are trained as ever.
        path: the old name of ``way``, with the old words "rebuild" and "factored"; still read.

    Raises:
        ValueError, TypeError: a field is out of range, or ``scale`` and ``alpha`` are both given.

    Examples:
        >>> FloraConfig(r=16, kernel_r=2, target_modules="all-conv").peft_type.value
        'TUCKER'
    """

    r: int | list[int] = field(default=8, metadata={"help": "Rank of the channel modes, or one rank per dimension."})
    kernel_r: int | None = field(default=2, metadata={"help": "Rank of each kernel mode; None keeps them whole."})
    scale: float | None = field(default=None, metadata={"help": "The constant s of the paper (1 by default)."})
    alpha: float | None = field(default=None, metadata={"help": "Instead of scale: s = alpha / r."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout probability on the adapter's input."})
    init: str = field(default="zero_first", metadata={"help": "A key of flora.INITIALIZERS."})
    init_weights: bool = field(default=True, metadata={"help": "False: a random, non-identity start, for tests."})
    target_modules: list[str] | set[str] | str | None = field(
        default=None,
        metadata={"help": "Names, suffixes, a regular expression, 'all-linear', 'all-conv', 'all-norm' or 'all'."},
    )
    exclude_modules: list[str] | set[str] | str | None = field(default=None, metadata={"help": "Modules to leave out."})
    target_parameters: list[str] | None = field(default=None, metadata={"help": "Raw parameters to adapt."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layer indices to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained in full and saved."})
    bias: Literal["none", "all", "tucker_only"] = field(default="none", metadata={"help": "Which biases to train."})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Token embeddings to train, as in PEFT."}
    )
    rank_pattern: dict[str, int | list[int]] = field(
        default_factory=dict, metadata={"help": "Regular expression or suffix -> rank (int or list)."}
    )
    scale_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Regular expression or suffix -> scale."}
    )
    fold: dict[str, str] | Literal["blocks"] = field(
        default_factory=dict,
        metadata={"help": "Regular expression or suffix -> einops pattern of the N-d view; or 'blocks'."},
    )
    budget: float | int | None = field(
        default=None, metadata={"help": "Parameters to spend on the updates: a fraction below 1, a count from 1."}
    )
    layout: dict[str, dict[str, Any]] | None = field(
        default=None,
        metadata={"help": "What the dimensions of unusual weights mean; filled in by the tuner."},
    )
    way: Literal["auto", "summed", "beside"] = field(
        default="auto", metadata={"help": "How a layer runs: 'summed', 'beside', or by the plan 'auto'."}
    )
    freeze_batch_norm: bool = field(
        default=True, metadata={"help": "Batch norms keep the base model's running statistics, in train mode too."}
    )
    path: InitVar[str | None] = None

    def __post_init__(self, path: str | None) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = PeftType("TUCKER")
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, (list, tuple)) else value)

        if isinstance(self.r, tuple):
            self.r = list(self.r)

        check_entries(vars(self))

        self._check_spending()
        self._check_types()
        one_of(self.init, INITIALIZERS, "init")
        self._read_way(path)
        one_of(self.bias, BIASES, "bias")

        if self.r is None:
            raise WrongTypeError("r must be an int or a list with one rank per dimension, got None")
        if not self.inference_mode and (self.scale == 0 or self.alpha == 0):
            raise UserError(
                "scale and alpha must not be 0: the adapter would change nothing and learn nothing; 1 is usual"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout must be at least 0 and below 1, got {self.dropout}; 0 turns it off")
        if self.layers_pattern and self.layers_to_transform is None:
            raise UserError("layers_pattern needs layers_to_transform, which says which of the layers to adapt")

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """PEFT's own; then the folder's model card says how to load the adapter.

        Args:
            save_directory: the folder of the adapter.
            **kwargs: as of PEFT.
        """
        super().save_pretrained(save_directory, **kwargs)
        folder = Path(save_directory)
        complete_card(folder, json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """PEFT's own, after a look at the weights beside the config, which PEFT reads only once the model is changed.

        Args:
            pretrained_model_name_or_path: a folder or the id of a repository on the hub.
            subfolder: of it.
            **kwargs: for the download.

        Raises:
            ValueError: the folder's ``adapter_model.safetensors`` is truncated or corrupt.
        """
        weights = Path(pretrained_model_name_or_path, subfolder or "", SAFETENSORS_WEIGHTS_NAME)
        if weights.is_file():
            with open_tensors(weights):
                pass

        return cast(PeftConfig, super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs))

    def _read_way(self, path: str | None) -> None:
        """``way``, where older configs say ``path``."""
        if path is not None:
            if self.way not in ("auto", OLD_WAYS.get(path, path)):
                raise UserError(f"way={self.way!r} and its old name path={path!r} are both given; give way alone")

            one_of(path, ("auto", *OLD_WAYS), "path, the old name of way,")
            self.way = path  # type: ignore[assignment]

        self.way = OLD_WAYS.get(self.way, self.way)  # type: ignore[assignment]
        one_of(self.way, WAYS, "way")

    def _check_spending(self) -> None:
        """``budget``, and what cannot stand beside ``alpha``."""
        if self.budget is not None:
            check_number(self.budget, "budget")

            if not self.budget > 0:
                raise UserError(
                    f"budget must be a fraction below 1 or a count from 1, got {self.budget}; 0.01 is one percent of "
                    "the model's parameters"
                )
            if self.budget > 1 and self.budget != int(self.budget):
                raise UserError(
                    f"budget above 1 is a count of parameters and must be whole, got {self.budget}; for a part of the "
                    "model give a fraction such as 0.015"
                )

        listed = isinstance(self.r, list) or any(isinstance(rank, list) for rank in self.rank_pattern.values())
        if self.alpha is not None and (listed or self.budget is not None or self.fold == BLOCKS):
            raise UserError(
                "alpha sets s = alpha / r and needs one int r; with rank lists or a budget or fold='blocks', give scale"
            )

    def _check_types(self) -> None:
        for name in ("init_weights", "inference_mode", "freeze_batch_norm"):
            if not isinstance(getattr(self, name), bool):
                raise WrongTypeError(f"{name} must be true or false, got {getattr(self, name)!r}")

        check_number(self.dropout, "dropout")

        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            _check_names(getattr(self, name), name, or_one=True)

        for name in ("target_parameters", "modules_to_save"):
            _check_names(getattr(self, name), name, or_one=False)

        _check_indices(self.layers_to_transform, "layers_to_transform")
        rows = self.trainable_token_indices
        for indices in rows.values() if isinstance(rows, Mapping) else [rows]:
            _check_indices(indices, "trainable_token_indices")

        if self.layout is not None and not isinstance(self.layout, Mapping):
            raise WrongTypeError(f"layout must map weights to what their dimensions mean, got {self.layout!r}")

        for name, entry in (self.layout or {}).items():
            layout_from_json(name, entry)

        # Building them raises for a key that is not a regular expression.
        Entries(vars(self))
        Selection(vars(self))


def _check_names(value: object, field: str, *, or_one: bool) -> None:
    if value is None or (or_one and isinstance(value, str)):
        return

    wanted = "a list of names or one regular expression" if or_one else "a list of names"

    listed = isinstance(value, (list, tuple, set, frozenset))
    wrong = [name for name in cast(Iterable[Any], value) if not isinstance(name, str) or not name] if listed else []
    if wrong and isinstance(wrong[0], type):
        raise WrongTypeError(
            f"{field} must be {wanted}, got the class {wrong[0].__name__}; names are those of print(model), and "
            "'all-linear', 'all-conv', 'all-norm' and 'all' stand for kinds of layers"
        )
    if not listed or wrong:
        raise WrongTypeError(f"{field} must be {wanted}, got {value!r} of type {type(value).__name__}")


def _check_indices(value: object, field: str) -> None:
    if value is None:
        return
    for index in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(index, bool) or not isinstance(index, int):
            raise WrongTypeError(f"{field} must be a list of whole numbers, got {value!r}")


def _refuse_foreign_names(made: Callable[..., None]) -> Callable[..., None]:
    """Refuses the field names of other methods, with our own name for the same thing, and names the nearest to a slip.

    Around ``__init__`` and not in ``__new__``: what reads the signature, such as the parser of configs, must find the
    fields.
    """

    @functools.wraps(made)
    def checked(self: FloraConfig, *args: Any, **kwargs: Any) -> None:
        if args:
            raise WrongTypeError(f"FloraConfig takes its fields by name, got {args[0]!r}; write FloraConfig(r=8)")

        for name in FOREIGN.keys() & kwargs.keys():
            raise WrongTypeError(f"FloraConfig has no {name}; write {FOREIGN[name]}")

        known = [*inspect.signature(made).parameters][1:]
        for name in kwargs:
            if name not in known and (hint := nearest(name, known)):
                # PEFT looks for its middle part where a config was written by a newer version.
                raise WrongTypeError(f"FloraConfig got an unexpected keyword argument {name!r}{hint}")

        made(self, *args, **kwargs)

    return checked


FloraConfig.__init__ = _refuse_foreign_names(FloraConfig.__init__)  # type: ignore[method-assign]
