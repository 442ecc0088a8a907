"""Where episodes come from: every data set is one file here and is found by the ``SOURCE`` record that ends it."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from metafast.episodes.source import Source


@cache
def known() -> dict[str, Source]:
    """Returns every data set by its name: the record of each module in this folder."""
    records = [import_module(f"{__name__}.{module.name}").SOURCE for module in iter_modules(__path__)]
    return {record.name: record for record in records}


def find(name: str) -> Source:
    """Returns the data set of that name.

    Raises:
        ValueError: there is none; the text has the names of those that there are.
    """
    if name not in known():
        raise ValueError(f"there is no data set {name!r}; choose from {', '.join(known())}")
    return known()[name]
