"""Fits a gradient-based learner into what torch does around it: gradients from outside, torch.func, torch.compile."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from metafast.executors import Choice
from metafast.inner.autocast import in_own_dtype
from metafast.inner.hyper_rates import HyperRates
from metafast.inner.operators import Operand, meta_loss, register
from metafast.inner.rates import Rates
from metafast.inner.transforms import outside_transforms, plain, plain_batch, transforming
from metafast.kernels.contract.layer import Loss
from metafast.learners.base import Learner, LearnerOutput
from metafast.learners.batch_norm import in_modes
from metafast.learners.captures import Captures, has_own_derivatives
from metafast.learners.known_batch import KnownBatch
from metafast.learners.layout import layout_of, named_rows
from metafast.learners.module_snapshot import ModuleSnapshot
from metafast.learners.outside_gradients import NOTHING, LossProbe, Outside, Surroundings, batch_requires_grad
from metafast.program import Program
from metafast.program.losses import may_become_another
from metafast.program.module_run import picked
from metafast.tasks import TaskBatch

_FUNCTIONS = (
    "the model calls a torch.autograd.Function, whose gradient autograd itself has to differentiate; a compiled graph "
    "cannot hold that: call the learner uncompiled"
)
_CREATE_GRAPH = (
    "create_graph=True records plain operations of unknown number, which a compiled graph cannot hold; call the "
    "learner uncompiled for it"
)
_DRAWS = (
    "the model draws random numbers, and a compiled graph has no place for their seeds; call the learner uncompiled, "
    "or call eval() on it"
)
_TRACES = (
    "the model changes buffers or attributes in training and reads buffers, which a compiled graph would find changed; "
    "call the learner uncompiled, or call eval() on it"
)
_FIRST_ORDER_ALONE = (
    "under torch.func this learner has derivatives of first order alone, in parameters, inputs and loss modules: the "
    "rules of some operations are found by torch.autograd, which torch.func does not differentiate. For higher orders, "
    "and for tensors that a loss closes over, use torch.autograd.grad on learner(tasks, create_graph=True)"
)
_SEVERAL = (
    "samples of several tensors cannot go into a compiled graph; call the learner uncompiled, for instance in a "
    "function that torch.compiler.disable marks"
)


class WithinTorch(Learner):
    """Its inner loop is differentiated by rules of its own, and torch sees as much of that as it has to.

    Attributes:
        number: the learner's number, by which operators find it.
        loss_modules: the modules that its losses are; their parameters are meta-parameters too.
    """

    model: nn.Module
    loss_modules: nn.ModuleList
    rows: nn.ParameterDict
    rate: Rates
    hyper: HyperRates
    captures: Captures
    output: str | int | None
    _snapshot: ModuleSnapshot
    _swapped: bool

    @property
    @abstractmethod
    def program(self) -> Program: ...

    @property
    @abstractmethod
    def _sources(self) -> list[Tensor]: ...

    def _set_losses(self, loss: Loss, query_loss: Loss | None = None) -> None:
        """Takes note of the losses."""
        self._loss_probe = LossProbe(loss, query_loss)
        self._recognised = [one for one in (loss, query_loss) if one is not None and may_become_another(one)]
        self._modules["loss_modules"] = self._loss_probe.modules
        self.number = register(self)

    def _loss_options(self) -> tuple[object, ...]:
        """Lists the options of losses that users hold, which may change at any time; tensors by their numbers."""
        options = [pair for loss in self._recognised for pair in loss.options.items()]
        return tuple((name, id(value) if isinstance(value, Tensor) else value) for name, value in options)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Gives a copy a number of its own."""
        super().__setstate__(state)
        self.number = register(self)

    def _known_for(self, tasks: TaskBatch, judged: bool = True) -> KnownBatch:
        raise NotImplementedError

    def _track_statistics(self, tasks: TaskBatch) -> None:
        raise NotImplementedError

    def _leave_traces(self, tasks: TaskBatch) -> None:
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
        with outside_transforms(self):
            yield batch

    @contextmanager
    def _as_it_was(self, tasks: TaskBatch) -> Iterator[TaskBatch]:
        """Does what ``_plainly`` does, with the module's own parameters in their places."""
        with self._snapshot.put_back() if self._swapped else nullcontext(), self._plainly(tasks) as batch:
            yield batch

    def _refuse_mapped(self, tasks: TaskBatch) -> None:
        """Raises RuntimeError where a transform maps the batch or the parameters over a further axis."""
        if transforming():
            plain_batch(tasks)
            for parameter in self.parameters():
                plain(parameter)

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """Says in words what cannot be recorded under a transform of torch.func."""
        try:
            yield
        except RuntimeError as error:
            if transforming() and "requires_grad_()" in str(error):
                raise RuntimeError(_FIRST_ORDER_ALONE) from None
            raise

    @in_own_dtype
    def for_operator(self, tasks: TaskBatch, trains: bool) -> Operand:
        """Checks a batch and says what computes it; where it ``trains``, the model's buffers move.

        Raises:
            RuntimeError: a loss reads a tensor that a compiled graph does not see, or the model draws random numbers,
                or it may change what it reads.
        """
        known = self._known_for(tasks)
        choice = known.choice
        if has_own_derivatives(self.program):
            raise RuntimeError(_FUNCTIONS)
        if self.program.draws:
            raise RuntimeError(_DRAWS)
        if self._loss_probe.needed:
            self._loss_probe.check_compiled(Surroundings(choice, self.program, self._sources), tasks)
        if trains:
            if known.leaves_traces and self.training and self.program.all_constants:
                raise RuntimeError(_TRACES)
            self._track_statistics(tasks)
            self._leave_traces(tasks)
        used = {p.name for p in self.program.parameters}
        columns = None
        if len(used) < len(layout := layout_of(self.model, self.rows)):
            columns = torch.cat([torch.arange(p.offset, p.offset + p.size) for p in layout if p.name in used])
            columns = columns.to(tasks.support_y.device)
        return Operand(choice.executor, self.program, columns)

    def output_shape(self, theta: Tensor, x: Tensor) -> tuple[int, ...]:
        """Returns the shape of the outputs for one task's samples ``x``; neither needs to hold data."""
        shapes = {name: p.shape for name, p in self.model.named_parameters()}
        buffers = {name: x.new_empty(b.shape, dtype=b.dtype) for name, b in self.model.named_buffers()}
        named = {p.name: theta[p.offset : p.offset + p.size].reshape(p.shape) for p in layout_of(self.model, self.rows)}
        parameters = {name: t if t.shape == shapes[name] else t[0] for name, t in named.items()}
        tensors = [*self.model.parameters(), *self.model.buffers()]
        twin = deepcopy(self.model, {id(t): t for t in tensors})  # what forward may change is the twin's
        with torch.no_grad(), in_modes(twin, self.captures.modes()):
            return tuple(picked(functional_call(twin, {**parameters, **buffers}, (x,)), self.output, twin).shape)

    def _compiled(
        self, tasks: TaskBatch, step_weights: Sequence[float], first_order: bool, create_graph: bool
    ) -> LearnerOutput:
        """Calls the one operator that stands for all of the inner loop; this is what torch.compile traces."""
        if create_graph:
            raise RuntimeError(_CREATE_GRAPH)
        if not isinstance(tasks.support_x, Tensor):
            raise RuntimeError(_SEVERAL)
        named = dict(self.model.named_parameters())
        rows = named_rows(self.rows)
        theta = torch.cat([rows.get(name, p).reshape(-1) for name, p in named.items()])
        losses, outputs, *_ = meta_loss(
            self.number, theta, self.rate(), tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y,
            list(self.loss_modules.parameters()), tasks.support_mask, tasks.query_mask,
            list(step_weights), first_order, torch.is_grad_enabled(),
        )  # fmt: skip
        return LearnerOutput(losses, outputs)
