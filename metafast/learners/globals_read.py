"""Finds the globals that a module's forward pass reads, in the user's own functions and classes."""

from __future__ import annotations

import builtins
import dis
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from types import CodeType, FunctionType, ModuleType
from typing import Any

from metafast.learners.images import functions_in, is_installed

Place = tuple[Mapping[str, Any], str]
"""The dictionary of a module or a class, and a name in it."""
_CALLED = ("forward", "__call__", "__getattr__")
"""The methods that a call of a module begins with."""
_LOADS = ("LOAD_GLOBAL", "LOAD_NAME")


def globals_of(classes: Iterable[type], values: Iterable[Any]) -> tuple[list[Place], list[FunctionType]]:
    """Finds the globals that ``forward`` of the user's classes reads, and attributes of their classes and modules.

    What the methods, functions and classes of the user's read that it calls counts too; these functions are returned
    as well. ``values`` are the attributes and hooks of the modules: some are functions that are called, and some are
    classes or modules that are read.
    """
    search = _Search(classes)
    for value in values:
        search.meet(value)
    return list(search.run()), search.functions


class _Search:
    """Follows functions from one to those that it calls.

    Attributes:
        called: the functions that are still to be looked at.
        read: all names that have been read, of globals and of attributes.
        functions: the functions that have been looked at.
        holders: the user's classes and modules that have been met, whose attributes count where they are read.
    """

    def __init__(self, classes: Iterable[type]) -> None:
        self.methods: dict[str, list[FunctionType]] = {}
        for name, member in (pair for cls in classes for pair in vars(cls).items()):
            self.methods.setdefault(name, []).extend(functions_in(member))
        self.called = [function for name in _CALLED for function in self.methods.get(name, ())]
        self.read: set[str] = set()
        self.holders: dict[int, Any] = {}
        self.seen: set[CodeType] = set()
        self.functions: list[FunctionType] = []
        self.yielded: set[tuple[int, str]] = set()

    def run(self) -> Iterator[Place]:
        """Yields each place once."""
        while self.called:
            while self.called:
                yield from self._of_function(self.called.pop())
            for holder in [*self.holders.values()]:
                for name in self.read & vars(holder).keys():
                    yield from self._place(vars(holder), name)

    def meet(self, value: Any) -> None:
        """Takes note of an object that forward may call, or read attributes of."""
        if isinstance(value, type | ModuleType):
            if not is_installed(value):
                bases = value.__mro__ if isinstance(value, type) else [value]
                self.holders |= {id(base): base for base in bases if not is_installed(base)}
        else:
            self.called += [f for f in functions_in(value) if not is_installed(f) and f.__code__ not in self.seen]

    def _of_function(self, function: FunctionType) -> Iterator[Place]:
        if function.__code__ in self.seen:
            return
        self.seen.add(function.__code__)
        self.functions.append(function)
        loaded, names = names_in(function.__code__)
        self.read |= names
        self.called += [method for name in names for method in self.methods.get(name, ())]
        for name in loaded:
            if name in function.__globals__ or not hasattr(builtins, name):
                yield from self._place(function.__globals__, name)

    def _place(self, home: Mapping[str, Any], name: str) -> Iterator[Place]:
        value = home.get(name)
        if (id(home), name) in self.yielded or (isinstance(value, ModuleType) and is_installed(value)):
            return
        self.yielded.add((id(home), name))
        if isinstance(value, type) and not is_installed(value):
            for member in vars(value).values():
                self.meet(member)
        self.meet(value)
        yield home, name


@lru_cache(maxsize=4096)
def names_in(code: CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """Returns the globals that a function and the functions inside of it load, and all names that they read."""
    loaded = {i.argval for i in dis.get_instructions(code) if i.opname in _LOADS}
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner = names_in(constant)
            loaded |= inner[0]
            names |= inner[1]
    return frozenset(loaded), frozenset(names)
