"""Fits a gradient-based learner into what torch does around it: gradients from outside, torch.func, torch.compile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from metafast.executors import Choice, Executor
from metafast.inner.autocast import in_own_dtype
from metafast.inner.operators import meta_loss, register
from metafast.inner.transforms import outside_transforms, plain_batch, transforming
from metafast.kernels.contract.layer import Loss
from metafast.learners.base import Learner, LearnerOutput
from metafast.learners.outside_gradients import NOTHING, LossProbe, Outside, Surroundings, batch_requires_grad
from metafast.program import Program
from metafast.program.recording import picked
from metafast.tasks import Samples, TaskBatch

_CREATE_GRAPH = (
    "create_graph=True records plain operations of unknown number, which a compiled graph cannot hold; call the "
    "learner uncompiled for it"
)
_DRAWS = (
    "the model draws random numbers, and a compiled graph has no place for their seeds; call the learner uncompiled, or "
    "call eval() on it"
)


class WithinTorch(Learner):
    """Its inner loop is differentiated by rules of its own, and torch sees as much of that as it has to.

    Attributes:
        number: the learner's number, by which operators find it.
        loss_modules: the modules that its losses are; their parameters are meta-parameters too.
    """

    model: nn.Module
    output: str | int | None

    def _set_losses(self, loss: Loss, query_loss: Loss | None = None) -> None:
        """Takes note of the losses; the learner calls it once in its constructor."""
        self._loss_probe = LossProbe(loss, query_loss)
        self.loss_modules = self._loss_probe.modules
        self.number = register(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Gives a copy a number of its own."""
        super().__setstate__(state)
        self.number = register(self)

    def _choice_for(self, tasks: TaskBatch) -> Choice:
        raise NotImplementedError

    def _track_statistics(self, tasks: TaskBatch) -> None:
        raise NotImplementedError

    @property
    def program(self) -> Program:
        """The Program of the latest batch."""
        raise NotImplementedError

    def meta_parameters(self) -> list[tuple[str, Tensor]]:
        """Lists the meta-parameters of the model, used or not, with their names."""
        raise NotImplementedError

    @property
    def _sources(self) -> list[Tensor]:
        raise NotImplementedError

    def _refresh_sources(self) -> None:
        """Looks the parameters up in the module again, where others may stand in their places."""
        raise NotImplementedError

    def _outside(self, choice: Choice, tasks: TaskBatch, judged: bool = True) -> Outside:
        """Finds what requires a gradient beside the parameters, in the batch and in losses that are the user's own."""
        if not self._loss_probe.needed and not batch_requires_grad(tasks):
            return NOTHING
        return self._loss_probe.look(Surroundings(choice, self.program, self._sources), tasks, judged)

    @contextmanager
    def _plainly(self, tasks: TaskBatch) -> Iterator[TaskBatch]:
        """Steps out of torch.func's transforms, and yields the batch without them.

        Raises:
            RuntimeError: a transform maps the batch over a further axis.
        """
        if not transforming():
            yield tasks
            return
        batch = plain_batch(tasks)
        try:
            with outside_transforms(self):
                self._refresh_sources()
                yield batch
        finally:
            self._refresh_sources()

    def _refuse_mapped(self, tasks: TaskBatch) -> None:
        """Raises RuntimeError where a transform maps the batch over a further axis."""
        if transforming():
            plain_batch(tasks)

    @in_own_dtype
    def for_operator(self, tasks: TaskBatch, trains: bool) -> tuple[Executor, Program]:
        """Checks a batch and says what computes it; where it ``trains``, running statistics move.

        Raises:
            RuntimeError: a loss reads a tensor that a compiled graph does not see, or the model draws random numbers.
        """
        choice = self._choice_for(tasks)
        unused = sorted({name for name, _ in self.meta_parameters()} - {p.name for p in self.program.parameters})
        if unused:
            raise RuntimeError(
                f"the model's forward pass does not use {unused}; under torch.compile it has to use all parameters: take "
                "them out, or call the learner uncompiled"
            )
        if self.program.draws:
            raise RuntimeError(_DRAWS)
        if self._loss_probe.needed:
            self._loss_probe.check_compiled(Surroundings(choice, self.program, self._sources), tasks)
        if trains:
            self._track_statistics(tasks)
        return choice.executor, self.program

    def output_shape(self, theta: Tensor, x: Tensor) -> tuple[int, ...]:
        """Returns the shape of the outputs for one task's samples ``x``; neither needs to hold data."""
        parameters = {name: theta.new_empty(p.shape) for name, p in self.model.named_parameters()}
        buffers = {name: x.new_empty(b.shape, dtype=b.dtype) for name, b in self.model.named_buffers()}
        with torch.no_grad():
            returned = functional_call(self.model, {**parameters, **buffers}, (x,))
        return tuple(picked(returned, self.output, self.model).shape)

    def _compiled(
        self, tasks: TaskBatch, rates: Tensor, step_weights: Sequence[float], first_order: bool, create_graph: bool
    ) -> LearnerOutput:
        """Calls the one operator that stands for all of the inner loop; this is what torch.compile traces."""
        if create_graph:
            raise RuntimeError(_CREATE_GRAPH)
        if isinstance(tasks.support_x, Samples):
            raise RuntimeError("samples of several tensors have no place in a compiled graph; call the learner uncompiled")
        theta = torch.cat([p.reshape(-1) for _, p in self.meta_parameters()])
        of_loss = [p.reshape(-1) for p in self.loss_modules.parameters()]
        losses, outputs, *_ = meta_loss(
            self.number, theta, rates, tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y,
            torch.cat(of_loss) if of_loss else theta.new_empty(0), tasks.support_mask, tasks.query_mask,
            list(step_weights), first_order, torch.is_grad_enabled(),
        )  # fmt: skip
        return LearnerOutput(losses, outputs)
