"""The executors and the choice between them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from metafast.executors.base import Executor, MetaGradient
from metafast.executors.native.cpu import CpuExecutor
from metafast.executors.native.cuda import PRECISIONS, CudaExecutor
from metafast.executors.reference.executor import ReferenceExecutor
from metafast.executors.triton.executor import TritonExecutor
from metafast.program import Program

__all__ = [
    "Choice",
    "CpuExecutor",
    "CudaExecutor",
    "Executor",
    "MetaGradient",
    "ReferenceExecutor",
    "TritonExecutor",
    "check_backend",
    "check_precision",
    "choose",
    "executors",
]

_EXECUTORS: list[Executor] = [CudaExecutor(), CpuExecutor(), TritonExecutor(), ReferenceExecutor()]


def executors() -> list[Executor]:
    """All executors, in the order in which ``auto`` tries them."""
    return list(_EXECUTORS)


@dataclass(frozen=True)
class Choice:
    """The executor that runs, and why those tried before it do not."""

    executor: Executor
    passed_over: tuple[tuple[str, str], ...]


def check_backend(backend: str) -> None:
    """Raises ValueError where no executor is called ``backend``."""
    names = ["auto", *(e.name for e in _EXECUTORS)]
    if backend not in names:
        raise ValueError(f"backend={backend!r} is unknown; choose from {names}")


def check_precision(precision: str) -> None:
    """Raises ValueError where no executor has ``precision``, on any device."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is unknown; choose from {list(PRECISIONS)}")


def choose(
    program: Program,
    x: Tensor,
    backend: str = "auto",
    masked: bool = False,
    precision: str = "float32",
    queries: int | None = None,
) -> Choice:
    """The first proven executor that takes ``program`` on batches like ``x [T, n, ...]``; or ``backend``, no other.

    ``masked``: are some samples padding? ``precision``: what products are rounded to. ``queries``:
    samples of a query set; ``None``: n.

    Raises:
        ValueError: ``backend`` is unknown.
        RuntimeError: ``backend`` cannot run this program; the text says why and what else exists.
    """
    check_backend(backend)
    passed_over: list[tuple[str, str]] = []
    for candidate in _EXECUTORS:
        if backend not in ("auto", candidate.name):
            continue
        executor = candidate.at(precision)
        if executor is None:
            passed_over.append((candidate.name, f"it has no precision {precision!r}"))
            continue
        reason = executor.refuses(program, x, masked, queries)
        if reason is None and backend == "auto" and not executor.proven:
            reason = f"it has not been proven on such a device yet; backend={executor.name!r} asks for it all the same"
        if reason is None:
            return Choice(executor, tuple(passed_over))
        passed_over.append((executor.name, reason))
    reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over)
    raise RuntimeError(
        f"backend={backend!r} cannot run this model ({reasons}). Use backend='auto', or one of "
        f"{[e.name for e in _EXECUTORS]}" + ("" if precision == "float32" else ", or precision='float32'")
    )
