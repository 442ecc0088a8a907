"""Holds the models that a learner has made of the tasks that it adapted to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from metafast.executors import Executor, choose
from metafast.inner.autocast import in_own_dtype
from metafast.learners.captures import Captures
from metafast.learners.module_snapshot import Moment
from metafast.learners.seeds import drawn_seeds
from metafast.program import Program
from metafast.program.inner_loop import InnerLoop
from metafast.program.rule import Rule
from metafast.tasks import TaskShapes, as_samples, parts_of

_SIZES = 64
"""How many numbers of samples are remembered."""


@dataclass(frozen=True)
class Adapted:
    """Holds T adapted models: their ``parameters [T, P]``, and the shape of each tensor of a ``sample``.

    They stay what they were made, whatever becomes of the learner; a copy of them, and one that was saved, says the
    same as they. What the model does with another number of samples is found by running it, which is refused where it
    has changed since the ``moment`` of adaptation. ``settings`` are the learner's ``backend`` and ``precision``.
    ``state`` are the vectors ``[T, P]`` that the rule of the inner loop carries, by torch.optim's names, after ``step``
    steps; ``learner.adapt(..., after=adapted)`` goes on from there.
    """

    captures: Captures
    program: Program
    executor: Executor
    parameters: Tensor
    step: int
    sample: tuple[tuple[int, ...], ...]
    moment: Moment
    settings: tuple[str | Executor, str]
    state: Mapping[str, Tensor] = field(default_factory=dict)
    _others: dict[int, tuple[Program, Executor]] = field(default_factory=dict)

    @in_own_dtype
    def __call__(self, x: Tensor) -> Tensor:
        """Returns the outputs ``[T, n, ...]`` for ``x [T, n, ...]``; no graph is kept.

        Raises:
            ValueError: another number of tasks, or samples of another shape.
            TypeError: ``x`` is of another dtype, or on another device.
            RuntimeError: the model has changed and was not run on so many samples before.
        """
        theta, x = self.parameters, as_samples(x)
        sample = tuple(tuple(part.shape[2:]) for part in parts_of(x))
        if x.dim() < 2 or x.shape[0] != theta.shape[0] or sample != self.sample:
            given, wanted = (
                ", ".join(map(str, shapes)) for shapes in ([tuple(p.shape) for p in parts_of(x)], self.sample)
            )
            raise ValueError(
                f"x has shape {given}; these {theta.shape[0]} adapted models take [T, n, *sample] with "
                f"T = {theta.shape[0]} and samples of shape {wanted}"
            )
        if (x.is_floating_point() and x.dtype != theta.dtype) or x.device != theta.device:
            raise TypeError(
                f"x is {x.dtype} on {x.device}, the adapted models are {theta.dtype} on {theta.device}; use "
                f"x.to({str(theta.device)!r}, {theta.dtype})"
            )
        program, executor = self._for_as_many(x)
        seeds = drawn_seeds(program, len(theta), theta.device)
        of_query = None if seeds is None else seeds[:, 1]
        return executor.predict(program, self.parameters, x.contiguous(), self.step, of_query)

    def _for_as_many(self, x: Any) -> tuple[Program, Executor]:
        """Returns what computes the outputs of as many samples as ``x`` has."""
        samples = x.shape[1]
        found = self._others.get(samples)
        if found is None:
            found = self.program, self.executor
            program = self.captures.extended(self.program, x, self.moment)
            if program is not self.program:
                loop = InnerLoop.judged_last(max(self.step, 1))
                choice = choose(program, loop, TaskShapes.of_samples(x), *self.settings)
                found = program.holding_constants(), choice.executor
            self._others[samples] = found
            if len(self._others) > _SIZES:
                del self._others[next(iter(self._others))]
        return found

    def state_dict(self, task: int) -> dict[str, Tensor]:
        """Returns one task's parameters under the user's names, for ``model.load_state_dict(..., strict=False)``.

        Raises:
            IndexError: there is no such task.
        """
        if not 0 <= task < self.parameters.shape[0]:
            raise IndexError(f"task={task}: the adapted models are numbered 0..{self.parameters.shape[0] - 1}")
        tensors = self.program.unflatten(self.parameters[task])
        return {p.name: t.clone() for p, t in zip(self.program.parameters, tensors, strict=True)}


def gone_on_from(
    after: Adapted | None, program: Program, rule: Rule | None, tasks: int, like: Tensor
) -> tuple[int, Tensor | None]:
    """Returns the number of steps behind ``after``, and ``z [T, (1 + K) P]`` that ``program`` goes on from by ``rule``.

    Raises:
        TypeError: ``after`` is nothing that ``adapt`` returns.
        ValueError: these are models of other parameters, of another number of tasks, of another dtype or device than
            ``like``, or were made by another rule.
    """
    if after is None:
        return 0, None
    if not isinstance(after, Adapted):
        raise TypeError(f"after is a {type(after).__name__}: give what an earlier call of adapt returned")
    states = tuple(rule.states) if rule is not None else ()
    names = [(p.name, p.shape) for p in program.parameters]
    theta = after.parameters
    if names != [(p.name, p.shape) for p in after.program.parameters] or len(theta) != tasks:
        raise ValueError(
            f"after: these are {len(theta)} adapted models with {after.program.size:,} parameters, and "
            f"the batch has {tasks} tasks and the learner {program.size:,} parameters; they must be the same"
        )
    if (theta.dtype, theta.device) != (like.dtype, like.device):
        raise ValueError(
            f"after: these models are {theta.dtype} on {theta.device}, and the learner is {like.dtype} on "
            f"{like.device}; adapt anew from the beginning"
        )
    if tuple(after.state) != states:
        raise ValueError(
            f"after: these models carry the state {list(after.state)}, and the learner's rule needs {list(states)}; "
            "they must have been adapted by the same rule"
        )
    return after.step, torch.cat([theta, *after.state.values()], 1)
