"""Holds what the gradient-based learners share: the captured model, the checks, the choice of executor, adaptation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors

from metafast.executors import Choice, Executor, check_backend, check_precision, choose, name_of
from metafast.executors.reference.executor import ReferenceExecutor
from metafast.inner.autocast import in_own_dtype
from metafast.inner.rates import Rate, Rates
from metafast.inner.recorded import recorded_adapt
from metafast.kernels.batch_norm import MODES
from metafast.learners.adapted_parameters import resolve_names
from metafast.learners.base import INNER_SETTINGS, LearnerRecipe
from metafast.learners.checks import check_batch, check_like, check_padding
from metafast.learners.module_snapshot import ModuleSnapshot
from metafast.learners.outside_gradients import Outside
from metafast.learners.within_torch import WithinTorch
from metafast.program import Program
from metafast.program.capture import capture
from metafast.program.inner_loop import InnerLoop
from metafast.program.losses import LossLike, as_loss
from metafast.program.running_statistics import track
from metafast.tasks import Batch, TaskBatch, TaskShapes

_STATISTICS = {
    "task": "task: the statistics of each pass over a task's own support or query samples, in training and test",
    "per_step": "per_step: the statistics of each pass over a task's own support or query samples, in training and "
    "test, with a scale and a shift for each inner step",
    "frozen": "frozen: the model's running statistics, which stay as they were",
    "running": "running: the model's running statistics, which training moves",
}


@dataclass(frozen=True)
class Adapted:
    """Holds T adapted models: their ``parameters [T, P]``, and the shape of a ``sample``."""

    program: Program
    choice: Choice
    parameters: Tensor
    step: int
    sample: tuple[int, ...]

    @in_own_dtype
    def __call__(self, x: Tensor) -> Tensor:
        """Returns the outputs ``[T, n, ...]`` for ``x [T, n, ...]``; no graph is kept.

        Raises:
            ValueError: another number of tasks, or samples of another shape.
            TypeError: ``x`` is of another dtype, or on another device.
        """
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

    ``output`` is the shape of a sample's output; ``checks_targets`` says whether the values of the targets are looked
    at in every batch.
    """

    choice: Choice
    output: tuple[int, ...]
    checks_targets: bool


