"""Holds the inner learning rates: one tensor that broadcasts to ``[S, P]``, whatever the rates are told apart by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from metafast.program import Parameter

_AXES = ("step", "layer", "parameter")


@dataclass(frozen=True)
class Rate:
    """Describes the inner learning rates ``alpha`` in ``theta_{s+1} = theta_s - alpha_s * g_s``.

    A hyper-parameter of a rule, such as the momentum of ``mf.SGD``, is described likewise.

    Args:
        value: the initial rate: a positive number (0 or more for other hyper-parameters), or a pair ``(low, high)``
            from which each rate is drawn uniformly.
        per: what the rates are told apart by: ``"step"`` (one for each inner step), ``"layer"`` (one for each module
            that holds parameters) or ``"parameter"`` (one for each element), or ``"step"`` with one of the others.
            Meta-SGD has ``per="parameter"``, and MAML++ ``per=("layer", "step")``.
        learn: whether the rates are meta-parameters. They then get the exact meta-gradient, and may turn negative.

    Raises:
        TypeError: the value is neither a number nor a pair of numbers.
        ValueError: the value is negative or not finite, or an axis is unknown.
    """

    value: float | tuple[float, float]
    per: str | Sequence[str] = ()
    learn: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.per, str):
            object.__setattr__(self, "per", tuple(self.per))  # equal rates have equal hashes
        if any(axis not in _AXES for axis in self.axes) or {"layer", "parameter"} <= self.axes:
            raise ValueError(f"per={self.per!r}: choose 'step' and one of 'layer' or 'parameter', from {_AXES}")
        if len(self.span) != 2 or not all(isinstance(v, Real) for v in self.span):
            raise TypeError(f"lr={self.value!r}: give a positive number, or a pair (low, high) to draw from")
        low, high = self.span
        if not (0 <= low <= high and math.isfinite(high)):
            raise ValueError(f"lr={self.value!r}: an inner learning rate must start as a positive, finite number")

    @classmethod
    def of_lr(cls, lr: float | tuple[float, float] | Rate) -> Rate:
        """Returns what a user gives as ``lr``.

        Raises:
            ValueError: it is not above 0.
        """
        rate = lr if isinstance(lr, Rate) else cls(lr)
        if rate.span[0] <= 0:
            raise ValueError(f"lr={rate.value!r}: an inner learning rate must start as a positive, finite number")
        return rate

    @property
    def axes(self) -> set[str]:
        """Returns ``per`` as a set."""
        return {self.per} if isinstance(self.per, str) else set(self.per)

    @property
    def span(self) -> tuple[float, float]:
        """Returns the least and the largest initial value."""
        return self.value if isinstance(self.value, tuple) else (self.value, self.value)


class Rates(nn.Module):
    """Holds the rates of one learner.

    Args:
        rate: the rates that the user asks for.
        parameters: the parameters that they are for.
        steps: the number S of inner steps.
        like: a tensor whose dtype and device the rates get.

    Attributes:
        axes: what the rates are told apart by.
        learn: whether they are meta-parameters.
        places: the parameters that there are rates for, by name.
        value: the rates ``[1 or S, 1 or layers or P]``, a parameter where they are learned.
        index: int64 ``[P]``, the layer of each element, where there is a rate for each layer; else ``None``.
    """

    value: Tensor
    index: Tensor | None

    def __init__(self, rate: Rate, parameters: Sequence[Parameter], steps: int, like: Tensor) -> None:
        super().__init__()
        self.axes, self.learn = frozenset(rate.axes), rate.learn
        self.places = {p.name: p for p in parameters}
        layers = [p.name.rpartition(".")[0] for p in parameters]
        names = list(dict.fromkeys(layers))
        index = None
        width = 1
        if "layer" in rate.axes:
            sizes = torch.tensor([p.size for p in parameters])
            index = torch.tensor([names.index(name) for name in layers]).repeat_interleave(sizes)
            width = len(names)
            index = index.to(like.device)
        elif "parameter" in rate.axes:
            width = sum(p.size for p in parameters)
        self.register_buffer("index", index, persistent=False)
        shape = (steps if self.by_step else 1, width)
        value = _drawn(rate, shape, like)
        if rate.learn:
            self.value = nn.Parameter(value)
        else:
            self.register_buffer("value", value)

    def of(self, parameters: Sequence[Parameter]) -> Tensor:
        """Returns the rates ``[1 or S, 1 or P]`` of some of the parameters, one after another."""
        rates: Tensor = self()
        if rates.shape[1] == 1 or [p.name for p in parameters] == [*self.places]:
            return rates
        places = [self.places[p.name] for p in parameters]
        return torch.cat([rates[:, p.offset : p.offset + p.size] for p in places], 1)

    def check(self, parameters: Sequence[Parameter]) -> None:
        """Raises ValueError where there is a rate for each layer or parameter, and the model has others by now."""
        now, then = ({(p.name, p.shape) for p in found} for found in (parameters, self.places.values()))
        if now != then and self.axes - {"step"}:
            raise ValueError(
                f"the model's parameters {sorted(name for name, _ in now ^ then)} are not those that there are inner "
                f"rates for, per={sorted(self.axes)}; make a new learner of the model as it is now"
            )

    @torch.no_grad()
    def start_from(self, rate: Rate) -> None:
        """Writes the values of ``rate`` into the rates that are there, so that an optimiser still holds them.

        Raises:
            ValueError: ``rate`` is told apart by something else, or is to be learned where these are not.
        """
        if rate.axes != self.axes or rate.learn != self.learn:
            raise ValueError(
                f"lr={rate}: the rates of this learner are told apart by {sorted(self.axes) or 'nothing'} and are "
                f"{'' if self.learn else 'not '}learned, and optimisers and checkpoints hold them; make a new learner, "
                "or set lr to a number, which goes into all of them"
            )
        drawn = _drawn(rate, tuple(self.value.shape), self.value)
        if self._held is None:
            self.value = drawn  # a parametrization writes it into what ``value`` is made of
        else:
            self._held.copy_(drawn)

    @property
    def by_step(self) -> bool:
        """Says whether there is a rate for each inner step."""
        return "step" in self.axes

    @property
    def fixed(self) -> Tensor | None:
        """Returns the tensor that :meth:`forward` returns at every call, until another tensor replaces ``value``.

        It is ``None`` where :meth:`forward`, or a parametrization of ``value``, computes a new tensor each time.
        """
        return self._held if self.index is None else None

    @property
    def _held(self) -> Tensor | None:
        """The tensor ``value`` itself; ``None`` where a parametrization computes it."""
        return self._parameters.get("value", self._buffers.get("value"))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *further: Any) -> None:
        saved = state_dict.get(prefix + "value")
        if isinstance(saved, Tensor) and saved.shape != self.value.shape:
            further[-1].append(
                f"the saved inner rates are {list(saved.shape)} and those of this learner {list(self.value.shape)}: [1 "
                "or S, 1 or layers or P]. They belong to another number of steps, another per=, or another model"
            )
        super()._load_from_state_dict(state_dict, prefix, *further)

    def forward(self) -> Tensor:
        """Returns the rates ``[1 or S, 1 or P]``."""
        if self.index is None:
            return self.value
        if self.index.device.type != "cpu":
            return self.value[:, self.index]
        # On a CPU the adjoint of indexing adds up in an order that threads decide, and that of gather one element after
        # another; a million of them need more than float32.
        each = self.value.double().gather(1, self.index.expand(self.value.shape[0], -1))
        return each.to(self.value.dtype)


def _drawn(rate: Rate, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Draws the initial values of rates; where ``rate`` has one value, each is that."""
    return torch.empty(shape, dtype=like.dtype).uniform_(*rate.span).to(like.device)
