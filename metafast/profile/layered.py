"""Times the rules of executors that run layer by layer in PyTorch; on a GPU by events on the stream.

A profiled run exchanges the layers of its Program for timed ones, so a run that is not profiled pays nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from metafast.executors import ExecutionPlan, Executor
from metafast.kernels.contract.layer import Layer, Loss, RuleContext, Tangents, Tensors
from metafast.profile.spans import LOSS, Span
from metafast.program import Program
from metafast.program.inner_loop import InnerLoop
from metafast.tasks import Batch, TaskShapes

Mark = float | torch.cuda.Event
"""A moment: seconds of ``time.perf_counter``, or an event on a stream."""


@dataclass(frozen=True)
class _Record:
    """A phase or a rule from ``begin`` to ``end``. ``phase`` is the index of the phase that a rule ran in."""

    name: str
    begin: Mark
    end: Mark
    phase: int = -1
    layer: str = ""
    step: int = 0
    tasks: int = 1


class SpanRecorder:
    """Records the phases and rules of a run on ``device``. On a GPU it also opens NVTX ranges for them, which are
    called ``metafast <phase>`` and ``<layer>.<rule>``."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.phases: list[_Record] = []
        self.rules: list[_Record] = []
        if self.on_gpu:
            torch.cuda.synchronize(device)
        self.origin, self.began = self._mark(), time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Records the block as phase ``name``."""
        with self._range(f"metafast {name}"):
            begin = self._mark()
            self.phases.append(_Record(name, begin, begin))
            yield
            self.phases[-1] = _Record(name, begin, self._mark())

    @contextmanager
    def rule(self, name: str, layer: str, step: int, tasks: int) -> Iterator[None]:
        """Records the block as rule ``name`` of ``layer`` in inner step ``step``, for ``tasks`` tasks at once."""
        with self._range(f"{layer}.{name}"):
            begin = self._mark()
            yield
            self.rules.append(_Record(name, begin, self._mark(), len(self.phases) - 1, layer, step, tasks))

    def add_spans(self, phases: list[Span], rules: list[Span]) -> None:
        """Adds what was recorded to both lists. A phase of several steps is split where the first rule of a step
        begins."""
        if self.on_gpu:
            torch.cuda.synchronize()
        for index, phase in enumerate(self.phases):
            inside = [rule for rule in self.rules if rule.phase == index]
            starts = [i for i, rule in enumerate(inside) if i == 0 or rule.step != inside[i - 1].step]
            edges = [phase.begin, *(inside[i].begin for i in starts[1:]), phase.end]
            named = [_named(phase.name, inside[i].step) for i in starts] or [phase.name]
            phases += [
                Span(name, self._seconds(begin), self._seconds(end), 0)
                for name, (begin, end) in zip(named, pairwise(edges), strict=True)
            ]
            for rule in inside:
                name = _named(phase.name, rule.step)
                times = self._seconds(rule.begin), self._seconds(rule.end)
                rules.append(Span(rule.name, *times, 0, name, rule.layer, tasks=rule.tasks))

    def _mark(self) -> Mark:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, mark: Mark) -> float:
        if isinstance(mark, float):
            return mark
        assert isinstance(self.origin, torch.cuda.Event)
        return self.began + 1e-3 * self.origin.elapsed_time(mark)

    @contextmanager
    def _range(self, name: str) -> Iterator[None]:
        if not self.on_gpu:
            yield
            return
        with torch.cuda.nvtx.range(name):
            yield


class TimedExecutor(Executor):
    """Does what ``inner`` does, and records each of its functions as a phase and each rule of its layers.

    Nothing is recorded while ``recorder`` is ``None``.

    Raises:
        ValueError: ``inner`` does not run its layers one by one in Python.
    """

    def __init__(self, inner: Executor) -> None:
        self.name = inner.name
        self.recorder: SpanRecorder | None = None
        self._programs: dict[Program, Program] = {}
        observed = inner.observed(self._timed)
        if observed is None:
            raise ValueError(f"executor {inner.name!r} does not run its layers one by one in Python")
        self.inner = observed

    def plan_own(self, program: Program, loop: InnerLoop, shapes: TaskShapes) -> ExecutionPlan | str:
        plan = self.inner.plan_own(program, loop, shapes)
        return plan if isinstance(plan, str) else replace(plan, executor=self)

    def predict(
        self, program: Program, params: Tensor, x: Tensor, step: int = 0, seeds: Tensor | None = None
    ) -> Tensor:
        return self.inner.predict(program, params, x, step, seeds)

    def loss_and_grad(
        self, program: Program, params: Tensor, batch: Batch, step: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        with self._phase("query"):
            return self.inner.loss_and_grad(program, params, batch, step)

    def adapt(self, program: Program, loop: InnerLoop, params: Tensor, rates: Tensor, support: Batch) -> Tensor:
        with self._phase("inner step"):
            return self.inner.adapt(program, loop, params, rates, support)

    def adapt_vjp(
        self, program: Program, loop: InnerLoop, trajectory: Tensor, rates: Tensor, support: Batch, v: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        with self._phase("reverse step"):
            return self.inner.adapt_vjp(program, loop, trajectory, rates, support, v)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        if self.recorder is None:
            yield
            return
        with self.recorder.phase(name):
            yield

    def _timed(self, program: Program) -> Program:
        """Returns the Program with timed layers, the same object each time, because executors cache by Program."""
        if program not in self._programs:
            nodes = tuple(replace(node, layer=_TimedLayer(node.layer, node.name, self)) for node in program.nodes)
            query_loss = None if program.query_loss is None else _TimedLoss(program.query_loss, self)
            timed = replace(program, nodes=nodes, loss=_TimedLoss(program.loss, self), query_loss=query_loss)
            self._programs[program] = timed
        return self._programs[program]

    def timing(self, rule: str, layer: str, ctx: RuleContext, tasks: int) -> Any:
        """Returns the context in which a rule of ``layer`` runs."""
        return self.recorder.rule(rule, layer, ctx.step, tasks) if self.recorder is not None else _NOTHING


class _Nothing:
    """A context that does nothing, at less cost than that of ``contextlib``."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        return None


