"""Makes whole meta-gradients of an executor's ``adapt``, ``adapt_vjp`` and ``loss_and_grad``, in segments of the loop.

Where ``z`` of all steps fits into memory the loop is one segment. Else it is cut into about sqrt(S) segments of as many
steps: the way forward keeps ``z`` at the beginning of each, and the way back takes the steps of one segment again
before it goes through them. That costs one more gradient a step, and the memory of ``2 sqrt(S)`` steps.

A truncated loop takes ``z_s`` before the steps of the way back for a constant, but for theta_0 in it: query losses that
are judged there, and what comes back to the first of these steps, go to theta_0 as they are.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from metafast.executors.steps import Steps
from metafast.program import Program
from metafast.program.inner_loop import InnerLoop
from metafast.tasks import Batch

if TYPE_CHECKING:
    from metafast.executors.base import Executor

_MEMORY = 1 << 30  # bytes


class Sets(NamedTuple):
    """Holds the support sets and the query sets of T tasks, which have been checked already."""

    support: Batch
    query: Batch


class Evaluation(NamedTuple):
    """Holds what the way forward computes, and what the way back needs of it.

    Attributes:
        losses: ``[T]``, the weighted sum over steps of each task's query losses.
        outputs: ``[T, m, ...]``, of the query sets after the last step.
        kept: ``z`` at the steps that are kept, ``[R, T, (1 + K) P]``: all, or where segments begin, and the last.
        final: ``z`` after the last step, ``[T, (1 + K) P]``.
        query_grads: ``[J, T, P]``, the gradients of the query losses at the J steps of the way back that are judged, or
            where there are several segments at the last of them alone. Before them stands the weighted sum of those
            that are judged before the way back begins, where there are any.
    """

    losses: Tensor
    outputs: Tensor
    final: Tensor
    kept: Tensor
    query_grads: Tensor


class Adjoints(NamedTuple):
    """Holds the adjoints of what an ``Evaluation`` says; ``None`` is zero."""

    losses: Tensor | None
    outputs: Tensor | None = None
    final: Tensor | None = None


class Segments(NamedTuple):
    """Says which steps of a loop the way back goes through, and which of them are taken again.

    Attributes:
        begin: the first step that the way back goes through.
        length: how many steps a segment has.
        steps: the number S of steps.
        row: the bytes of ``z`` of all tasks at one step.
    """

    begin: int
    length: int
    steps: int
    row: int

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Lists the first step of each segment and the first behind it."""
        return [(a, min(a + self.length, self.steps)) for a in range(self.begin, self.steps, max(self.length, 1))]

    def skips(self, loop: InnerLoop) -> bool:
        """Says whether query losses are judged before the first step that the way back goes through."""
        return any(step < self.begin for step, _ in loop.judged_steps)

    @property
    def keeps_all(self) -> bool:
        """Says whether no step is taken again."""
        return self.length >= self.steps - self.begin

    @property
    def rows(self) -> int:
        """Counts the steps that are kept."""
        return self.steps - self.begin + 1 if self.keeps_all else len(self.spans) + 1

    @property
    def bytes(self) -> int:
        """Counts the bytes of what is kept, with the steps of one segment."""
        return self.row * (self.rows + (0 if self.keeps_all else self.length))

    def __str__(self) -> str:
        size = f"{self.bytes / 2**20:,.1f} MiB"
        if self.keeps_all:
            return f"every one of {self.steps - self.begin} steps kept, {size}"
        return (
            f"one of {self.length} steps kept and the others taken again, {size} in place of "
            f"{self.row * (self.steps - self.begin + 1) / 2**20:,.1f} MiB; it costs one more gradient a step"
        )


def segments_of(loop: InnerLoop, tasks: int, width: int, itemsize: int) -> Segments:
    """Chooses the segments for so many tasks whose ``z`` has ``width`` elements each.

    Raises:
        ValueError: ``loop.memory`` is less than any plan needs.
    """
    back = loop.steps if loop.truncate is None else min(loop.truncate, loop.steps)
    row = tasks * width * itemsize
    found = Segments(loop.steps - back, back, loop.steps, row)
    if found.bytes <= (loop.memory or _MEMORY):
        return found
    found = min(found, found._replace(length=math.isqrt(max(back - 1, 0)) + 1), key=lambda one: one.bytes)
    if loop.memory is not None and found.bytes > loop.memory:
        raise ValueError(
            f"memory={loop.memory:,}: the way back through {back} steps keeps {found.bytes:,} bytes at the least; give "
            "more, fewer tasks or steps, or truncate="
        )
    return found


