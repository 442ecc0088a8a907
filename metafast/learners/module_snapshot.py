"""Notices that a module is no longer what it was, at the cost of a few dictionary look-ups."""

from __future__ import annotations

import argparse
import sys
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from operator import attrgetter, is_
from types import CodeType, FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

_PLAIN = (bool, int, float, complex, str, bytes, type(None), Enum, torch.dtype, torch.device, torch.Size)
"""Values that cannot change and still be themselves; equal ones are the same."""
_TRAINED = attrgetter("requires_grad", "_backward_hooks", "_post_accumulate_grad_hooks")
_HOOKS_OF_MODULES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OF_ANY_MODULE = frozenset(nn.Module().__dict__)
"""The attributes of every module, which torch itself keeps; what they hold is looked at one by one."""
_FOREIGN = sys.stdlib_module_names | {"torch", "numpy", "metafast"}
"""Packages whose objects are taken to be the same inside as long as they are the same."""
_OWN = ("metafast.inner", "metafast.learners")
"""Modules of these packages change by themselves in no way that matters here."""
_CALLED = ("forward", "__call__", "__getattr__")
"""The methods that a call of a module begins with."""
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_LEAVES = 1000
"""The most values inside of one attribute that are looked at."""
_DEPTH = 6
"""How deep into an attribute is looked."""


class ModuleSnapshot:
    """Holds the parameters, buffers, sub-modules, modes, hooks and attributes of ``module`` at one moment.

    Parameters are looked at for whether they require a gradient, and attributes, those of its classes too, for being
    equal where they are plain values and the same object where not. Lists, dicts, sets, dataclasses, namespaces and
    other objects of the user's are looked into, as far as they hold no more than some hundred values.

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
        self._trained = [tuple(map(copy, _TRAINED(parameter))) for parameter in self.parameters]
        registries = [registry for m in modules for registry in (m._parameters, m._buffers, m._modules)]
        registries += [getattr(m, hooks) for m in modules for hooks in _HOOKS_OF_MODULES]
        registries += [getattr(torch_module, f"_global{hooks}") for hooks in _HOOKS_OF_MODULES]
        # Most of them are empty, which one call sees of all together.
        self._empty = [registry for registry in registries if not registry]
        self._filled = [registry for registry in registries if registry]
        self._sizes = [len(registry) for registry in self._filled]
        self._homes: list[dict[Any, Any]] = [registry for registry in self._filled for _ in registry]
        self._names = [name for registry in self._filled for name in registry]
        self._items = [item for registry in self._filled for item in registry.values()]
        self._of_parameters = {id(m._parameters) for m in modules}
        others = [m for m in modules if m is not owner and not _says_nothing(m)]
        self._others, self._types = others, [type(m) for m in others]
        self._attributes = [*(m.__dict__ for m in others), *_classes(self._types)]
        self._left_out = [{name for home, name in ignored if home == id(home_)} for home_ in self._attributes]
        pairs = [*zip(self._attributes, self._left_out, strict=True)]
        self._values = [
            {name: _kept(name, value) for name, value in home.items() if name not in out} for home, out in pairs
        ]
        known = {id(m.__dict__): _constants(type(m)) for m in others}
        numbers = [
            (home, name, value)
            for home, out in pairs
            for name, value in home.items()
            if isinstance(home, dict) and isinstance(value, int | float) and value in (0, 1)
            if name not in {*out, *_OF_ANY_MODULE, *known[id(home)]}
        ]
        called = [value for m in others for value in (*vars(m).values(), *m._forward_hooks.values())]
        called += [hook for m in others for hook in m._forward_pre_hooks.values()]
        read = list(_globals_of(_bases(self._types), called))
        self._globals = [(home, name, _kept("", home[name])) for home, name in read]
        # ``True`` equals ``1.0``, but is another to ``is``: such numbers are looked at for their kinds too.
        self._number_homes = [home for home, _, _ in numbers]
        self._number_names = [name for _, name, _ in numbers]
        self._number_kinds = [type(value) for _, _, value in numbers]
        inside = {id(v): v for home, out in pairs for name, v in home.items() if name not in {*out, *_OF_ANY_MODULE}}
        inside |= {id(home[name]): home[name] for home, name in read}
        inside = {key: value for key, value in inside.items() if not isinstance(value, _PLAIN)}
        self._copies = [(value, deepcopy(value)) for value in inside.values() if _is_plain(value)]
        images = [(value, _image(value)) for value in inside.values() if not _is_plain(value)]
        self._leaves_out = any(self._left_out)
        self._images = [(value, image) for value, image in images if type(image) is not _Itself]
        self._looks_inside = bool(self._globals or self._copies or self._images)

    def changed(self) -> bool:
        """Says whether anything has been replaced, added or taken away, switched or set to another value."""
        if self.parts_changed() or not (
            [*map(_TRAINED, self.parameters)] == self._trained
            and [*map(type, self._others)] == self._types
        ):
            return True
        return self._attributes_changed()

    def parts_changed(self) -> bool:
        """Says whether a parameter, buffer, module or hook has been replaced, added or taken away."""
        items = map(dict.get, self._homes, self._names)
        return any(self._empty) or not all(map(is_, items, self._items)) or [*map(len, self._filled)] != self._sizes

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
        same = [*map(len, self._filled)] == self._sizes and [*map(type, self._others)] == self._types
        return swapped and same and not any(self._empty) and not self._attributes_changed()

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

    def _some_values(self) -> list[dict[str, Any]]:
        """Returns the values of the attributes that are not left out."""
        pairs = zip(self._attributes, self._left_out, strict=True)
        return [{name: value for name, value in home.items() if name not in out} for home, out in pairs]

    def _number_kinds_changed(self) -> bool:
        return [*map(type, map(dict.get, self._number_homes, self._number_names))] != self._number_kinds

    def _inside_changed(self) -> bool:
        """Says whether globals, or what lists, dicts and other objects hold, have changed."""
        return (
            any(kept != home.get(name) for home, name, kept in self._globals)
            or any(value != copy for value, copy in self._copies)
            or any(image != _image(value) for value, image in self._images)
        )

    def _attributes_changed(self) -> bool:
        try:
            return (
                self._values != (self._some_values() if self._leaves_out else self._attributes)
                or (self._number_kinds and self._number_kinds_changed())
                or (self._looks_inside and self._inside_changed())
            )
        except (RuntimeError, ValueError):  # a tensor or an array in the place of something else
            return True


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


class _Itself:
    """Stands for an object; it is equal to that object alone."""

    __slots__ = ("value",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return other is self.value or (type(other) is _Itself and other.value is self.value)


def _says_nothing(module: nn.Module) -> bool:
    """Says whether the attributes of a module matter to nobody: it is a part of a learner, or an empty container."""
    if type(module).__module__.startswith(_OWN):
        return True
    return type(module) in _CONTAINERS and not module._modules and not module._parameters


def _constants(cls: type) -> Collection[str]:
    """Returns the options of a layer of torch's own, such as ``inplace``, which only their values matter of."""
    return getattr(cls, "__constants__", ()) if _is_foreign(cls) else ()


