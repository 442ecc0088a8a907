"""Repeats what was recorded of a module, operation by operation, as torch computes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from metafast.program.capture import needed
from metafast.program.derive import Slot, as_step
from metafast.program.noise import Draw
from metafast.program.operation import Constant, Input, Made, Recording, Ref, Weight
from metafast.tasks import parts_of


def replay(
    recording: Recording, parameters: Mapping[str, Tensor], x: Any, seeds: Tensor | None = None, step: int = 0
) -> dict[Ref, Any]:
    """Returns each value that goes into the output, for one task's samples ``x [n, ...]`` and parameters by name.

    ``seeds`` int64 ``[1]`` and the inner ``step`` decide the random numbers. Where autograd is on, it records the
    operations as it records those of the module itself.
    """
    leaves = parts_of(x)
    slots: dict[Ref, Slot] = {}
    filled: dict[Slot, Any] = {}

    def enter(ref: Ref, tensor: Any) -> None:
        slots[ref] = Slot("made", len(slots))
        filled[slots[ref]] = tensor

    for number in needed(recording):
        operation = recording.operations[number]
        if isinstance(operation.target, Draw):
            enter(Made(number), operation.target.numbers(seeds, step))
            continue
        for ref in operation.reads:
            if ref not in slots:
                enter(ref, _outside(ref, leaves, parameters))
        found = as_step(operation, slots).run(filled)
        for part, tensor in enumerate(found if isinstance(found, tuple | list) else (found,)):
            enter(Made(number, part), tensor)
    if recording.output not in slots:
        enter(recording.output, _outside(recording.output, leaves, parameters))
    return {ref: filled[slot] for ref, slot in slots.items()}


def _outside(ref: Ref, leaves: Sequence[Tensor], parameters: Mapping[str, Tensor]) -> Tensor:
    """Returns a tensor that no operation made."""
    if isinstance(ref, Input):
        return leaves[ref.number]
    if isinstance(ref, Weight):
        return parameters[ref.name]
    assert isinstance(ref, Constant)
    return ref.tensor
