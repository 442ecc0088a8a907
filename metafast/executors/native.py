"""The native executor: the whole meta-step of a batch of tasks in one C++ call, on the CPU in float32 or float64.

Each task's inner loop and reverse sweep run on one core, tasks are spread over torch's threads; where there are fewer
tasks than threads, several share a task. Of small networks a core runs as many tasks at once as a vector has lanes. The
numbers depend on neither. The extension is built for
several instruction sets; the best one is used. Of ragged tasks each runs on its own samples alone. A loss without
rules in C++ makes one call a pass instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from metafast.executors import python_loss
from metafast.executors.base import Executor, MetaGradient, query_weights
from metafast.executors.description import (
    FACTS,
    LOSSES,
    Model,
    Models,
    Order,
    call,
    extension,
    foreign,
    missing,
    ready,
    targets,
)
from metafast.executors.memory import Plan
from metafast.program import Program
from metafast.tasks import Batch, TaskBatch

_META_GRADIENT = None if extension is None else torch.ops.metafast.cpu_meta_gradient.default
_BUDGET = 256 << 20
_TEAM_FROM = 1 << 18  # some ten microseconds of a core, beside which a barrier is short


class NativeExecutor(Executor, python_loss.Passes):
    """C++ on the CPU. ``budget`` bounds the bytes of activations kept from the inner loop for the way back; beyond it
    they are computed again. ``isa`` names one of ``NativeExecutor.isas()``; ``None`` takes the best. Where there are
    fewer tasks than threads, several threads share a task whose contractions have ``team_from`` products on average."""

    name = "native"

    def __init__(self, budget: int = _BUDGET, isa: str | None = None, team_from: int = _TEAM_FROM) -> None:
        self.budget, self.team_from = budget, team_from
        self._isa = isa
        self._models = Models(Model)

    @staticmethod
    @lru_cache
    def isas() -> tuple[str, ...]:
        """The instruction sets that this processor and this build have in common, the best first."""
        return () if extension is None else tuple(extension.isas())

    @property
    def isa(self) -> str:
        """The instruction set that runs."""
        return self._isa or self.isas()[0]

    @cached_property
    def _build(self) -> int:
        return self.isas().index(self.isa)

    def refuses(self, program: Program, x: Tensor, masked: bool = False, queries: int | None = None) -> str | None:
        if missing is not None:
            return missing
        if self.isa not in self.isas():
            return f"isa={self.isa!r} is not among {list(self.isas())}"
        if x.device.type != "cpu":
            return f"device {x.device}: it runs on the CPU"
        if x.dtype not in (torch.float32, torch.float64):
            return f"dtype {x.dtype}: it runs float32 and float64"
        reason = foreign(program, x)
        if reason is not None:
            return reason
        try:
            self._memory(program, x, x.shape[1])
        except ValueError as error:
            return str(error)
        return None

    def explain(self, program: Program, x: Tensor) -> list[str]:
        needed = self._memory(program, x, x.shape[1])
        several = needed["team_workspace"] and needed["chunks"] < torch.get_num_threads()
        alone = f"{'several cores' if several else 'a core'} for each task"
        where = f"a core for {needed['lanes']} tasks at once" if needed["lanes"] else alone
        return [f"C++ ({self.isa}), {where}" for _ in program.nodes]

    def memory_plan(self, program: Program, support_x: Tensor, query_x: Tensor, steps: int) -> str:
        keep, peak = self.memory(program, support_x, query_x, steps)
        together = self._memory(program, support_x, query_x.shape[1], steps)["lanes"] or 1
        return str(Plan(min(torch.get_num_threads() * together, len(support_x)), keep, peak))

    def memory(self, program: Program, support: Tensor, query: Tensor, steps: int) -> tuple[bool, int]:
        """Are the activations of every inner step kept, and the bytes of working memory that a meta-gradient takes.

        ``support`` and ``query`` are batches ``[T, n, ...]``.
        """
        needed, size = self._memory(program, support, query.shape[1], steps), support.element_size()
        cores = torch.get_num_threads()
        tasks = min(cores, needed["chunks"])
        keep = program.loss.stem in LOSSES and steps * needed["tape"] * size * tasks <= self.budget
        tapes = (steps if keep else 1) * needed["tape"] + max(needed["tangents"], needed["query_tape"])
        each = max(tapes + (2 * steps + 4) * program.size, needed["lanes_memory"])
        return keep, size * (tasks * each + (cores - tasks) * needed["team_workspace"])

    def predict(self, program: Program, params: Tensor, x: Tensor, step: int = 0) -> Tensor:
        return self.outputs(program, params, Batch(x, x), step)

    def loss_and_grad(
        self, program: Program, params: Tensor, batch: Batch, step: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        if program.loss.stem not in LOSSES:
            return python_loss.loss_and_grad(self, program, params, batch, step)
        return self._loss_and_grad(program, params, batch, targets(program, batch), step)

    def adapt(self, program: Program, params: Tensor, lr: Tensor, support: Batch, steps: int) -> Tensor:
        if program.loss.stem not in LOSSES:
            return python_loss.adapt(self, program, params, lr, support, steps)
        model, order = self._models.of(program, support.x), Order(support.mask)
        head = self._head(model, params.dtype)
        trajectory: Tensor = call(
            torch.ops.metafast.cpu_adapt, *head, ready(params), ready(lr.to(params.dtype)),
            order.pack(support.x), order.pack(targets(program, support)), order.sizes, steps,
        )  # fmt: skip
        return trajectory

    def adapt_vjp(
        self,
        program: Program,
        trajectory: Tensor,
        lr: Tensor,
        support: Batch,
        v: Tensor,
        *,
        first_order: bool = False,
        needs_lr: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        options = {"first_order": first_order, "needs_lr": needs_lr}
        if program.loss.stem not in LOSSES:
            return python_loss.adapt_vjp(self, program, trajectory, lr, support, v, **options)
        model, order = self._models.of(program, support.x), Order(support.mask)
        head = self._head(model, trajectory.dtype)
        grads, lr_grad = call(
            torch.ops.metafast.cpu_adapt_vjp, *head, ready(trajectory), ready(lr.to(trajectory.dtype)),
            order.pack(support.x), order.pack(targets(program, support)), order.sizes, ready(v), first_order, needs_lr,
        )  # fmt: skip
        return grads, lr_grad if needs_lr else None

    def meta_gradient(
        self,
        program: Program,
        params: Tensor,
        lr: Tensor,
        tasks: TaskBatch,
        steps: int,
        *,
        step_weights: list[float] | None = None,
        first_order: bool = False,
        needs_lr: bool = True,
    ) -> MetaGradient:
        if program.loss.stem not in LOSSES:
            return super().meta_gradient(
                program, params, lr, tasks, steps,
                step_weights=step_weights, first_order=first_order, needs_lr=needs_lr,
            )  # fmt: skip
        losses, outputs, (grad,), lr_grad = self.gradients(
            program, (params,), lr, tasks, steps,
            step_weights=step_weights, first_order=first_order, needs_lr=needs_lr,
        )  # fmt: skip
        return MetaGradient(losses, outputs, grad, lr_grad)

    def gradients(
        self,
        program: Program,
        parameters: Sequence[Tensor],
        lr: Tensor,
        tasks: TaskBatch,
        steps: int,
        *,
        step_weights: list[float] | None = None,
        first_order: bool = False,
        needs_lr: bool = True,
    ) -> tuple[Tensor, Tensor, Sequence[Tensor], Tensor | None]:
        if program.loss.stem not in LOSSES:
            return super().gradients(
                program, parameters, lr, tasks, steps,
                step_weights=step_weights, first_order=first_order, needs_lr=needs_lr,
            )  # fmt: skip
        x, dtype = tasks.support_x, parameters[0].dtype
        model, front, behind = self._models.of(program, x), Order(tasks.support_mask), Order(tasks.query_mask)
        losses, outputs, grads, lr_grad = call(
            _META_GRADIENT, *self._head(model, dtype), parameters, ready(lr if lr.dtype == dtype else lr.to(dtype)),
            front.pack(x), front.pack(targets(program, tasks.support)), front.sizes,
            behind.pack(tasks.query_x), behind.pack(targets(program, tasks.query)), behind.sizes,
            query_weights(step_weights, steps), first_order, needs_lr, self.budget,
        )  # fmt: skip
        return losses, behind.unpack(outputs), grads, lr_grad if needs_lr else None

    def outputs(self, program: Program, params: Tensor, batch: Batch, step: int) -> Tensor:
        model, order = self._models.of(program, batch.x), Order(batch.mask)
        head = self._head(model, params.dtype)
        found = call(torch.ops.metafast.cpu_predict, *head, ready(params), order.pack(batch.x), order.sizes, step)
        return order.unpack(found)

    def pull(self, program: Program, params: Tensor, batch: Batch, g: Tensor, step: int) -> Tensor:
        return self._loss_and_grad(program, params, batch, g, step)[1]

    def push(self, program: Program, params: Tensor, batch: Batch, u: Tensor, step: int) -> tuple[Tensor, Tensor]:
        model, order = self._models.of(program, batch.x), Order(batch.mask)
        head = self._head(model, params.dtype)
        found = call(torch.ops.metafast.cpu_jvp, *head, ready(params), ready(u), order.pack(batch.x), order.sizes, step)
        outputs, tangents = (order.unpack(part) for part in found)
        return outputs, tangents

    def bend(
        self, program: Program, params: Tensor, batch: Batch, u: Tensor, g: Tensor, gd: Tensor, step: int
    ) -> tuple[Tensor, Tensor]:
        model, order = self._models.of(program, batch.x), Order(batch.mask)
        head = self._head(model, params.dtype)
        grads, products = call(
            torch.ops.metafast.cpu_hvp, *head, ready(params), ready(u),
            order.pack(batch.x), order.pack(g), order.pack(gd), order.sizes, step,
        )  # fmt: skip
        return grads, products

    def _loss_and_grad(
        self, program: Program, params: Tensor, batch: Batch, y: Tensor, step: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        model, order = self._models.of(program, batch.x), Order(batch.mask)
        head = self._head(model, params.dtype)
        losses, grads, outputs = call(
            torch.ops.metafast.cpu_loss_and_grad, *head, ready(params),
            order.pack(batch.x), order.pack(y), order.sizes, step,
        )  # fmt: skip
        return losses, grads, order.unpack(outputs)

    def _memory(self, program: Program, x: Tensor, queries: int, steps: int = 1) -> dict[str, int]:
        """By name, what a meta-gradient takes: elements of memory, and numbers of tasks (csrc/torch/facts.h)."""
        model, like = self._models.of(program, x), _nothing(x.dtype)
        numbers = call(
            torch.ops.metafast.cpu_memory, model.description, self._build, self.team_from, like,
            x.shape[1], queries, len(x), steps, self.budget,
        ).tolist()  # fmt: skip
        return {name: int(number) for name, number in zip(FACTS["memory_numbers"], numbers, strict=True)}

    def _head(self, model: Model, dtype: torch.dtype) -> tuple[Tensor, int, int, int, Tensor]:
        constants = [c.detach().to(dtype).reshape(-1) for c in model.constants]
        numbers = torch.cat(constants) if constants else _nothing(dtype)
        return model.description, self._build, self.team_from, model.rank, numbers


@lru_cache
def _nothing(dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype)
