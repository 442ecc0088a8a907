"""Cases: tests and benchmarks of a layer walk its sizes and options, each with an independent truth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .layer import Layer, Loss

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """A layer at one size. Shapes are those of one task.

    Args:
        name: says what is special about the sizes.
        layer: the rules under test.
        function: ``(params, inputs) -> output`` of one task, from ``torch.nn.functional`` and not from the rules.
        params: shapes of the parameters, in the order that the rules take them.
        inputs: shapes ``[n, ...]`` of the inputs.
        constants: what the node brings along.
        step: the inner step that the pass belongs to.
        tolerance: largest relative error (of norms) allowed in float32.
        reason: why the tolerance is what it is.
    """

    name: str
    layer: Layer
    function: Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], Tensor]
    params: tuple[Shape, ...]
    inputs: tuple[Shape, ...]
    constants: tuple[Tensor, ...] = ()
    step: int = 0
    tolerance: float = 2e-6
    reason: str = "sums of up to a thousand products of unit size, rounded to 24 bits"

    def __str__(self) -> str:
        return f"{self.layer.kind}: {self.name}"


@dataclass(frozen=True)
class LossCase:
    """A loss at one size.

    Args:
        name: says what is special about the sizes.
        loss: the rules under test.
        function: ``(outputs, targets) -> scalar`` of one task, from ``torch.nn.functional``.
        outputs: shape ``[n, ...]`` of one task's outputs.
        classes: targets are class indices below this, one for each element behind the class axis of the outputs;
            ``None``: real numbers of the shape of the outputs.
        prepare: what is made of such targets ``[T, n, ...]``.
        scale: size of the outputs.
        tolerance: largest relative error (of norms) allowed in float32.
        reason: why the tolerance is what it is.
    """

    name: str
    loss: Loss
    function: Callable[[Tensor, Tensor], Tensor]
    outputs: Shape
    classes: int | None = None
    scale: float = 1.0
    prepare: Callable[[Tensor], Tensor] = Tensor.clone
    tolerance: float = 2e-6
    reason: str = "a softmax and a sum of up to a hundred terms, rounded to 24 bits"

    def __str__(self) -> str:
        return f"{self.loss.kind}: {self.name}"
