"""MAML learns an initialisation from which a few gradient steps learn a task."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from metafast.executors import Choice
from metafast.executors.composition import Segments, Sets, segments_of
from metafast.inner.autocast import in_own_dtype
from metafast.inner.autograd import MetaLoss, flattened
from metafast.inner.hyper_rates import HyperRates, described
from metafast.inner.rates import Rate, Rates
from metafast.inner.recorded import recorded
from metafast.inner.rules import SGD
from metafast.inner.rules.checks import check_flag, check_rule
from metafast.inner.rules.probe import check_step, probed
from metafast.learners.adapted_parameters import without_batch_norm
from metafast.learners.base import LearnerOutput, LearnerRecipe
from metafast.learners.checks import check_steps
from metafast.learners.gradient import GradientLearner
from metafast.learners.known_batch import KnownBatch
from metafast.learners.layout import layout_of
from metafast.learners.outside_gradients import Outside
from metafast.learners.seeds import with_seeds
from metafast.learners.settings import check_whole
from metafast.program import Program
from metafast.program.engine import add_gradients
from metafast.program.inner_loop import InnerLoop
from metafast.program.losses import LossLike
from metafast.program.rule import Hyper, Rule, hyper_rows, is_of_the_user
from metafast.tasks import TaskBatch, TaskShapes

_PLAIN = SGD()
_PLAIN_ALONE = (
    "a compiled graph holds inner loops of plain gradient steps on one support set; call the learner uncompiled for a "
    "rule, for samples of each step's own, and for truncate= and memory="
)


class MAML(GradientLearner):
    """Model-agnostic meta-learning (Finn, Abbeel, Levine 2017, 1703.03400) takes its exact second-order gradient here.

    ``theta_{s+1} = theta_s - alpha grad L_support(theta_s)``, ``s = 0..S-1``; the meta-loss is
    ``mean_t L_query(theta_S)``, or ``mean_t sum_s w_s L_query(theta_s)`` with ``step_weights``.
    Its recipes move no parameter of a batch norm, as the MAML papers do.

    Args:
        first_order: drop the Hessian terms (FOMAML).
        step_weights: ``w_1 .. w_S``; ``None`` puts all weight on the last step.
        inner: what an inner step makes of the gradient: ``mf.SGD(momentum=0.9)``, ``mf.Adam()``, ``mf.AdamW()``,
            ``mf.RMSprop()``, ``mf.Adagrad()``, each with ``max_norm=`` and ``max_value=``, or an ``mf.Rule`` of your
            own. Hyper-parameters may be an :class:`~metafast.inner.rates.Rate`, which can be learned.
        learn_state: whether the state that the rule starts from (momentum, moments) is a meta-parameter.
        truncate: go back through the last so many steps, and take what lies before for constants, but for theta itself
            (Shaban et al. 2019, 1810.10667); 0 is first order. ``"T1-T2"`` is 1 (Luketina et al. 2016, 1511.06727).
            ``None``: through all.
        memory: the most bytes for the states of the steps that are kept for the way back. With less than all of them it
            keeps about ``sqrt(S)`` and takes the others again. ``None``: 1 GiB, or more where nothing less will do.
        **options: ``query_loss``, ``adapt``, ``bn``, ``output``, ``backend`` and ``precision`` of
            :class:`~metafast.learners.gradient.GradientLearner`, which raises its errors too.
    """

    name = "maml"
    paper = "Finn, Abbeel, Levine 2017, 1703.03400"
    _inner: Rule

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: LossLike,
        lr: float | Rate,
        steps: int = 1,
        first_order: bool = False,
        step_weights: Iterable[float] | None = None,
        inner: Rule = _PLAIN,
        learn_state: bool = False,
        truncate: int | str | None = None,
        memory: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, loss=loss, lr=lr, steps=steps, **options)
        self.first_order = first_order
        self.step_weights = step_weights
        self.truncate = truncate
        self.memory = memory
        self.inner = inner
        check_flag("learn_state", learn_state)
        if learn_state and not inner.states:
            raise ValueError(f"learn_state=True: {inner!r} carries no state from step to step that could be learned")
        layout, like = layout_of(model, self.rows), next(model.parameters())
        self.hyper = HyperRates.of_rates(described(inner), layout, steps, like)
        self._learns_state = learn_state
        states = inner.states if learn_state else ()
        self.start_state = HyperRates.of_rates(
            {name: Rate(inner.start(name), "parameter", learn=True) for name in states}, layout, steps, like
        )
        self._look()

    @classmethod
    def recipe_options(cls, recipe: LearnerRecipe, model: nn.Module) -> dict[str, Any]:
        """Lets the inner loop of a recipe move all but batch norm."""
        return {"adapt": without_batch_norm(model)}

    @property
    def first_order(self) -> bool:
        """Whether the Hessian terms are dropped."""
        return self._first_order

    @first_order.setter
    def first_order(self, first_order: bool) -> None:
        if not isinstance(first_order, bool):
            raise TypeError(f"first_order={first_order!r}: give True, which drops the Hessian terms, or False")
        self._first_order = first_order

    @property
    def inner(self) -> Rule:
        """What an inner step makes of the gradient."""
        return self._inner

    @inner.setter
    def inner(self, inner: Rule) -> None:
        if not isinstance(inner, Rule):
            raise TypeError(
                f"inner={inner!r}: give a rule, such as mf.SGD(momentum=0.9), mf.Adam() or an mf.Rule of yours"
            )
        check_rule(inner)
        if self._sealed:
            if len(self.start_state) and [*self.start_state] != [*inner.states]:
                raise ValueError(
                    f"inner={inner!r}: the state that is learned is {[*self.start_state]}; make a new learner"
                )
            self.hyper.start_from(inner)
        self.__dict__["_inner"] = inner  # nn.Module would take a rule that is a module for a part of another name
        self._modules.pop("inner", None)
        if isinstance(inner, nn.Module):
            self._modules["inner"] = inner
        self._is_plain = type(inner) is SGD and inner.is_plain
        self._plan_again()

    def _hyper_rates(self) -> list[Rates]:
        return [*super()._hyper_rates(), *self.start_state.each()]

    @property
    def _rule(self) -> Rule | None:
        return None if self._is_plain else self._inner

    @property
    def truncate(self) -> int | None:
        """How many of the last steps the way back goes through; ``None``: all."""
        return self._truncate

    @truncate.setter
    def truncate(self, truncate: int | str | None) -> None:
        truncate = 1 if truncate == "T1-T2" else truncate
        if truncate is not None:
            if isinstance(truncate, str):
                raise ValueError(f'truncate={truncate!r}: give a number of steps, "T1-T2" or None')
            check_whole("truncate", truncate, 0, "the way back goes through a whole number of steps")
        self._truncate = truncate
        self._plan_again()

    @property
    def memory(self) -> int | None:
        """The most bytes that the way back keeps of the states of the steps; ``None``: as it sees fit."""
        return self._memory

    @memory.setter
    def memory(self, memory: int | None) -> None:
        if memory is not None:
            check_whole("memory", memory, 1, "it is a number of bytes")
        self._memory = memory
        self._plan_again()

    @property
    def step_weights(self) -> list[float]:
        """They are the weights of the query losses after steps ``0..S``; assign ``w_1 .. w_S`` to change them."""
        return list(self._weights)

    @step_weights.setter
    def step_weights(self, weights: Iterable[float] | None) -> None:
        self._weights, self._judged_last = tuple(finite_weights(weights, self.steps)), weights is None

    def _examine(self, tasks: TaskBatch, shapes: TaskShapes) -> KnownBatch:
        known = super()._examine(tasks, shapes)
        if is_of_the_user(self._inner):
            check_step(self._inner, known.program.size, self._first_hyper(known.program), self.rate.value)
        return known

    def _first_hyper(self, program: Program) -> Hyper:
        """Returns the hyper-parameters of the first step, without a graph."""
        return self._inner.named(hyper_rows(self.inner_rates(program).detach(), 0))

    def _outside(self, choice: Choice, tasks: TaskBatch, judged: bool = True) -> Outside:
        """Finds what it finds for any learner, and tensors that a rule reads beside what it is given."""
        found = super()._outside(choice, tasks, judged)
        if self._is_plain or not is_of_the_user(self._inner):
            return found
        own = self._inner.parameters() if isinstance(self._inner, nn.Module) else ()
        with torch.enable_grad():
            values = probed(self._inner, self.program.size, self._first_hyper(self.program), self.rate.value)
        return found.with_rule(values, own)

    def _made_for_steps(self) -> list[tuple[str, str]]:
        found = super()._made_for_steps()
        if not self._judged_last:
            found.append(("there are step_weights", "set learner.step_weights = None first"))
        return found

    def _follow_steps(self) -> None:
        self.step_weights = None

    def schedule(self, iteration: int, iterations: int) -> tuple[object, ...]:
        """Changes nothing; a recording holds the weights of the query losses and the order of differentiation."""
        return self.step_weights, self.first_order

    @in_own_dtype
    def forward(self, tasks: TaskBatch, create_graph: bool = False) -> LearnerOutput:
        """Adapts to each task and judges it on its query set; ``.loss.backward()`` gives the exact meta-gradient.

        Gradients also go to tensors of the batch, and to what the loss reads, where they require one; the outputs can
        be differentiated too. ``create_graph=True`` records the unrolled computation through the reference path
        instead: slower and larger, but differentiable any number of times.

        Raises:
            TypeError, ValueError: the batch does not fit the model.
        """
        if torch.compiler.is_compiling():
            if not self.loop.is_plain or tasks.each_step or self._learns_state:
                raise RuntimeError(_PLAIN_ALONE)
            return self._compiled(tasks, self._weights, self.first_order, create_graph)
        known = self._known_for(tasks)
        check_steps(tasks, self.steps)
        if not create_graph:
            self._check_memory(known, fused=False)
        tasks, seen = with_seeds(known.program, tasks), tasks.first_step
        if torch.is_grad_enabled():
            self._track_statistics(tasks)
        outside = self._outside(known.choice, seen)
        if outside.own and not torch.is_grad_enabled():
            with torch.enable_grad():  # the first step differentiates the loss in these parameters
                return self._recorded(tasks, outside).detach()
        must = outside.must_be_recorded() or known.is_recorded
        if create_graph or outside.own or (torch.is_grad_enabled() and must):
            out = self._recorded(tasks, outside)
        else:
            start, rates, program = self._start_of(self.flat_parameters()), self.inner_rates(), self._held_program()
            spec, tensors = flattened(tasks)
            modules = self._outside_modules
            losses, outputs, *_ = MetaLoss.apply(
                start, rates, known.choice.executor, program, self.loop, spec, modules, *tensors, *modules.parameters()
            )
            out = LearnerOutput(losses, outputs)
        if torch.is_grad_enabled():
            self._leave_traces(tasks)
        return out

    @property
    def _outside_modules(self) -> nn.ModuleList:
        """The modules whose parameters autograd has to give gradients to: losses, and a rule that is a module."""
        if not isinstance(self._inner, nn.Module):
            return self.loss_modules
        return nn.ModuleList([*self.loss_modules, self._inner])

    def _start_of(self, parameters: Tensor) -> Tensor:
        if not self._learns_state:
            return parameters
        states = (self.start_state.of_name(name).of(self.program.parameters)[0] for name in self.start_state)
        return torch.cat([parameters, *states])

    def _recorded(self, tasks: TaskBatch, outside: Outside) -> LearnerOutput:
        start, rates = self._start_of(self.flat_parameters()), self.inner_rates()
        sets = Sets(tasks.support, tasks.query)
        with self._recording():
            return LearnerOutput(*recorded(self._held_program(), self.loop, start, rates, sets, outside.own)[:2])

    def explain(self, x: Tensor | None = None) -> str:
        """Says what it says of any gradient-based learner, and what inner steps are, where they are not plain."""
        said = super().explain(x)
        if self._rule is not None:
            said += f"\n  inner steps: {self._inner}"
        known = self._latest if x is None else None
        if known is not None and not self.loop.is_plain:
            try:
                segments = str(self._segments(known))
            except ValueError as error:  # the executor's one call may need less
                segments = str(error)
            said += f"\n  z of the steps, step by step or through autograd: {segments}"
        return said

    def _check_memory(self, known: KnownBatch, fused: bool) -> None:
        """Raises ValueError where ``memory`` is less than any plan needs, before running statistics move.

        Where the executor's one call is to do it (``fused``), it says so of its own plan, if it has one.
        """
        if self._memory is not None and (not fused or known.choice.plan.memory() is None):
            self._segments(known)

    def _segments(self, known: KnownBatch) -> Segments:
        """Says which steps are kept where the loop is taken by parts."""
        width = (1 + self.loop.states) * known.program.size
        return segments_of(self.loop, known.tasks, width, known.parameters[0].element_size())

    @in_own_dtype
    def backward(self, tasks: TaskBatch) -> LearnerOutput:
        """Adds the meta-gradient of the mean loss to ``.grad`` of all meta-parameters, in one call of the executor.

        It goes through ``forward`` where a subclass has one of its own, or where hooks watch the learner.
        """
        known = self._known_for(tasks)
        if tasks.each_step:
            check_steps(tasks, self.steps)
        if known.program.draws:
            tasks = with_seeds(known.program, tasks)
        watched = self._forward_hooks or self._forward_pre_hooks or type(self).forward is not MAML.forward
        further = self._learns_state or isinstance(self._inner, nn.Module)
        if watched or further or self._outside(known.choice, tasks.first_step).names or known.is_recorded:
            with torch.enable_grad():
                return super().backward(tasks)
        if known.tracks_statistics:
            self._check_memory(known, fused=True)
            self._track_statistics(tasks)
        rates = self.inner_rates()
        loop = self._loop(learns_rates=rates.requires_grad)
        found = known.choice.executor.meta_gradient(known.program, loop, known.parameters, rates, tasks)
        self._add_gradients(found.grads)
        if found.rates_grad is not None:
            add_gradients(rates, found.rates_grad)
        if known.leaves_traces:
            self._leave_traces(tasks)
        return LearnerOutput(found.losses, found.outputs)

    @property
    def loop(self) -> InnerLoop:
        """The inner loop as the executors read it, by the settings of now."""
        learned = self.rate.learn or self.hyper.learn
        return self._loop(learns_rates=learned)

    def _loop(self, learns_rates: bool) -> InnerLoop:
        steps, weights, first_order, one_rate = self._steps, self._weights, self._first_order, self._one_rate
        return InnerLoop(
            steps, weights, first_order, learns_rates, one_rate, self._rule, 0, self._truncate, self._memory
        )


def finite_weights(weights: Iterable[float] | None, steps: int) -> list[float]:
    """Returns the weights of the query losses after steps ``0..S``; ``None`` puts all weight on the last.

    Raises:
        ValueError: not S numbers, one that is not finite, or nothing but zeros.
    """
    if weights is None:
        return [0.0] * steps + [1.0]
    try:
        values = [float(w) for w in weights]
    except (TypeError, ValueError):
        values = []
    if len(values) == steps + 1 and values[0] == 0:
        del values[0]  # as a learner tells them
    if len(values) != steps or not all(math.isfinite(w) for w in values) or not any(values):
        raise ValueError(
            f"step_weights={weights!r}: give {steps} finite numbers, not all zero, one for the query loss after each "
            "step"
        )
    return [0.0, *values]
