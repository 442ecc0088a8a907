"""Defines what a learner is, the protocol that training, tests and the command line rely on, and registers learners."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from metafast.tasks import TaskBatch

INNER_SETTINGS = ("steps", "inner_lr", "inner_optimizer", "test_steps")
"""Fields of a recipe that belong to an inner loop; they are ``None`` for a learner that has none."""


@dataclass(frozen=True)
class LearnerOutput:
    """Holds what a learner makes of a batch of T tasks.

    Attributes:
        losses: ``[T]``, each task's meta-loss.
        outputs: ``[T, m, ...]``, what the adapted models say of the query sets. A meta-loss of one's own can be built
            on them where the learner has a gradient: that of its losses goes the same way.
    """

    losses: Tensor
    outputs: Tensor

    @property
    def loss(self) -> Tensor:
        """Is the mean of ``losses``, with their graph wherever it is read."""
        if not self.losses.requires_grad:
            return self.losses.mean()
        with torch.enable_grad():
            return self.losses.mean()

    def detach(self) -> LearnerOutput:
        """Returns the same without a graph."""
        return LearnerOutput(self.losses.detach(), self.outputs.detach())


class LearnerRecipe(Protocol):
    """Lists what a learner may read of a recipe; ``metafast.training.recipes.Recipe`` says what each field means."""

    @property
    def loss(self) -> str: ...
    @property
    def classification(self) -> bool: ...
    @property
    def ways(self) -> int: ...
    @property
    def steps(self) -> int | None: ...
    @property
    def inner_lr(self) -> float | None: ...
    @property
    def inner_optimizer(self) -> str | None: ...
    @property
    def test_steps(self) -> tuple[int, ...] | None: ...


class Learner(nn.Module, ABC):
    """A learner makes a model from a support set, and from many tasks it learns to do so well.

    The meta-objective is ``J = mean_t L(outputs_t, query_y_t)``, ``outputs_t = A(support_t)(query_x_t)``, where ``A``
    is :meth:`adapt`. ``parameters()`` are the meta-parameters. How ``A`` works is left open: by gradient steps
    (:class:`~metafast.learners.gradient.GradientLearner`), by distances to prototypes, by a memory. A class that sets
    ``name`` is found by :func:`by_name`, and so by recipes and by the command line; nothing else has to be told of it.

    Attributes:
        name: how recipes and the command line call the learner, such as ``"maml++"``.
        paper: authors, year and arXiv number.
        recipe_changes: what the learner changes in a recipe that was written for MAML, by the kind of its tasks:
            ``"classification"`` or ``"regression"``.
        inner_settings: which of ``INNER_SETTINGS`` it takes. The others are ``None`` in its recipes.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    recipe_changes: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    inner_settings: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **options: Any) -> None:
        """Registers a class that has a name of its own.

        Raises:
            ValueError: another class has that name.
        """
        super().__init_subclass__(**options)
        if "name" in vars(cls):
            known = _LEARNERS.get(cls.name, cls)
            if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ValueError(
                    f"name = {cls.name!r} of {cls.__module__}.{cls.__qualname__} is taken by {known.__module__}."
                    f"{known.__qualname__}; give the learner another one"
                )
            _LEARNERS[cls.name] = cls

    @classmethod
    @abstractmethod
    def from_recipe(cls, recipe: LearnerRecipe, model: nn.Module, backend: str) -> Learner:
        """Builds the learner of a recipe around ``model``, whose last layer is called ``head``.

        Raises:
            ValueError: ``backend`` names an executor that the learner has no use for.
        """

    @classmethod
    def check_recipe(cls, recipe: LearnerRecipe) -> None:
        """Checks that the recipe's tasks and inner settings are for this learner.

        Raises:
            ValueError: an inner setting is missing, or set where the learner takes none; the text names it.
        """
        for setting in INNER_SETTINGS:
            value = getattr(recipe, setting)
            if value is None and setting in cls.inner_settings:
                raise ValueError(f"{setting} is missing; {cls.name} needs it")
            if value is not None and setting not in cls.inner_settings:
                raise ValueError(f"{setting} is {value!r}, but {cls.name} has no such setting; leave it out")

    @classmethod
    def test_settings(cls, recipe: LearnerRecipe) -> list[dict[str, Any]]:
        """Returns the keyword arguments of :meth:`adapt` under which the learner is tested, one set for each test.

        The last one is what a run is known by. A learner that has only one way to adapt is tested once.
        """
        return [{}]

    @abstractmethod
    def forward(self, tasks: TaskBatch) -> LearnerOutput:
        """Adapts to each task and judges it on its query set; ``.loss.backward()`` gives the meta-gradient.

        Raises:
            TypeError, ValueError: the batch does not fit the model; the text names the tensor.
        """

    def backward(self, tasks: TaskBatch) -> LearnerOutput:
        """Adds ``dJ/dparameter`` to ``.grad`` of all meta-parameters. What it returns belongs to no graph."""
        out = self(tasks)
        out.loss.backward()
        return out.detach()

    @abstractmethod
    def adapt(
        self, support_x: Tensor, support_y: Tensor, *, support_mask: Tensor | None = None
    ) -> Callable[[Tensor], Tensor]:
        """Adapts to T tasks and returns their models as one function ``x [T, n, ...] -> outputs [T, n, ...]``.

        Tests call both under ``torch.no_grad()``: a learner that adapts by autograd switches it on for itself.

        Args:
            support_x: ``[T, n, ...]``.
            support_y: ``[T, n]`` labels, or ``[T, n, ...]`` targets.
            support_mask: bool ``[T, n]``; samples that are false are padding.
        """

    def explain(self, x: Tensor | None = None) -> str:
        """Says in lines what runs the learner on batches like ``x [T, n, ...]``."""
        size = sum(p.numel() for p in self.parameters())
        return f"executor: none, {type(self).__name__} runs as PyTorch's own operators; {size:,} parameters"

    def batch_norm(self) -> str | None:
        """Says where batch norm takes its statistics from; it is ``None`` where the learner has no batch norm."""
        if not any(isinstance(module, _BatchNorm) for module in self.modules()):
            return None
        return f"as torch.nn.BatchNorm does in {'training' if self.training else 'evaluation'} mode"

    def outer_optimizer(self, lr: float) -> torch.optim.Optimizer:
        """Makes the optimiser of the meta-parameters, that of the learner's paper. It is Adam if none says otherwise.

        Its ``lr`` is a tensor beside the parameters, and a step reads nothing back: a CUDA graph can hold it.
        """
        parameters = list(self.parameters())
        return torch.optim.Adam(
            parameters, lr=rate_beside(parameters[0], lr), fused=True, capturable=parameters[0].is_cuda
        )

    def schedule(self, iteration: int, iterations: int) -> tuple[object, ...]:
        """Sets what changes as training goes on, for iteration ``0 <= iteration < iterations``.

        Returns the settings that a recording of an outer step holds as they were: it is made anew when they differ.
        """
        return ()

    def graph_obstacle(self, tasks: TaskBatch) -> str | None:
        """Says why no CUDA graph can hold :meth:`backward` on batches like ``tasks``, which are on a GPU.

        It is ``None`` where one can.
        """
        return f"{type(self).__name__} may wait for the host"


_LEARNERS: dict[str, type[Learner]] = {}


def names() -> list[str]:
    """Returns the names of all learners, in alphabetical order."""
    return sorted(_LEARNERS)


def by_name(name: str) -> type[Learner]:
    """Returns the class of the learner that recipes and the command line call ``name``.

    Raises:
        ValueError: there is none.
    """
    if name not in _LEARNERS:
        raise ValueError(f"there is no algorithm {name!r}; choose from {', '.join(names())}")
    return _LEARNERS[name]


def rate_beside(parameter: Tensor, lr: float) -> Tensor:
    """Puts ``lr`` into a tensor on the parameter's device, as torch's fused optimisers want it."""
    # The kernels read a rate on a GPU as float32, and one on the CPU as float64.
    dtype = torch.float32 if parameter.is_cuda else torch.float64
    return torch.tensor(lr, dtype=dtype, device=parameter.device)
