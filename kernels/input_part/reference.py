"""One of several tensors that the samples of a task consist of."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..contract.layer import Layer, RuleContext, Tangents, Tensors


@dataclass(frozen=True)
class InputPart(Layer):
    """Part ``number`` of the samples, which have a list ``parts`` of tensors ``[T, n, ...]``."""

    kind = "input_part"
    number: int = 0

    def forward(self, ctx: RuleContext, params: Tensors, inputs: Tensors, constants: Tensors = ()) -> Tensor:
        part: Tensor = inputs[0].parts[self.number]  # type: ignore[attr-defined]
        return part

    def backward(self, ctx: RuleContext, params: Tensors, g_y: Tensor) -> tuple[Tangents, Tangents]:
        return (None,), ()
