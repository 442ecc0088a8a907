"""One of several tensors that the samples of a task consist of."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..contract.layer import Layer, RuleContext, Tensors


@dataclass(frozen=True)
class InputPart(Layer):
    """Part ``number`` of the samples, which have a list ``parts`` of tensors ``[T, n, ...]``.

    Samples get no adjoint of a pass; where they require a gradient, autograd records ``forward``.
    """

    kind = "input_part"
    carries_gradient = False
    number: int = 0

    def forward(self, ctx: RuleContext, params: Tensors, inputs: Tensors, constants: Tensors = ()) -> Tensor:
        part: Tensor = inputs[0].parts[self.number]  # type: ignore[attr-defined]
        return part
