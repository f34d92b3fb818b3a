"""Swapping the Linears of a module tree, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from qtale.errors import InputError


def linear_names(model: nn.Module) -> list[str]:
    """Names of every ``nn.Linear`` of a model, in order; subclasses are left out, as they may compute otherwise."""
    return [name for name, module in model.named_modules(remove_duplicate=False) if type(module) is nn.Linear]


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the submodule called ``name``; raises InputError where there is none."""
    parent_name, _, leaf = name.rpartition(".")
    try:
        parent = model.get_submodule(parent_name)
        parent.get_submodule(leaf)
    except AttributeError as error:
        raise InputError(f"{type(model).__name__}: has no module {name!r}.") from error
    if not leaf:
        raise InputError(f"{type(model).__name__}: is itself what should be replaced; use the new module in its place.")
    setattr(parent, leaf, module)


def replace(model: nn.Module, names: Iterable[str], make: Callable[[str, nn.Linear], nn.Module]) -> None:
    """Put ``make(name, linear)`` in the place of each named Linear, one at a time; the old ones are let go.

    A Linear that lies in the tree under several names is made once. Raises InputError for names that are no Linear.
    """
    places: dict[int, list[str]] = {}
    for name in names:
        places.setdefault(id(_linear(model, name)), []).append(name)
    for own_names in places.values():
        made = make(own_names[0], _linear(model, own_names[0]))
        for name in own_names:
            set_module(model, name, made)


def _linear(model: nn.Module, name: str) -> nn.Linear:
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise InputError(f"{type(model).__name__}: has no module {name!r}.") from error
    if not isinstance(module, nn.Linear):
        raise InputError(f"{name}: is a {type(module).__name__}; only a Linear can be replaced.")
    return module
