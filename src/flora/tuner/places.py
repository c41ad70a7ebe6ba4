"""Where modules stand in the tree, and whether tensors of a file have a place there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

# Attributes that every module has; its children are among them.
TORCHS_OWN = vars(nn.Module()).keys()


class Place(NamedTuple):
    """Where a module stands in the tree."""

    parent: nn.Module
    name: str

    def held(self) -> Any:
        """What stands there now."""
        return getattr(self.parent, self.name)

    def put(self, module: nn.Module) -> None:
        """Puts another module there."""
        setattr(self.parent, self.name, module)


class Reference(NamedTuple):
    """Where a module is held beside the tree: in a list or dict, or in the plain attributes of another module."""

    holder: Any
    key: Any

    def held(self) -> Any:
        """What is held there now."""
        return self.holder[self.key]

    def put(self, module: nn.Module) -> None:
        """Puts another module there."""
        self.holder[self.key] = module


class TupleReference(NamedTuple):
    """Where a module is held in a tuple beside the tree, which is replaced as a whole.

    Attributes:
        holder: of the tuple: a list or dict, or the attributes of a module.
        key: of the tuple there.
        position: of the module in the tuple.
    """

    holder: Any
    key: Any
    position: int

    def held(self) -> Any:
        """What is held there now."""
        return self.holder[self.key][self.position]

    def put(self, module: nn.Module) -> None:
        """Puts another module there."""
        items = list(self.holder[self.key])
        items[self.position] = module
        self.holder[self.key] = tuple(items)


# The places of each module that has several, by its id.
Places = dict[int, list[Place | Reference | TupleReference]]


def places_of(model: nn.Module) -> Places:
    """The places of each module that is held in several, by its id.

    nnU-Net's blocks stand twice in the tree, weights and all. The pyramids of MaskFormer and UperNet run their layers
    from a list, which the tree does not show.
    """
    places: Places = {}
    seen: set[int] = set()
    for parent in model.modules():
        for name, child in parent._modules.items():
            places.setdefault(id(child), []).append(Place(parent, name))

        attributes = vars(parent)
        for name in attributes.keys() - TORCHS_OWN:
            for module, reference in _references(attributes, name, seen):
                places.setdefault(id(module), []).append(reference)

    return {key: found for key, found in places.items() if len(found) > 1}


def _references(holder: Any, key: Any, seen: set[int]) -> Iterator[tuple[nn.Module, Reference | TupleReference]]:
    """The modules that an entry of a list or dict holds, in lists, tuples and dicts inside it too."""
    value = holder[key]
    if isinstance(value, nn.Module):
        yield value, Reference(holder, key)

    if type(value) is tuple:
        for position, item in enumerate(value):
            if isinstance(item, nn.Module):
                yield item, TupleReference(holder, key, position)
    elif isinstance(value, (list, dict)) and id(value) not in seen:
        seen.add(id(value))

        for inner in list(value) if isinstance(value, dict) else range(len(value)):
            yield from _references(value, inner, seen)


def put_wrappers(model: nn.Module, places: Places) -> None:
    """Puts PEFT's wrappers of ``modules_to_save`` and of token rows wherever their modules still stand bare.

    PEFT puts a wrapper into the places that it finds by name.

    Args:
        model: with the wrappers.
        places: of the modules before they were wrapped.
    """
    for wrapper in list(model.modules()):
        if not isinstance(wrapper, AuxiliaryTrainingWrapper):
            continue

        bare = wrapper.original_module
        for place in places.get(id(bare), ()):
            if place.held() is bare and place != Place(wrapper, "original_module"):
                place.put(wrapper)


@contextmanager
def hidden_from_peft(model: nn.Module, name: str) -> Iterator[None]:
    """Gives the model's own modules of that name another one, so that PEFT does not take their parents for wrappers."""
    owners = [each for each in model.modules() if name in each._modules and not isinstance(each, BaseTunerLayer)]
    hidden = f"{name} of the model"

    for owner in owners:
        _rename_child(owner, name, hidden)

    try:
        yield
    finally:
        for owner in owners:
            _rename_child(owner, hidden, name)


def _rename_child(parent: nn.Module, old: str, new: str) -> None:
    """In place and in order: the order of its children is that in which the parent may run them."""
    children = {new if name == old else name: child for name, child in parent._modules.items()}
    parent._modules.clear()
    parent._modules.update(children)


def under_all_names(model: nn.Module, kind: type[nn.Module], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file under every name that their module has; a file has those of the first place only.

    Args:
        model: with modules of that kind.
        kind: of module whose tensors the file may have.
        state: the tensors of the file, by full name.
    """
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, kind):
            names.setdefault(id(module), []).append(name)

    found = dict(state)
    for first, *others in (each for each in names.values() if len(each) > 1):
        inside = {key.removeprefix(first): value for key, value in state.items() if key.startswith(f"{first}.")}
        for other in others:
            found.update({other + rest: value for rest, value in inside.items() if other + rest not in state})

    return found


def find_misfit(own: Mapping[str, Tensor], given: Mapping[str, Tensor], prefix: str) -> str | None:
    """What is wrong with the first tensor that has no place in the model, or is another one there; None if all fit."""
    for key, value in given.items():
        layer, found, tensor = key.removeprefix("base_model.model.").partition(f".{prefix}")
        if found and key not in own:
            return f"it has {tensor!r} for the layer {layer!r}, which the base model lacks or adapts with other ranks"

        if found and own[key].shape != value.shape:
            here = f"of shape {tuple(value.shape)} in the file, but the base model needs {tuple(own[key].shape)}"
            return f"{layer!r} has {tensor!r} {here}"

        if found and own[key].is_complex() != value.is_complex():
            return f"{layer!r} has {tensor!r} as {value.dtype} in the file, but the base model needs {own[key].dtype}"

    return None


def find_missing(own: Iterable[str], given: Iterable[str], prefix: str, adapter: str, *, zero: bool) -> str | None:
    """The first tensor of an adapter that the model has and a file lacks, or None.

    PEFT leaves what the file lacks as the start made it. A weight with none of its tensors in the file may stay so,
    where it starts from no change; one with a part of them would compute with random numbers.

    Args:
        own: the keys of the model.
        given: those of the file.
        prefix: of the tensors of our layers.
        adapter: its name in the model.
        zero: whether weights start from no change.
    """
    held = set(given)
    weights: dict[str, list[str]] = {}
    for key in own:
        stem, found, _ = key.rpartition(f".{adapter}.")
        if found and stem.rpartition(".")[2].startswith(prefix):
            weights.setdefault(stem, []).append(key)

    for keys in weights.values():
        lacking = [key for key in keys if key not in held]
        if lacking and not (zero and len(lacking) == len(keys)):
            return lacking[0]

    return None
