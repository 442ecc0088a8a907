"""Tables on the terminal: numbers are never broken, columns that do not fit are left out, a file gets all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from metafast.extras import require

_LONG_LINE = 120  # where there is no terminal; a table may be longer
_UNBOUNDED = 10_000

Line = tuple[Sequence[str], str | None]
"""The cells of a row and its style."""


def console() -> Any:
    """As wide as the terminal, if there is one; square brackets in names and errors are text, not styles."""
    made = require("rich.console").Console(highlight=False, markup=False, emoji=False)
    if not made.is_terminal:
        made.width = max(made.width, _LONG_LINE)
    return made


def print_table(
    console: Any, headings: Sequence[str], lines: Sequence[Line], *, spare: Sequence[str] = (), words: int = 1
) -> None:
    """Prints ``lines`` under ``headings``, the first ``words`` columns being words and the rest numbers.

    On a terminal that is too narrow the columns ``spare`` go, the first of them first; then words are wrapped.
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
