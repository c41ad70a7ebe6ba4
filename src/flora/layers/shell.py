"""Running a module with other weights, while the module itself stays as it is.

A forward with ``W + dW`` must never put that into the module: another thread that runs the same model would compute
with it, or keep it for good. So the call runs on a *shell*, an object of the same class that shares everything with
the module (buffers, hooks, submodules, plain attributes) except for the weights that change. Only along the path to a
weight of a submodule are the submodules shells too.

Three kinds of module cannot run as a shell: those under a compiler, which swaps nothing in the module that runs;
scripted ones; and those whose ``forward`` was replaced on the instance by something that holds on to the module. They
run through ``torch.func.functional_call``, one thread at a time.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import contextmanager, nullcontext
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

from flora.errors import UserError

REGISTRIES = ("_parameters", "_buffers", "_modules")
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_ONE_AT_A_TIME = threading.RLock()


class Shell(NamedTuple):
    """A module, its stand-in for one call, and the attributes that the stand-in started with."""

    module: nn.Module
    stand_in: nn.Module
    start: dict[str, Any]


def call_with(module: nn.Module, weights: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """The output of a module with these tensors in place of its parameters.

    Args:
        module: any module; accelerate's hooks on it run as they would.
        weights: dotted name of a parameter -> the tensor that stands in for it.
        *args: of its forward.
        **kwargs: of its forward.
    """
    if torch.compiler.is_compiling() or not can_be_shell(module):
        return _swapped(module, weights, *args, **kwargs)

    hook = vars(module).get("_hf_hook")
    if hook is None:
        return run_as_shell(module, weights, lambda shell: shell(*args, **kwargs))

    args, kwargs = hook.pre_forward(module, *args, **kwargs)

    with torch.no_grad() if hook.no_grad else nullcontext():
        out = run_as_shell(module, weights, lambda shell: shell(*args, **kwargs))

    return hook.post_forward(module, out)


def weights_are_elsewhere(module: nn.Module) -> bool:
    """Whether a hook of accelerate or diffusers brings the weights, or casts them, when the module is called."""
    own = vars(module)
    return "_hf_hook" in own or "_diffusers_hook" in own


def forward_is_replaced(module: nn.Module) -> bool:
    """Whether the instance has a forward of its own, by which it may compute something else than its class does."""
    own = vars(module)
    if "_diffusers_hook" in own:
        return False

    replaced = own.get("_old_forward" if "_hf_hook" in own else "forward")
    if replaced is None:
        return False

    # What accelerate leaves behind when it takes its hooks off is the class's own method.
    return getattr(replaced, "__func__", None) is not type(module).forward or replaced.__self__ is not module


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks are registered on the module, for its forward or its backward."""
    return any(getattr(module, registry) for registry in HOOKS)


