"""Defines what an inner step makes of the gradient: a rule, its state, its hyper-parameters, and the way back of both.

A step takes ``z = (theta, state)`` to ``z'``. Its way back takes the adjoint of ``z'`` to those of ``z``, of the
gradient and of the hyper-parameters; it follows from the step by autograd. Vectors are ``[T, P]``; theta and the
vectors of the state lie one after another in ``z [T, (1 + K) P]``.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from metafast.program.one_thread import one_thread

Hyper = Mapping[str, Tensor]
"""Hyper-parameters of one step by name, ``"lr"`` among them: float64, of no dimension or ``[P]``."""
_CLIPS = ("max_norm", "max_value")
_NORM_EPS = 1e-6  # what torch.nn.utils.clip_grad_norm_ adds to the norm


class Formula(NamedTuple):
    """Names one of the steps that executors have compiled.

    Attributes:
        kind: the name under which they know it.
        option: how the step is taken, where there are two ways.
    """

    kind: str
    option: bool = False


class Rule(ABC):
    """Says how an inner step follows from the gradient; a class of your own needs :meth:`step` and what it is made of.

    .. code-block:: python

        class Sign(mf.Rule):
            hyper = ("decay",)
            states = ("trace",)

            def __init__(self, decay=0.9):
                self.decay = decay                          # a number, or an mf.Rate: learned, by step, by layer

            def step(self, theta, gradient, state, hyper, count):
                trace = hyper["decay"] * state[0] + gradient
                return theta - hyper["lr"] * torch.tanh(trace), (trace,)

    The meta-gradient is exact: the way back differentiates ``step`` by autograd. A rule may be an ``nn.Module`` too,
    whose parameters then are meta-parameters.

    Attributes:
        hyper: the names of its hyper-parameters beside the learning rate, each an attribute of the rule.
        states: the names of the vectors that it carries from step to step.
        max_norm: before the step the gradient of each task is scaled down to this norm, as
            ``torch.nn.utils.clip_grad_norm_`` does it; ``None``: it is not.
        max_value: before that each element is clamped to ``[-max_value, max_value]``, as
            ``torch.nn.utils.clip_grad_value_`` does it; ``None``: it is not.
    """

    hyper: ClassVar[tuple[str, ...]] = ()
    states: Sequence[str] = ()
    max_norm: Any = None
    max_value: Any = None

    def __new__(cls, *args: Any, **options: Any) -> Any:
        """Says where the learning rate belongs, which optimisers of torch take themselves.

        Raises:
            TypeError: ``lr`` is given to a rule that has no such argument of its own.
        """
        if "lr" in options and "lr" not in inspect.signature(cls.__init__).parameters:
            raise TypeError(
                f"{cls.__name__}(lr={options['lr']!r}): the learning rate is the learner's, "
                f"mf.MAML(..., lr={options['lr']!r}, inner=mf.{cls.__name__}(...)), and may be an mf.Rate"
            )
        return super().__new__(cls)

    @abstractmethod
    def step(
        self, theta: Tensor, gradient: Tensor, state: tuple[Tensor, ...], hyper: Hyper, count: int
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Returns the parameters and the state after a step.

        Args:
            theta: the parameters ``[T, P]``. Those that the inner loop does not move have a gradient of zero, and stay
                as they are whatever is returned for them.
            gradient: the gradient of the support loss, ``[T, P]``, clipped already.
            state: the vectors named in ``states``, ``[T, P]`` each.
            hyper: ``"lr"`` and the hyper-parameters, each a number or ``[P]``, in float64.
            count: the number of this step, from 1.
        """

    def start(self, name: str) -> float:
        """Returns what the elements of a state are before the first step."""
        return 0.0

    @property
    def formula(self) -> Formula | None:
        """Says which of the steps that executors may have compiled this one is; ``None``: it is none of them."""
        return None

    @property
    def hyper_names(self) -> tuple[str, ...]:
        """Lists the hyper-parameters as tables hold them: ``"lr"``, the rule's own, and the bounds that it clips to."""
        return ("lr", *self.hyper, *(name for name in _CLIPS if getattr(self, name) is not None))

    def advance(self, z: Tensor, gradient: Tensor, rows: Tensor, count: int, moved: Tensor) -> Tensor:
        """Takes a step from ``z [T, (1 + K) P]``, the parameters and the state, and returns it after the step.

        Args:
            z: the parameters and the vectors of the state, one after another.
            gradient: the gradient of the support loss, ``[T, P]``.
            rows: the hyper-parameters ``[H, 1 or P]`` in the order of ``hyper_names``, in float64.
            count: the number of this step, from 1.
            moved: true ``[P]`` where the inner loop moves the parameter.
        """
        theta, *state = z.split(gradient.shape[-1], -1)
        hyper = self.named(rows)
        with _threads(self):
            gradient = clipped(self, gradient, hyper)
            found, states = self.step(theta, gradient, tuple(state), hyper, count)
        parts = [
            torch.where(moved, new, old).to(z.dtype) for new, old in zip((found, *states), (theta, *state), strict=True)
        ]
        return torch.cat(parts, -1)

    @torch.no_grad()
    def advance_vjp(
        self, z: Tensor, gradient: Tensor, rows: Tensor, count: int, moved: Tensor, v: Tensor, learns: bool
    ) -> StepAdjoints:
        """Takes the adjoint ``v`` of what :meth:`advance` returns to those of what it is given."""
        with torch.enable_grad(), _threads(self, learns):
            leaves = [z.detach().requires_grad_(), gradient.detach().requires_grad_()]
            own = rows.detach().requires_grad_(learns)
            found = self.advance(leaves[0], leaves[1], own, count, moved)
            wanted = [*leaves, own] if learns else leaves
            of_z, of_gradient, *of_rows = torch.autograd.grad(
                found, wanted, v, allow_unused=True, materialize_grads=True
            )
        return StepAdjoints(of_z, of_gradient * moved, of_rows[0] if learns else None)

    def named(self, rows: Tensor) -> Hyper:
        """Returns the hyper-parameters by name, each of no dimension or ``[P]``."""
        rows = rows[:, 0] if rows.shape[1] == 1 else rows
        return dict(zip(self.hyper_names, rows.unbind(0), strict=True))


