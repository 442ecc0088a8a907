"""Keeps what executors find out of Programs, for as long as these live."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

from metafast.program import Program

_LIMIT = 64
"""How many findings of one Program are kept; the oldest goes first."""

Found = TypeVar("Found")


class ByProgram(Generic[Found]):
    """Keeps findings by Program and by a further key, such as shapes. They must not hold the Program.

    A copy has kept nothing yet.
    """

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[Program, dict[Hashable, Found]] = WeakKeyDictionary()

    def of(self, program: Program, key: Any, find: Callable[[Program, Any], Found]) -> Found:
        """Returns what was found of ``program`` under ``key``: the result of ``find(program, key)``."""
        known = self._known.get(program)
        if known is None:
            known = self._known[program] = {}
        found = known.get(key)
        if found is None:
            found = find(program, key)
            if len(known) >= _LIMIT:
                del known[next(iter(known))]
            known[key] = found
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()
