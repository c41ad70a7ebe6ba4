"""``flora.prepare``: ``W + s dW`` of all layers of one form, in a few batched calls before a forward.

dW is a chain of small products (``layers/chain.py``). Layers whose weights, cores and factors have the same shapes have
the same chain, so it runs once on stacks of them, and so does its backward.

Nobody decides ahead which layers take part. A layer that runs with ``W + s dW``, and keeps it for backward, asks for it
here; those that asked in one forward are prepared in the next, if their tensors still look the same. A layer that finds
nothing forms its own. So whatever runs in another way is never concerned: other ways, several adapters, a compiler.

What was formed is for one forward of one model in one thread, and nothing of it is left afterwards.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flora.errors import UserError, WrongTypeError
from flora.layers import device
from flora.layers.chain import Step, chain_of
from flora.layers.gate import again, call_of, is_plain_eager, is_walled_off, outside_autocast
from flora.tucker.delta import TuckerDelta

CORE = -1  # among the modes of factors


class Asked(NamedTuple):
    """What a layer had when it asked.

    Attributes:
        tensors: weight, core and factors, None for the identity.
        facts: of each, and the scale; layers with equal facts are one group.
    """

    tensors: tuple[Tensor | None, ...]
    facts: tuple[Any, ...]


class Group(NamedTuple):
    """Layers with one form.

    Attributes:
        layers: what each had, by layer.
        looks: how all tensors looked.
        weights: of the layers.
        tensors: the cores of all layers, then a factor of all layers, ...
        modes: of the cores and factors, in this order.
        steps: of the chain.
        scale: of the updates.
    """

    layers: dict[TuckerDelta, Asked]
    looks: list[Any]
    weights: list[Tensor]
    tensors: list[Tensor]
    modes: tuple[int, ...]
    steps: tuple[Step, ...]
    scale: float


class Changed(NamedTuple):
    """What was formed for one layer.

    Attributes:
        weight: ``W + s dW``.
        asked: what it was formed of.
        versions: the sum of those of the tensors, which grow when one is written to.
    """

    weight: Tensor
    asked: Asked
    versions: int


class Forward:
    """One forward of a prepared model.

    Args:
        known: the layers that asked in the one before.
        groups: those that can be formed together.
    """

    def __init__(self, known: Mapping[TuckerDelta, Asked], groups: Sequence[Group]) -> None:
        self.known = known
        self.asked: dict[TuckerDelta, Asked] = {}
        self.changed: dict[TuckerDelta, Changed] = {}
        self.is_as_before = True

        for group in groups:
            if _looks(group.layers, [*group.weights, *group.tensors]) == group.looks:
                self.changed.update(_form(group))

    def find(self, delta: TuckerDelta, tensors: tuple[Tensor | None, ...]) -> Tensor | None:
        """``W + s dW`` of a layer, None where it has to form it itself."""
        # A checkpointed block may use nothing from outside. Without a graph nothing has to wait for its backward.
        if not torch.is_grad_enabled() or is_walled_off():
            return None

        found = self.changed.get(delta)
        if found is not None and _is_current(found, delta, tensors):
            self.asked[delta] = found.asked
            return found.weight

        facts = _look_at(delta, tensors)
        if facts is not None:
            before = self.known.get(delta)
            self.asked[delta] = Asked(tensors, facts)
            self.is_as_before &= before is not None and before.facts == facts and _are_same(before.tensors, tensors)

        return None


class _Running(threading.local):
    """The forward of a prepared model that this thread is in."""

    forward: Forward | None = None


_RUNNING = _Running()


def changed_weight(
    x: Tensor, delta: TuckerDelta, weight: Tensor, core: Tensor, factors: Sequence[Tensor | None]
) -> Tensor | None:
    """``W + s dW`` of a layer that keeps it for backward, in the dtype of W; None where it was not prepared.

    Args:
        x: the input.
        delta: of the layer.
        weight: of the layer.
        core: of the delta.
        factors: of the delta.
    """
    running = _RUNNING.forward
    if running is None or not device.may_be_held(weight, x):
        return None
    return running.find(delta, (weight, core, *factors))


# ---- which layers, and when ----------------------------------------------------------------------------------------


class Prepared:
    """That a model is prepared, until ``remove()`` or the end of a ``with``."""

    # The layers that asked in the last forward. A copy of the model begins without.
    known: Mapping[TuckerDelta, Asked] = {}
    groups: Sequence[Group] = ()

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        model.register_forward_pre_hook(self.begin)
        model.register_forward_hook(self.end, always_call=True)

    def begin(self, model: nn.Module, args: Any) -> None:
        """A hook before the forward of the model."""
        if torch.compiler.is_compiling():
            return

        _RUNNING.forward = None
        if torch.is_grad_enabled() and is_plain_eager() and not is_walled_off():
            _RUNNING.forward = Forward(self.known, self.groups)

    def end(self, model: nn.Module, args: Any, output: Any) -> None:
        """A hook after it, also where it raised."""
        if torch.compiler.is_compiling():
            return

        done, _RUNNING.forward = _RUNNING.forward, None
        if done is None or (done.is_as_before and len(done.asked) == len(done.known)):
            return

        # FSDP2 sends the gradients of a block off when that block's backward is over; those of a group come later. What
        # it has just sharded are other tensors than before, so it is looked for here.
        self.known, self.groups = done.asked, ()
        if not any(_is_sharded(module) for module in self.model.modules()):
            self.groups = _grouped(done.asked)

    def remove(self) -> None:
        """Takes the hooks off: each layer forms its own ``W + s dW`` again."""
        for hooks in (self.model._forward_pre_hooks, self.model._forward_hooks):
            for key, hook in list(hooks.items()):
                if getattr(hook, "__self__", None) is self:
                    del hooks[key]

    def __enter__(self) -> Prepared:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model}


def prepare(model: nn.Module) -> Prepared:
    """Has the changed weights of equal layers formed in a few batched calls before each forward, from the second on.

    It pays in eager training on a GPU, where many small layers wait for the host. Outputs and gradients stay the same
    up to rounding. It concerns layers that keep ``W + s dW`` for backward: on a GPU, convolutions, and linear layers
    for which the plan says so, whose weight is small beside their input. Those with the same shapes of weight, core and
    factors are formed together. Everything else runs as without it: checkpointed blocks, compiled, sharded and
    offloaded layers, several active adapters, inference, and everything on a CPU.

    The gradients of a group arrive together, when the backward has been through all of its layers. A second
    ``backward`` through one forward therefore needs ``retain_graph=True`` in the first.

    Args:
        model: the module that a step calls, with adapters attached.

    Returns:
        A handle: ``remove()`` ends it, and so does the end of ``with flora.prepare(model):``. A model that is prepared
        already gives the handle that it has.

    Raises:
        TypeError: it is not a module.
        ValueError: it has no adapter.

    Examples:
        >>> from peft import get_peft_model
        >>> from flora import FloraConfig
        >>> base = nn.Sequential(*[nn.Conv2d(6, 6, 3, padding=1) for _ in range(4)])
        >>> model = get_peft_model(base, FloraConfig(r=2, target_modules="all-conv"))
        >>> with prepare(model):
        ...     for _ in range(2):
        ...         model(torch.randn(1, 6, 5, 5)).sum().backward()
    """
    if not isinstance(model, nn.Module):
        raise WrongTypeError(f"flora.prepare takes a module, got {type(model).__name__}")

    if not any(isinstance(module, TuckerDelta) for module in model.modules()):
        raise UserError(
            f"{type(model).__name__} has no FLoRA adapter to prepare; attach one first, with get_peft_model or "
            "add_adapter"
        )

    for hook in model._forward_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, Prepared):
            return owner

    return Prepared(model)


def _is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 gathers the module's parameters for the time of its forward and of its backward."""
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)


