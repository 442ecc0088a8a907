"""What all gradient-based learners share: the captured model, the checks, the choice of executor, adaptation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors

from metafast.executors import Choice, Executor, check_backend, check_precision, choose, name_of
from metafast.executors.reference.executor import ReferenceExecutor
from metafast.inner.rates import Rate, Rates
from metafast.kernels.batch_norm import MODES
from metafast.learners.checks import check_batch, check_like, check_padding, resolve_names
from metafast.learners.module_snapshot import ModuleSnapshot
from metafast.program import Program
from metafast.program.capture import capture
from metafast.program.inner_loop import InnerLoop
from metafast.program.losses import LossLike, as_loss
from metafast.program.running_statistics import track
from metafast.tasks import Batch, TaskBatch, TaskShapes


@dataclass(frozen=True)
class LearnerOutput:
    """``loss``: the mean over tasks; ``losses [T]``; ``outputs [T, m, ...]`` of the adapted models on the query sets
    (no gradient flows through the outputs)."""

    losses: Tensor
    outputs: Tensor

    @cached_property
    def loss(self) -> Tensor:
        """The mean of ``losses``, with their graph wherever it is read first."""
        if not self.losses.requires_grad:
            return self.losses.mean()
        with torch.enable_grad():
            return self.losses.mean()


@dataclass(frozen=True)
class Adapted:
    """T adapted models. ``parameters [T, P]``; ``sample`` is the shape of a sample."""

    program: Program
    choice: Choice
    parameters: Tensor
    step: int
    sample: tuple[int, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs ``[T, n, ...]`` for ``x [T, n, ...]``; no graph is kept."""
        theta = self.parameters
        if x.dim() < 2 or x.shape[0] != theta.shape[0] or x.shape[2:] != self.sample:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; these {theta.shape[0]} adapted models take [T, n, *sample] with "
                f"T = {theta.shape[0]} and samples of shape {self.sample}"
            )
        if x.dtype != theta.dtype or x.device != theta.device:
            raise TypeError(
                f"x is {x.dtype} on {x.device}, the adapted models are {theta.dtype} on {theta.device}; use "
                f"x.to({str(theta.device)!r}, {theta.dtype})"
            )
        return self.choice.executor.predict(self.program, self.parameters, x.contiguous(), self.step)

    def state_dict(self, task: int) -> dict[str, Tensor]:
        """The parameters of one task under the user's names: ``model.load_state_dict(..., strict=False)``."""
        if not 0 <= task < self.parameters.shape[0]:
            raise IndexError(f"task={task}: the adapted models are numbered 0..{self.parameters.shape[0] - 1}")
        tensors = self.program.unflatten(self.parameters[task])
        return {p.name: t.clone() for p, t in zip(self.program.parameters, tensors, strict=True)}


class _Seen(NamedTuple):
    """Of a kind of batch: the executor, the shape of a sample's output, and whether the targets of every batch are
    looked at."""

    choice: Choice
    output: tuple[int, ...]
    check_each: bool


