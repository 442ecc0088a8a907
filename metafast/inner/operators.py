"""Registers a learner's loss and its way back as operators of torch, so that torch.compile takes each as one node.

A compiled graph cannot hold a learner. It holds the learner's number, by which the operators find it when they run.
"""

from __future__ import annotations

import functools
import itertools
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from metafast.executors import Executor
from metafast.executors.composition import Adjoints, Sets, segments_of
from metafast.inner.autograd import NO_MAPPING, ONLY_ONCE, STATISTICS_CHANGED, evaluate, versions, way_back
from metafast.inner.recorded import recorded_vjp, standing_in
from metafast.program import Program
from metafast.program.inner_loop import InnerLoop
from metafast.tasks import Batch, TaskBatch

_NO_SUCH_LEARNER = "the learner that this graph was compiled for is gone: keep it alive, or compile the new one"


class Operand(NamedTuple):
    """Holds what computes a batch.

    Attributes:
        executor: the executor that was chosen.
        program: the Program.
        columns: which elements of the vector of all parameters are those of the Program, int64 ``[P]``; ``None``: all.
    """

    executor: Executor
    program: Program
    columns: Tensor | None

    def pick(self, of_all: Tensor) -> Tensor:
        """Returns the elements ``[..., P]`` of the Program's parameters; a single rate serves all of them."""
        return of_all if self.columns is None or of_all.shape[-1] == 1 else of_all[..., self.columns]

    def spread(self, picked: Tensor, size: int) -> Tensor:
        """Puts what ``pick`` has picked of ``size`` elements into their places, beside zeros."""
        if self.columns is None or picked.shape[-1] == size:
            return picked
        return picked.new_zeros(*picked.shape[:-1], size).index_copy(-1, self.columns, picked)


class Compilable(Protocol):
    """Is what the operators ask of a learner."""

    loss_modules: nn.ModuleList

    def for_operator(self, tasks: TaskBatch, trains: bool) -> Operand:
        """Checks a batch and says what computes it; where it ``trains``, running statistics move."""

    def output_shape(self, theta: Tensor, x: Tensor) -> tuple[int, ...]:
        """Returns the shape of the outputs for one task's samples ``x``; neither needs to hold data."""


_learners: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def register(learner: Compilable) -> int:
    """Gives the learner its number."""
    number = next(_numbers)
    _learners[number] = learner
    return number


def _find(number: int) -> Compilable:
    learner: Compilable | None = _learners.get(number)
    if learner is None:
        raise RuntimeError(_NO_SUCH_LEARNER)
    return learner


def _loop(step_weights: Sequence[float], first_order: bool, learns_rates: bool = False) -> InnerLoop:
    return InnerLoop(len(step_weights) - 1, tuple(step_weights), first_order, learns_rates)