def _look_at(delta: TuckerDelta, tensors: Sequence[Tensor | None]) -> tuple[Any, ...] | None:
    """The facts of a layer; None where nothing is trained, or its tensors are not parameters in their place."""
    present = [tensor for tensor in tensors if tensor is not None]
    if any(type(tensor) is not nn.Parameter or tensor.is_inference() for tensor in present):
        return None

    _, core, *factors = present
    if not any(tensor.requires_grad for tensor in present) or any(factor.dtype != core.dtype for factor in factors):
        return None

    # The places of the factors that are there, then how everything looks.
    return tuple([tensor is None for tensor in tensors]), *_looks([delta], present)


def _looks(deltas: Iterable[TuckerDelta], tensors: Iterable[Tensor]) -> list[Any]:
    """What has to be the same for the same products, and may be changed in place."""
    scales: list[Any] = [delta.scale for delta in deltas]
    return scales + [(tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad) for tensor in tensors]


def _is_current(changed: Changed, delta: TuckerDelta, tensors: Sequence[Tensor | None]) -> bool:
    """Whether it was formed of these tensors with this scale, and none was written to since."""
    asked = changed.asked
    return (
        _are_same(tensors, asked.tensors) and _versions(tensors) == changed.versions and asked.facts[1] == delta.scale
    )


