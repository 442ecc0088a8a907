"""Computes a learner's losses by plain operations that autograd records: every order, and every tensor that is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metafast.inner.autocast import in_own_dtype
from metafast.inner.rules import PLAIN, SGD
from metafast.program import Program
from metafast.program.inner_loop import InnerLoop, rates_by_step
from metafast.program.interpreter import Pass, without_padding
from metafast.tasks import Batch


class OwnParameter(NamedTuple):
    """Names a parameter that the loss reads by itself, beside the outputs.

    Attributes:
        number: its number in the Program.
        tensor: the tensor that the loss reads; ``theta_0`` is made of it.
    """

    number: int
    tensor: Tensor


class Sets(NamedTuple):
    """Holds the support sets and the query sets of T tasks, which have been checked already."""

    support: Batch
    query: Batch


@in_own_dtype
def recorded(
    program: Program, loop: InnerLoop, params: Tensor, rates: Tensor, sets: Sets,
    own: Sequence[OwnParameter] = (), rule: SGD = PLAIN,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Computes losses ``[T]`` and outputs ``[T, m, ...]`` while autograd records every inner step.

    The results can be differentiated to any order, in all that they are made of. ``params`` are ``[P]``,
    ``rates [1 or S, 1 or P]``.
    """
    trajectory = recorded_adapt(program, loop, params, rates, sets.support, own, rule)
    nothing = (False,) * len(program.parameters)
    losses = params.new_zeros(trajectory[0].shape[0])
    for step, weight in loop.judged_steps:
        run = Pass(program.query, trajectory[step], without_padding(sets.query), step, nothing)
        outputs = run.forward()
        losses = losses + weight * run.loss()
    return losses, outputs


@in_own_dtype
def recorded_adapt(
    program: Program, loop: InnerLoop, params: Tensor, rates: Tensor, support: Batch,
    own: Sequence[OwnParameter] = (), rule: SGD = PLAIN,
) -> list[Tensor]:  # fmt: skip
    """Takes the inner steps from ``params [P]`` and returns ``theta_0 .. theta_S``, each ``[T, P]``."""
    adapted = tuple(p.adapted for p in program.parameters)
    theta = params.expand(support.x.shape[0], -1)
    trajectory = [theta]
    velocity: Tensor | None = None
    support = without_padding(support)
    prefix = Pass(program, theta, support, 0, adapted).forward_prefix()
    for step, rate in enumerate(rates_by_step(rates, loop.steps)):
        run = Pass(program, trajectory[-1], support, step, adapted, prefix)
        run.forward()
        losses = run.loss()
        gradient = run.flat(run.backward())
        if step == 0 and own:
            gradient = _with_own(program, gradient, losses, own)
        if loop.first_order:
            gradient = gradient.detach()
        direction = gradient
        if not rule.is_plain:
            direction, velocity = rule.direction(trajectory[-1], gradient, velocity, program.adapted.to(theta.device))
        trajectory.append(torch.addcmul(trajectory[-1], rate, direction, value=-1))
    return trajectory


@in_own_dtype
def recorded_vjp(
    program: Program, loop: InnerLoop, modules: nn.ModuleList, sets_of: Callable[[Sequence[Tensor]], Sets],
    inputs: Sequence[Tensor], adjoints: tuple[Tensor | None, Tensor | None], needed: Sequence[bool],
    pick: Callable[[Tensor], Tensor] = lambda of_all: of_all,
) -> list[Tensor | None]:  # fmt: skip
    """Computes the adjoints of those ``inputs`` that are ``needed``, from those of the losses and the outputs.

    Args:
        program: the model and its loss.
        loop: the inner loop.
        modules: the modules that the losses are.
        sets_of: makes the support and query sets of their tensors.
        inputs: ``theta [P]``, rates, the tensors that the sets are made of, and the parameters of ``modules``.
        adjoints: those of the losses ``[T]`` and of the outputs; ``None`` is zero.
        needed: for each input, whether its adjoint is computed.
        pick: picks the elements of the Program's parameters from ``theta`` and from rates.
    """
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() if need else t for t, need in zip(inputs, needed, strict=True)]
        batch = len(inputs) - len(list(modules.parameters()))
        with standing_in(modules, leaves[batch:]):
            found = recorded(program, loop, pick(leaves[0]), pick(leaves[1]), sets_of(leaves[2:batch]))
            pairs = [(value, g) for value, g in zip(found, adjoints, strict=True) if g is not None]
            wanted = [leaf for leaf, need in zip(leaves, needed, strict=True) if need]
            values, given = zip(*pairs, strict=True)
            grads = iter(torch.autograd.grad(values, wanted, given, materialize_grads=True, allow_unused=True))
    return [next(grads) if need else None for need in needed]


@contextmanager
def standing_in(modules: nn.ModuleList, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Puts ``tensors`` into the places of the parameters of ``modules``, for as long as the context lasts."""
    if not tensors:
        yield
        return
    other = {id(p): t for p, t in zip(modules.parameters(), tensors, strict=True)}
    registries: list[dict[str, Any]] = [module._parameters for module in modules.modules()]
    places = [(r, name, p) for r in registries for name, p in r.items() if id(p) in other]
    for registry, name, parameter in places:
        registry[name] = other[id(parameter)]
    try:
        yield
    finally:
        for registry, name, parameter in places:
            registry[name] = parameter


def _with_own(program: Program, gradient: Tensor, losses: Tensor, own: Sequence[OwnParameter]) -> Tensor:
    """Puts the whole derivatives of ``losses [T]`` in the parameters that the loss reads itself into ``gradient``.

    Before the first step the task's weights are these very parameters, so that what the loss makes of them counts.
    Later they are others, and for the inner loop the parameters are constants.
    """
    tensors = [o.tensor for o in own]
    of_task = [torch.autograd.grad(loss, tensors, create_graph=True) for loss in losses]
    pieces = list(gradient.split([p.size for p in program.parameters], 1))
    for o, of_tasks in zip(own, zip(*of_task, strict=True), strict=True):
        if program.parameters[o.number].adapted:
            pieces[o.number] = torch.stack(of_tasks).flatten(1)
    return torch.cat(pieces, 1)
