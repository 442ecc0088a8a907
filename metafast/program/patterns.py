"""Recognises recorded operations as layers that have rules, by the patterns that each layer declares.

``metafast.kernels.contract.pattern`` says what a pattern is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from metafast.kernels import modules
from metafast.kernels.contract.layer import Layer
from metafast.kernels.contract.pattern import Pattern
from metafast.program.operation import Constant, Operation, Ref, Weight


@dataclass(frozen=True)
class Match:
    """Says which layer an operation becomes.

    Attributes:
        layer: the layer.
        inputs: the values that it reads, in the order that its rules take them.
        params: the names of its parameters, likewise.
        constants: its constants, likewise.
    """

    layer: Layer
    inputs: Sequence[Ref]
    params: Sequence[str] = ()
    constants: Sequence[torch.Tensor] = ()


@cache
def catalogue() -> dict[Any, Pattern]:
    """Collects the ``PATTERNS`` in every layer's ``reference.py`` by operator, once for all.

    Raises:
        ValueError: two patterns match the same operator.
    """
    found: dict[Any, Pattern] = {}
    for reference in modules("reference"):
        for pattern in getattr(reference, "PATTERNS", ()):
            for name in pattern.operators:
                operator = name if callable(name) else _operator(name)
                if operator in found:
                    raise ValueError(f"{name} is matched by two patterns of metafast.kernels; take it out of one")
                found[operator] = pattern
    return found


def _operator(name: str) -> Any:
    packet, overload = name.split(".")
    return getattr(getattr(torch.ops.aten, packet), overload)


def match(
    operation: Operation, shape_of: Callable[[Ref], tuple[int, ...]], is_value: Callable[[Ref], bool], bn: str
) -> Match | None:
    """Returns the layer that ``operation`` becomes, with what it reads; ``None`` where no pattern covers it.

    Args:
        operation: what was recorded.
        shape_of: finds the shape of a value.
        is_value: says whether a value is one of the batch's, rather than made of parameters or constants alone.
        bn: the mode of batch norm that holds for the module that made the call.
    """
    pattern = catalogue().get(operation.target)
    if pattern is None or not operation.grad or operation.autocast is not None:
        return None
    arguments = operation.arguments()
    inputs = [arguments[name] for name in pattern.inputs]
    if not all(isinstance(value, Ref) and is_value(value) for value in inputs):
        return None
    given = {**arguments, "input_shape": tuple(shape_of(inputs[0])), "bn": bn}
    layer = pattern.read(**{name: given[name] for name in inspect.signature(pattern.read).parameters})
    if layer is None:
        return None
    params = [arguments[name] for name in layer.parameter_names]
    constants = [arguments[name] for name in layer.constant_names]
    taken = {*pattern.inputs, *pattern.unread, *layer.parameter_names, *layer.constant_names}
    others = [value for name, value in arguments.items() if name not in taken]
    fits = all(isinstance(p, Weight) for p in params) and all(isinstance(c, Constant) for c in constants)
    if not fits or any(isinstance(value, Ref) for value in others):
        return None
    return Match(layer, inputs, [p.name for p in params], [c.tensor for c in constants])
