"""Sums of tangents, of which ``None`` is zero."""

from __future__ import annotations

from torch import Tensor


def add_optional(a: Tensor, b: Tensor | None) -> Tensor:
    """``a + b``."""
    return a if b is None else a + b


def sum_present(*tangents: Tensor | None) -> Tensor:
    """The sum of those that are there; at least one is."""
    present = [tangent for tangent in tangents if tangent is not None]
    result = present[0]
    for tangent in present[1:]:
        result = result + tangent
    return result
