"""Steps at which the kernels are tested: a rule with its options, how many parameters, the how manieth step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RuleCase:
    """A step of a rule.

    Args:
        name: says what is special about it.
        rule: the name of the rule.
        options: its options.
        size: the number of parameters of a task.
        count: the number of the step, from 1.
        wide: whether each parameter has hyper-parameters of its own.
        tolerance: largest relative error (of norms) allowed in float32.
        reason: why the tolerance is what it is.
    """

    name: str
    rule: str
    options: Mapping[str, Any] = field(default_factory=dict)
    size: int = 37
    count: int = 3
    wide: bool = False
    tolerance: float = 2e-6
    reason: str = "a dozen operations an element, and sums of a thousand of unit size, rounded to 24 bits"

    def __str__(self) -> str:
        return f"{self.rule}: {self.name}"


_CLIPS = {"max_norm": 1.5, "max_value": 0.8}
_SGD = {"momentum": 0.9, "dampening": 0.25, "weight_decay": 0.1}
_LOOSE = {"max_norm": 1e3, "max_value": 1e3}
_MOMENTS = {"tolerance": 2e-5, "reason": "beta2's adjoint is the small difference of two sums, of g^2 and of its root"}

CASES = [
    RuleCase("plain", "SGD"),
    RuleCase("clipped, decayed", "SGD", {"weight_decay": 0.1, **_CLIPS}, size=150),
    RuleCase("momentum, first step", "SGD", _SGD, count=1),
    RuleCase("momentum", "SGD", _SGD, size=150),
    RuleCase("momentum of each parameter, clipped", "SGD", {**_SGD, **_CLIPS}, size=150, wide=True),
    RuleCase("Nesterov", "SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    RuleCase("Nesterov, norm not reached", "SGD", {"momentum": 0.9, "nesterov": True, **_LOOSE}, count=1),
    RuleCase("one parameter", "SGD", {"momentum": 0.9, "max_norm": 0.5}, size=1),
    RuleCase("first step", "Adam", count=1, **_MOMENTS),
    RuleCase("a late step", "Adam", {"weight_decay": 0.1}, count=1000, size=150, **_MOMENTS),
    RuleCase("clipped", "Adam", {"weight_decay": 0.1, **_CLIPS}, size=150, **_MOMENTS),
    RuleCase("of each parameter, clipped", "Adam", _CLIPS, wide=True, **_MOMENTS),
    RuleCase("no memory of gradients", "Adam", {"betas": (0.0, 0.5)}, count=2),
    RuleCase("decoupled decay", "AdamW", {"weight_decay": 0.1}, size=150, **_MOMENTS),
    RuleCase("decoupled decay of each parameter", "AdamW", {"max_value": 0.5}, wide=True, **_MOMENTS),
]  # fmt: skip
