"""Which operations of a user's model mean a layer. Each ``reference.py`` declares its own as ``PATTERNS``.

A declaration speaks of arguments by the names that torch's operators give them, and knows nothing of how a model is
captured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .layer import Layer


@dataclass(frozen=True)
class Pattern:
    """Operations that mean one layer.

    Args:
        read: makes the layer of the arguments, or ``None`` where its rules do not cover them. It takes those arguments
            that it asks for by the names in the operator's schema (``input`` is the first one). ``input_shape``,
            ``[n, ...]``, and ``bn``, the mode of batch norm that holds for the module, are there for those who
            ask.
        operators: names of torch's operators with their overloads, such as ``"linear.default"``, or functions that
            stand for an operation in a recording.
        inputs: the arguments that are values of the batch, in the order in which the rules take them.
        unread: arguments that may be tensors although the layer has no use for them.
    """

    read: Callable[..., Layer | None]
    operators: tuple[str | Callable[..., Any], ...]
    inputs: tuple[str, ...] = ("input",)
    unread: tuple[str, ...] = ()


def pair(value: Any) -> tuple[int, int]:
    """Both numbers of an option of two axes, which is one number where they are equal."""
    if isinstance(value, int):
        return value, value
    return (int(value[0]), int(value[0])) if len(value) == 1 else (int(value[0]), int(value[1]))
