"""The inner-update rule: learning rates of any shape as one tensor that broadcasts to ``[S, P]``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor, nn

from metafast.program import Program

_AXES = ("step", "layer", "parameter")


@dataclass(frozen=True)
class Rate:
    """Inner learning rates ``alpha`` in ``theta_{s+1} = theta_s - alpha_s * g_s``, as a user asks for them.

    Args:
        value: the initial rate: a positive number, or a pair ``(low, high)`` to draw each rate uniformly from.
        per: any of ``"step"`` (one for each inner step) and one of ``"layer"`` (one for each module that holds
            parameters) or ``"parameter"`` (one for each element): Meta-SGD is ``per="parameter"``, the rates of MAML++
            are ``per=("layer", "step")``.
        learn: whether the rates are meta-parameters; they then get the exact meta-gradient, and may turn negative.

    Raises:
        TypeError: a value that is neither a number nor a pair of numbers.
        ValueError: a value that is not positive, or an unknown axis.
    """

    value: float | tuple[float, float]
    per: str | Sequence[str] = ()
    learn: bool = False

    def __post_init__(self) -> None:
        if any(axis not in _AXES for axis in self.axes) or {"layer", "parameter"} <= self.axes:
            raise ValueError(f"per={self.per!r}: choose 'step' and one of 'layer' or 'parameter', from {_AXES}")
        if len(self.span) != 2 or not all(isinstance(v, Real) for v in self.span):
            raise TypeError(f"lr={self.value!r}: give a positive number, or a pair (low, high) to draw from")
        low, high = self.span
        if not (0 < low <= high and math.isfinite(high)):
            raise ValueError(f"lr={self.value!r}: an inner learning rate must start as a positive, finite number")

    @property
    def axes(self) -> set[str]:
        """What the rates are told apart by."""
        return {self.per} if isinstance(self.per, str) else set(self.per)

    @property
    def span(self) -> tuple[float, float]:
        """The range of the initial values."""
        return self.value if isinstance(self.value, tuple) else (self.value, self.value)


class Rates(nn.Module):
    """The rates of one learner: ``value [1 or S, 1 or layers or P]``, a parameter where they are learned."""

    value: Tensor
    index: Tensor | None

    def __init__(self, rate: Rate, program: Program, steps: int, like: Tensor) -> None:
        super().__init__()
        layers = [p.name.rpartition(".")[0] for p in program.parameters]
        names = list(dict.fromkeys(layers))
        index, width = None, 1
        if "layer" in rate.axes:
            sizes = torch.tensor([p.size for p in program.parameters])
            index, width = torch.tensor([names.index(name) for name in layers]).repeat_interleave(sizes), len(names)
            index = index.to(like.device)
        elif "parameter" in rate.axes:
            width = program.size
        self.register_buffer("index", index, persistent=False)
        shape = (steps if "step" in rate.axes else 1, width)
        value = torch.empty(shape, dtype=like.dtype).uniform_(*rate.span).to(like.device)
        if rate.learn:
            self.value = nn.Parameter(value)
        else:
            self.register_buffer("value", value)

    @property
    def fixed(self) -> Tensor | None:
        """What :meth:`forward` gives again and again, until ``value`` is another tensor; ``None`` where it computes."""
        return self.value if self.index is None else None

    def forward(self) -> Tensor:
        """``[1 or S, 1 or P]``."""
        return self.value if self.index is None else self.value[:, self.index]
