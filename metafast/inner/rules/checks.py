"""Checks the hyper-parameters of rules."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from metafast.inner.rates import Rate


def check_hyper(name: str, value: Any, below: float = math.inf) -> None:
    """Checks that a hyper-parameter is, or starts as, a number from 0 up to but not including ``below``.

    Raises:
        TypeError: it is neither a number nor an :class:`~metafast.inner.rates.Rate`.
        ValueError: it is out of its range.
    """
    span = value.span if isinstance(value, Rate) else (value, value)
    if any(not isinstance(v, Real) or isinstance(v, bool) for v in span):
        raise TypeError(f"{name}={value!r}: give a number, or an mf.Rate, which can be learned")
    if not all(0 <= v < below for v in span):
        wanted = "a finite number of at least 0" if below == math.inf else f"a number in [0, {below:g})"
        raise ValueError(f"{name}={value!r}: give {wanted}")


def check_bounds(max_norm: Any, max_value: Any) -> None:
    """Checks what a gradient is clipped to, as :func:`check_hyper` does; a bound is above 0, and no layer's own."""
    for name, value in (("max_norm", max_norm), ("max_value", max_value)):
        if value is None:
            continue
        check_hyper(name, value)
        if (value.span if isinstance(value, Rate) else (value,))[0] <= 0:
            raise ValueError(f"{name}={value!r}: give a number above 0, or None, which clips nothing")
    if isinstance(max_norm, Rate) and max_norm.axes - {"step"}:
        raise ValueError(
            f"max_norm={max_norm!r}: the norm is that of a task's whole gradient, so there is one bound for it, or one "
            'for each step (per="step")'
        )


def check_flag(name: str, value: Any) -> None:
    """Raises TypeError where an option that is on or off is neither."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: give True or False")


def is_zero(value: Any) -> bool:
    """Says whether a hyper-parameter is the number zero, and stays that."""
    return not isinstance(value, Rate) and value == 0
