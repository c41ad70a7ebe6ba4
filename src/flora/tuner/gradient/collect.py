"""The gradients of the dense weights, batch by batch: each is taken as it is computed and freed again at once."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from tqdm import tqdm

from flora.errors import UserError, WrongTypeError, user_errors
from flora.tucker.delta import TuckerDelta
from flora.tuner.gradient.sketch import Sketch, add_up, is_distributed
from flora.tuner.layer import FloraLayer, named_layers

Loss = Callable[[nn.Module, Any], Tensor]
# One batch in so many is kept for judging the step.
JUDGING = 4
# The least batches that the ranges of wide modes come from.
RANGES = 3


class AdaptedWeight(NamedTuple):
    """A weight that an adapter changes.

    Attributes:
        module: the name of its module in the base model.
        weight: its name in the module.
        layer: the module with its adapters.
        delta: the change.
    """

    module: str
    weight: str
    layer: FloraLayer
    delta: TuckerDelta

    @property
    def name(self) -> str:
        """Of the weight in the base model."""
        return f"{self.module}.{self.weight}"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight as the adapter sees it."""
        return self.delta.form.shape


class Batches(NamedTuple):
    """What the gradient comes from, and what the size of the step is judged on."""

    gradient: list[Any]
    judging: list[Any]


class Pass(NamedTuple):
    """One pass over batches.

    Attributes:
        method: of the sketches that take the gradients.
        weights: whose gradients are taken.
        batches: each with its number.
    """

    method: str
    weights: list[AdaptedWeight]
    batches: list[tuple[int, Any]]


def adapted_weights(model: nn.Module, adapter: str) -> list[AdaptedWeight]:
    """Every weight that this adapter changes, in the order of the model."""
    return [
        AdaptedWeight(module, weight, layer, layer.delta(adapter, weight))
        for module, layer in named_layers(model)
        if adapter in layer.settings
        for weight in layer.attributes
    ]


class TooFewBatchesError(UserError):
    """There is no batch that could judge the step."""


