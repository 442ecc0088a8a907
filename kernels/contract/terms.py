"""Sums in which a term of ``None`` is zero."""

from __future__ import annotations

from torch import Tensor


def add(a: Tensor, b: Tensor | None) -> Tensor:
    """``a + b``."""
    return a if b is None else a + b


def total(*terms: Tensor | None) -> Tensor:
    """The sum of the terms that are there; at least one is."""
    present = [term for term in terms if term is not None]
    result = present[0]
    for term in present[1:]:
        result = result + term
    return result
