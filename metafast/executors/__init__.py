"""Lists the executors and chooses between them."""

from __future__ import annotations

from dataclasses import dataclass

from metafast.executors.base import ExecutionPlan, Executor, MetaGradient
from metafast.executors.native.cpu import CpuExecutor
from metafast.executors.native.cuda import BlockLimits, CudaExecutor
from metafast.executors.reference.executor import ReferenceExecutor
from metafast.executors.triton.executor import TritonExecutor
from metafast.program import Program
from metafast.program.inner_loop import InnerLoop
from metafast.tasks import TaskShapes

__all__ = [
    "BlockLimits",
    "Choice",
    "CpuExecutor",
    "CudaExecutor",
    "ExecutionPlan",
    "Executor",
    "MetaGradient",
    "ReferenceExecutor",
    "TritonExecutor",
    "check_backend",
    "check_precision",
    "choose",
    "executors",
    "name_of",
]

_EXECUTORS: list[Executor] = [CudaExecutor(), CpuExecutor(), TritonExecutor(), ReferenceExecutor()]


def executors() -> list[Executor]:
    """Returns all executors, in the order in which ``auto`` tries them."""
    return list(_EXECUTORS)


@dataclass(frozen=True)
class Choice:
    """Holds the plan of the executor that was chosen.

    Attributes:
        plan: how that executor computes.
        passed_over: the name of each executor that was tried before, and the reason why it was not taken.
    """

    plan: ExecutionPlan
    passed_over: tuple[tuple[str, str], ...]

    @property
    def executor(self) -> Executor:
        """Returns the executor that was chosen."""
        return self.plan.executor


def check_backend(backend: str | Executor) -> None:
    """Checks that ``backend`` is an executor or the name of one.

    Raises:
        ValueError: no executor has this name.
        TypeError: it is neither a name nor an executor.
    """
    if isinstance(backend, Executor):
        return
    names = ["auto", *(e.name for e in _EXECUTORS)]
    if not isinstance(backend, str):
        raise TypeError(f"backend={backend!r} is neither an executor nor the name of one; choose from {names}")
    if backend not in names:
        raise ValueError(f"backend={backend!r} is unknown; choose from {names}")


def check_precision(precision: str) -> None:
    """Raises ValueError where no executor has ``precision`` on any device."""
    known = list(dict.fromkeys(name for executor in _EXECUTORS for name in executor.precisions))
    if precision not in known:
        raise ValueError(f"precision={precision!r} is unknown; choose from {known}")


def choose(
    program: Program, loop: InnerLoop, shapes: TaskShapes, backend: str | Executor = "auto", precision: str = "float32"
) -> Choice:
    """Chooses the executor that computes ``loop`` for batches of these ``shapes``.

    Args:
        program: the model and its loss.
        loop: what is done to each task.
        shapes: the shapes, dtypes and devices of the batches.
        backend: ``"auto"`` takes the first proven executor that has a plan; a name or an executor takes that one.
        precision: the name of what the operands of products are rounded to. Under the default, ``"float32"``, an
            executor that is given itself keeps its own.

    Raises:
        ValueError: ``backend`` is unknown.
        TypeError: ``backend`` is neither a name nor an executor.
        RuntimeError: ``backend`` cannot run this program; the text says why and what else exists.
    """
    check_backend(backend)
    passed_over: list[tuple[str, str]] = []
    candidates = [backend] if isinstance(backend, Executor) else _EXECUTORS
    keeps_its_own = isinstance(backend, Executor) and precision == "float32"
    for candidate in candidates:
        if backend not in ("auto", candidate, candidate.name):
            continue
        plan = candidate.plan(program, loop, shapes, None if keeps_its_own else precision)
        if isinstance(plan, ExecutionPlan):
            if backend != "auto" or candidate.proven:
                return Choice(plan, tuple(passed_over))
            plan = f"it has not been proven on such a device yet; backend={candidate.name!r} asks for it all the same"
        passed_over.append((candidate.name, plan))
    reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over)
    raise RuntimeError(
        f"backend={name_of(backend)!r} cannot run this model ({reasons}). Use backend='auto', or one of "
        f"{[e.name for e in _EXECUTORS]}" + ("" if precision == "float32" else ", or precision='float32'")
    )


def name_of(backend: str | Executor) -> str:
    """Returns the name of a backend that is given as a name or as an executor."""
    return backend.name if isinstance(backend, Executor) else backend
