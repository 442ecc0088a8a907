"""Notices that a module is no longer what it was, at the cost of a few dictionary look-ups."""

from __future__ import annotations

from operator import is_
from typing import Any

from torch import Tensor, nn


class ModuleSnapshot:
    """Holds the parameters, buffers, sub-modules and modes of ``module`` at one moment.

    A module that keeps the snapshot of itself is its ``owner``. Its own mode is left out: a snapshot that held its
    owner would keep both alive.
    """

    def __init__(self, module: nn.Module, owner: nn.Module | None = None) -> None:
        modules = list(module.modules())
        self.parameters = list(module.parameters())
        self._moded = [m for m in modules if m is not owner]
        self._modes = [m.training for m in self._moded]
        self._registries = [r for m in modules for r in (m._parameters, m._buffers, m._modules)]
        self._sizes = [len(registry) for registry in self._registries]
        self._homes: list[dict[str, Any]] = [registry for registry in self._registries for _ in registry]
        self._names = [name for registry in self._registries for name in registry]
        self._items = [item for registry in self._registries for item in registry.values()]
        self._of_parameters = {id(m._parameters) for m in modules}

    def changed(self) -> bool:
        """Says whether anything has been replaced, added or taken away, or a mode been switched."""
        items = map(dict.get, self._homes, self._names)
        return not (
            all(map(is_, items, self._items))
            and [len(registry) for registry in self._registries] == self._sizes
            and [m.training for m in self._moded] == self._modes
        )

    def only_values_changed(self) -> bool:
        """Says whether a change is no more than other tensors in the places of parameters, of the same shape and kind.

        That is what ``torch.func.functional_call`` does to a module for the time of a call.
        """
        for home, name, item in zip(self._homes, self._names, self._items, strict=True):
            other = home.get(name)
            if other is item:
                continue
            if id(home) not in self._of_parameters or not isinstance(other, Tensor) or not isinstance(item, Tensor):
                return False
            if (other.shape, other.dtype, other.device) != (item.shape, item.dtype, item.device):
                return False
        return [len(registry) for registry in self._registries] == self._sizes and [
            m.training for m in self._moded
        ] == self._modes
