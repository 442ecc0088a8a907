"""Runs the inner loop of a batch of tasks and its way back in one C++ call on the CPU, in float32 or float64.

Tasks are spread over torch's threads, and each runs on one core. Where there are fewer tasks than threads, several
threads share a task; where the network is small, a core runs as many tasks at once as a vector has lanes. Results do
not depend on either. The extension is built for several instruction sets and uses the best that the processor has.
Each of several ragged tasks runs on its own samples, without padding. The one call takes steps by the rules of
torch.optim (``Rule.formula``), samples of each step, and long loops in segments. Under a loss that has no rules in
C++, or that leaves out some of the labels of a batch, Python computes the loss and each pass is a call of its own; so
is each pass where C++ has no formula for the steps (see ``inner_steps``).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property, lru_cache, partial

import torch
from torch import Tensor

from metafast.executors import steps
from metafast.executors.base import ExecutionPlan, Executor, MetaGradient
from metafast.executors.memory import MemoryPlan
from metafast.executors.native.encode import (
    FACTS,
    Model,
    Models,
    RaggedPacking,
    as_input,
    call_op,
    extension,
    extension_error,
    has_rules,
    support_samples,
    targets,
    unsupported_layer,
    unsupported_loss,
)
from metafast.executors.native.inner_steps import InnerSteps, inner_steps, loop_numbers, rule_numbers
from metafast.executors.python_loss import PythonLoss
from metafast.program import Program
from metafast.program.inner_loop import InnerLoop
from metafast.program.rule import started
from metafast.tasks import Batch, TaskBatch, TaskShapes

_META_GRADIENT = None if extension is None else torch.ops.metafast.cpu_meta_gradient.default
_BUDGET = 256 << 20  # bytes
_TEAM_FROM = 1 << 18  # products that take a core some ten microseconds, beside which a barrier costs little


class CpuExecutor(Executor):
    """Runs Programs by C++ on the CPU.

    Args:
        budget: the bytes of activations that may be kept from the inner loop for the way back, which else computes
            them again.
        isa: the instruction set, one of ``CpuExecutor.isas()``; ``None`` takes the best.
        team_from: where there are fewer tasks than threads, several threads share a task if its contractions have at
            least this many products on average.
    """

    name = "cpu"
    remedy = "pip install --no-build-isolation -e ."

    def __init__(self, budget: int = _BUDGET, isa: str | None = None, team_from: int = _TEAM_FROM) -> None:
        self.budget = budget
        self.team_from = team_from
        self._isa = isa
        self._models = Models(Model)
        self._models_under_external_loss = Models(partial(Model, external_loss=True))

    @staticmethod
    @lru_cache
    def isas() -> tuple[str, ...]:
        """Lists the instruction sets that both this processor and this build have, the best first."""
        return () if extension is None else tuple(extension.isas())

    @property
    def isa(self) -> str:
        """Returns the instruction set that is used."""
        return self._isa or self.isas()[0]

    @cached_property
    def _build(self) -> int:
        """Returns the number under which C++ knows the instruction set."""
        return self.isas().index(self.isa)

    def plan_own(self, program: Program, loop: InnerLoop, shapes: TaskShapes) -> ExecutionPlan | str:
        if extension_error is not None:
            return extension_error
        if self.isa not in self.isas():
            return f"isa={self.isa!r} is not among {list(self.isas())}"
        if shapes.device.type != "cpu":
            return f"device {shapes.device}: it runs on the CPU"
        if shapes.dtype not in (torch.float32, torch.float64):
            return f"dtype {shapes.dtype}: it runs float32 and float64"
        reason = unsupported_layer(program, shapes.sample)
        if reason is not None:
            return reason
        try:
            needed = self._memory(program, shapes, loop._replace(memory=None))
        except ValueError as error:
            return str(error)
        with suppress(ValueError):  # which a call raises where the memory is too small
            needed = self._memory(program, shapes, loop)
        several = needed["team_workspace"] and needed["chunks"] < torch.get_num_threads()
        alone = f"{'several cores' if several else 'a core'} for each task"
        where = f"C++ ({self.isa}), " + (f"a core for {needed['lanes']} tasks at once" if needed["lanes"] else alone)
        where += "; the loss in Python" if unsupported_loss(program, shapes) else ""
        return ExecutionPlan(
            self,
            lambda: tuple(where for _ in program.nodes),
            f"executor {self.name!r} may wait for the host",
            lambda: str(self.memory(program, loop, shapes)),
        )

    def memory(self, program: Program, loop: InnerLoop, shapes: TaskShapes) -> MemoryPlan:
        """Plans the working memory of a meta-gradient of tasks of these shapes.

        Raises:
            ValueError: C++ cannot run the program on these shapes, or ``loop.memory`` is less than any plan needs; the
                text says why.
        """
        needed = self._memory(program, shapes, loop)
        cores = torch.get_num_threads()
        tasks = min(cores, needed["chunks"])
        each = max(needed["task_memory"], needed["lanes_memory"])
        elements = needed["shared"] + tasks * each + (cores - tasks) * needed["team_workspace"]
        at_once = unsupported_loss(program, shapes) is None and program.query is program
        at_once = at_once and rule_numbers(loop.rule) is not None
        back = loop.steps - needed["begin"]
        words = ""
        if 0 < needed["segment"] < back:
            again = f"{back - needed['segment']} of {back} taken again"
            words = f"{needed['segment']} steps kept at a time, {again}, which costs a gradient each"
        elif back < loop.steps:
            words = f"the way back through {back} of {loop.steps} steps"
        peak = elements * shapes.dtype.itemsize
        at_a_time = min(cores * (needed["lanes"] or 1), shapes.tasks)
        return MemoryPlan(at_a_time, at_once and bool(needed["keeps_tapes"]), peak, words)

    def predict(
        self, program: Program, params: Tensor, x: Tensor, step: int = 0, seeds: Tensor | None = None
    ) -> Tensor:
        return self.outputs(program, params, Batch(x, x), step)

    def loss_and_grad(
        self, program: Program, params: Tensor, batch: Batch, step: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not has_rules(program.loss, batch.y):
            return PythonLoss(self).loss_and_grad(program, params, batch, step)
        model = self._models.of(program, batch.x.shape[2:])
        return self._loss_and_grad(model, params, batch, targets(program.loss, batch.y, batch.x.dtype), step)

    def adapt(self, program: Program, loop: InnerLoop, params: Tensor, rates: Tensor, support: Batch) -> Tensor:
        found = self._fused(program, loop, rates, support, params.dtype)
        if found is None:
            return steps.adapt(self, program, loop, params, rates, support)
        first = support.at(0)
        if loop.states and not (params.dim() == 1 and len(params) == program.size):
            params = started(loop.rule, params, program.size).expand(first.x.shape[0], -1)
        model = self._models.of(program, first.x.shape[2:])
        trajectory: Tensor = call_op(
            torch.ops.metafast.cpu_adapt, *self._head(model, params.dtype), as_input(params), *found,
            *support_samples(program.loss, support), loop_numbers(loop, support.each_step, self.budget),
        )  # fmt: skip
        return trajectory

    def adapt_vjp(
        self, program: Program, loop: InnerLoop, trajectory: Tensor, rates: Tensor, support: Batch, v: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        found = self._fused(program, loop, rates, support, trajectory.dtype)
        if found is None:
            return steps.adapt_vjp(self, program, loop, trajectory, rates, support, v)
        model = self._models.of(program, support.at(0).x.shape[2:])
        grads, rates_grad = call_op(
            torch.ops.metafast.cpu_adapt_vjp, *self._head(model, trajectory.dtype), as_input(trajectory), *found,
            *support_samples(program.loss, support), as_input(v), loop_numbers(loop, support.each_step, self.budget),
        )  # fmt: skip
        return grads, rates_grad if loop.learns_rates else None

    def hvp(self, program: Program, params: Tensor, batch: Batch, u: Tensor, step: int = 0) -> Tensor:
        if not has_rules(program.loss, batch.y):
            return PythonLoss(self).hvp(program, params, batch, u, step)
        u = u.expand(batch.x.shape[0], -1) * program.adapted
        y = targets(program.loss, batch.y, batch.x.dtype)
        return self._hvp(self._models.of(program, batch.x.shape[2:]), params, batch, u, (y, y[:0]), step)

    def meta_gradient(
        self, program: Program, loop: InnerLoop, parameters: Sequence[Tensor], rates: Tensor, tasks: TaskBatch
    ) -> MetaGradient:
        loss, dtype, support = program.loss, parameters[0].dtype, tasks.support
        found = self._fused(program, loop, rates, support, dtype)
        if found is None or program.query_loss is not None or not has_rules(loss, tasks.query_y):
            return super().meta_gradient(program, loop, parameters, rates, tasks)
        model = self._models.of(program, tasks.query_x.shape[2:])
        query = RaggedPacking(tasks.query_mask)
        losses, outputs, grads, rates_grad = call_op(
            _META_GRADIENT, *self._head(model, dtype), parameters, *found, *support_samples(loss, support),
            *query.samples(loss, tasks.query_x, tasks.query_y), loop_numbers(loop, tasks.each_step, self.budget),
            loop.step_weights,
        )  # fmt: skip
        return MetaGradient(losses, query.unpack(outputs), grads, rates_grad if loop.learns_rates else None)

    def outputs(self, program: Program, params: Tensor, batch: Batch, step: int) -> Tensor:
        """Computes the outputs ``[T, n, ...]``, as all ``OutputDerivatives`` do."""
        model = self._models.of(program, batch.x.shape[2:])
        packing = RaggedPacking(batch.mask)
        found = call_op(
            torch.ops.metafast.cpu_predict, *self._head(model, params.dtype), as_input(params),
            packing.pack(batch.x), packing.sizes, step,
        )  # fmt: skip
        return packing.unpack(found)

    def outputs_vjp(self, program: Program, params: Tensor, batch: Batch, g: Tensor, step: int = 0) -> Tensor:
        model = self._models_under_external_loss.of(program, batch.x.shape[2:])
        return self._loss_and_grad(model, params, batch, g, step)[1]

    def outputs_jvp(
        self, program: Program, params: Tensor, batch: Batch, u: Tensor, step: int
    ) -> tuple[Tensor, Tensor]:
        """Computes the outputs and their tangent along ``u [T, P]``, both ``[T, n, ...]``."""
        model = self._models.of(program, batch.x.shape[2:])
        packing = RaggedPacking(batch.mask)
        found = call_op(
            torch.ops.metafast.cpu_jvp, *self._head(model, params.dtype), as_input(params), as_input(u),
            packing.pack(batch.x), packing.sizes, step,
        )  # fmt: skip
        outputs, tangents = (packing.unpack(part) for part in found)
        return outputs, tangents

    def outputs_hvp(
        self, program: Program, params: Tensor, batch: Batch, u: Tensor, g: Tensor, gd: Tensor, step: int
    ) -> Tensor:
        """Computes the tangents of the adjoints of all parameters along ``u``, ``[T, P]``."""
        model = self._models_under_external_loss.of(program, batch.x.shape[2:])
        return self._hvp(model, params, batch, u, (g, gd), step)

    def _hvp(
        self, model: Model, params: Tensor, batch: Batch, u: Tensor, y: tuple[Tensor, Tensor], step: int
    ) -> Tensor:
        """Computes ``H u``; ``y`` are the targets and nothing, or the adjoint of the outputs and its tangent."""
        packing = RaggedPacking(batch.mask)
        product: Tensor = call_op(
            torch.ops.metafast.cpu_hvp, *self._head(model, params.dtype), as_input(params), as_input(u),
            packing.pack(batch.x), packing.pack(y[0]), packing.pack(y[1]) if len(y[1]) else y[1], packing.sizes, step,
        )  # fmt: skip
        return product

    def _fused(
        self, program: Program, loop: InnerLoop, rates: Tensor, support: Batch, dtype: torch.dtype
    ) -> InnerSteps | None:
        """Returns the steps as operators take them; ``None`` where C++ cannot take them all in one call."""
        y = support.y.flatten(0, 1) if support.each_step else support.y
        return inner_steps(loop, rates, dtype) if has_rules(program.loss, y) else None

    def _loss_and_grad(
        self, model: Model, params: Tensor, batch: Batch, y: Tensor, step: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Computes losses, gradients and outputs; ``y`` are the targets, or the adjoint of the outputs."""
        packing = RaggedPacking(batch.mask)
        losses, grads, outputs = call_op(
            torch.ops.metafast.cpu_loss_and_grad, *self._head(model, params.dtype), as_input(params),
            packing.pack(batch.x), packing.pack(y), packing.sizes, step,
        )  # fmt: skip
        return losses, grads, packing.unpack(outputs)

    def _memory(self, program: Program, shapes: TaskShapes, loop: InnerLoop) -> dict[str, int]:
        """Asks C++ what a meta-gradient takes: elements of memory, and numbers of tasks (csrc/torch/facts.h)."""
        model = self._models.of(program, shapes.sample)
        numbers = call_op(
            torch.ops.metafast.cpu_memory, model.description, self._build, self.team_from, _empty(shapes.dtype),
            *shapes.samples, shapes.tasks, rule_numbers(loop.rule) or (), loop_numbers(loop, False, self.budget),
            loop.step_weights,
        ).tolist()  # fmt: skip
        return {name: int(number) for name, number in zip(FACTS["memory_numbers"], numbers, strict=True)}

    def _head(self, model: Model, dtype: torch.dtype) -> tuple[Tensor, int, int, int, Tensor]:
        """Returns the arguments with which every operator begins: the model and how it is run."""
        numbers = _empty(dtype)
        if model.constants:
            numbers = torch.cat([c.detach().to(dtype).reshape(-1) for c in model.constants])
        return model.description, self._build, self.team_from, model.rank, numbers


@lru_cache
def _empty(dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype)