class Learner(nn.Module):
    """A model that learns to adapt. ``parameters()`` are the meta-parameters; torch optimisers do the outer step.

    Args:
        model: any ``nn.Module`` that maps ``[n, ...]`` to one tensor; it stays untouched.
        loss: ``"cross_entropy"``, ``"mse"`` or a callable (outputs, targets) -> scalar for one task.
        lr: inner learning rate: a number, or a :class:`Rate`.
        steps: S, the number of inner steps.
        adapt: what the inner loop moves: names of parameters or modules, or modules; ``None``: every parameter that
            requires a gradient.
        bn: where batch norm takes its statistics from: ``"task"``, ``"per_step"``, ``"frozen"`` or ``"running"``.
        backend: the name of an executor, or one itself, or ``"auto"`` for the fastest that can run the model.
        precision: ``"float32"``, or where an executor offers them ``"tf32x3"``, as exact on tensor cores, or ``"tf32"``
            or ``"bf16"``, which put a meta-gradient of several steps off by several per cent and more.

    Raises:
        CaptureError: the model's forward pass cannot become a Program.
        ValueError: an option out of its range; the text names it.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: LossLike,
        lr: float | Rate,
        steps: int = 1,
        adapt: Iterable[str | nn.Module] | str | nn.Module | None = None,
        bn: str = "task",
        backend: str | Executor = "auto",
        precision: str = "float32",
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model={model!r} is no nn.Module; pass an instance of one")
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps={steps!r}: the inner loop takes a whole number of steps, at least 1")
        if bn not in MODES:
            raise ValueError(f"bn={bn!r} is unknown; choose from {MODES}")
        check_backend(backend)
        check_precision(precision)
        self.model, self.steps, self.backend, self.precision = model, steps, backend, precision
        self.loss, self.bn = as_loss(loss), bn
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        self.adapted_names = trained if adapt is None else resolve_names(model, adapt)
        self.program = self._capture()
        first = next(model.parameters())
        self.rows = self._rows_per_step()
        self._sources, self._captured = self._parameters_in_order(), ModuleSnapshot(model)
        self.rate = Rates(lr if isinstance(lr, Rate) else Rate(lr), self.program, steps, first)
        self._fixed_rate, self._watch = self.rate.fixed, ModuleSnapshot(self, owner=self)
        self.tracks = any(getattr(n.layer, "mode", None) == "running" for n in self.program.nodes)
        self._seen: dict[tuple[object, ...], _Seen] = {}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As of any module, without its walk through all modules where none has changed."""
        if set_to_none and not self._watch.changed():
            for parameter in self._watch.parameters:
                parameter.grad = None
        else:
            super().zero_grad(set_to_none)

    def adapt(
        self, support_x: Tensor, support_y: Tensor, steps: int | None = None, support_mask: Tensor | None = None
    ) -> Adapted:
        """Adapts to T tasks, ``support_x [T, n, ...]``, and returns their models; no graph is kept.

        ``steps`` may differ from that of training; with a rate for each step the last one serves all later steps.
        """
        tasks = TaskBatch(support_x, support_y, support_x, support_y, support_mask, support_mask)
        choice = self._prepare(tasks)
        steps = self.steps if steps is None else steps
        if not isinstance(steps, int) or steps < 0:
            raise ValueError(f"steps={steps!r}: the inner loop takes a whole number of steps, at least 0")
        with torch.no_grad():
            theta = self._adapted(choice, tasks.support, steps)
        return Adapted(self.program, choice, theta, steps, tuple(support_x.shape[2:]))

    def explain(self, x: Tensor | None = None) -> str:
        """Which executor runs each layer, and why. Pass ``x [T, n, ...]`` before the first batch has been seen."""
        if x is not None:
            choice = self._choose(TaskShapes.of_samples(x))
        elif self._seen:
            choice = next(reversed(self._seen.values())).choice
        else:
            return "no batch has been seen yet; call explain(support_x)"
        hows, memory = choice.plan.layers, choice.plan.memory()
        width = max(len(n.name) for n in self.program.nodes)
        sizes = [sum(self.program.parameters[k].size for k in n.params) for n in self.program.nodes]
        lines = [f"executor: {choice.executor.name} (backend={name_of(self.backend)!r})"]
        lines += [f"  passed over {name}: {reason}" for name, reason in choice.passed_over]
        for node, size, how in zip(self.program.nodes, sizes, hows, strict=True):
            label = getattr(node.layer, "label", node.layer.kind)
            lines.append(f"  {node.name:<{width}}  {label:<20} {size:>9,} parameters  {how}")
        moved = sum(p.size for p in self.program.parameters if p.adapted)
        lines.append(f"  loss: {self.program.loss.kind}; {moved:,} of {self.program.size:,} parameters are adapted")
        lines += [] if memory is None else [f"  memory of a meta-gradient: {memory}"]
        return "\n".join(lines)

    @property
    def loop(self) -> InnerLoop:
        """The inner loop as the executors read it, by the settings of now."""
        return InnerLoop.judged_last(self.steps)

    def flat_parameters(self) -> Tensor:
        """The meta-parameters of the model as one vector ``[P]``, tied to them by autograd."""
        return _flatten_dense_tensors(self._sources)

    def _adapted(self, choice: Choice, support: Batch, steps: int) -> Tensor:
        loop = InnerLoop.judged_last(steps)
        trajectory = choice.executor.adapt(self.program, loop, self.flat_parameters(), self.rate(), support)
        return trajectory[-1]

    def _capture(self) -> Program:
        return capture(self.model, self.loss, bn=self.bn, adapt=self.adapted_names, steps=self.steps)

    def _probe(self, x: Tensor) -> tuple[int, ...]:
        """The shape of a sample's output, from a run of one task."""
        y = ReferenceExecutor().predict(self.program, self.flat_parameters().detach(), x[:1])
        if y.shape[:2] != (1, x.shape[1]):
            raise ValueError(
                f"for samples [n, ...] = {list(x.shape[1:])} the model gives {list(y.shape[1:])}; its first axis must "
                "stay the sample axis n"
            )
        return tuple(y.shape[2:])

    def _refresh(self) -> None:
        """Captures the module again where it was moved (its buffers are other tensors then) or has changed its mode."""
        if not self._watch.changed():
            return
        if self._captured.changed():
            self.program = self._capture()
            self._sources, self._captured = self._parameters_in_order(), ModuleSnapshot(self.model)
            self._seen.clear()
        self._fixed_rate, self._watch = self.rate.fixed, ModuleSnapshot(self, owner=self)

    def _rates(self) -> Tensor:
        """``[1 or S, 1 or P]``: of the rule of the inner update."""
        return self.rate() if self._fixed_rate is None else self._fixed_rate

    def _parameters_in_order(self) -> list[Tensor]:
        named = {**dict(self.model.named_parameters()), **{k.replace("/", "."): v for k, v in self.rows.items()}}
        return [named[p.name] for p in self.program.parameters]

    def _rows_per_step(self) -> nn.ParameterDict:
        """``per_step`` batch norm: gamma and beta with a row for each inner step, started from the model's."""
        named = dict(self.model.named_parameters())
        rows = nn.ParameterDict()
        for p in self.program.parameters:
            if p.shape != named[p.name].shape:
                rows[p.name.replace(".", "/")] = nn.Parameter(named[p.name].detach().expand(p.shape).clone())
        return rows

    def _prepare(self, tasks: TaskBatch) -> Choice:
        """Checks a batch against the model and chooses the executor, once for each kind of batch."""
        check_batch(tasks)
        self._refresh()
        key = self._kind(tasks)
        seen = self._seen.get(key)
        if seen is None:
            seen = self._meet(tasks)
            self._check_targets(seen, tasks)
            self._seen[key] = seen
        elif seen.check_each:
            self._check_targets(seen, tasks)
        return seen.choice

    def _kind(self, tasks: TaskBatch) -> tuple[object, ...]:
        """What all that holds of a batch depends on, but for the values of its labels."""
        own = self._sources[0]
        return tasks.shapes, own.dtype, own.device

    def _choose(self, shapes: TaskShapes) -> Choice:
        return choose(self.program, self.loop, shapes, self.backend, self.precision)

    def _meet(self, tasks: TaskBatch) -> _Seen:
        check_like(tasks, self)
        if tasks.shapes.ragged:
            check_padding(self.program, self.flat_parameters().detach(), tasks)
        output = self._probe(tasks.support_x)
        self._probe(tasks.query_x)
        choice = self._choose(tasks.shapes)
        # Reading labels back from a GPU each time would stall it.
        return _Seen(choice, output, self.program.loss.reads_targets and tasks.support_x.device.type == "cpu")

    def _check_targets(self, seen: _Seen, tasks: TaskBatch) -> None:
        self.program.loss.check(seen.output, tasks.support_y, "support_y")
        self.program.loss.check(seen.output, tasks.query_y, "query_y")

    def _add_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Adds one for each meta-parameter of the model to its ``.grad``."""
        for parameter, gradient in zip(self._sources, gradients, strict=True):
            if parameter.requires_grad:
                parameter.grad = gradient if parameter.grad is None else parameter.grad.detach() + gradient

    def _track(self, tasks: TaskBatch) -> None:
        if self.tracks:
            track(self.program, self.flat_parameters().detach(), tasks.support)


def finite_weights(weights: Iterable[float] | None, steps: int) -> list[float]:
    """Weights of the query losses after steps ``0..S``; ``None``: the last only.

    Raises:
        ValueError: not S numbers, one that is not finite, or nothing but zeros.
    """
    if weights is None:
        return [0.0] * steps + [1.0]
    try:
        values = [float(w) for w in weights]
    except (TypeError, ValueError):
        values = []
    if len(values) != steps or not all(math.isfinite(w) for w in values) or not any(values):
        raise ValueError(
            f"step_weights={weights!r}: give {steps} finite numbers, not all zero, one for the query loss after each "
            "step"
        )
    return [0.0, *values]
