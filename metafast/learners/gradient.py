"""Holds what the gradient-based learners share: the captured model, the checks, the choice of executor, adaptation."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors

from metafast.executors import Choice, Executor, check_backend, check_precision, choose, name_of
from metafast.inner.autocast import in_own_dtype
from metafast.inner.rates import Rate, Rates
from metafast.inner.recorded import recorded_adapt
from metafast.learners.adapted_parameters import resolve_names
from metafast.learners.base import INNER_SETTINGS, LearnerRecipe
from metafast.learners.batch_norm import BatchNormMode, check_mode, modes_of, norms_of
from metafast.learners.captures import Captures, CaptureSettings, first_task, has_own_derivatives
from metafast.learners.checks import check_batch, check_initialised, check_like, check_padding
from metafast.learners.double_check import double_check
from metafast.learners.module_snapshot import ModuleSnapshot
from metafast.learners.outside_gradients import Outside
from metafast.learners.seeds import drawn_seeds, with_seeds
from metafast.learners.within_torch import WithinTorch
from metafast.program import Parameter, Program
from metafast.program.inner_loop import InnerLoop
from metafast.program.losses import LossLike, as_loss
from metafast.program.noise import given_numbers
from metafast.program.recording import call
from metafast.program.running_statistics import track
from metafast.tasks import Batch, TaskBatch, TaskShapes, as_samples, parts_of

_KINDS = 64
"""How many kinds of batches are remembered."""
_STATISTICS = {
    "task": "task: the statistics of each pass over a task's own support or query samples, in training and test",
    "per_step": "per_step: the statistics of each pass over a task's own support or query samples, in training and "
    "test, with a scale and a shift for each inner step",
    "frozen": "frozen: the model's running statistics, which stay as they were",
    "running": "running: the model's running statistics, which training moves",
}


@dataclass(frozen=True)
class Adapted:
    """Holds T adapted models: their ``parameters [T, P]``, and the shape of each tensor of a ``sample``."""

    captures: Captures
    program: Program
    choice: Choice
    parameters: Tensor
    step: int
    sample: tuple[tuple[int, ...], ...]

    @in_own_dtype
    def __call__(self, x: Tensor) -> Tensor:
        """Returns the outputs ``[T, n, ...]`` for ``x [T, n, ...]``; no graph is kept.

        Raises:
            ValueError: another number of tasks, or samples of another shape.
            TypeError: ``x`` is of another dtype, or on another device.
        """
        theta, x = self.parameters, as_samples(x)
        sample = tuple(tuple(part.shape[2:]) for part in parts_of(x))
        if x.dim() < 2 or x.shape[0] != theta.shape[0] or sample != self.sample:
            given, wanted = (
                ", ".join(map(str, shapes)) for shapes in ([tuple(p.shape) for p in parts_of(x)], self.sample)
            )
            raise ValueError(
                f"x has shape {given}; these {theta.shape[0]} adapted models take [T, n, *sample] with "
                f"T = {theta.shape[0]} and samples of shape {wanted}"
            )
        if (x.is_floating_point() and x.dtype != theta.dtype) or x.device != theta.device:
            raise TypeError(
                f"x is {x.dtype} on {x.device}, the adapted models are {theta.dtype} on {theta.device}; use "
                f"x.to({str(theta.device)!r}, {theta.dtype})"
            )
        program = self.captures.extended(self.program, x)
        seeds = drawn_seeds(program, len(theta), theta.device)
        return self.choice.executor.predict(
            program, self.parameters, x.contiguous(), self.step, None if seeds is None else seeds[:, 1]
        )

    def state_dict(self, task: int) -> dict[str, Tensor]:
        """Returns one task's parameters under the user's names, for ``model.load_state_dict(..., strict=False)``.

        Raises:
            IndexError: there is no such task.
        """
        if not 0 <= task < self.parameters.shape[0]:
            raise IndexError(f"task={task}: the adapted models are numbered 0..{self.parameters.shape[0] - 1}")
        tensors = self.program.unflatten(self.parameters[task])
        return {p.name: t.clone() for p, t in zip(self.program.parameters, tensors, strict=True)}


class KnownBatch(NamedTuple):
    """Holds what is known of one kind of batch since the first of it was seen.

    ``parameters`` are those of the model in the order of ``program``. ``output`` is the shape of a sample's output;
    ``checks_targets`` says whether the values of the targets are looked at in every batch, ``leaves_traces`` whether a
    call of the model changes its buffers or attributes, ``tracks_statistics`` whether there is a ``"running"`` norm.
    ``is_recorded`` says that autograd records the inner loop, because a ``torch.autograd.Function`` of the model has a
    derivative that only autograd can differentiate.
    """

    program: Program
    parameters: list[Tensor]
    is_recorded: bool
    leaves_traces: bool
    tracks_statistics: bool
    choice: Choice
    output: tuple[int, ...]
    checks_targets: bool


class GradientLearner(WithinTorch):
    """Its inner loop takes gradient steps: ``theta_{s+1} = theta_s - alpha_s grad L_support(theta_s)``, for each task.

    ``parameters()`` are the model's, with rows of their own where ``bn="per_step"``, and the rates where these are
    learned; torch optimisers do the outer step.

    Args:
        model: any ``nn.Module`` that maps ``[n, ...]`` to one tensor; it stays untouched.
        loss: ``"cross_entropy"``, ``"mse"`` or a callable (outputs, targets) -> scalar for one task, which sees the
            samples that count. ``nn.CrossEntropyLoss``, ``nn.MSELoss`` and their functions are recognised.
        query_loss: the loss that judges the query sets, likewise; ``None``: the same as ``loss``.
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

    inner_settings = INNER_SETTINGS
    inner_optimizers: ClassVar[tuple[str, ...]] = ("sgd",)
    """The inner optimisers that a recipe may ask for."""

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: LossLike,
        lr: float | Rate,
        query_loss: LossLike | None = None,
        steps: int = 1,
        adapt: Iterable[str | nn.Module] | str | nn.Module | None = None,
        bn: BatchNormMode = None,
        output: str | int | None = None,
        backend: str | Executor = "auto",
        precision: str = "float32",
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model={model!r} is no nn.Module; pass an instance of one")
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps={steps!r}: the inner loop takes a whole number of steps, at least 1")
        check_initialised(model)
        check_mode(model, bn)
        check_backend(backend)
        check_precision(precision)
        self.model, self.steps, self.backend, self.precision = model, steps, backend, precision
        self.loss, self.bn, self.output = as_loss(loss), bn, output
        self.query_loss = None if query_loss is None else as_loss(query_loss)
        self._set_losses(self.loss, self.query_loss)
        self._adapt = None if adapt is None else frozenset(resolve_names(model, adapt))
        self._trained = frozenset(name for name, p in model.named_parameters() if p.requires_grad)
        self.captures = Captures(model, self._capture_settings)
        self.captures.trained = {name: norm.training for name, norm in norms_of(model).items()}
        self.rows = self._rows_per_step()
        self.rate = Rates(lr if isinstance(lr, Rate) else Rate(lr), self._layout(), steps, next(model.parameters()))
        self._parameter_count = len(list(model.parameters()))
        self._known: OrderedDict[tuple[object, ...], KnownBatch] = OrderedDict()
        self._latest: KnownBatch | None = None
        self._look()

    @classmethod
    def from_recipe(cls, recipe: LearnerRecipe, model: nn.Module, backend: str) -> GradientLearner:
        """Builds the learner with the recipe's loss, rate and steps, and with what :meth:`recipe_options` returns."""
        inner: dict[str, Any] = {"loss": recipe.loss, "lr": recipe.inner_lr, "steps": recipe.steps}
        return cls(model, backend=backend, **inner, **cls.recipe_options(recipe, model))

    @classmethod
    def recipe_options(cls, recipe: LearnerRecipe, model: nn.Module) -> dict[str, Any]:
        """Returns the arguments of the constructor that a recipe decides, beside loss, rate and steps."""
        return {}

    @classmethod
    def check_recipe(cls, recipe: LearnerRecipe) -> None:
        """Checks what any learner checks, and that the inner optimiser is one of ``inner_optimizers``."""
        super().check_recipe(recipe)
        if recipe.inner_optimizer not in cls.inner_optimizers:
            raise ValueError(
                f"inner_optimizer is {recipe.inner_optimizer!r}; {cls.name} takes {' or '.join(cls.inner_optimizers)}"
            )

    @classmethod
    def test_settings(cls, recipe: LearnerRecipe) -> list[dict[str, Any]]:
        """Returns one set for each number of inner steps in the recipe's ``test_steps``."""
        return [{"steps": steps} for steps in recipe.test_steps or ()]

    def batch_norm(self) -> str | None:
        """Says what ``bn`` means, where the model has a batch norm."""
        if super().batch_norm() is None:
            return None
        modes = dict.fromkeys(modes_of(self.model, self.bn, self.captures.trained).values())
        return "; ".join(_STATISTICS[mode] for mode in modes)

    def graph_obstacle(self, tasks: TaskBatch) -> str | None:
        """Says why the executor of such batches cannot run under a CUDA graph; it is ``None`` where it can."""
        self._follow_changes()
        return self._choose(self.captures.of(tasks), tasks.shapes).plan.graph_obstacle

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Does what any module's does, without its walk through all modules where none has changed."""
        if set_to_none and not self._snapshot.changed():
            for parameter in self._snapshot.parameters:
                parameter.grad = None
        else:
            super().zero_grad(set_to_none)

    @in_own_dtype
    def adapt(
        self, support_x: Tensor, support_y: Tensor, steps: int | None = None, support_mask: Tensor | None = None
    ) -> Adapted:
        """Adapts to T tasks, ``support_x [T, n, ...]``, and returns their models; no graph is kept.

        ``steps`` may differ from that of training; with a rate for each step the last one serves all later steps.
        """
        tasks = TaskBatch(support_x, support_y, support_x, support_y, support_mask, support_mask)
        choice = self._choice_for(tasks, judged=False)
        tasks = with_seeds(self.program, tasks)
        steps = self.steps if steps is None else steps
        if not isinstance(steps, int) or steps < 0:
            raise ValueError(f"steps={steps!r}: the inner loop takes a whole number of steps, at least 0")
        with torch.no_grad():
            theta = self._adapted(choice, tasks.support, steps, self._outside(choice, tasks, judged=False))
        return Adapted(
            self.captures,
            self.program,
            choice,
            theta,
            steps,
            tuple(tuple(p.shape[2:]) for p in parts_of(tasks.support_x)),
        )

    @property
    def adapted_names(self) -> frozenset[str]:
        """The names of the parameters that the inner loop moves."""
        return self._trained if self._adapt is None else self._adapt

    @property
    def program(self) -> Program:
        """The Program of the latest batch.

        Raises:
            RuntimeError: no batch has been seen yet.
        """
        return self._now.program

    @property
    def _now(self) -> KnownBatch:
        if self._latest is None:
            raise RuntimeError("no batch has been seen yet; a model is captured with its first one")
        return self._latest

    @property
    def _sources(self) -> list[Tensor]:
        """The parameters of the model in the order of ``program``."""
        return self._now.parameters

    def explain(self, x: Tensor | None = None) -> str:
        """Says which executor runs each layer, and why. Pass ``x [T, n, ...]`` before the first batch has been seen."""
        if x is not None:
            self._follow_changes()
            choice = self._choose(self.captures.of_samples(x), TaskShapes.of_samples(x))
        elif self._latest is not None:
            choice = self._latest.choice
        else:
            return "no batch has been seen yet; call explain(support_x)"
        hows, memory = choice.plan.layers(), choice.plan.memory()
        width = max(len(n.name) for n in self.program.nodes)
        sizes = [sum(self.program.parameters[k].size for k in n.params) for n in self.program.nodes]
        lines = [f"executor: {choice.executor.name} (backend={name_of(self.backend)!r})"]
        lines += [f"  passed over {name}: {reason}" for name, reason in choice.passed_over]
        for node, size, how in zip(self.program.nodes, sizes, hows, strict=True):
            label = getattr(node.layer, "label", node.layer.kind)
            lines.append(f"  {node.name:<{width}}  {label:<20} {size:>9,} parameters  {how}")
        moved = sum(p.size for p in self.program.parameters if p.adapted)
        loss, of_query = self.program.loss.label, self.program.query.loss.label
        loss += "" if self.query_loss is None else f", {of_query} on query sets"
        lines.append(f"  loss: {loss}; {moved:,} of {self.program.size:,} parameters are adapted")
        lines += [] if memory is None else [f"  memory of a meta-gradient: {memory}"]
        return "\n".join(lines)

    def prepare(self, tasks: TaskBatch) -> None:
        """Captures and checks the model for batches like ``tasks``, which otherwise the first of them waits for.

        Raises:
            CaptureError: the model's forward pass cannot become a Program.
            TypeError, ValueError: the batch does not fit the model.
        """
        self._choice_for(tasks)

    @property
    def loop(self) -> InnerLoop:
        """The inner loop as the executors read it, by the settings of now."""
        return InnerLoop.judged_last(self.steps)

    def flat_parameters(self) -> Tensor:
        """Returns the meta-parameters of the model as one vector ``[P]``, tied to them by autograd."""
        return _flatten_dense_tensors(self._sources)

    def _adapted(self, choice: Choice, support: Batch, steps: int, outside: Outside) -> Tensor:
        loop = InnerLoop.judged_last(steps)
        if outside.own:
            with torch.enable_grad():
                theta, rates = self.flat_parameters(), self.inner_rates()
                return recorded_adapt(self.program, loop, theta, rates, support, outside.own)[-1].detach()
        trajectory = choice.executor.adapt(self.program, loop, self.flat_parameters(), self.inner_rates(), support)
        return trajectory[-1]

    def _capture_settings(self) -> CaptureSettings:
        losses = self.loss, self.query_loss
        return CaptureSettings(*losses, self.adapted_names, self.bn, self.steps, self.output)

    def _follow_changes(self) -> None:
        """Forgets what was captured where the module is not as it was; it is captured again with the next batch."""
        stale = self.captures.stale()
        if not stale and not self._snapshot.changed():
            return
        if not stale and self._snapshot.only_values_changed():
            self._refresh_sources()
            self._look()
            return
        if self.training:
            self.captures.trained = {name: norm.training for name, norm in norms_of(self.model).items()}
        self.captures.forget()
        self._known.clear()
        self._look()

    def _look(self) -> None:
        """Takes note of how the module is now."""
        named = list(self.model.named_parameters())
        if all(isinstance(p, nn.Parameter) for _, p in named):  # others stand in their places for one call only
            self._trained = frozenset(name for name, p in named if p.requires_grad)
        assigned = {pair for recording in self.captures.recordings.values() for pair in recording.assigned}
        self._fixed_rate, self._snapshot = self.rate.fixed, ModuleSnapshot(self, owner=self, ignored=assigned)

    def inner_rates(self, program: Program | None = None) -> Tensor:
        """Returns the rates of the parameters of ``program``, or of the latest one, ``[1 or S, 1 or P]``."""
        with torch.enable_grad():  # so that they are tied to the learned ones whether or not autograd is on
            rates = self.rate() if self._fixed_rate is None else self._fixed_rate
        if rates.shape[1] == 1:
            return rates
        program = program or self.program
        return rates if len(program.parameters) == self._parameter_count else self._columns(rates, program)

    def _columns(self, rates: Tensor, program: Program) -> Tensor:
        """Picks from rates for all parameters of the model those of the parameters that ``program`` uses."""
        used = {p.name for p in program.parameters}
        parts = [rates[:, p.offset : p.offset + p.size] for p in self._layout() if p.name in used]
        return torch.cat(parts, 1)

    def _refresh_sources(self) -> None:
        for key, known in self._known.items():
            self._known[key] = known._replace(parameters=self.parameters_of(known.program))
        if self._latest is not None:
            self._latest = self._latest._replace(parameters=self.parameters_of(self._latest.program))

    def meta_parameters(self) -> list[tuple[str, Tensor]]:
        """Lists the meta-parameters of the model, used or not, with their names; some have a row for each step."""
        rows = {name.replace("/", "."): p for name, p in self.rows.items()}
        return [(name, rows.get(name, p)) for name, p in self.model.named_parameters()]

    def parameters_of(self, program: Program) -> list[Tensor]:
        """Lists the meta-parameters of the model in the order of ``program``."""
        named = dict(self.meta_parameters())
        return [named[p.name] for p in program.parameters]

    def _rows_per_step(self) -> nn.ParameterDict:
        """Makes gamma and beta of ``per_step`` batch norm, with a row for each inner step, started from the model's."""
        rows = nn.ParameterDict()
        modes = modes_of(self.model, self.bn, {})
        for name, norm in norms_of(self.model).items():
            for own, parameter in norm.named_parameters(prefix=name, recurse=False):
                if modes[name] == "per_step":
                    shape = (self.steps + 1, *parameter.shape)
                    rows[own.replace(".", "/")] = nn.Parameter(parameter.detach().expand(shape).clone())
        return rows

    def _layout(self) -> list[Parameter]:
        """Lists all parameters of the model as a Program that used each of them would have them."""
        found: list[Parameter] = []
        for name, parameter in self.meta_parameters():
            offset = found[-1].offset + found[-1].size if found else 0
            found.append(Parameter(name, tuple(parameter.shape), offset, name in self.adapted_names))
        return found

    def _choice_for(self, tasks: TaskBatch, judged: bool = True) -> Choice:
        """Checks a batch against the model and chooses the executor, once for each kind of batch.

        The query sets are looked at where the batch is ``judged``.
        """
        check_batch(tasks)
        self._follow_changes()
        self._refuse_mapped(tasks)
        key = (*self._kind(tasks), judged)
        known = self._known.get(key)
        if known is None:
            with self._plainly(tasks) as batch:
                self._latest = self._known[key] = self._examine(batch)
            known = self._known[key]
            try:
                self._check_targets(known, tasks, judged)
            except Exception:
                del self._known[key]  # the next batch of this kind is checked as the first one
                raise
            if len(self._known) > _KINDS:
                self._known.popitem(last=False)
        elif known.checks_targets:
            self._check_targets(known, tasks, judged)
        self.__dict__["_latest"] = known  # nn.Module's own way to set an attribute takes longer than all the rest
        return known.choice

    def _kind(self, tasks: TaskBatch) -> tuple[object, ...]:
        """Returns all that decides whether a batch fits and what runs it, but for the values of its labels."""
        own = self._snapshot.parameters[0]
        return tasks.shapes, own.dtype, own.device

    def _choose(self, program: Program, shapes: TaskShapes) -> Choice:
        return choose(program, self.loop, shapes, self.backend, self.precision)

    def _examine(self, tasks: TaskBatch) -> KnownBatch:
        """Captures the model for the first batch of a kind, and checks both."""
        check_like(tasks, self)
        program = self.captures.of(tasks)
        parameters = self.parameters_of(program)
        theta = _flatten_dense_tensors(parameters).detach()
        if tasks.shapes.ragged:
            check_padding(program, theta, tasks)
        output = self._output_shape(tasks.support_x)
        self._output_shape(tasks.query_x)
        if self.captures.second_look and not self.rows:
            double_check(self.captures, program, theta, tasks)
        choice = self._choose(program, tasks.shapes)
        # Reading labels back from a GPU each time would stall it.
        reads = program.loss.reads_targets or program.query.loss.reads_targets
        looks = reads and tasks.support_x.device.type == "cpu"
        leaves_traces = self.captures.recording(tasks.support_x).changes_module
        tracks = any(getattr(node.layer, "mode", None) == "running" for node in program.nodes)
        self._look()
        recorded = has_own_derivatives(program)
        return KnownBatch(program, parameters, recorded, leaves_traces, tracks, choice, output, looks)

    def _output_shape(self, x: Tensor) -> tuple[int, ...]:
        """Returns the shape of a sample's output."""
        shape = self.captures.recording(x).output_shape
        if shape[:1] != x.shape[1:2]:
            given = ", ".join(str(list(part.shape[1:])) for part in parts_of(x))
            raise ValueError(
                f"for samples [n, ...] = {given} the model gives {list(shape)}; its first axis must stay the sample "
                "axis n"
            )
        return tuple(shape[1:])

    def _check_targets(self, known: KnownBatch, tasks: TaskBatch, judged: bool) -> None:
        known.program.loss.check(known.output, tasks.support_y, "support_y")
        if judged:
            known.program.query.loss.check(known.output, tasks.query_y, "query_y")

    def _add_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Adds the gradient of each meta-parameter of the model to its ``.grad``."""
        for parameter, gradient in zip(self._sources, gradients, strict=True):
            if parameter.requires_grad:
                parameter.grad = gradient if parameter.grad is None else parameter.grad.detach() + gradient

    def _held_program(self) -> Program:
        """Returns the Program, with copies of its constants where the model itself is about to change them."""
        return self.program.holding_constants() if self._now.leaves_traces else self.program

    def _track_statistics(self, tasks: TaskBatch) -> None:
        """Moves the running statistics of batch norm, where ``bn="running"``."""
        if self._now.tracks_statistics:
            predict = self._now.choice.executor.predict
            with self._plainly(tasks) as batch:
                track(self.program, predict, self.flat_parameters().detach(), batch.support)

    def _leave_traces(self, tasks: TaskBatch) -> None:
        """Leaves the buffers and attributes of the model as one call of it would, on the first task's support set."""
        if self._now.leaves_traces and self.training:
            with self._plainly(tasks) as batch, torch.no_grad(), self.captures.statistics_kept():
                with given_numbers(None if batch.seeds is None else batch.seeds[:1, 0]):
                    call(self.model, first_task(batch.support_x))
