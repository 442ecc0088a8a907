"""Notices that a module is no longer what it was, at the cost of a few dictionary look-ups."""

from __future__ import annotations

from collections.abc import Collection
from copy import deepcopy
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn


class ModuleSnapshot:
    """Holds the parameters, buffers, sub-modules, modes, hooks and attributes of ``module`` at one moment.

    Parameters are looked at for whether they require a gradient, and attributes for being the same object or equal.
    Lists, tuples, dicts and sets of plain values are copied, so that a change inside of them is noticed too.

    Args:
        module: the module to look at, with all that it consists of.
        owner: the module that keeps the snapshot, where that is ``module`` itself: its own attributes and mode are left
            out, since a snapshot that held its owner would keep both alive.
        ignored: attributes to leave out: the ``id`` of the module's dictionary, and the name.
    """

    def __init__(
        self, module: nn.Module, owner: nn.Module | None = None, ignored: Collection[tuple[int, str]] = ()
    ) -> None:
        # A scripted module keeps its parts out of Python's sight, and cannot change but for its parameters' values.
        modules = [m for m in module.modules() if not isinstance(m, torch.jit.ScriptModule)]
        self.parameters = list(module.parameters())
        self._trained = [p.requires_grad for p in self.parameters]
        self._registries = [
            registry
            for m in modules
            for registry in (m._parameters, m._buffers, m._modules, m._forward_hooks, m._forward_pre_hooks)
        ]
        self._sizes = [len(registry) for registry in self._registries]
        self._homes: list[dict[Any, Any]] = [registry for registry in self._registries for _ in registry]
        self._names = [name for registry in self._registries for name in registry]
        self._items = [item for registry in self._registries for item in registry.values()]
        self._of_parameters = {id(m._parameters) for m in modules}
        self._attributes = [m.__dict__ for m in modules if m is not owner]
        self._left_out = [{name for home, name in ignored if home == id(home_)} for home_ in self._attributes]
        self._values = [
            tuple(map(_kept, _values(home, left_out)))
            for home, left_out in zip(self._attributes, self._left_out, strict=True)
        ]

    def only_values_changed(self) -> bool:
        """Says whether a change is no more than other tensors in the places of parameters, of the same shape and kind.

        That is what ``torch.func.functional_call`` does to a module for the time of a call.
        """
        replaced = 0
        for home, name, item in zip(self._homes, self._names, self._items, strict=True):
            other = home.get(name)
            if other is item:
                continue
            replaced += 1
            if id(home) not in self._of_parameters or not isinstance(other, Tensor) or not isinstance(item, Tensor):
                return False
            if (other.shape, other.dtype, other.device) != (item.shape, item.dtype, item.device):
                return False
        same_sizes = [len(registry) for registry in self._registries] == self._sizes
        return replaced > 0 and same_sizes and self._attributes_are_equal()

    def _attributes_are_equal(self) -> bool:
        try:
            return [*map(_values, self._attributes, self._left_out)] == self._values
        except (RuntimeError, ValueError):  # a tensor or an array in the place of something else
            return False

    def changed(self) -> bool:
        """Says whether anything has been replaced, added or taken away, switched or set to another value."""
        items = map(dict.get, self._homes, self._names)
        if not (
            all(map(is_, items, self._items))
            and [len(registry) for registry in self._registries] == self._sizes
            and [p.requires_grad for p in self.parameters] == self._trained
        ):
            return True
        return not self._attributes_are_equal()


def _values(home: dict[str, Any], left_out: Collection[str]) -> tuple[Any, ...]:
    """Returns the values of a module's attributes."""
    if left_out:
        return tuple(value for name, value in home.items() if name not in left_out)
    return tuple(home.values())


_PLAIN = (bool, int, float, str, type(None))


def _kept(value: Any) -> Any:
    """Returns ``value``, or a copy of it where it could change and still be itself."""
    return deepcopy(value) if isinstance(value, list | dict | set) and _is_plain(value) else value


def _is_plain(value: Any) -> bool:
    """Says whether ``value`` consists of plain values alone."""
    if isinstance(value, dict):
        return type(value) is dict and all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple | set):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)