class StepAdjoints(NamedTuple):
    """Holds the adjoints of what a step is made of.

    Attributes:
        z: that of theta and the state before the step, ``[T, (1 + K) P]``, without what goes through the gradient.
        gradient: that of the gradient, ``[T, P]``; zero where a parameter does not move.
        hyper: those of the hyper-parameters, ``[H, 1 or P]`` float64; ``None`` where they are not asked for.
    """

    z: Tensor
    gradient: Tensor
    hyper: Tensor | None


def clipped(rule: Rule, gradient: Tensor, hyper: Hyper) -> Tensor:
    """Returns ``gradient [T, P]`` clamped by value and then scaled to a norm for each task, where the rule says so.

    The norm of a gradient of zero has the derivative zero.
    """
    if rule.max_value is not None:
        bound = hyper["max_value"].to(gradient.dtype)
        gradient = torch.where(gradient > bound, bound, torch.where(gradient < -bound, -bound, gradient))
    if rule.max_norm is not None:
        norm = root(gradient.square().sum(-1, keepdim=True))
        gradient = gradient * (hyper["max_norm"] / (norm + _NORM_EPS)).clamp(max=1.0).to(gradient.dtype)
    return gradient


def root(square: Tensor) -> Tensor:
    """Returns the square root, whose derivative is zero where ``square`` is zero: there it has none. NaN stays NaN."""
    flat = square <= 0
    return torch.where(flat, 0.0, torch.where(flat, 1.0, square).sqrt())


def started(rule: Rule | None, start: Tensor, size: int) -> Tensor:
    """Returns ``z [..., (1 + K) P]`` before the first step; ``start`` is that, or the parameters ``[..., P]`` alone."""
    if rule is None or not rule.states or start.shape[-1] != size:
        return start
    shape = start.shape
    return torch.cat([start, *(start.new_full(shape, rule.start(name)) for name in rule.states)], -1)


def hyper_rows(rates: Tensor, step: int) -> Tensor:
    """Returns the hyper-parameters of one step, ``[H, 1 or P]``, from ``rates [H, 1 or S, 1 or P]``.

    The last row serves all later steps.
    """
    return rates[:, min(step, rates.shape[1] - 1)]


def is_of_the_user(rule: Rule | None) -> bool:
    """Says whether a rule is none of metafast's own."""
    return rule is not None and not type(rule).__module__.startswith("metafast.")


def _threads(rule: Rule, learns: bool = False) -> AbstractContextManager[None]:
    """Lets one thread do what the number of threads would round otherwise: sums, and what a user's rule may hold.

    The adjoint of a hyper-parameter is a sum over all elements.
    """
    sums = learns or rule.max_norm is not None or is_of_the_user(rule)
    return one_thread() if sums else nullcontext()
