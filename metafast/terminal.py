"""Prints tables: a terminal gets the columns that fit, a file gets all of them, and numbers are never broken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from metafast.extras import require

_LONG_LINE = 120  # characters, where there is no terminal; a table may be wider
_UNBOUNDED = 10_000  # characters: more than any table has

Line = tuple[Sequence[str], str | None]
"""A row of a table: its cells, and rich's name of its style, if it has one."""


def console() -> Any:
    """Makes a console that is as wide as the terminal and prints square brackets as they are, not as styles.

    Where there is no terminal, lines have at least 120 characters.

    Raises:
        ModuleNotFoundError: the package rich is not installed.
    """
    made = require("rich.console").Console(highlight=False, markup=False, emoji=False)
    if not made.is_terminal:
        made.width = max(made.width, _LONG_LINE)
    return made


def print_table(
    console: Any, headings: Sequence[str], lines: Sequence[Line], *, spare: Sequence[str] = (), words: int = 1
) -> None:
    """Prints ``lines`` under ``headings``; the first ``words`` columns are words, the others numbers.

    Where a terminal is too narrow, the columns ``spare`` are left out one by one, in their order. If that is not
    enough, words are wrapped.
    """
    for gone in range(len(spare) + 1):
        table = _table(headings, lines, [i for i, h in enumerate(headings) if h not in spare[:gone]], words)
        width = console.measure(table, options=console.options.update(width=_UNBOUNDED)).maximum
        if not console.is_terminal:
            console.width = max(console.width, width)
        if width <= console.width:
            break
    console.print(table)


def _table(headings: Sequence[str], lines: Sequence[Line], kept: Sequence[int], words: int) -> Any:
    box = require("rich.box").SIMPLE_HEAD
    table = require("rich.table").Table(box=box, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    for i in kept:
        table.add_column(
            headings[i].replace(" ", "\n", 1), justify="left" if i < words else "right", no_wrap=i >= words
        )
    for cells, style in lines:
        table.add_row(*(cells[i] for i in kept), style=style)
    return table
