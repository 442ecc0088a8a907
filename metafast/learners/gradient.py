"""Holds what the gradient-based learners share: the captured model, the checks, the choice of executor, adaptation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors

from metafast.executors import Choice, Executor, choose, name_of
from metafast.executors.composition import in_pieces
from metafast.executors.steps import Steps
from metafast.inner.autocast import in_own_dtype
from metafast.inner.hyper_rates import HyperRates
from metafast.inner.rates import Rate, Rates
from metafast.inner.recorded import recorded_adapt
from metafast.inner.transforms import plain
from metafast.learners.adapted import Adapted, gone_on_from
from metafast.learners.base import INNER_SETTINGS, LearnerRecipe
from metafast.learners.batch_norm import STATISTICS, BatchNormMode, modes_of, norms_of
from metafast.learners.captures import first_task, has_own_derivatives
from metafast.learners.checks import (
    check_batch,
    check_buffers,
    check_initialised,
    check_like,
    check_padding,
    check_steps,
    mixing,
)
from metafast.learners.double_check import double_check
from metafast.learners.explanation import explained
from metafast.learners.following import FollowingLearner
from metafast.learners.known_batch import KnownBatch
from metafast.learners.layout import layout_of, rows_per_step
from metafast.learners.module_snapshot import Moment
from metafast.learners.outside_gradients import Outside, Surroundings
from metafast.learners.seeds import with_seeds
from metafast.learners.settings import check_whole
from metafast.learners.task_loss import TaskLoss
from metafast.program import Program
from metafast.program.capture import CaptureError
from metafast.program.inner_loop import InnerLoop
from metafast.program.losses import LossLike
from metafast.program.module_run import call
from metafast.program.noise import given_numbers
from metafast.program.one_thread import one_thread
from metafast.program.rule import Rule
from metafast.program.running_statistics import track
from metafast.program.second_look import Difference
from metafast.tasks import Batch, TaskBatch, TaskShapes, as_samples, parts_of

_KINDS = 64
"""How many kinds of batches are remembered."""
_UNSEEN = "no batch has been seen yet, or none since a setting has changed"


class GradientLearner(FollowingLearner):
    """Its inner loop takes gradient steps: ``theta_{s+1} = theta_s - alpha_s grad L_support(theta_s)``, for each task.

    ``parameters()`` are the model's, with rows of their own where ``bn="per_step"``, and the rates where these are
    learned; torch optimisers do the outer step. Every argument but ``model`` is an attribute too, which may be set at
    any time: it takes effect with the next batch, or says why it cannot.

    Args:
        model: any ``nn.Module`` that maps the samples of a task, ``[n, ...]``, to a tensor ``[n, ...]``. It is
            captured by running it on the first batch of each kind, and stays untouched.
        loss: ``"cross_entropy"``, ``"mse"`` or a callable (outputs, targets) -> scalar for one task, which sees the
            samples that count. ``nn.CrossEntropyLoss``, ``nn.MSELoss`` and their functions are recognised, with their
            options; the parameters of any other module are learned too.
        query_loss: the loss that judges the query sets, likewise; ``None``: the same as ``loss``.
        lr: inner learning rate: a number, or a :class:`Rate`.
        steps: S, the number of inner steps.
        adapt: what the inner loop moves: names of parameters or modules, or modules; ``None``: every parameter that
            requires a gradient.
        bn: where batch norm takes its statistics from: ``"task"``, ``"per_step"``, ``"frozen"`` or ``"running"``, or a
            dictionary of these by names of modules; ``None``: a module in training from the samples of each pass, and
            one in evaluation from its running statistics.
        output: which part counts of what the model returns, by name or number; ``None``: all of it, one tensor.
        backend: the name of an executor, or one itself, or ``"auto"`` for the fastest that can run the model.
        precision: ``"float32"``, or where an executor offers them ``"tf32x3"``, as exact on tensor cores, or ``"tf32"``
            or ``"bf16"``, which put a meta-gradient of several steps off by several per cent and more.

    Raises:
        CaptureError: the model has no parameters.
        ValueError: an option out of its range; the text names it.
    """

    inner_settings = INNER_SETTINGS
    inner_optimizers: ClassVar[tuple[str, ...]] = ("sgd",)
    """The inner optimisers that a recipe may ask for."""

    _fixed_rate: Tensor | None

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
        check_initialised(model)
        if next(model.parameters(), None) is None:
            raise CaptureError(f"{type(model).__name__} has no parameters; there is nothing to meta-learn")
        self.model = model
        self.steps, self.backend, self.precision = steps, backend, precision
        self.loss, self.query_loss, self.bn, self.output = loss, query_loss, bn, output
        self._set_losses(self.loss, self.query_loss)
        self._move(adapt)
        self.rows = rows_per_step(model, bn, steps)
        self.rate = Rates(Rate.of_lr(lr), layout_of(model, self.rows), steps, next(model.parameters()))
        self._one_rate = self.rate.axes <= {"step"}
        self.hyper = HyperRates()
        self.captures = self._new_captures({name: norm.training for name, norm in norms_of(model).items()})
        self._start()

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
        return "; ".join(STATISTICS[mode] for mode in modes)

    @in_own_dtype
    def graph_obstacle(self, tasks: TaskBatch) -> str | None:
        """Says why the executor of such batches cannot run under a CUDA graph; it is ``None`` where it can."""
        self._follow_changes()
        return self._choose(self.captures.of(tasks), tasks.shapes).plan.graph_obstacle

    @in_own_dtype
    def adapt(
        self,
        support_x: Tensor,
        support_y: Tensor,
        steps: int | None = None,
        support_mask: Tensor | None = None,
        *,
        each_step: bool = False,
        after: Adapted | None = None,
    ) -> Adapted:
        """Adapts to T tasks, ``support_x [T, n, ...]``, and returns their models; no graph is kept.

        Args:
            support_x: ``[T, n, ...]``, or with ``each_step`` ``[S, T, n, ...]``.
            support_y: the targets, likewise.
            steps: may differ from that of training; with a rate for each step the last one serves all later steps.
            support_mask: true for the samples that count.
            each_step: whether every step has samples of its own.
            after: adapted models of as many tasks to go on from: their parameters, and the state and count of their
                steps.
        """
        of_first, mask = (support_x, support_y), support_mask
        if each_step:
            of_first, mask = (as_samples(support_x)[0], support_y[0]), None if mask is None else mask[0]
        tasks = TaskBatch(support_x, support_y, *of_first, support_mask, mask, each_step=each_step)
        if steps is None:
            steps = len(tasks.support_y) if each_step else self.steps
        check_whole("steps", steps, 0, "the inner loop takes a whole number of steps")
        check_steps(tasks, steps)
        choice = self._known_for(tasks, judged=False).choice
        tasks = with_seeds(self.program, tasks)
        first, start = gone_on_from(after, self.program, self._rule, len(tasks), self.rate.value)
        with torch.no_grad():
            outside = self._outside(choice, tasks.first_step, judged=False)
            z = self._adapted(choice, tasks.support, steps, outside, start, first)
        sample = tuple(tuple(p.shape[2:]) for p in parts_of(tasks.query_x))
        moment = Moment(self._model_snapshot, self.program.all_constants)
        program, settings = self.program.holding_constants(), (self.backend, self.precision)
        theta, *states = z.split(program.size, 1)
        state = dict(zip(self._rule.states if self._rule else (), states, strict=True))
        return Adapted(self.captures, program, choice.executor, theta, first + steps, sample, moment, settings, state)

    @in_own_dtype
    def task_loss(
        self, x: Tensor, y: Tensor, *, at: Adapted | Tensor | None = None, mask: Tensor | None = None
    ) -> TaskLoss:
        """Returns the loss of each of T tasks on ``x [T, n, ...]``, whose derivatives are gradients and ``H u``.

        Args:
            x: the samples.
            y: their targets.
            at: adapted models, or parameters ``[T, P]`` or ``[P]``; ``None``: the initial ones.
            mask: bool ``[T, n]``, true for the samples that count.

        Raises:
            TypeError, ValueError: the samples do not fit the model, or the parameters are of another shape.
        """
        tasks = TaskBatch(x, y, x, y, mask, mask)
        known = self._known_for(tasks, judged=False)
        tasks = with_seeds(known.program, tasks)
        program, size = known.program.holding_constants().adapting_all, known.program.size
        theta = at.parameters if isinstance(at, Adapted) else self.flat_parameters() if at is None else at
        shape = list(theta.shape) if isinstance(theta, Tensor) else type(theta).__name__
        if shape not in ([size], [len(tasks), size]):
            raise ValueError(
                f"at: parameters of shape {shape}; for these {len(tasks)} tasks give [{len(tasks)}, "
                f"{size}], [{size}], or models adapted to as many tasks"
            )
        theta = theta.detach().expand(len(tasks), -1).contiguous()
        step = at.step if isinstance(at, Adapted) else 0
        return TaskLoss(program, known.choice.executor, theta, tasks.support, step)

    @property
    def program(self) -> Program:
        """The Program of the latest batch.

        Raises:
            RuntimeError: no batch has been seen yet, or none since a setting has changed.
        """
        return self._now.program

    @property
    def _now(self) -> KnownBatch:
        if self._latest is None:
            raise RuntimeError(f"{_UNSEEN}; a model is captured with the next one")
        return self._latest

    @property
    def _sources(self) -> list[Tensor]:
        """The parameters of the model in the order of ``program``."""
        return self._now.parameters

    @in_own_dtype
    def explain(self, x: Tensor | None = None) -> str:
        """Says which executor runs each layer, and why. Pass ``x [T, n, ...]`` before the first batch has been seen."""
        if x is not None:
            self._follow_changes()
            program = self.captures.of_samples(x)
            choice = self._choose(program, TaskShapes.of_samples(x))
        elif self._latest is not None:
            program, choice = self._latest.program, self._latest.choice
        else:
            return f"{_UNSEEN}; call explain(support_x)"
        return explained(program, choice, name_of(self.backend))

    @in_own_dtype
    def prepare(self, tasks: TaskBatch) -> None:
        """Captures and checks the model for batches like ``tasks``, which otherwise the first of them waits for.

        Raises:
            CaptureError: the model's forward pass cannot become a Program.
            TypeError, ValueError: the batch does not fit the model.
        """
        self._known_for(tasks)

    @property
    def loop(self) -> InnerLoop:
        """The inner loop as the executors read it, by the settings of now."""
        return InnerLoop.judged_last(self.steps)

    def flat_parameters(self) -> Tensor:
        """Returns the meta-parameters of the model as one vector ``[P]``, tied to them by autograd."""
        return _flatten_dense_tensors(self._sources)

    def _hyper_rates(self) -> list[Rates]:
        """Lists the rates of what belongs to the rule."""
        return self.hyper.each()

    @property
    def _rule(self) -> Rule | None:
        """What an inner step makes of the gradient; ``None``: it goes along the gradient itself."""
        return None

    def _start_of(self, parameters: Tensor) -> Tensor:
        """Returns what inner loops start from: ``parameters [P]``, and behind them the rule's state if learned."""
        return parameters

    def _adapted(
        self, choice: Choice, support: Batch, steps: int, outside: Outside, start: Tensor | None = None, first: int = 0
    ) -> Tensor:
        """Returns ``z_S [T, (1 + K) P]``; it goes on from ``start`` after ``first`` steps, where there is one."""
        loop = InnerLoop.judged_last(steps, rule=self._rule, first=first)
        if outside.own:
            with torch.enable_grad():
                theta, rates = self._start_of(self.flat_parameters()), self.inner_rates()
                return recorded_adapt(self.program, loop, theta, rates, support, outside.own)[-1].detach()
        z = self._start_of(self.flat_parameters()) if start is None else start
        rates = self.inner_rates()
        z = Steps(self.program, loop, rates).start(z, support.at(0).x.shape[0])
        for a, b in in_pieces(loop, z.numel() * z.element_size()):
            z = choice.executor.adapt(self.program, loop.part(a, b), z, rates, support.steps(a, b))[-1]
        return z

    def inner_rates(self, program: Program | None = None) -> Tensor:
        """Returns the rates of the parameters of ``program``, or of the latest one, ``[1 or S, 1 or P]``.

        Under a rule its hyper-parameters follow, ``[H, 1 or S, 1 or P]`` in float64. What is learned is tied to the
        result whether or not autograd is on.
        """
        rule = self._rule
        rates = self._fixed_rate
        if rates is None or rates.shape[1] > 1:
            with torch.enable_grad():
                rates = self.rate.of((program or self.program).parameters)
        if rule is None:
            return rates
        with torch.enable_grad():
            return self.hyper.table(rule, rates, (program or self.program).parameters)

    def _known_for(self, tasks: TaskBatch, judged: bool = True) -> KnownBatch:
        """Checks a batch against the model and returns what is known of its kind, which the first of them shows.

        The query sets are looked at where the batch is ``judged``.
        """
        check_batch(tasks)
        if self._recognised:
            self._recognise_again()
        self._follow_changes()
        self._refuse_mapped(tasks)
        key = self._kind(tasks, judged)
        known = self._known.get(key)
        if known is None:
            with self._as_it_was(tasks) as batch:
                check_like(batch, self)
                known = self._latest = self._examine(batch.first_step, batch.shapes)
            known.parameters[:] = self.parameters_of(known.program)
            self._check_targets(known, tasks, judged)
            check_padding(tasks, known.unpaddable)
            self._known[key] = known
            if len(self._known) > _KINDS:
                self._known.popitem(last=False)
        else:
            if known.checks_targets:
                self._check_targets(known, tasks, judged)
            if known.unpaddable is not None:
                check_padding(tasks, known.unpaddable)
        self.__dict__["_latest"] = known  # nn.Module's own way to set an attribute takes longer than all the rest
        return known

    def _kind(self, tasks: TaskBatch, judged: bool) -> tuple[object, ...]:
        """Returns all that decides whether a batch fits and what runs it, but for the values of its labels."""
        own = self._snapshot.parameters[0]
        options = self._loss_options() if self._recognised else ()
        return tasks.shapes, own.dtype, own.device, judged, options

    def _choose(self, program: Program, shapes: TaskShapes) -> Choice:
        return choose(program, self.loop, shapes, self.backend, self.precision)

    def _examine(self, tasks: TaskBatch, shapes: TaskShapes) -> KnownBatch:
        """Captures the model for the first batch of a kind, of these ``shapes``, and checks both."""
        check_buffers(self.model)
        for rates in (self.rate, *self._hyper_rates()):
            rates.check(layout_of(self.model, self.rows))
        program = self.captures.of(tasks)
        parameters = self.parameters_of(program)
        theta = _flatten_dense_tensors(parameters).detach()
        unpaddable = None
        if tasks.shapes.ragged:
            unpaddable = self.captures.dependence_on_size(tasks) or mixing(program, theta, tasks)
        output = self.captures.output_shape(tasks.support_x)
        self.captures.output_shape(tasks.query_x)
        if self.captures.second_look:
            try:
                double_check(self.captures, program, theta, tasks)
            except (Difference, ValueError, RuntimeError):
                if not self.captures.doubt(tasks.query_x):
                    raise
                return self._examine(tasks, shapes)
        choice = self._choose(program, shapes)
        # Reading labels back from a GPU each time would stall it.
        reads = program.loss.reads_targets or program.query.loss.reads_targets
        looks = reads and tasks.support_x.device.type == "cpu"
        leaves_traces = self.captures.recording(tasks.support_x).changes_module
        tracks = any(getattr(node.layer, "mode", None) == "running" for node in program.nodes)
        if not self._swapped:
            self._look()
        self._loss_probe.check_left_behind(self.model, Surroundings(choice, program, parameters), tasks, self._assigned)
        recorded = has_own_derivatives(program)
        return KnownBatch(
            program, parameters, recorded, leaves_traces, tracks, choice, output, looks, unpaddable, shapes.tasks
        )

    def _check_targets(self, known: KnownBatch, tasks: TaskBatch, judged: bool) -> None:
        support_y = tasks.every_support.y if tasks.each_step else tasks.support_y
        known.program.loss.check(known.output, support_y, "support_y")
        if judged:
            known.program.query.loss.check(known.output, tasks.query_y, "query_y")

    def _add_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Adds the gradient of each meta-parameter of the model to its ``.grad``."""
        for parameter, gradient in zip(self._sources, gradients, strict=True):
            if parameter.requires_grad:
                before = parameter.grad
                parameter.grad = gradient if before is None else before.detach() + gradient

    def _held_program(self) -> Program:
        """Returns the Program, with copies of its constants where the model itself is about to change them."""
        return self.program.holding_constants() if self._now.leaves_traces else self.program

    def _track_statistics(self, tasks: TaskBatch) -> None:
        """Moves the running statistics of batch norm, where ``bn="running"``."""
        if self._now.tracks_statistics:
            predict = self._now.choice.executor.predict
            with self._plainly(tasks) as batch:
                theta = _flatten_dense_tensors([plain(p) for p in self._sources])
                track(self.program, predict, theta.detach(), batch.first_step.support)

    def _leave_traces(self, tasks: TaskBatch) -> None:
        """Leaves the buffers and attributes of the model as one call of it would, on the first task's support set."""
        if self._now.leaves_traces and self.training:
            # One thread, because torch's means have other bits with other numbers of threads.
            with self._plainly(tasks) as batch, self.captures.as_called(), _numbers_of(batch), one_thread():
                call(self.model, first_task(batch.first_step.support_x))
            self._note_traces()


def _numbers_of(tasks: TaskBatch) -> AbstractContextManager[None]:
    """Makes the model draw what the Program draws for the first task's support set."""
    return given_numbers(None if tasks.seeds is None else tasks.seeds[:1, 0])