@torch.no_grad()
def evaluate(
    executor: Executor, program: Program, loop: InnerLoop, start: Tensor, rates: Tensor, sets: Sets
) -> Evaluation:
    """Adapts from theta_0 or ``z_0``, and judges on the query sets; no graph is kept."""
    support, query = sets
    steps, tasks = Steps(program, loop, rates), query.x.shape[0]
    z = steps.start(start, tasks)
    segments = segments_of(loop, tasks, z.shape[-1], z.element_size())
    weights = dict(loop.judged_steps)
    losses, grads, kept = z.new_zeros(tasks), [], []

    def judge(step: int, z: Tensor) -> Tensor:
        if weights[step] == 0:
            grads.append(z.new_zeros(tasks, program.size))
            return executor.predict(program.query, steps.theta(z), query.x, loop.first + step, query.seeds)
        loss, grad, outputs = executor.loss_and_grad(program.query, steps.theta(z), query, loop.first + step)
        losses.add_(loss, alpha=weights[step])
        if step >= segments.begin:
            grads.append(grad)
        elif grads:
            grads[0].add_(grad, alpha=weights[step])
        else:
            grads.append(grad * weights[step])
        return outputs

    if 0 in weights and loop.steps > 0:
        judge(0, z)
    skipped = in_pieces(loop.part(0, segments.begin), segments.row)
    for a, b in [*skipped, *segments.spans]:
        trajectory = executor.adapt(program, loop.part(a, b), z, rates, support.steps(a, b))
        if a >= segments.begin:
            kept.append(trajectory if segments.keeps_all else trajectory[:1].clone())
        z = trajectory[-1]
        for step in range(a + 1, b + (b < loop.steps)):
            if step in weights:
                judge(step, trajectory[step - a])
        if not segments.keeps_all:
            del grads[segments.skips(loop) :]
    outputs = judge(loop.steps, z)
    if not (segments.keeps_all and segments.spans):
        kept.append(z[None])
    return Evaluation(losses, outputs, z.clone(), torch.cat(kept) if len(kept) > 1 else kept[0], torch.stack(grads))


@torch.no_grad()
def way_back(
    executor: Executor,
    program: Program,
    loop: InnerLoop,
    rates: Tensor,
    sets: Sets,
    found: tuple[Tensor, Tensor],
    adjoints: Adjoints,
) -> tuple[Tensor, Tensor | None]:
    """Computes the adjoints of ``z_0 [T, (1 + K) P]`` and of the rates, ``None`` where the loop does not learn them.

    ``found`` are ``kept`` and ``query_grads`` of an ``Evaluation``.
    """
    (kept, query_grads), (g_losses, g_outputs, g_final) = found, adjoints
    support, query = sets
    steps, last = Steps(program, loop, rates), loop.steps
    segments = segments_of(loop, kept.shape[1], kept.shape[-1], kept.element_size())
    weights = dict(loop.judged_steps) if g_losses is not None else {}
    skips = segments.skips(loop)
    known = [s for s, _ in loop.judged_steps if s >= segments.begin] if segments.keeps_all else [last]
    of_query = dict(zip(known, query_grads[int(skips) :], strict=True))

    def judged(step: int, z: Tensor, v: Tensor) -> Tensor:
        """Adds to ``v`` what the query loss after ``step`` steps, at ``z``, makes of ``theta``."""
        if step not in weights or g_losses is None:
            return v
        grad = of_query.get(step)
        if grad is None:
            grad = executor.loss_and_grad(program.query, steps.theta(z), query, loop.first + step)[1]
        return steps.add(v, grad * (weights[step] * g_losses)[:, None])

    v = judged(last, kept[-1], torch.zeros_like(kept[-1]) if g_final is None else g_final)
    if g_outputs is not None:
        g = executor.outputs_vjp(program, steps.theta(kept[-1]), query, g_outputs, loop.first + last)
        v = steps.add(v, g)
    rates_grad = torch.zeros_like(rates) if loop.learns_rates else None
    for number, (a, b) in reversed(list(enumerate(segments.spans))):
        part, batch = loop.part(a, b), support.steps(a, b)
        trajectory = kept if segments.keeps_all else executor.adapt(program, part, kept[number], rates, batch)
        adjoint = v
        if any(step in weights for step in range(a, b)):
            rows = [judged(step, trajectory[step - a], torch.zeros_like(v)) for step in range(a, b)]
            adjoint = torch.stack([*rows, v])
        v, of_rates = executor.adapt_vjp(program, part, trajectory, rates, batch, adjoint)
        if rates_grad is not None and of_rates is not None:
            rates_grad += of_rates
    if segments.begin > 0:
        v = steps.of_theta(v)
    if skips and g_losses is not None:
        v = steps.add(v, query_grads[0] * g_losses[:, None])
    return v, rates_grad


def in_pieces(loop: InnerLoop, row: int) -> list[tuple[int, int]]:
    """Cuts the steps of a loop that keeps none of them into pieces whose trajectory stays small.

    ``row`` are the bytes of ``z`` of all tasks at one step.
    """
    length = loop.steps if (loop.steps + 1) * row <= _MEMORY >> 4 else math.isqrt(max(loop.steps - 1, 0)) + 1
    return [(a, min(a + length, loop.steps)) for a in range(0, loop.steps, max(length, 1))]