def run_between_hooks(module: nn.Module, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``run(*args, **kwargs)`` as the forward of the module: its hooks see, and may change, inputs and outputs."""
    if torch.compiler.is_dynamo_compiling():
        # A compiler cannot follow hooks of the backward, of any module: they break its graph.
        if module._backward_hooks or module._backward_pre_hooks:
            return _untraced_between_hooks(module, run, *args, **kwargs)
        return _traced_between_hooks(module, run, args, kwargs)

    # torch runs the hooks of the object that it is called on: a shell whose forward is ``run``. The hooks are given the
    # module itself, which they may know it by.
    stand_in: nn.Module = object.__new__(type(module))
    start = {**vars(module), "forward": run}

    for registry in HOOKS:
        start[registry] = OrderedDict((key, _with(hook, module)) for key, hook in start[registry].items())

    object.__setattr__(stand_in, "__dict__", start)

    return stand_in(*args, **kwargs)


_untraced_between_hooks: Callable[..., Any] = torch.compiler.disable(run_between_hooks)


def _traced_between_hooks(
    module: nn.Module, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The same in the steps of torch's own call, which a compiler can follow; it makes no object of another class."""
    for key, hook in module._forward_pre_hooks.items():
        if key in module._forward_pre_hooks_with_kwargs:
            changed = hook(module, args, kwargs)
            if changed is not None:
                args, kwargs = changed
        else:
            changed = hook(module, args)
            if changed is not None:
                args = changed if isinstance(changed, tuple) else (changed,)

    out = run(*args, **kwargs)

    for key, hook in module._forward_hooks.items():
        named = (kwargs,) if key in module._forward_hooks_with_kwargs else ()
        changed = hook(module, args, *named, out)
        if changed is not None:
            out = changed

    return out


def _with(hook: Callable[..., Any], module: nn.Module) -> Callable[..., Any]:
    return lambda _, *args: hook(module, *args)


def run_as_shell(module: nn.Module, weights: Mapping[str, Any], run: Callable[[nn.Module], Any]) -> Any:
    """``run(shell)``, where the shell has these weights; attributes that it sets are set on the module as well."""
    shells: list[Shell] = []
    stand_in = shell_of(module, weights, shells)
    out = run(stand_in)
    for shell in shells:
        _keep_what_was_set(shell)
    return out


def can_be_shell(module: nn.Module) -> bool:
    """Whether a shallow copy of the module computes what the module does."""
    if isinstance(module, torch.jit.ScriptModule):
        return False

    own = vars(module)
    if "_hf_hook" in own:
        replaced = own.get("_old_forward")
    else:
        replaced = own.get("forward")

    return replaced is None or (isinstance(replaced, MethodType) and replaced.__self__ is module)


def shell_of(module: nn.Module, weights: Mapping[str, Any], shells: list[Shell] | None = None) -> nn.Module:
    """A shallow copy of the module with these weights; also appended to ``shells``, with those inside it."""
    # An object of the same class whose ``__dict__`` is a copy: a weight that changes is another entry in it, everything
    # else is the module's own. A weight of a submodule makes that submodule a shell in turn.
    if any(hasattr(value, "ds_status") for value in module._parameters.values()):
        raise UserError(
            f"{module} is to run with changed weights, and DeepSpeed ZeRO-3 keeps its weights in parts; leave it out "
            "of the targets, or train with ZeRO-2"
        )

    own, inner = _by_owner(weights)
    cls, start = type(module), dict(vars(module))
    start["_parameters"] = {**module._parameters, **own}

    if isinstance(module, nn.RNNBase):
        start["_parameters"] = _own_weights(module, own)

    if inner:
        children = {name: shell_of(module.get_submodule(name), group, shells) for name, group in inner.items()}
        start["_modules"] = {**module._modules, **children}

    if parametrize.is_parametrized(module):
        cls = _without_parametrizations(module, start, own)

    # FSDP1 puts a plain tensor of the same name in front of each parameter.
    for name in own.keys() & start.keys():
        start[name] = own[name]

    # The caller runs accelerate's hook; here the module's own forward is wanted.
    if "_hf_hook" in start:
        start["forward"] = start.pop("_old_forward")
        del start["_hf_hook"]

    # Methods that were bound to the module, as libraries store them on instances, are bound to the shell instead.
    stand_in: nn.Module = object.__new__(cls)
    for name, value in start.items():
        if isinstance(value, MethodType) and value.__self__ is module:
            start[name] = MethodType(value.__func__, stand_in)

    object.__setattr__(stand_in, "__dict__", dict(start))

    if shells is not None:
        shells.append(Shell(module, stand_in, start))

    return stand_in


def _by_owner(weights: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The weights of the module itself, and those of its children by child, without the child's name."""
    own: dict[str, Any] = {}
    inner: dict[str, dict[str, Any]] = {}
    for name, value in weights.items():
        child, dot, rest = name.partition(".")
        if dot:
            inner.setdefault(child, {})[rest] = value
        else:
            own[name] = value

    return own, inner


def _without_parametrizations(module: nn.Module, start: dict[str, Any], own: Mapping[str, Any]) -> type:
    """Puts parametrized weights into ``start`` as plain ones; returns the class without their properties."""
    lists: Any = module.parametrizations
    values = {name: own[name] if name in own else getattr(module, name) for name in lists}
    start["_parameters"] = {**start["_parameters"], **values}
    start["_modules"] = {name: child for name, child in start["_modules"].items() if name != "parametrizations"}
    return type(module).__bases__[0]


def _own_weights(module: nn.RNNBase, own: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of a recurrent layer for its shell: on a GPU its forward moves them into one piece of memory.

    It does so because it sees that they are not those of the module. What is frozen is moved as an alias, so that the
    module's own tensor stays where it is.
    """
    return {
        name: value if name in own or value is None or value.requires_grad else value.detach()
        for name, value in {**module._parameters, **own}.items()
    }


def _keep_what_was_set(shell: Shell) -> None:
    """Sets on the module what its forward has set on the stand-in: a cache, a count, the last attention map."""
    module, stand_in, start = shell
    before, after = vars(module), vars(stand_in)
    for name in after.keys() | start.keys():
        value = after.get(name)
        if name in REGISTRIES or name.startswith("_flat_weight") or value is start.get(name):
            continue

        if name in after:
            bound = isinstance(value, MethodType) and value.__self__ is stand_in
            before[name] = getattr(module, value.__name__) if bound else value  # type: ignore[union-attr]
        else:
            before.pop(name, None)


def _swapped(module: nn.Module, weights: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """The same by ``torch.func.functional_call``, which puts the weights into the module for the time of the call."""
    with nullcontext() if torch.compiler.is_compiling() else _ONE_AT_A_TIME, _in_front(module, weights):
        out = torch.func.functional_call(module, dict(weights), args, kwargs)
    if isinstance(module, nn.RNNBase):
        # It has cached the stand-ins; they would keep the graph alive.
        module._update_flat_weights()
    return out


@contextmanager
def _in_front(module: nn.Module, weights: Mapping[str, Any]) -> Any:
    """Replaces the plain tensors that FSDP1 puts in front of parameters; ``functional_call`` does not see them."""
    fronts = [(vars(module.get_submodule(name.rpartition(".")[0])), name.rpartition(".")[2], name) for name in weights]
    shadowed = [(front, leaf, name, front[leaf]) for front, leaf, name in fronts if leaf in front]

    try:
        for front, leaf, name, _ in shadowed:
            front[leaf] = weights[name]

        yield
    finally:
        for front, leaf, _, old in shadowed:
            front[leaf] = old
