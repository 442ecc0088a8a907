"""Says what an object of the user's holds, so that a later look shows whether anything inside of it has changed."""

from __future__ import annotations

import argparse
import sys
import sysconfig
from array import array
from collections import ChainMap, UserDict, UserList, deque
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from functools import cached_property, lru_cache, partial
from pathlib import Path
from types import FunctionType, MappingProxyType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (bool, int, float, complex, str, bytes, type(None), Enum, torch.dtype, torch.device, torch.Size)
"""Values that cannot change and still be themselves; equal ones of one type are the same."""
OF_ANY_MODULE = frozenset(nn.Module().__dict__)
"""The attributes of every module, which torch itself keeps; what they hold is looked at one by one."""
_FOREIGN = ("torch", "numpy", "metafast")
"""Packages whose objects, as Python's own, are taken to be the same inside as long as they are the same."""
_STDLIB = sysconfig.get_path("stdlib")
_LEAVES = 20_000
"""The most values inside of one object that are looked at."""
_DEPTH = 12
"""How deep into an object is looked."""
_NUMBERS = 1_000_000
"""The largest NumPy array that is looked at."""


class Itself:
    """Stands for an object; it is equal to that object alone."""

    __slots__ = ("value",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return other is self.value or (type(other) is Itself and other.value is self.value)


def kept(value: Any) -> Any:
    """Returns what equals ``value`` for as long as it is plain and equal, or the same object."""
    return value if isinstance(value, PLAIN) else Itself(value)


def is_plain(value: Any, depth: int = _DEPTH) -> bool:
    """Says whether ``value`` consists of plain values alone, in lists, dicts, sets and tuples."""
    if type(value) in (list, tuple, set, dict):
        inner = value.values() if type(value) is dict else value
        return depth > 0 and len(value) <= _LEAVES and all(is_plain(part, depth - 1) for part in inner)
    return isinstance(value, PLAIN)


def image_of(value: Any) -> Any:
    """Returns what is equal to the image of ``value`` later on if nothing inside has changed."""
    looking = _Looking()
    image = looking.at(value, _DEPTH)
    return image if looking.left > 0 else Itself(value)


class _Looking:
    """Looks into one object, at no more than so many values, and at each that it holds once."""

    def __init__(self) -> None:
        self.left = _LEAVES
        self.seen: set[int] = set()

    def at(self, value: Any, depth: int) -> Any:
        """Returns the image of ``value``."""
        self.left -= 1
        if isinstance(value, PLAIN):
            return type(value), value
        if isinstance(value, Tensor):
            return Itself(value), value.requires_grad
        looks = depth > 0 and self.left > 0 and id(value) not in self.seen
        parts = _parts(value) if looks else None
        if parts is None:
            return Itself(value)
        self.seen.add(id(value))
        return [type(value), *(self.at(part, depth - 1) for part in parts)]


def is_foreign(owner: type | FunctionType | ModuleType) -> bool:
    """Says whether a class, a function or a module is none of the user's own."""
    name = owner.__name__ if isinstance(owner, ModuleType) else owner.__module__ or ""
    return _is_foreign_package(name.partition(".")[0])


@lru_cache
def _is_foreign_package(name: str) -> bool:
    if name not in sys.stdlib_module_names:
        return name in _FOREIGN
    path = getattr(sys.modules.get(name), "__file__", None)  # a user's trace.py hides Python's own
    return path is None or path.startswith(_STDLIB)


def is_installed(owner: type | FunctionType | ModuleType) -> bool:
    """Says whether a class, a function or a module belongs to an installed package, whose code stays what it is."""
    name = owner.__name__ if isinstance(owner, ModuleType) else owner.__module__ or ""
    return is_foreign(owner) or _is_installed_package(name.partition(".")[0])


@lru_cache
def _is_installed_package(name: str) -> bool:
    path = getattr(sys.modules.get(name), "__file__", None)
    return path is not None and not {"site-packages", "dist-packages"}.isdisjoint(Path(path).parts)


def functions_in(value: Any) -> Iterator[FunctionType]:
    """Yields the user's functions that ``value`` is or stands for: a method, a property, a partial, a decorated one."""
    # Types are asked, not attributes: an object of the user's may answer to any name, or fail in its own way.
    if isinstance(value, property):
        value = value.fget
    elif isinstance(value, staticmethod | classmethod | MethodType):
        value = value.__func__
    elif isinstance(value, partial | cached_property):
        value = value.func
    if isinstance(value, FunctionType):
        yield value
        inside = [getattr(value, "__wrapped__", None), *contents(value)]
        yield from (inner for inner in inside if isinstance(inner, FunctionType) and inner is not value)
    elif not isinstance(value, type) and not is_installed(type(value)):
        members = (vars(base).get("__call__") for base in type(value).__mro__)
        yield from (member for member in members if isinstance(member, FunctionType))


def _parts(value: Any) -> Iterable[Any] | None:
    """Returns what an object consists of; it is ``None`` where that is not looked at."""
    if isinstance(value, nn.Module):  # one that is kept out of torch's sight, in a list for instance
        hooks = [*value._forward_hooks.values(), *value._forward_pre_hooks.values()]
        return [value.training, *_flat(value._parameters), *_flat(value._buffers), *hooks, *_own(value)]
    if isinstance(value, type | ModuleType):
        return None if is_installed(value) or isinstance(value, ModuleType) else _of_class(value)
    if isinstance(value, FunctionType):
        found = [*contents(value), value.__defaults__, value.__kwdefaults__, *vars(value).values()]
        return found if any(part is not None for part in found) else None
    inside = _inside(value)
    if inside is not None:
        return inside if type(value).__module__ in ("builtins", "collections") else [*inside, *_own(value)]
    own = isinstance(value, SimpleNamespace | argparse.Namespace) or not is_foreign(type(value))
    return _own(value) if own else None


def _inside(value: Any) -> list[Any] | None:
    """Returns what a collection or a call holds; it is ``None`` of any other object."""
    if isinstance(value, list | tuple | deque):
        return list(value)
    if isinstance(value, dict | MappingProxyType):
        return _flat(value)
    if isinstance(value, set | frozenset):
        return [len(value), *sorted(value, key=hash)] if all(isinstance(v, PLAIN) for v in value) else None
    if isinstance(value, UserDict | UserList):
        return [value.data]
    if isinstance(value, ChainMap):
        return value.maps
    if isinstance(value, array | bytearray):
        return [bytes(value)]
    if isinstance(value, partial):
        return [value.func, *value.args, *_flat(value.keywords)]
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if any((cls.__module__, cls.__name__) == ("numpy", "ndarray") for cls in type(value).__mro__):
        if value.dtype == object or value.size > _NUMBERS:
            return [*value.flat] if value.size <= _LEAVES else None
        mask = getattr(value, "mask", None)
        return [value.shape, str(value.dtype), value.tobytes(), None if mask is None else mask.tobytes()]
    return None


def contents(function: FunctionType) -> list[Any]:
    """Returns what a function closes over; an empty cell is one too."""
    found = []
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:
            found.append(Ellipsis)
    return found


def _own(value: Any) -> list[Any]:
    """Returns the attributes of an object, by ``__dict__``, by slots and by its class, but those of every module."""
    named = dict(getattr(value, "__dict__", {}))
    for cls in type(value).__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in [slots] if isinstance(slots, str) else slots:
            private = name.startswith("__") and not name.endswith("__")
            named[name] = getattr(value, f"_{cls.__name__.lstrip('_')}{name}" if private else name, None)
    inner = _flat(value._modules) if isinstance(value, nn.Module) else []
    classes = [] if is_installed(type(value)) else [type(value)]
    return [*inner, *_flat({name: part for name, part in named.items() if name not in OF_ANY_MODULE}), *classes]


def _of_class(cls: type) -> list[Any]:
    """Returns the attributes of a class of the user's, and of those below it."""
    own = [base for base in cls.__mro__ if not is_installed(base)]
    return [part for base in own for name, part in vars(base).items() if not name.startswith("__")]


def _flat(named: Mapping[Any, Any]) -> list[Any]:
    """Returns names and values one after another, rather than in pairs, which would be new objects each time."""
    return [part for pair in named.items() for part in pair]
