"""Writes what is done to each task in the form that C++ reads: the loop's numbers, its rule and its rates."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from metafast.executors.native.encode import FACTS, as_input
from metafast.program.inner_loop import InnerLoop
from metafast.program.rule import Rule

_PLAIN: tuple[float, ...] = ()


class InnerSteps(NamedTuple):
    """Holds the steps of a loop as operators take them.

    Attributes:
        rule: the numbers of a rule (csrc/torch/rule_tables.h); empty where steps go along the gradient.
        rates: ``[1 or S, 1 or P]`` in the dtype of the parameters, or under a rule ``[H, 1 or S, 1 or P]`` in float64.
    """

    rule: tuple[float, ...]
    rates: Tensor


def inner_steps(loop: InnerLoop, rates: Tensor, dtype: torch.dtype) -> InnerSteps | None:
    """Returns the steps as operators take them; ``None`` where C++ has no formula for them.

    Of a rule's hyper-parameters C++ takes the learning rate and weight decay for each parameter, and of all others one
    number a step.
    """
    if loop.rule is None:
        return InnerSteps(_PLAIN, as_input(rates if rates.dtype == dtype else rates.to(dtype)))
    rule, formula = rule_numbers(loop.rule), loop.rule.formula
    if rule is None or formula is None:
        return None
    rates = as_input(rates.double())
    if rates.shape[-1] > 1:
        wide = (0, FACTS["steps"][formula.kind]["decay"])
        others = rates[[h for h in range(len(rates)) if h not in wide]]
        if not bool((others == others[..., :1]).all()):
            return None
    return InnerSteps(rule, rates)


class BlockSteps(NamedTuple):
    """Holds the steps of a loop as thread blocks take them.

    Attributes:
        rule: as in ``InnerSteps``.
        rates: ``[1 or S, 1 or P]`` in the dtype of the parameters, or under a rule ``[1 or S, H]`` in float64.
    """

    rule: tuple[float, ...]
    rates: Tensor

    def gradient(self, found: Tensor, rates: Tensor, scale: float) -> Tensor:
        """Returns the gradient of the user's ``rates`` from what an operator has ``found``."""
        if not self.rule:
            return found
        sums = found[:, 0].sum(0) * scale  # the blocks of a cluster have the same
        return sums[:, :1].to(rates.dtype) if rates.dim() == 2 else sums.t()[..., None]


def block_steps(loop: InnerLoop, each_step: bool, rates: Tensor, dtype: torch.dtype) -> BlockSteps | None:
    """Returns the steps as thread blocks take them; ``None`` where they have no formula for them.

    Of a rule's hyper-parameters blocks take one number a step. Steps along the gradient on samples of their own are
    those of SGD without momentum.
    """
    if loop.rule is None and not each_step:
        return BlockSteps(_PLAIN, as_input(rates.to(dtype)))
    rule = rule_numbers(loop.rule)
    if rule is None or rates.shape[-1] > 1:
        return None
    if rule == _PLAIN:
        rule = (FACTS["steps"]["sgd"]["number"], 0, 0, 0, 0)
        return BlockSteps(rule, torch.nn.functional.pad(rates.double(), (0, FACTS["steps"]["sgd"]["names"] - 1)))
    return BlockSteps(rule, as_input(rates[..., 0].double().t()))


def rule_numbers(rule: Rule | None) -> tuple[float, ...] | None:
    """Writes a rule down in numbers; ``None`` where C++ has no formula for it."""
    if rule is None:
        return _PLAIN
    formula = rule.formula
    if formula is None or formula.kind not in FACTS["steps"]:
        return None
    clips = rule.max_norm is not None, rule.max_value is not None
    starts = (rule.start(name) for name in rule.states)
    return (FACTS["steps"][formula.kind]["number"], formula.option, len(rule.states), *clips, *starts)


def loop_numbers(loop: InnerLoop, each_step: bool, budget: int) -> list[int]:
    """Writes a loop's numbers down in the order of ``FACTS["loop_settings"]``; -1 stands for ``None``."""
    truncate = -1 if loop.truncate is None else loop.truncate
    memory = -1 if loop.memory is None else loop.memory
    flags = int(loop.first_order), int(loop.learns_rates), int(loop.one_rate), int(each_step)
    return [loop.steps, loop.first, truncate, memory, *flags, budget]