_NOTHING = _Nothing()


class _TimedLayer(Layer):
    """Times the four rules of ``layer``; every other attribute is the layer's own."""

    def __init__(self, layer: Layer, name: str, executor: TimedExecutor) -> None:
        self.layer, self.node, self.executor = layer, name, executor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)

    @property
    def varies(self) -> bool:
        return self.layer.varies

    @property
    def carries_gradient(self) -> bool:
        return self.layer.carries_gradient

    def forward(self, ctx: RuleContext, params: Tensors, inputs: Tensors, constants: Tensors = ()) -> Tensor:
        tasks = next(given.shape[0] for given in (*inputs, *params, ctx.seeds) if given is not None)
        with self.executor.timing("forward", self.node, ctx, tasks):
            return self.layer.forward(ctx, params, inputs, constants)

    def backward(self, ctx: RuleContext, params: Tensors, g_y: Tensor) -> tuple[Tangents, Tangents]:
        with self.executor.timing("backward", self.node, ctx, g_y.shape[0]):
            return self.layer.backward(ctx, params, g_y)

    def tangent_forward(self, ctx: RuleContext, params: Tensors, d_params: Tangents, d_inputs: Tangents) -> Tensor:
        tasks = next(d.shape[0] for d in (*d_params, *d_inputs) if d is not None)
        with self.executor.timing("tangent_forward", self.node, ctx, tasks):
            return self.layer.tangent_forward(ctx, params, d_params, d_inputs)

    def tangent_backward(
        self, ctx: RuleContext, params: Tensors, d_params: Tangents, gd_y: Tensor
    ) -> tuple[Tangents, Tangents]:
        with self.executor.timing("tangent_backward", self.node, ctx, gd_y.shape[0]):
            return self.layer.tangent_backward(ctx, params, d_params, gd_y)


class _TimedLoss(Loss):
    """Times the rules of ``loss``; every other attribute is the loss's own."""

    def __init__(self, loss: Loss, executor: TimedExecutor) -> None:
        self.loss, self.executor = loss, executor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loss, name)

    def check(self, output: tuple[int, ...], targets: Tensor, name: str) -> None:
        self.loss.check(output, targets, name)

    def forward(self, ctx: RuleContext, outputs: Tensor, targets: Tensor) -> Tensor:
        with self.executor.timing("forward", LOSS, ctx, outputs.shape[0]):
            return self.loss.forward(ctx, outputs, targets)

    def backward(self, ctx: RuleContext) -> Tensor:
        with self.executor.timing("backward", LOSS, ctx, 1):
            return self.loss.backward(ctx)

    def tangent_backward(self, ctx: RuleContext, d_outputs: Tensor) -> Tensor:
        with self.executor.timing("tangent_backward", LOSS, ctx, d_outputs.shape[0]):
            return self.loss.tangent_backward(ctx, d_outputs)


def _named(phase: str, step: int) -> str:
    return f"{phase} {step + 1}" if phase.endswith("step") else phase
