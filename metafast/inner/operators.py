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
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors

from metafast.executors import Executor
from metafast.inner.autograd import NO_MAPPING, ONLY_ONCE, STATISTICS_CHANGED, evaluate, versions, way_back
from metafast.inner.recorded import recorded
from metafast.program import Program
from metafast.program.inner_loop import InnerLoop
from metafast.tasks import TaskBatch

_NO_SUCH_LEARNER = "the learner that this graph was compiled for is gone: keep it alive, or compile the new one"
_OTHER_LOSS = (
    "the parameters of the loss module are not those that the compiled graph was given; under "
    "torch.func.functional_call call the learner uncompiled"
)


class Compilable(Protocol):
    """Is what the operators ask of a learner."""

    loss_modules: nn.ModuleList

    def for_operator(self, tasks: TaskBatch, trains: bool) -> tuple[Executor, Program]:
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


def _batch(inputs: Sequence[Tensor], support_mask: Tensor | None, query_mask: Tensor | None) -> TaskBatch:
    """Makes the batch of the inputs of ``meta_loss``, which are parameters, rates, and then its tensors."""
    support_x, support_y, query_x, query_y = inputs[2:6]
    return TaskBatch(support_x, support_y, query_x, query_y, support_mask, query_mask)


def _written(program: Program) -> Tensor:
    """Counts the writes to all constants of the program, so that a later one shows."""
    return torch.tensor(sum(versions(program)))


@torch.library.custom_op("metafast::meta_loss", mutates_args=())
def meta_loss(
    learner: int, theta: Tensor, rates: Tensor, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor,
    of_loss: Tensor, support_mask: Tensor | None, query_mask: Tensor | None,
    step_weights: Sequence[float], first_order: bool, trains: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Computes an ``Evaluation``, and the number of writes to the program's constants.

    ``of_loss`` are the parameters of the loss module, flat; ``trains`` says whether gradients may be asked for.
    """
    owner = _find(learner)
    tasks = TaskBatch(support_x, support_y, query_x, query_y, support_mask, query_mask)
    if of_loss.numel() and not torch.equal(of_loss, _flatten_dense_tensors(list(owner.loss_modules.parameters()))):
        raise RuntimeError(_OTHER_LOSS)
    with _with_autograd():
        executor, program = owner.for_operator(tasks, trains)
        found = evaluate(executor, program, _loop(step_weights, first_order), theta, rates, tasks)
    return *(t.contiguous() for t in found), _written(program)  # type: ignore[return-value]


@meta_loss.register_fake
def _(
    learner: int, theta: Tensor, rates: Tensor, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor,
    of_loss: Tensor, support_mask: Tensor | None, query_mask: Tensor | None,
    step_weights: Sequence[float], first_order: bool, trains: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    tasks = support_x.shape[0]
    loop = _loop(step_weights, first_order)
    outputs = _find(learner).output_shape(theta, query_x[0])
    size = theta.shape[0]
    shapes = ((tasks,), (tasks, *outputs), (loop.steps + 1, tasks, size), (len(loop.judged_steps), tasks, size))
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
    tasks = _batch(inputs, support_mask, query_mask)
    with _with_autograd():
        executor, program = owner.for_operator(tasks, False)
        if not torch.equal(written, _written(program)):
            raise RuntimeError(STATISTICS_CHANGED)
        loop = _loop(step_weights, first_order, needed[1])
        adjoints = (g_losses, g_outputs)
        if any(needed[2:]):
            grads = _recorded_vjp(owner, program, loop, inputs, tasks, adjoints, needed)
        else:
            found = way_back(executor, program, loop, inputs[1], tasks, (trajectory, query_grads), adjoints)
            grads = [*found, *(None,) * (len(inputs) - 2)]
    return [
        t.new_empty(0) if g is None or not need else g.clone(memory_format=torch.contiguous_format)
        for t, g, need in zip(inputs, grads, needed, strict=True)
    ]


def _recorded_vjp(
    owner: Compilable, program: Program, loop: InnerLoop, inputs: Sequence[Tensor], tasks: TaskBatch,
    adjoints: tuple[Tensor | None, Tensor | None], needed: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """Computes the adjoints of all inputs through plain operations."""
    with torch.enable_grad():
        *leaves, _ = (t.detach().requires_grad_(need) for t, need in zip(inputs, needed, strict=True))
        batch = _batch(leaves, tasks.support_mask, tasks.query_mask)
        found = recorded(program, loop, leaves[0], leaves[1], batch)
        pairs = [(value, g) for value, g in zip(found, adjoints, strict=True) if g is not None]
        of_loss = list(owner.loss_modules.parameters()) if needed[-1] else []
        trained = [p for p in of_loss if p.requires_grad]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        grads = torch.autograd.grad(
            [value for value, _ in pairs], [*wanted, *trained], [g for _, g in pairs], materialize_grads=True,
            allow_unused=True,
        )  # fmt: skip
    by_leaf = iter(grads[: len(wanted)])
    by_parameter = iter(grads[len(wanted) :])
    of_inputs = [next(by_leaf) if leaf.requires_grad else None for leaf in leaves]
    flat = [(next(by_parameter) if p.requires_grad else torch.zeros_like(p)).reshape(-1) for p in of_loss]
    return [*of_inputs, torch.cat(flat) if flat else None]


@meta_loss_vjp.register_fake
def _(
    learner: int, inputs: Sequence[Tensor], support_mask: Tensor | None, query_mask: Tensor | None,
    step_weights: Sequence[float], first_order: bool, trajectory: Tensor, query_grads: Tensor, written: Tensor,
    g_losses: Tensor | None, g_outputs: Tensor | None, needed: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    return [t.new_empty(t.shape if need else 0) for t, need in zip(inputs, needed, strict=True)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.learner, *tensors, ctx.step_weights, ctx.first_order, _ = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, g_losses: Tensor | None, g_outputs: Tensor | None, *_: Tensor | None) -> Any:
    *inputs, support_mask, query_mask, trajectory, query_grads, written = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[1 : 1 + len(inputs)])
    grads = meta_loss_vjp(
        ctx.learner, inputs, support_mask, query_mask, ctx.step_weights, ctx.first_order, trajectory, query_grads,
        written, g_losses, g_outputs, needed,
    )  # fmt: skip
    return None, *(g if need else None for g, need in zip(grads, needed, strict=True)), *(None,) * 5


def _refuse_twice(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(ONLY_ONCE)


def _refuse_mapping(info: Any, in_dims: Any, *args: Any) -> Any:
    raise RuntimeError(NO_MAPPING)


meta_loss.register_autograd(_backward, setup_context=_keep)
meta_loss_vjp.register_autograd(_refuse_twice)
meta_loss.register_vmap(_refuse_mapping)
meta_loss_vjp.register_vmap(_refuse_mapping)
