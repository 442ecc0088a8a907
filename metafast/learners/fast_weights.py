"""Takes inner steps one after another, each a part of a larger graph: weights that learn as a sequence runs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from metafast.executors.composition import Sets
from metafast.inner.autocast import in_own_dtype
from metafast.inner.autograd import MetaLoss, flattened
from metafast.inner.recorded import recorded
from metafast.learners.checks import check_steps
from metafast.learners.maml import MAML
from metafast.learners.seeds import with_seeds
from metafast.tasks import TaskBatch


class Fast(NamedTuple):
    """Holds fast weights after some steps.

    Attributes:
        z: the parameters of each task and the state of the rule behind them, ``[T, (1 + K) P]``, with their graph. The
            parameters that the model uses lie in the order of ``model.parameters()``.
        steps: the number of steps taken.
    """

    z: Tensor
    steps: int


class FastWeights(MAML):
    """Takes the S inner steps of MAML from where the last call ended, with a graph through all of it.

    Each of T sequences has weights of its own that learn as it runs: ``z_{i+1} = steps(z_i, support_i)``, and
    ``outputs_i = model(z_{i+1}; query_i)``. Gradients go to the initial weights, the learning rates, and the inputs and
    targets of every call. A test-time-training layer (Sun et al. 2024, 2407.04620) is this with one call a chunk: keys
    and values are the support, queries the query set.

    Args:
        model: the module whose parameters are the fast weights at the beginning.
        **options: those of :class:`~metafast.learners.maml.MAML` but ``step_weights``.
    """

    @in_own_dtype
    def after(
        self, fast: Fast | None, support_x: Tensor, support_y: Tensor, query_x: Tensor, *, each_step: bool = False
    ) -> tuple[Tensor, Fast]:
        """Takes S steps on the support set; returns outputs ``[T, m, ...]`` for ``query_x``, and what to go on from.

        Args:
            fast: what the last call returned; ``None``: the initial weights, the same for all sequences; or
                ``Fast(z, 0)`` with weights ``[T, P]`` of your own to begin with.
            support_x: ``[T, n, ...]``, or with ``each_step`` ``[S, T, n, ...]``.
            support_y: the targets of the inner loss, likewise.
            query_x: ``[T, m, ...]``.

        Raises:
            TypeError, ValueError: the samples do not fit the model, or ``fast`` is of another number of sequences, or
                of parameters.
        """
        first_y = support_y[0] if each_step else support_y
        query_y = first_y[:, :1].detach().expand(-1, query_x.shape[1], *first_y.shape[2:])
        tasks = TaskBatch(support_x, support_y, query_x, query_y, each_step=each_step)
        known = self._known_for(tasks)
        check_steps(tasks, self.steps)
        tasks = with_seeds(known.program, tasks)
        outside = self._outside(known.choice, tasks.first_step)
        if fast is not None and not isinstance(fast, Fast):
            raise TypeError(f"fast is a {type(fast).__name__}; pass what the last call returned, mf.Fast(z, 0) or None")
        z, steps = fast if fast is not None else (self._start_of(self.flat_parameters()), 0)
        if fast is not None:
            self._check(z, len(tasks))
        unjudged = (0.0,) * (self.steps + 1)
        loop = self.loop._replace(first=steps, step_weights=unjudged)
        rates, program = self.inner_rates(), self._held_program()
        if torch.is_grad_enabled() and (outside.must_be_recorded() or known.is_recorded or outside.own):
            return self._after_recorded(loop, z, rates, tasks)
        spec, tensors = flattened(tasks)
        modules = self._outside_modules
        _, outputs, final, *_ = MetaLoss.apply(
            z, rates, known.choice.executor, program, loop, spec, modules, *tensors, *modules.parameters()
        )
        return outputs, Fast(final, steps + self.steps)

    def weights(self, fast: Fast) -> dict[str, Tensor]:
        """Returns fast weights by the names of the model's parameters, ``[T, *shape]`` each, with their graph.

        Raises:
            RuntimeError: no batch has been seen yet.
        """
        return self.program.by_name(fast.z[:, : self.program.size])

    def _check(self, z: Tensor, tasks: int) -> None:
        size, states = self.program.size, self.loop.states
        if z.dim() != 2 or z.shape[1] not in (size, (1 + states) * size):
            state = f", or {(1 + states) * size} with the state of the rule" if states else ""
            raise ValueError(
                f"fast: weights of shape {list(z.shape)}; give [T, P] for {tasks} sequences, and the model has "
                f"P = {size} parameters{state}"
            )
        if z.shape[0] != tasks:
            raise ValueError(f"fast: these are the weights of {z.shape[0]} sequences, and the batch has {tasks}")

    def _after_recorded(self, loop: Any, z: Tensor, rates: Tensor, tasks: TaskBatch) -> tuple[Tensor, Fast]:
        with self._recording():
            _, outputs, final = recorded(self._held_program(), loop, z, rates, Sets(tasks.support, tasks.query))
        return outputs, Fast(final, loop.first + self.steps)