@functools.cache
def _usual_dispatch() -> tuple[Any, Any]:
    """Returns the dispatch keys that a new thread includes and excludes."""
    found: list[Any] = []

    def look() -> None:
        found.extend((torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return found[0], found[1]


@contextmanager
def _with_autograd() -> Iterator[None]:
    """Lets autograd and transforms work inside an operator, where torch has taken their dispatch keys away."""
    with torch._C._ForceDispatchKeyGuard(*_usual_dispatch()), torch.no_grad():
        yield


def _sets(masks: tuple[Tensor | None, Tensor | None], tensors: Sequence[Tensor]) -> Sets:
    """Makes the support and query sets of their tensors."""
    support_x, support_y, query_x, query_y = tensors
    return Sets(Batch(support_x, support_y, masks[0]), Batch(query_x, query_y, masks[1]))


def _written(program: Program) -> Tensor:
    """Counts the writes to all constants of the program, so that a later one shows."""
    return torch.tensor(sum(versions(program)))


@torch.library.custom_op("metafast::meta_loss", mutates_args=())
def meta_loss(
    learner: int, theta: Tensor, rates: Tensor, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor,
    of_loss: Sequence[Tensor], support_mask: Tensor | None, query_mask: Tensor | None,
    step_weights: Sequence[float], first_order: bool, trains: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Computes an ``Evaluation``, and the number of writes to the program's constants.

    ``of_loss`` are the parameters of the loss modules; ``trains`` says whether gradients may be asked for.
    """
    owner = _find(learner)
    tasks = TaskBatch(support_x, support_y, query_x, query_y, support_mask, query_mask)
    with _with_autograd():
        operand = owner.for_operator(tasks, trains)
        executor, program, _ = operand
        loop = _loop(step_weights, first_order)
        sets = Sets(tasks.support, tasks.query)
        with standing_in(owner.loss_modules, of_loss):
            found = evaluate(executor, program, loop, operand.pick(theta), operand.pick(rates), sets)
        trajectory, grads = (operand.spread(t, theta.shape[0]).contiguous() for t in (found.kept, found.query_grads))
    return found.losses.contiguous(), found.outputs.contiguous(), trajectory, grads, _written(program)


@meta_loss.register_fake
def _(
    learner: int, theta: Tensor, rates: Tensor, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor,
    of_loss: Sequence[Tensor], support_mask: Tensor | None, query_mask: Tensor | None,
    step_weights: Sequence[float], first_order: bool, trains: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    tasks = support_x.shape[0]
    loop = _loop(step_weights, first_order)
    outputs = _find(learner).output_shape(theta, query_x[0])
    size = theta.shape[0]
    segments = segments_of(loop, tasks, size, theta.element_size())
    judged = len(loop.judged_steps) if segments.keeps_all else 1
    shapes = ((tasks,), (tasks, *outputs), (segments.rows, tasks, size), (judged, tasks, size))
    losses, of_query, trajectory, grads = (theta.new_empty(shape) for shape in shapes)
    return losses, of_query, trajectory, grads, torch.empty((), dtype=torch.int64)


@torch.library.custom_op("metafast::meta_loss_vjp", mutates_args=())
def meta_loss_vjp(
    learner: int, inputs: Sequence[Tensor], support_mask: Tensor | None, query_mask: Tensor | None,
    step_weights: Sequence[float], first_order: bool, trajectory: Tensor, query_grads: Tensor, written: Tensor,
    g_losses: Tensor | None, g_outputs: Tensor | None, needed: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """Computes the adjoints of the ``inputs`` of ``meta_loss`` that are ``needed``; the others get an empty tensor."""
    owner = _find(learner)
    support_x, support_y, query_x, query_y = inputs[2:6]
    tasks = TaskBatch(support_x, support_y, query_x, query_y, support_mask, query_mask)
    with _with_autograd():
        operand = owner.for_operator(tasks, False)
        executor, program, _ = operand
        if not torch.equal(written, _written(program)):
            raise RuntimeError(STATISTICS_CHANGED)
        loop = _loop(step_weights, first_order, needed[1])
        adjoints = Adjoints(g_losses, g_outputs)
        masks = support_mask, query_mask
        if any(needed[2:]):
            grads = recorded_vjp(
                executor, program, loop, owner.loss_modules, partial(_sets, masks), inputs, operand.pick(trajectory),
                adjoints, needed, operand.pick,
            )  # fmt: skip
        else:
            kept = operand.pick(trajectory), operand.pick(query_grads)
            with standing_in(owner.loss_modules, inputs[6:]):
                grad, rates_grad = way_back(
                    executor, program, loop, operand.pick(inputs[1]), _sets(masks, inputs[2:6]), kept, adjoints
                )
            found = grad.sum(0), rates_grad
            spread = (g if g is None else operand.spread(g, t.shape[-1]) for g, t in zip(found, inputs, strict=False))
            grads = [*spread, *(None,) * (len(inputs) - 2)]
    return [
        t.new_empty(0) if g is None or not need else g.clone(memory_format=torch.contiguous_format)
        for t, g, need in zip(inputs, grads, needed, strict=True)
    ]


@meta_loss_vjp.register_fake
def _(
    learner: int, inputs: Sequence[Tensor], support_mask: Tensor | None, query_mask: Tensor | None,
    step_weights: Sequence[float], first_order: bool, trajectory: Tensor, query_grads: Tensor, written: Tensor,
    g_losses: Tensor | None, g_outputs: Tensor | None, needed: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    return [t.new_empty(t.shape if need else 0) for t, need in zip(inputs, needed, strict=True)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.learner, *tensors, of_loss, support_mask, query_mask, ctx.step_weights, ctx.first_order, _ = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*tensors, support_mask, query_mask, *output[2:], *of_loss)
    ctx.of_loss = [p.requires_grad for p in of_loss]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, g_losses: Tensor | None, g_outputs: Tensor | None, *_: Tensor | None) -> Any:
    *inputs, support_mask, query_mask, trajectory, query_grads, written = ctx.saved_tensors[:11]
    needed = [*ctx.needs_input_grad[1 : 1 + len(inputs)], *ctx.of_loss]
    grads = meta_loss_vjp(
        ctx.learner, [*inputs, *ctx.saved_tensors[11:]], support_mask, query_mask, ctx.step_weights, ctx.first_order,
        trajectory, query_grads, written, g_losses, g_outputs, needed,
    )  # fmt: skip
    found = [g if need else None for g, need in zip(grads, needed, strict=True)]
    return None, *found[: len(inputs)], found[len(inputs) :], *(None,) * 5


def _refuse_twice(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(ONLY_ONCE)


def _refuse_mapping(info: Any, in_dims: Any, *args: Any) -> Any:
    raise RuntimeError(NO_MAPPING)


meta_loss.register_autograd(_backward, setup_context=_keep)
meta_loss_vjp.register_autograd(_refuse_twice)
meta_loss.register_vmap(_refuse_mapping)
meta_loss_vjp.register_vmap(_refuse_mapping)