def first_batches(batches: Iterable[Any], count: int) -> Batches:
    """The first of them, the last quarter of which is for judging.

    Raises:
        TypeError: ``batches`` cannot be iterated over, or ``count`` is not a whole number.
        ValueError: ``count`` is below two.
        TooFewBatchesError: there are fewer than two.
    """
    if not isinstance(batches, Iterable):
        raise WrongTypeError(f"batches must be a loader or a list of batches, got a {type(batches).__name__}")
    if isinstance(count, bool) or not isinstance(count, int):
        raise WrongTypeError(f"count, how many batches are used at most, must be a whole number, got {count!r}")
    if count < 2:
        raise UserError(f"count is {count}, expected 2 or more: one batch is for judging the step, the others give it")

    taken = list(islice(batches, count))
    if len(taken) < 2:
        raise TooFewBatchesError(
            "the start from the gradient needs two batches or more, one of them for judging the step, "
            f"got {len(taken)}; give more data or smaller batches"
        )

    held = max(1, len(taken) // JUDGING)

    return Batches(taken[:-held], taken[-held:])


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    """The loss that a model returns itself, as those of transformers do.

    Raises:
        ValueError: it returns none.
    """
    batch = to_device(batch, next(model.parameters()).device)
    about = "the model cannot be called with a batch as it is; give loss=lambda model, batch: ..."
    with user_errors(TypeError, about=about):
        if isinstance(batch, Mapping):
            output = model(**batch)
        elif isinstance(batch, (tuple, list)):
            output = model(*batch)
        else:
            output = model(batch)

    if isinstance(output, Mapping):
        loss = output.get("loss")
    else:
        loss = getattr(output, "loss", output)

    if isinstance(loss, (tuple, list)) and loss:
        loss = loss[0]

    if not isinstance(loss, Tensor) or loss.numel() != 1:
        kind = type(output).__name__
        raise UserError(f"{type(model).__name__} returns {kind} without a loss; give loss=lambda model, batch: ...")

    return loss


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors in dicts, lists and tuples moved to a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(to_device(item, device) for item in value)

    return value


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Training mode without dropout and with the norms' own statistics; afterwards everything is as it was.

    Random numbers are the same at every entry, so that losses inside can be compared.
    """
    training = {module: module.training for module in model.modules()}
    buffers = {buffer: buffer.detach().clone() for buffer in model.buffers()}
    trained = {value: value.requires_grad for value in model.parameters()}
    python, arrays = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = sorted({value.device.index for value in trained if value.is_cuda})

    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            random.seed(0)
            np.random.seed(0)  # noqa: NPY002
            model.train()

            for module in model.modules():
                if isinstance(module, (_BatchNorm, _DropoutNd)):
                    module.eval()

            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)  # noqa: NPY002

        for module, mode in training.items():
            module.training = mode

        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)

        for parameter, wanted in trained.items():
            parameter.requires_grad_(wanted)


@contextmanager
def without_adapters(weights: Sequence[AdaptedWeight]) -> Iterator[None]:
    """The base layers alone."""
    disabled = {adapted.layer: adapted.layer._disable_adapters for adapted in weights}

    try:
        for layer in disabled:
            layer._disable_adapters = True

        yield
    finally:
        for layer, before in disabled.items():
            layer._disable_adapters = before


def collect(
    model: nn.Module,
    weights: Sequence[AdaptedWeight],
    sketches: Mapping[str, Sketch],
    batches: Sequence[Any],
    loss: Loss,
) -> None:
    """Streams the gradients of the batches into the sketches; the model is left as it was.

    Raises:
        ValueError: no adapted weight has a gradient.
    """
    passes = [Pass("add", list(weights), list(enumerate(batches)))]
    wide = [adapted for adapted in weights if sketches[adapted.name].needs_ranges]
    if wide:
        # The leading directions are common to the batches, so that a few of them show the ranges.
        spread = list(enumerate(batches))[:: max(1, len(batches) // RANGES)]
        passes.insert(0, Pass("add_to_ranges", wide, spread))

    # Gradients that the caller has accumulated are put back afterwards. Within, the model runs as it would train, but
    # for dropout and moving statistics, and without its adapters: the gradient is that of the frozen weights.
    # What is accumulated already would be added to what a batch gives.
    kept = {value: value.grad for value in model.parameters()}
    for value in kept:
        value.grad = None

    count = sum(len(each.batches) for each in passes)
    bar = tqdm(total=count, desc="start: gradients", unit="batch", disable=None, leave=False)

    with bar, at_rest(model), without_adapters(weights):
        try:
            for each in passes:
                receivers = [(adapted, getattr(sketches[adapted.name], each.method)) for adapted in each.weights]
                for number, batch in each.batches:
                    _one_batch(model, receivers, number, batch, loss)
                    bar.update()

                for adapted in each.weights:
                    sketches[adapted.name].close_ranges()
        finally:
            for parameter, gradient in kept.items():
                parameter.grad = gradient


def _one_batch(model: nn.Module, receivers: Sequence[Any], number: int, batch: Any, loss: Loss) -> None:
    """One backward pass whose gradients are handed over one by one."""
    # Only the adapted weights require a gradient. Each is handed over and freed the moment autograd has accumulated it,
    # so no two dense gradients need to be in memory at once.
    handles = []
    for value in model.parameters():
        value.requires_grad_(False)

    try:
        for adapted, receive in receivers:
            handles.append(_watch(adapted, partial(receive, batch=number)))

        found = loss(model, batch)
        if not isinstance(found, Tensor) or found.numel() != 1:
            shape = tuple(getattr(found, "shape", ()))
            raise UserError(
                f"the loss must be one number in a tensor, got a {type(found).__name__} of shape {shape}; "
                "return its mean()"
            )
        if not found.requires_grad:
            raise UserError(
                "the loss does not depend on the adapted weights; is it computed under no_grad, or is every block "
                "under reentrant gradient checkpointing? (then call model.enable_input_require_grads() first)"
            )

        found.backward()
    finally:
        for handle in handles:
            handle.remove()


def _watch(adapted: AdaptedWeight, receive: Callable[[Tensor], None]) -> Any:
    """Hands every gradient of the weight to ``receive``, in float32 and as the adapter sees it."""

    def take(gradient: Tensor) -> None:
        if gradient.is_sparse:
            gradient = gradient.to_dense()

        receive(gradient.detach().float().reshape(adapted.shape))

    stored = stored_weight(adapted)
    if stored is None:
        return adapted.layer.get_base_layer().register_forward_hook(partial(_watch_sides, take))

    def taken(parameter: Tensor) -> None:
        gradient, parameter.grad = cast("Tensor", parameter.grad), None
        take(gradient)

    stored.requires_grad_(True)

    return stored.register_post_accumulate_grad_hook(taken)


def stored_weight(adapted: AdaptedWeight) -> nn.Parameter | None:
    """The parameter itself; None where a quantised linear layer holds it in another form.

    Raises:
        ValueError: its gradient cannot be had.
    """
    base = adapted.layer.get_base_layer()
    owner = base.get_submodule(adapted.weight.rpartition(".")[0])
    value = owner._parameters.get(adapted.weight.rpartition(".")[2])

    if adapted.layer.quantization_backend is not None:
        return None

    if value is None or hasattr(value, "ds_shape") or hasattr(value, "device_mesh"):
        if value is None:
            kind = "computed from other tensors (a parametrization)"
        else:
            kind = "sharded"

        raise UserError(
            f"the start from the gradient cannot read {adapted.name}: it is {kind}; start before the model is sharded, "
            "or leave this module out (exclude_modules)"
        )

    return value


def _watch_sides(take: Callable[[Tensor], None], module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
    """Of a quantised linear layer: the gradient of its dequantised weight, from the two sides of the product."""
    if not torch.is_grad_enabled():
        return None

    # dL/dW of y = x @ W.T is grad_y.T @ x. The packed weight cannot have a gradient, so it is formed from the layer's
    # input and the gradient of its output, which must require one even where nothing below it does.
    # shape: x (..., in), output (..., out), taken (out, in)
    x = inputs[0].detach()

    if not output.requires_grad:
        output = output.detach().requires_grad_(True)

    def sides(gradient: Tensor) -> None:
        rows = gradient.reshape(-1, gradient.shape[-1])
        take(rows.float().T @ x.reshape(-1, x.shape[-1]).float())

    output.register_hook(sides)

    return output


def mean_loss(model: nn.Module, batches: Sequence[Any], loss: Loss) -> float:
    """Over batches and processes."""
    with at_rest(model), torch.no_grad():
        values = [loss(model, batch).detach().double().reshape(()) for batch in batches]

    total = torch.stack(values).mean()

    if is_distributed():
        add_up(total)
        total = total / torch.distributed.get_world_size()

    return float(total)
