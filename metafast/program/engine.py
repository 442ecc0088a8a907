"""Hands an adjoint to torch's autograd engine itself.

Given an adjoint, ``torch.autograd`` first compares its shape by means of torch's symbolic shapes, which import SymPy:
34 MB for good in a process that needs it for nothing else. The engine looks at the shape too.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.autograd.graph import _engine_run_backward


def add_gradients(values: Tensor, adjoint: Tensor) -> None:
    """Does what ``values.backward(adjoint)`` does."""
    _engine_run_backward((values,), (adjoint,), False, False, (), allow_unreachable=True, accumulate_grad=True)


def gradients(values: Tensor, wanted: Iterable[Tensor], adjoint: Tensor) -> tuple[Tensor | None, ...]:
    """Does what ``torch.autograd.grad(values, wanted, adjoint, allow_unused=True)`` does."""
    return _engine_run_backward(
        (values,), (adjoint,), False, False, tuple(wanted), allow_unreachable=True, accumulate_grad=False
    )