def _classes(types: Iterable[type]) -> list[Mapping[str, Any]]:
    """Returns the attributes of the classes, and of those below them, that are the user's own."""
    return [vars(cls) for cls in _bases(types)]


def _bases(types: Iterable[type]) -> list[type]:
    """Returns the classes, and those below them, that are the user's own, each once."""
    return list(dict.fromkeys(base for cls in types for base in cls.__mro__ if not _is_foreign(base)))


def _globals_of(classes: Iterable[type], others: Iterable[Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yields the globals that ``forward`` of the user's classes reads, each as the dictionary of a module and a name.

    What is read by the methods, functions and classes of the user's that it calls counts too, and so do attributes of
    the user's own modules. ``others`` may be functions that are called beside, such as hooks.
    """
    methods: dict[str, list[FunctionType]] = {}
    for name, member in (pair for cls in classes for pair in vars(cls).items()):
        methods.setdefault(name, []).extend(_functions_in([member]))
    called = [function for name in _CALLED for function in methods.get(name, ())] + _functions_in(others)
    seen: set[CodeType] = set()
    while called:
        function = called.pop()
        if function.__code__ in seen:
            continue
        seen.add(function.__code__)
        home, names = function.__globals__, _names_in(function.__code__)
        called += [method for name in names for method in methods.get(name, ())]
        homes = [home, *(vars(value) for value in map(home.get, names) if _is_own_module(value))]
        for where, name in ((where, name) for where in homes for name in names):
            value = where.get(name)
            if isinstance(value, type | FunctionType) and not _is_foreign(value):
                called += _functions_in(vars(value).values() if isinstance(value, type) else [value])
                yield where, name
            elif _may_change(value):
                yield where, name


def _functions_in(members: Iterable[Any]) -> list[FunctionType]:
    """Returns the functions that attributes of a class are, be it as properties, class methods or static ones."""
    found = (getattr(member, "fget", None) or getattr(member, "__func__", member) for member in members)
    return [function for function in found if isinstance(function, FunctionType)]


def _names_in(code: CodeType) -> set[str]:
    """Returns the names of globals and attributes that a function and the functions inside of it read."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names_in, inner))


def _may_change(value: Any) -> bool:
    """Says whether a global is a value that another one may take the place of; modules of a model are taken to stay."""
    if value is None or isinstance(value, type | FunctionType | ModuleType | nn.Module):
        return False
    return isinstance(value, (Tensor, *_PLAIN)) or _parts(value) is not None


def _kept(name: str, value: Any) -> Any:
    """Returns what equals ``value`` for as long as it is plain and equal, or the same object."""
    return value if isinstance(value, _PLAIN) or name in _OF_ANY_MODULE else _Itself(value)


def _image(value: Any) -> Any:
    """Returns what is equal to the image of ``value`` later on if nothing inside has changed."""
    image, left = _image_of(value, _DEPTH, _LEAVES)
    return image if left > 0 else _Itself(value)


def _image_of(value: Any, depth: int, left: int) -> tuple[Any, int]:
    """Returns the image of ``value``, and how many of the ``left`` values may still be looked at."""
    if isinstance(value, _PLAIN):
        return value, left - 1
    parts = _parts(value) if depth and left > 0 else None
    if parts is None:
        return _Itself(value), left - 1
    found: list[Any] = [type(value)]
    for part in parts:
        image, left = _image_of(part, depth - 1, left)
        found.append(image)
        if left <= 0:
            break
    return found, left


def _parts(value: Any) -> Iterable[Any] | None:
    """Returns what an object consists of; it is ``None`` where that is not looked at."""
    if isinstance(value, list | tuple):
        return value
    if isinstance(value, dict):
        return _flat(value)
    if isinstance(value, set | frozenset):
        return [len(value), *sorted(value, key=hash)] if all(isinstance(v, _PLAIN) for v in value) else None
    if type(value).__module__ == "numpy" and type(value).__name__ == "ndarray":
        return [value.shape, str(value.dtype), value.tobytes()] if value.size <= _LEAVES else None
    if is_dataclass(value) and not isinstance(value, type | nn.Module):
        return [getattr(value, field.name, None) for field in fields(value)]
    if isinstance(value, deque):
        return list(value)
    if isinstance(value, partial):
        return [value.func, *value.args, *_flat(value.keywords)]
    if isinstance(value, FunctionType):
        return [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
    if isinstance(value, nn.Module):  # one that is kept out of torch's sight, in a list for instance
        return [value.training, *_flat(value._parameters), *_flat(value._buffers), *_own(value)]
    own = isinstance(value, SimpleNamespace | argparse.Namespace) or not _is_foreign(type(value))
    return None if not own or isinstance(value, torch.Tensor | type) else _own(value)


def _own(value: Any) -> list[Any]:
    """Returns the attributes of an object, by ``__dict__`` and by slots; of a module those that are not every one's."""
    slots = [name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ())]
    named = {**getattr(value, "__dict__", {}), **{name: getattr(value, name, None) for name in slots}}
    inner = _flat(value._modules) if isinstance(value, nn.Module) else []
    return [*inner, *_flat({name: part for name, part in named.items() if name not in _OF_ANY_MODULE})]


def _flat(named: Mapping[str, Any]) -> list[Any]:
    """Returns names and values one after another, rather than in pairs, which would be new objects each time."""
    return [part for pair in named.items() for part in pair]


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _is_foreign(owner: type | FunctionType) -> bool:
    return (owner.__module__ or "").partition(".")[0] in _FOREIGN


def _is_own_module(value: Any) -> bool:
    return isinstance(value, ModuleType) and value.__name__.partition(".")[0] not in _FOREIGN


def _is_plain(value: Any) -> bool:
    """Says whether ``value`` consists of plain values alone, in lists, dicts, sets and tuples."""
    if type(value) is dict:
        return len(value) <= _LEAVES and all(map(_is_plain, value.values()))
    if type(value) in (list, tuple, set):
        return len(value) <= _LEAVES and all(map(_is_plain, value))
    return isinstance(value, _PLAIN)
