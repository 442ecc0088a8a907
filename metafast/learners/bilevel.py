"""Solves bilevel problems: an outer loss of what an inner loop of gradient steps makes of a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from metafast.inner.rates import Rate
from metafast.learners.adapted import Adapted
from metafast.learners.base import LearnerOutput
from metafast.learners.maml import MAML
from metafast.program.losses import LossLike
from metafast.tasks import TaskBatch, as_samples, each_part, parts_of

Set = Sequence[Any]
"""Samples and targets ``(x, y)``, or ``(x, y, mask)`` with false where a sample is padding."""


@dataclass(frozen=True)
class BilevelOutput:
    """Holds the outer ``loss``, a number, and the ``outputs [m, ...]`` for the samples that it judges."""

    loss: Tensor
    outputs: Tensor


@dataclass(frozen=True)
class Solution:
    """Is the model that the inner loop ends with; it maps ``x [n, ...]`` to outputs ``[n, ...]``."""

    adapted: Adapted

    def __call__(self, x: Any) -> Tensor:
        """Returns the outputs ``[n, ...]``; no graph is kept."""
        return self.adapted(_as_task(x, 0))[0]

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the parameters by name, for ``model.load_state_dict(..., strict=False)``."""
        return self.adapted.state_dict(0)


class Bilevel(nn.Module):
    """Differentiates an outer loss through S inner steps of one problem, exactly:

        min over lambda of  L_outer(theta_S(lambda), lambda),
        theta_{s+1} = step(theta_s, grad L_inner(theta_s, lambda), lambda)

    ``lambda`` is all that requires a gradient and that the inner loop reads: learned rates and hyper-parameters of the
    rule (:class:`~metafast.inner.rates.Rate` with ``learn=True``), parameters of losses that are modules, inputs and
    targets of the training set (weights of samples are factors of soft targets), and with ``learn_start`` the initial
    parameters. It is one task of :class:`~metafast.learners.maml.MAML`, by the same executors: the way back records no
    graph, and takes the memory of about ``2 sqrt(S)`` copies of the parameters where S of them are too many.

    Args:
        model: the module that the inner loop trains.
        loss: the inner loss.
        outer_loss: the outer loss; ``None``: the same.
        lr: the inner learning rate: a number or a :class:`~metafast.inner.rates.Rate`.
        steps: S, the number of inner steps.
        learn_start: whether the model's initial parameters are among ``parameters()``.
        **options: those of :class:`~metafast.learners.maml.MAML`: ``inner``, ``truncate``, ``memory``, ``adapt``, ...

    Raises:
        CaptureError, TypeError, ValueError: what ``MAML`` raises.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: LossLike,
        outer_loss: LossLike | None = None,
        lr: float | Rate,
        steps: int,
        learn_start: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        kind = MAML if learn_start else _FromFixedStart
        self.learner = kind(model, loss=loss, query_loss=outer_loss, lr=lr, steps=steps, **options)

    def forward(
        self, train: Set, held_out: Set, *, each_step: bool = False, create_graph: bool = False
    ) -> BilevelOutput:
        """Trains on ``train`` and judges on ``held_out``; ``.loss.backward()`` gives the exact hypergradient.

        Args:
            train: ``x [n, ...]`` and ``y [n, ...]``; with ``each_step`` ``[S, n, ...]``, a batch for each inner step.
            held_out: ``x [m, ...]`` and ``y [m, ...]``.
            each_step: whether every inner step has samples of its own.
            create_graph: record plain operations instead, which can be differentiated any number of times.
        """
        return _of_one(self.learner(_tasks(train, held_out, each_step), create_graph=create_graph))

    def backward(self, train: Set, held_out: Set, *, each_step: bool = False) -> BilevelOutput:
        """Adds the hypergradient to ``.grad`` of ``parameters()``, and of tensors of the sets that require one."""
        return _of_one(self.learner.backward(_tasks(train, held_out, each_step)))

    def solve(self, train: Set, steps: int | None = None, *, each_step: bool = False) -> Solution:
        """Trains on ``train``, and returns the model at the end; no graph is kept."""
        x, y, mask = _parts(train, each_step)
        return Solution(self.learner.adapt(x, y, steps, mask, each_step=each_step))

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields the outer variables that are parameters; the model's own are among them with ``learn_start``."""
        learner = self.learner
        start = [*learner.model.parameters(), *learner.rows.parameters()]
        fixed = {id(parameter) for parameter in start} if isinstance(learner, _FromFixedStart) else set()
        for name, parameter in super().named_parameters(*args, **kwargs):
            if id(parameter) not in fixed:
                yield name, parameter

    def explain(self) -> str:
        """Says what runs each layer, and how the way back goes through memory."""
        return self.learner.explain()


class _FromFixedStart(MAML):
    """Is MAML whose initial parameters are no meta-parameters."""

    def flat_parameters(self) -> Tensor:
        """Returns the initial parameters, without a graph."""
        return super().flat_parameters().detach()

    def _add_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Leaves the model's ``.grad`` as it is."""


def _parts(given: Set, each_step: bool) -> tuple[Any, Tensor, Tensor | None]:
    """Returns samples, targets and mask with an axis of one task."""
    if not isinstance(given, tuple | list) or len(given) not in (2, 3):
        raise TypeError(f"a set is (x, y) or (x, y, mask), not {type(given).__name__} of {_length(given)}")
    x, y, mask = (*given, None)[:3]
    wrong = [part for part in (*parts_of(as_samples(x)), y) if not isinstance(part, Tensor)]
    if wrong:
        raise TypeError(f"a set has a {type(wrong[0]).__name__}; pass torch.Tensors (torch.as_tensor makes one)")
    axis = 1 if each_step else 0
    return _as_task(x, axis), y.unsqueeze(axis), None if mask is None else mask.unsqueeze(axis)


def _length(given: Any) -> str:
    return f"length {len(given)}" if hasattr(given, "__len__") else "no length"


def _as_task(x: Any, axis: int) -> Any:
    return each_part(lambda part: part.unsqueeze(axis), as_samples(x))


def _tasks(train: Set, held_out: Set, each_step: bool) -> TaskBatch:
    x, y, mask = _parts(train, each_step)
    query_x, query_y, query_mask = _parts(held_out, False)
    return TaskBatch(x, y, query_x, query_y, mask, query_mask, each_step=each_step)


def _of_one(out: LearnerOutput) -> BilevelOutput:
    return BilevelOutput(out.loss, out.outputs[0])
