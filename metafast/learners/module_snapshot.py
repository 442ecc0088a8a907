"""Notices that a module is no longer what it was, at the cost of a few dictionary look-ups."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from metafast.learners.globals_read import globals_of
from metafast.learners.images import OF_ANY_MODULE, PLAIN, Itself, image_of, is_foreign, is_installed, is_plain, kept

_TRAINED = attrgetter("requires_grad", "_backward_hooks", "_post_accumulate_grad_hooks", "shape", "dtype")
_REQUIRES_GRAD = attrgetter("requires_grad")
_CODE = attrgetter("__code__")
_HOOKS_OF_MODULES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OWN = ("metafast.inner", "metafast.learners")
"""Modules of these packages change by themselves in no way that matters here."""
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


class ModuleSnapshot:
    """Holds the parameters, buffers, sub-modules, modes, hooks and attributes of ``module`` at one moment.

    Parameters are looked at for their shapes and whether they require a gradient, and attributes, those of its classes
    too, for being equal and of one type where they are plain values and the same object where not. Objects of the
    user's are looked into (:mod:`~metafast.learners.images`), as are the globals that forward passes read.

    Args:
        module: the module to look at, with all that it consists of.
        owner: the module that keeps the snapshot, where that is ``module`` itself: its own attributes and mode are left
            out, since a snapshot that held its owner would keep both alive.
        ignored: attributes to leave out: the ``id`` of the module's dictionary, and the name.
    """

    def __init__(
        self, module: nn.Module, owner: nn.Module | None = None, ignored: Collection[tuple[int, str]] = ()
    ) -> None:
        everything = list(module.modules())
        # A scripted module keeps its parts out of Python's sight.
        self._scripted = [m for m in everything if isinstance(m, torch.jit.ScriptModule)]
        self._scripts = [*map(_of_script, self._scripted)]
        modules = [m for m in everything if not isinstance(m, torch.jit.ScriptModule)]
        self.parameters = list(module.parameters())
        self._trained = [tuple(map(copy, _TRAINED(parameter))) for parameter in self.parameters]
        self._take_registries(modules)
        others = [m for m in modules if m is not owner and not _says_nothing(m)]
        self._others, self._types = others, [type(m) for m in others]
        self._take_attributes(ignored)
        hooks = [hook for m in modules for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
        hooks += [*torch_module._global_forward_hooks.values(), *torch_module._global_forward_pre_hooks.values()]
        self._look_inside(hooks)

    def _take_registries(self, modules: list[nn.Module]) -> None:
        registries = [registry for m in modules for registry in (m._parameters, m._buffers, m._modules)]
        registries += [getattr(m, hooks) for m in modules for hooks in _HOOKS_OF_MODULES]
        registries += [getattr(torch_module, f"_global{hooks}") for hooks in _HOOKS_OF_MODULES]
        # Most of them are empty, which one call sees of all together.
        self._empty = [registry for registry in registries if not registry]
        self._filled = [registry for registry in registries if registry]
        self._homes: list[dict[Any, Any]] = [registry for registry in self._filled for _ in registry]
        self._names = [name for registry in self._filled for name in registry]
        self._items = [item for registry in self._filled for item in registry.values()]
        self._of_parameters = {id(m._parameters) for m in modules}

    def _take_attributes(self, ignored: Collection[tuple[int, str]]) -> None:
        self._attributes = [*(m.__dict__ for m in self._others), *map(vars, _bases(self._types))]
        self._left_out = [{name for home, name in ignored if home == id(home_)} for home_ in self._attributes]
        self._leaves_out = any(self._left_out)
        self._values = [
            {name: value if name in OF_ANY_MODULE else kept(value) for name, value in some.items()}
            for some in self._some_values()
        ]
        # ``True`` equals ``1.0``, but is another to ``is``: types of plain values are looked at too.
        known = [_constants(cls) for cls in self._types]
        plain = [
            (home, name, value)
            for home, out, constants in zip(self._attributes, self._left_out, known, strict=False)
            for name, value in home.items()
            if isinstance(value, int | float | str) and name not in {*out, *OF_ANY_MODULE, *constants}
        ]
        self._plain_homes: list[Any] = [home for home, _, _ in plain]
        self._plain_names = [name for _, name, _ in plain]
        self._plain_types = [type(value) for _, _, value in plain]

    def _look_inside(self, hooks: list[Any]) -> None:
        """Takes images of what attributes, hooks and globals hold."""
        held = [v for some in self._some_values() for name, v in some.items() if name not in OF_ANY_MODULE]
        read, self._functions = globals_of(_bases(self._types), [*held, *hooks])
        self._codes = [*map(_CODE, self._functions)]
        classes = [vars(cls) for cls in _bases(self._types)]
        read += [(home, name) for home in classes for name, v in home.items() if isinstance(v, int | float | str)]
        self._globals = [(home, name, kept(home.get(name)), type(home.get(name))) for home, name in read]
        objects = [*held, *hooks, *(home.get(name) for home, name in read)]
        inside = {id(value): value for value in objects if not isinstance(value, PLAIN)}
        self._texts = [(value, repr(value)) for value in inside.values() if is_plain(value)]
        images = [(value, image_of(value)) for value in inside.values() if not is_plain(value)]
        self._images = [(value, image) for value, image in images if type(image) is not Itself]
        buffers = [item for item in self._items if isinstance(item, Tensor) and not isinstance(item, nn.Parameter)]
        self._fixed = [*buffers, *(value for value in held if isinstance(value, Tensor))]
        self._fixed_flags = [*map(_REQUIRES_GRAD, self._fixed)]
        self._looks_inside = bool(self._globals or self._texts or self._images)

    def changed(self) -> bool:
        """Says whether anything has been replaced, added or taken away, switched or set to another value."""
        if self.parts_changed() or not (
            [*map(_TRAINED, self.parameters)] == self._trained
            and [*map(_REQUIRES_GRAD, self._fixed)] == self._fixed_flags
        ):
            return True
        return self._attributes_changed()

    def parts_changed(self) -> bool:
        """Says whether a parameter, buffer, module or hook has been replaced, added or taken away."""
        items = map(dict.get, self._homes, self._names)
        return (
            any(self._empty)
            or [*chain.from_iterable(self._filled)] != self._names
            or not all(map(is_, items, self._items))
        )

    def only_values_changed(self) -> bool:
        """Says whether a change is no more than other tensors in the places of parameters, of the same shape and kind.

        That is what ``torch.func.functional_call`` does to a module for the time of a call.
        """
        swapped = False
        for home, name, item in zip(self._homes, self._names, self._items, strict=True):
            other = home.get(name)
            if other is item:
                continue
            if id(home) not in self._of_parameters or not isinstance(other, Tensor) or not isinstance(item, Tensor):
                return False
            if isinstance(other, nn.Parameter):  # which is there to stay
                return False
            if (other.shape, other.dtype, other.device) != (item.shape, item.dtype, item.device):
                return False
            swapped = True
        same = [*chain.from_iterable(self._filled)] == self._names and not any(self._empty)
        return swapped and same and not self._attributes_changed()

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """Puts the parameters back that others stand in for, for as long as the context lasts."""
        swapped = [
            (home, name, home[name], item)
            for home, name, item in zip(self._homes, self._names, self._items, strict=True)
            if home[name] is not item
        ]
        for home, name, _, item in swapped:
            home[name] = item
        try:
            yield
        finally:
            for home, name, other, _ in swapped:
                home[name] = other

    def _some_values(self) -> list[Any]:
        """Returns the attributes that are not left out."""
        if not self._leaves_out:
            return self._attributes
        pairs = zip(self._attributes, self._left_out, strict=True)
        return [{name: value for name, value in home.items() if name not in out} for home, out in pairs]

    def _attributes_changed(self) -> bool:
        try:
            return (
                self._values != self._some_values()
                or [*map(type, self._others)] != self._types
                or (bool(self._plain_homes) and self._plain_types_changed())
                or [*map(_CODE, self._functions)] != self._codes
                or (self._looks_inside and self._inside_changed())
                or (bool(self._scripted) and [*map(_of_script, self._scripted)] != self._scripts)
            )
        except (RuntimeError, ValueError):  # a tensor or an array in the place of something else
            return True

    def _plain_types_changed(self) -> bool:
        return [*map(type, map(dict.get, self._plain_homes, self._plain_names))] != self._plain_types

    def _inside_changed(self) -> bool:
        """Says whether globals, or what lists, dicts and other objects hold, have changed."""
        return (
            any(was != (value := home.get(name)) or type(value) is not cls for home, name, was, cls in self._globals)
            or any(repr(value) != text for value, text in self._texts)
            or any(image != image_of(value) for value, image in self._images)
        )


class Moment:
    """Tells whether a model, and ``buffers`` of it, are still what they were when ``snapshot`` was taken.

    A copy belongs to a copy of the model, which nobody else changes.
    """

    def __init__(self, snapshot: ModuleSnapshot, buffers: Iterable[Tensor]) -> None:
        self._snapshot: ModuleSnapshot | None = snapshot
        self._versions = [(buffer, buffer._version) for buffer in buffers]
        self._gone = self._moved = False

    def gone(self) -> bool:
        """Says whether the model has changed since; parameters that others stand in for do not count."""
        snapshot = self._snapshot
        changed = snapshot is not None and snapshot.changed() and not snapshot.only_values_changed()
        self._gone = self._gone or changed
        return self._gone

    def moved(self) -> bool:
        """Says whether numbers in the buffers have changed since."""
        self._moved = self._moved or any(buffer._version != version for buffer, version in self._versions)
        return self._moved

    def __getstate__(self) -> dict[str, Any]:
        return {"_snapshot": None, "_versions": [], "_gone": self.gone(), "_moved": self.moved()}


def _says_nothing(module: nn.Module) -> bool:
    """Says whether the attributes of a module matter to nobody: it is a part of a learner, or an empty container."""
    if type(module).__module__.startswith(_OWN):
        return True
    return type(module) in _CONTAINERS and not module._modules and not module._parameters


def _constants(cls: type) -> Collection[str]:
    """Returns the options of a layer of torch's own, such as ``inplace``, which only their values matter of."""
    return getattr(cls, "__constants__", ()) if is_foreign(cls) else ()


def _bases(types: Iterable[type]) -> list[type]:
    """Returns the classes, and those below them, that are the user's own, each once."""
    return list(dict.fromkeys(base for cls in types for base in cls.__mro__ if not is_installed(base)))


def _of_script(module: torch.jit.ScriptModule) -> tuple[Any, ...]:
    """Returns what is equal as long as a scripted module's mode, tensors and attributes are the same."""
    kind = getattr(module, "_concrete_type", None)
    names = [] if kind is None else [n for n in kind.get_attributes() if not isinstance(getattr(module, n), Tensor)]
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return module.training, [*map(Itself, tensors)], [repr(getattr(module, name)) for name in names]