class GradientLearner(WithinTorch):
    """Its inner loop takes gradient steps: ``theta_{s+1} = theta_s - alpha_s grad L_support(theta_s)``, for each task.

    ``parameters()`` are the model's, with rows of their own where ``bn="per_step"``, and the rates where these are
    learned; torch optimisers do the outer step.

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

    inner_settings = INNER_SETTINGS
    inner_optimizers: ClassVar[tuple[str, ...]] = ("sgd",)
    """The inner optimisers that a recipe may ask for."""

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
        self._set_losses(self.loss)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        self.adapted_names = trained if adapt is None else resolve_names(model, adapt)
        self.program = self._capture()
        first = next(model.parameters())
        self.rows = self._rows_per_step()
        self._sources, self._model_snapshot = self._parameters_in_order(), ModuleSnapshot(model)
        self.rate = Rates(lr if isinstance(lr, Rate) else Rate(lr), self.program, steps, first)
        self._fixed_rate, self._snapshot = self.rate.fixed, ModuleSnapshot(self, owner=self)
        self.tracks_statistics = any(getattr(n.layer, "mode", None) == "running" for n in self.program.nodes)
        self._known: dict[tuple[object, ...], KnownBatch] = {}

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
        return None if super().batch_norm() is None else _STATISTICS[self.bn]

    def graph_obstacle(self, tasks: TaskBatch) -> str | None:
        """Says why the executor of such batches cannot run under a CUDA graph; it is ``None`` where it can."""
        return self._choose(tasks.shapes).plan.graph_obstacle

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
        choice = self._choice_for(tasks)
        steps = self.steps if steps is None else steps
        if not isinstance(steps, int) or steps < 0:
            raise ValueError(f"steps={steps!r}: the inner loop takes a whole number of steps, at least 0")
        with torch.no_grad():
            theta = self._adapted(choice, tasks.support, steps, self._outside(choice, tasks, judged=False))
        return Adapted(self.program, choice, theta, steps, tuple(support_x.shape[2:]))

    def explain(self, x: Tensor | None = None) -> str:
        """Says which executor runs each layer, and why. Pass ``x [T, n, ...]`` before the first batch has been seen."""
        if x is not None:
            choice = self._choose(TaskShapes.of_samples(x))
        elif self._known:
            choice = next(reversed(self._known.values())).choice
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
        lines.append(f"  loss: {self.program.loss.kind}; {moved:,} of {self.program.size:,} parameters are adapted")
        lines += [] if memory is None else [f"  memory of a meta-gradient: {memory}"]
        return "\n".join(lines)

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
                theta = self.flat_parameters()
                return recorded_adapt(self.program, loop, theta, self.rate(), support, outside.own)[-1].detach()
        trajectory = choice.executor.adapt(self.program, loop, self.flat_parameters(), self.rate(), support)
        return trajectory[-1]

    def _capture(self) -> Program:
        return capture(self.model, self.loss, bn=self.bn, adapt=self.adapted_names, steps=self.steps)

    def _output_shape(self, x: Tensor) -> tuple[int, ...]:
        """Finds the shape of a sample's output by a run of one task."""
        y = ReferenceExecutor().predict(self.program, self.flat_parameters().detach(), x[:1])
        if y.shape[:2] != (1, x.shape[1]):
            raise ValueError(
                f"for samples [n, ...] = {list(x.shape[1:])} the model gives {list(y.shape[1:])}; its first axis must "
                "stay the sample axis n"
            )
        return tuple(y.shape[2:])

    def _follow_changes(self) -> None:
        """Captures the module again where it was moved (its buffers are other tensors then) or has changed its mode."""
        if not self._snapshot.changed():
            return
        if self._model_snapshot.changed():
            if not self._model_snapshot.only_values_changed():
                self.program = self._capture()
                self._known.clear()
            self._model_snapshot = ModuleSnapshot(self.model)
        self._refresh_sources()
        self._fixed_rate, self._snapshot = self.rate.fixed, ModuleSnapshot(self, owner=self)

    def _rates(self) -> Tensor:
        """Returns the inner rates, ``[1 or S, 1 or P]``, tied to the learned ones whether or not autograd is on."""
        if self._fixed_rate is not None:
            return self._fixed_rate
        with torch.enable_grad():
            return self.rate()

    def _refresh_sources(self) -> None:
        self._sources = self._parameters_in_order()

    def _parameters_in_order(self) -> list[Tensor]:
        named = {**dict(self.model.named_parameters()), **{k.replace("/", "."): v for k, v in self.rows.items()}}
        return [named[p.name] for p in self.program.parameters]

    def _rows_per_step(self) -> nn.ParameterDict:
        """Makes gamma and beta of ``per_step`` batch norm, with a row for each inner step, started from the model's."""
        named = dict(self.model.named_parameters())
        rows = nn.ParameterDict()
        for p in self.program.parameters:
            if p.shape != named[p.name].shape:
                rows[p.name.replace(".", "/")] = nn.Parameter(named[p.name].detach().expand(p.shape).clone())
        return rows

    def _choice_for(self, tasks: TaskBatch) -> Choice:
        """Checks a batch against the model and chooses the executor, once for each kind of batch."""
        check_batch(tasks)
        self._follow_changes()
        self._refuse_mapped(tasks)
        key = self._kind(tasks)
        known = self._known.get(key)
        if known is None:
            with self._plainly(tasks) as batch:
                known = self._examine(batch)
            self._check_targets(known, tasks)
            self._known[key] = known
        elif known.checks_targets:
            self._check_targets(known, tasks)
        return known.choice

    def _kind(self, tasks: TaskBatch) -> tuple[object, ...]:
        """Returns all that decides whether a batch fits and what runs it, but for the values of its labels."""
        own = self._sources[0]
        return tasks.shapes, own.dtype, own.device

    def _choose(self, shapes: TaskShapes) -> Choice:
        return choose(self.program, self.loop, shapes, self.backend, self.precision)

    def _examine(self, tasks: TaskBatch) -> KnownBatch:
        """Checks the first batch of a kind."""
        check_like(tasks, self)
        if tasks.shapes.ragged:
            check_padding(self.program, self.flat_parameters().detach(), tasks)
        output = self._output_shape(tasks.support_x)
        self._output_shape(tasks.query_x)
        choice = self._choose(tasks.shapes)
        # Reading labels back from a GPU each time would stall it.
        looks = self.program.loss.reads_targets and tasks.support_x.device.type == "cpu"
        return KnownBatch(choice, output, looks)

    def _check_targets(self, known: KnownBatch, tasks: TaskBatch) -> None:
        self.program.loss.check(known.output, tasks.support_y, "support_y")
        self.program.loss.check(known.output, tasks.query_y, "query_y")

    def _add_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Adds the gradient of each meta-parameter of the model to its ``.grad``."""
        for parameter, gradient in zip(self._sources, gradients, strict=True):
            if parameter.requires_grad:
                parameter.grad = gradient if parameter.grad is None else parameter.grad.detach() + gradient

    def _track_statistics(self, tasks: TaskBatch) -> None:
        """Moves the running statistics of batch norm, where ``bn="running"``."""
        if self.tracks_statistics:
            with self._plainly(tasks) as batch:
                track(self.program, self.flat_parameters().detach(), batch.support)
