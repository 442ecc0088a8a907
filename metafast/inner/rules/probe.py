"""Takes a step of a user's rule on made-up numbers, so that what it does wrong is said before any work is lost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metafast.program.rule import Hyper, Rule

_RTOL, _ATOL = 1e-3, 1e-5
"""How far a task's step may be off beside other tasks: products of matrices of other sizes are rounded otherwise."""


def probed(rule: Rule, size: int, hyper: Hyper, like: Tensor) -> list[Tensor]:
    """Returns the parameters and the states that the first step makes of numbers ``[2, P]``, which require no gradient.

    Args:
        rule: the rule.
        size: the number P of parameters.
        hyper: the hyper-parameters of the first step.
        like: a tensor of the parameters' dtype, on their device.

    Raises:
        ValueError: ``step`` returns something else than it must, or changes what it is given; the text says what.
    """
    places = torch.arange(2 * size, device=like.device).reshape(2, size)
    return _stepped(rule, places.sin().to(like.dtype), places.cos().to(like.dtype), hyper)


@torch.no_grad()
def check_step(rule: Rule, size: int, hyper: Hyper, like: Tensor) -> None:
    """Checks that the step of each task follows from what it is given alone; the arguments are those of :func:`probed`.

    Raises:
        ValueError: what :func:`probed` raises; or the same step gives other numbers, or other tasks change it.
    """
    found = torch.stack(probed(rule, size, hyper, like))
    if not torch.allclose(torch.stack(probed(rule, size, hyper, like)), found, 0, 0, equal_nan=True):
        raise ValueError(
            f"{_name(rule)}.step returns other numbers for the same arguments: it draws random ones, or remembers "
            "earlier calls. The way back takes steps again, and they must be the same: keep what lasts in states"
        )
    places = torch.arange(2 * size, device=like.device).reshape(2, 1, size)
    alone = [_stepped(rule, row.sin().to(like.dtype), row.cos().to(like.dtype), hyper) for row in places]
    if not torch.allclose(torch.cat([torch.stack(of_task) for of_task in alone], 1), found, _RTOL, _ATOL, True):
        raise ValueError(
            f"{_name(rule)}.step makes another step of a task where another task stands beside it: theta and gradient "
            "are [T, P], and a norm, mean or sum is one task's own over the last axis alone (dim=-1, keepdim=True)"
        )


def _stepped(rule: Rule, theta: Tensor, gradient: Tensor, hyper: Hyper) -> list[Tensor]:
    """Returns what ``step`` makes of ``theta`` and ``gradient [T, P]``, as a list, after a look at it."""
    state = tuple(torch.full_like(theta, rule.start(name)) for name in rule.states)
    given = {"theta": theta, "gradient": gradient, **dict(zip(rule.states, state, strict=True)), **hyper}
    versions = {name: tensor._version for name, tensor in given.items()}
    found: Any = rule.step(theta, gradient, state, hyper, 1)
    changed = [name for name, tensor in given.items() if tensor._version != versions[name]]
    if changed:
        raise ValueError(
            f"{_name(rule)}.step changes {', '.join(changed)} in place, which the way back still reads; return new "
            "tensors, such as theta - hyper['lr'] * gradient"
        )
    pair = isinstance(found, tuple | list) and len(found) == 2 and isinstance(found[1], tuple | list)
    tensors = [found[0], *found[1]] if pair else []
    shapes = [getattr(tensor, "shape", None) for tensor in tensors]
    if shapes != [theta.shape] * (1 + len(state)):
        got = "tensors of the shapes " if pair else ""
        what = [list(shape) if shape is not None else None for shape in shapes] if pair else type(found).__name__
        raise ValueError(
            f"{_name(rule)}.step returned {got}{what} for theta {list(theta.shape)}; "
            f"it must return the parameters and a tuple of the states {list(rule.states)}, all of theta's shape"
        )
    return tensors


def _name(rule: Rule) -> str:
    return type(rule).__name__
