"""Notices that a module is no longer the one that was captured, at the cost of a few dictionary look-ups."""

from __future__ import annotations

from typing import Any

from torch import nn


class Watch:
    """Parameters, buffers, sub-modules and modes of a module at one moment."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._registries: list[tuple[dict[str, Any], int]] = []
        self._entries: list[tuple[dict[str, Any], str, Any]] = []
        for module in modules:
            for registry in (module._parameters, module._buffers, module._modules):
                self._registries.append((registry, len(registry)))
                self._entries += [(registry, name, item) for name, item in registry.items()]
        self._modes = [(module, module.training) for module in modules]

    def changed(self) -> bool:
        """Has anything been replaced, added or taken away, or a mode been switched?"""
        return (
            any(registry.get(name) is not item for registry, name, item in self._entries)
            or any(len(registry) != size for registry, size in self._registries)
            or any(module.training is not mode for module, mode in self._modes)
        )