def _are_same(some: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> bool:
    return len(some) == len(others) and all(map(is_, some, others))


def _versions(tensors: Sequence[Tensor | None]) -> int:
    return sum([tensor._version for tensor in tensors if tensor is not None])


def _grouped(asked: Mapping[TuckerDelta, Asked]) -> list[Group]:
    """The groups of at least two layers."""
    found: dict[Any, dict[TuckerDelta, Asked]] = {}
    for delta, each in asked.items():
        found.setdefault(each.facts, {})[delta] = each

    return [_group(layers) for layers in found.values() if len(layers) > 1]


def _group(layers: dict[TuckerDelta, Asked]) -> Group:
    # Weights, then cores, then factors: of all layers each.
    weights, *by_mode = zip(*[asked.tensors for asked in layers.values()], strict=True)
    delta = next(iter(layers))
    core, factors = delta.tensors()
    modes = (CORE, *[mode for mode, factor in enumerate(factors) if factor is not None])
    tensors = [tensor for mode in by_mode for tensor in mode if tensor is not None]

    looks = _looks(layers, [*weights, *tensors])

    return Group(layers, looks, list(weights), tensors, modes, chain_of(core, factors).steps, delta.scale)


# ---- the products --------------------------------------------------------------------------------------------------


def _form(group: Group) -> dict[TuckerDelta, Changed]:
    with outside_autocast(group.weights[0].device.type):
        weights = _form_at_once(group, *group.tensors)

    return {
        delta: Changed(weight, asked, _versions(asked.tensors))
        for (delta, asked), weight in zip(group.layers.items(), weights, strict=True)
    }


class _Formed(torch.autograd.Function):
    """Cores and factors of all layers of a group -> the changed weight of each.

    A layer that the backward does not reach gets no gradient, as if it stood alone.
    """

    @staticmethod
    def forward(ctx: Any, group: Group, *tensors: Tensor) -> Any:
        stacks = _stacks(group, tensors)
        rows = _rows(stacks, group.steps)

        ctx.given = group, _versions(tensors)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*stacks.values(), *rows)

        return device.add_updates(group.weights, stacks.get(0), rows[-1], group.scale).unbind(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        group, versions = ctx.given
        saved = _saved(ctx)
        reached = [layer for layer, grad in enumerate(grads) if grad is not None]

        with outside_autocast(saved[0].device.type):
            if torch.is_grad_enabled():
                wanted = [grad for grad in grads if grad is not None]
                _check_unwritten(group, versions)
                found = again(ctx, partial(_formed_plain, reached), (group, *group.tensors), (), wanted)[1:]
            else:
                stacks = dict(zip(group.modes, saved, strict=False))
                found = _project(group, grads, stacks, saved[len(stacks) :])

        layers = len(grads)
        if len(reached) < layers:
            found = [each if grads[place % layers] is not None else None for place, each in enumerate(found)]

        return None, *found


_form_at_once = call_of(_Formed)


def _formed_plain(reached: Sequence[int], group: Group, *tensors: Tensor) -> list[Tensor]:
    """The changed weights of these layers in plain operations, for the gradient of a gradient."""
    stacks = _stacks(group, tensors)
    rows = _rows(stacks, group.steps)[-1]
    updates = group.scale * (torch.bmm(stacks[0], rows.mT) if 0 in stacks else rows.mT)

    # The gradient passes the rounding of the sum by.
    with torch.no_grad():
        changed = device.add_updates(group.weights, stacks.get(0), rows, group.scale)

    shaped = (updates - updates.detach()).reshape(changed.shape).to(changed.dtype)

    return [changed[layer] + shaped[layer] for layer in reached]


def _stacks(group: Group, tensors: tuple[Tensor, ...]) -> dict[int, Tensor]:
    """The cores, and the factors of each mode."""
    # shape: (layers, *ranks), (layers, I, J)
    count = len(group.layers)
    return {mode: torch.stack(tensors[place * count : (place + 1) * count]) for place, mode in enumerate(group.modes)}


def _rows(stacks: Mapping[int, Tensor], steps: Sequence[Step]) -> list[Tensor]:
    """What there is before each step: ``summed._rows`` with a dimension for the layers."""
    current = stacks[CORE]
    rows: list[Tensor] = []

    # shape: (layers, rest, J), then (layers, I, rest)
    for mode, rest, rank in steps:
        current = current.reshape(-1, rest, rank)
        rows.append(current)
        if mode:
            current = torch.bmm(stacks[mode], current.mT) if mode in stacks else current.mT

    return rows


def _project(
    group: Group, grads: Sequence[Tensor | None], stacks: Mapping[int, Tensor], rows: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """The gradients of all cores and factors from those of the weights: the steps from the other end."""
    present = [torch.zeros_like(group.weights[0]) if grad is None else grad for grad in grads]
    cores = stacks[CORE]
    current = device.cast(torch.stack(present), cores.dtype)
    found: dict[int, Tensor] = {}

    # shape: (layers, I, rest), then (layers, rest of the mode before, its J)
    for (mode, rest, _), before in reversed(list(zip(group.steps, rows, strict=True))):
        current = current.reshape(len(grads), -1, rest)

        if mode in stacks:
            found[mode] = torch.bmm(current, before)
            current = torch.bmm(current.mT, stacks[mode])
        else:
            current = current.mT

        # From the first of these steps on, the tensors are small.
        if mode == 0 and group.scale != 1:
            current = group.scale * current
            found = {place: group.scale * each for place, each in found.items()}

    # One copy for all layers, where the engine would make one for each gradient that is strided.
    found[CORE] = current.reshape(cores.shape).contiguous()

    return [each for mode in group.modes for each in found[mode].unbind(0)]


def _check_unwritten(group: Group, versions: int) -> None:
    if _versions(group.tensors) != versions:
        raise UserError(
            "a gradient of a gradient was asked for after weights of the adapter were written to, so it cannot be "
            "computed any more; take it before the optimizer's step"
        )


def _saved(ctx: Any) -> tuple[Tensor, ...]:
    try:
        return ctx.saved_tensors  # type: ignore[no-any-return]
    except RuntimeError as error:
        if "second time" not in str(error):
            raise
        raise UserError(
            "a second backward went through one forward of a model with flora.prepare, whose layers of one shape share "
            "a graph; add up the losses before backward, give retain_graph=True to the first backward, or train "
            "without flora.prepare"
        ) from error
