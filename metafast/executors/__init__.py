"""The executors and the choice between them."""

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
    """All executors, in the order in which ``auto`` tries them."""
    return list(_EXECUTORS)


@dataclass(frozen=True)
class Choice:
    """The plan of the executor that runs, and why those tried before it do not."""

    plan: ExecutionPlan
    passed_over: tuple[tuple[str, str], ...]

    @property
    def executor(self) -> Executor:
        """The one that runs."""
        return self.plan.executor


def check_backend(backend: str | Executor) -> None:
    """Raises ValueError where no executor is called ``backend``, TypeError where it is no name and no executor."""
    if isinstance(backend, Executor):
        return
    names = ["auto", *(e.name for e in _EXECUTORS)]
    if not isinstance(backend, str):
        raise TypeError(f"backend={backend!r} is neither an executor nor the name of one; choose from {names}")
    if backend not in names:
        raise ValueError(f"backend={backend!r} is unknown; choose from {names}")


def check_precision(precision: str) -> None:
    """Raises ValueError where no executor has ``precision``, on any device."""
    known = list(dict.fromkeys(name for executor in _EXECUTORS for name in executor.precisions))
    if precision not in known:
        raise ValueError(f"precision={precision!r} is unknown; choose from {known}")


def choose(
    program: Program, loop: InnerLoop, shapes: TaskShapes, backend: str | Executor = "auto", precision: str = "float32"
) -> Choice:
    """The first proven executor that computes ``loop`` for batches of these ``shapes``; or ``backend``, no other.

    ``precision``: what the operands of products are rounded to.

    Raises:
        ValueError: ``backend`` is unknown.
        RuntimeError: ``backend`` cannot run this program; the text says why and what else exists.
    """
    check_backend(backend)
    passed_over: list[tuple[str, str]] = []
    candidates = [backend] if isinstance(backend, Executor) else _EXECUTORS
    for candidate in candidates:
        if backend not in ("auto", candidate, candidate.name):
            continue
        plan = candidate.plan(program, loop, shapes, precision)
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
    """What a backend is called."""
    return backend.name if isinstance(backend, Executor) else backend
