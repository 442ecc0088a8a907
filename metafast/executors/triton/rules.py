"""Lowers the rule of an inner loop to Triton: a step and its way back become a few kernels in the place of autograd."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from metafast.kernels.rules.kernel import StepLaunch
from metafast.kernels.rules.reference import HYPER, StepForm
from metafast.program.rule import Hyper, Rule, StepAdjoints


class TritonRule(Rule):
    """Steps as another rule does, by kernels.

    Args:
        rule: the rule.
        form: its form, as the kernels know it.
    """

    def __init__(self, rule: Rule, form: StepForm) -> None:
        self.rule, self.form = rule, form

    @property
    def states(self) -> Sequence[str]:  # type: ignore[override]
        """Names the vectors of the rule's state."""
        return self.rule.states

    @property
    def hyper_names(self) -> tuple[str, ...]:
        """Lists the rule's hyper-parameters."""
        return self.rule.hyper_names

    def start(self, name: str) -> float:
        """Returns what the rule starts from."""
        return self.rule.start(name)

    def step(
        self, theta: Tensor, gradient: Tensor, state: tuple[Tensor, ...], hyper: Hyper, count: int
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Steps as the rule does, by PyTorch."""
        return self.rule.step(theta, gradient, state, hyper, count)

    def advance(self, z: Tensor, gradient: Tensor, rows: Tensor, count: int, moved: Tensor) -> Tensor:
        """Takes the step in one launch, and one or two more for a norm."""
        return StepLaunch(self.form, z, gradient, rows, count, moved).forward()

    def advance_vjp(
        self, z: Tensor, gradient: Tensor, rows: Tensor, count: int, moved: Tensor, v: Tensor, learns: bool
    ) -> StepAdjoints:
        """Goes back through the step in one launch, and a few more for a norm and for learned hyper-parameters."""
        return StepAdjoints(*StepLaunch(self.form, z, gradient, rows, count, moved).vjp(v, learns))


def lower_rule(rule: Rule) -> Rule:
    """Returns the rule with kernels in the place of autograd, or as it is where there are none for it."""
    form = form_of(rule)
    return rule if form is None else TritonRule(rule, form)


def form_of(rule: Rule) -> StepForm | None:
    """Returns the form of the rule's step, where there are kernels for it."""
    formula, names = rule.formula, rule.hyper_names
    if formula is None or formula.kind not in HYPER:
        return None
    known = HYPER[formula.kind]
    assert names[: len(known)] == known, names  # in this order the kernels read them
    return StepForm(formula.kind, len(rule.states), formula.option, names)
