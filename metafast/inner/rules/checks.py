"""Checks the hyper-parameters of rules."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from metafast.inner.rates import Rate
from metafast.program.rule import Rule


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


def check_rule(rule: Rule) -> None:
    """Checks what a rule says of itself: names and values of its hyper-parameters, its states, and what it clips to.

    Raises:
        TypeError, ValueError: something is not what :class:`~metafast.program.rule.Rule` says; the text names it.
    """
    name = type(rule).__name__
    for what in ("hyper", "states"):
        names = getattr(rule, what)
        if isinstance(names, str) or not all(isinstance(n, str) for n in names) or len({*names}) < len(names):
            raise TypeError(f"{name}.{what} = {names!r}: give a tuple of names, all different, such as ('decay',)")
    kept = [n for n in rule.hyper if n in ("lr", "max_norm", "max_value")]
    if kept:
        raise ValueError(f"{name}.hyper names {kept[0]!r}, which every rule has; leave it out, or call yours otherwise")
    for key in rule.hyper:
        if not hasattr(rule, key):
            raise ValueError(
                f"{name}.hyper names {key!r}, and the rule has no such attribute: set self.{key} to a number"
            )
        check_number(f"{name}.{key}", getattr(rule, key))
    for key in rule.states:
        check_number(f"{name}.start({key!r})", rule.start(key), or_rate=False)
    check_bounds(rule.max_norm, rule.max_value)


def check_number(name: str, value: Any, or_rate: bool = True) -> None:
    """Raises TypeError where ``value`` is neither a finite number nor, where that may be, a ``Rate``."""
    if or_rate and isinstance(value, Rate):
        return
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        more = ", or an mf.Rate, which can be learned" if or_rate else ""
        raise TypeError(f"{name} is {value!r}: give a finite number{more}")


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
