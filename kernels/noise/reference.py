"""Random numbers: they depend on nothing, and nothing is differentiated in them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..contract.layer import Layer, RuleContext, Tensors
from .counter import bits, shifted

_SMALL = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}
"""The bits of a fraction that each dtype holds exactly; float64 holds 53."""


@dataclass(frozen=True)
class Noise(Layer):
    """Draw ``number`` of a model: independent numbers for each task, step and element.

    ``distribution`` is ``"uniform"`` in ``[0, 1)``, ``"open"`` in ``(0, 1)``, ``"normal"``, or ``"kept"``: ``scale``
    with the probability ``1 - rate``, else 0. The value has the ``shape`` of one task; where that is ``None``, it has
    the shape of the input, or with ``features`` the first so many of its axes, the others being 1.
    """

    kind = "noise"
    varies = True
    carries_gradient = False
    number: int
    distribution: str
    dtype: torch.dtype
    shape: tuple[int, ...] | None
    features: int | None = None
    rate: float = 0.0
    scale: float = 1.0

    def forward(self, ctx: RuleContext, params: Tensors, inputs: Tensors, constants: Tensors = ()) -> Tensor:
        if ctx.seeds is None:
            raise ValueError("it draws random numbers, and the batch has no seeds for them: give Batch(..., seeds=...)")
        shape = self.shape if self.shape is not None else self.shape_like(tuple(inputs[0].shape[1:]))
        return self.values(ctx.seeds, ctx.step, shape)

    def shape_like(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of one task's numbers for one task's input of ``shape``."""
        count = len(shape) if self.features is None else self.features
        return (*shape[:count], *(1,) * (len(shape) - count))

    def values(self, seeds: Tensor, step: int, shape: tuple[int, ...]) -> Tensor:
        """The numbers ``[T, *shape]`` of the tasks with ``seeds [T]`` in inner step ``step``."""
        words = bits(seeds, step, self.number, torch.Size(shape).numel()).view(len(seeds), *shape)
        if self.distribution == "kept":
            kept = shifted(words, 11).double() * 2.0**-53 >= self.rate
            return kept.to(self.dtype) * self.scale
        if self.distribution == "normal":
            return torch.special.ndtri(_between(words, 52)).to(self.dtype)
        places = _SMALL.get(self.dtype, 53)
        if self.distribution == "open":
            return _between(words, places - 1).to(self.dtype)
        return (shifted(words, 64 - places).double() * 2.0**-places).to(self.dtype)


def _between(words: Tensor, places: int) -> Tensor:
    """Numbers between 0 and 1, neither of them, in steps of ``2 ** -places``."""
    return (shifted(words, 64 - places).double() + 0.5) * 2.0**-places
