"""Which modules and calls of a user's model mean a layer. Each ``reference.py`` declares its own as ``PATTERNS``.

A declaration speaks of arguments by the names that torch gives them, and knows nothing of how a model is captured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .layer import Layer

SAMPLES = object()
"""Stands among sizes for the number of samples of the input: ``x.size(0)``."""


@dataclass(frozen=True)
class Pattern:
    """Modules and calls that mean one layer.

    Args:
        read: makes the layer of the arguments, or ``None`` where its rules do not cover them. Its own parameters are
            the arguments of a call, in their order and with their defaults; a module has them as attributes of the same
            names. ``bn``, the learner's mode of batch norm, and ``name``, the module's name in the model, are there
            for those who ask.
        modules: classes of modules.
        functions: functions of torch, operators of Python.
        methods: names of methods of a tensor.
        inputs: the arguments that are values of the batch, in the order in which the rules take them.
    """

    read: Callable[..., Layer | None]
    modules: tuple[type, ...] = ()
    functions: tuple[Any, ...] = ()
    methods: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ("input",)


def pair(value: Any) -> tuple[int, int]:
    """Both numbers of an option of two axes, which is one number where they are equal."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))
