"""Steps along a mean of gradients over the root of a mean of their squares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from metafast.inner.rates import Rate
from metafast.inner.rules.checks import check_bounds, check_flag, check_hyper
from metafast.program.rule import Formula, Hyper, Rule, root


@dataclass(frozen=True, kw_only=True)
class Adam(Rule):
    """Steps as ``torch.optim.Adam`` does (Kingma, Ba 2015, 1412.6980), in the k-th step from zero moments

        g <- g + weight_decay theta
        m <- beta1 m + (1 - beta1) g,    v <- beta2 v + (1 - beta2) g^2
        theta <- theta - lr / (1 - beta1^k) m / (sqrt(v) / sqrt(1 - beta2^k) + eps)

    Where ``v`` is zero, because the gradient has been zero in every step, ``sqrt(v)`` has no derivative; it is taken
    for zero, so that all gradients are finite. Every hyper-parameter is a number, or a
    :class:`~metafast.inner.rates.Rate`, which can be learned and told apart by step, layer or parameter.

    Args:
        betas: ``(beta1, beta2)``, each from 0 up to, but not including, 1.
        eps: at least 0.
        weight_decay: at least 0.
        amsgrad: whether the largest ``v`` so far takes the place of ``v``.
        max_norm: the norm to which each task's gradient is scaled down first; ``None``: it is not.
        max_value: the value to which each of its elements is clamped before that; ``None``: it is not.

    Raises:
        TypeError, ValueError: a hyper-parameter is out of its range; the text names it.
    """

    betas: tuple[float | Rate, float | Rate] = (0.9, 0.999)
    eps: float | Rate = 1e-8
    weight_decay: float | Rate = 0.0
    amsgrad: bool = False
    max_norm: float | Rate | None = None
    max_value: float | Rate | None = None
    hyper: ClassVar[tuple[str, ...]] = ("beta1", "beta2", "eps", "weight_decay")
    decoupled: ClassVar[bool] = False
    """Whether weight decay shrinks the parameters themselves, past the moments."""

    def __post_init__(self) -> None:
        if not isinstance(self.betas, tuple | list) or len(self.betas) != 2:
            raise TypeError(f"betas={self.betas!r}: give a pair, such as (0.9, 0.999)")
        object.__setattr__(self, "betas", tuple(self.betas))
        for name, value in zip(("betas[0]", "betas[1]"), self.betas, strict=True):
            check_hyper(name, value, 1)
        check_hyper("eps", self.eps)
        check_hyper("weight_decay", self.weight_decay)
        check_flag("amsgrad", self.amsgrad)
        check_bounds(self.max_norm, self.max_value)

    @property
    def beta1(self) -> float | Rate:
        """How much of the mean of gradients a step keeps."""
        return self.betas[0]

    @property
    def beta2(self) -> float | Rate:
        """How much of the mean of squares a step keeps."""
        return self.betas[1]

    @property
    def formula(self) -> Formula | None:
        """Names the step, where a subclass has not made another of it."""
        return Formula("adam", self.decoupled) if type(self) in (Adam, AdamW) and not self.amsgrad else None

    @property
    def states(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names the moments."""
        return ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if self.amsgrad else ()))

    def step(
        self, theta: Tensor, gradient: Tensor, state: tuple[Tensor, ...], hyper: Hyper, count: int
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Steps as the class says."""
        lr, beta1, beta2 = hyper["lr"], hyper["beta1"], hyper["beta2"]
        if self.decoupled:
            theta = theta * (1 - lr * hyper["weight_decay"])
        else:
            gradient = gradient + hyper["weight_decay"] * theta
        mean = beta1 * state[0] + (1 - beta1) * gradient
        square = beta2 * state[1] + (1 - beta2) * gradient.square()
        states = (mean, square, torch.maximum(state[2], square)) if self.amsgrad else (mean, square)
        denominator = root(states[-1]) / (1 - beta2**count).sqrt() + hyper["eps"]
        return theta - lr / (1 - beta1**count) * (mean / denominator), states


@dataclass(frozen=True, kw_only=True)
class AdamW(Adam):
    """Steps as ``torch.optim.AdamW`` does (Loshchilov, Hutter 2019, 1711.05101): as :class:`Adam` but for its decay.

    Instead of being added to the gradient it shrinks the parameters, ``theta <- theta (1 - lr weight_decay)``, before
    the step. The arguments are those of :class:`Adam`.
    """

    weight_decay: float | Rate = 1e-2
    decoupled: ClassVar[bool] = True
