"""Compares a Program with the module that it was captured from: the module itself runs, on another task.

Outputs and one gradient must agree. Where they do not, the first operation that differs is named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metafast.program import Program
from metafast.program.engine import gradients
from metafast.program.interpreter import Pass
from metafast.program.operation import Made, Recording, Ref, Weight
from metafast.program.replay import replay
from metafast.tasks import Batch, each_part

_ALLOWED = {torch.float64: (1e-9, 1e-8), torch.float32: (1e-4, 1e-3), torch.bfloat16: (5e-2, 2e-1)}
"""The largest difference of outputs and of gradients, relative to the largest number among them, by the dtype of the
coarsest numbers."""


class Difference(RuntimeError):
    """Is raised where a Program does not compute what its module computes."""


@dataclass(frozen=True)
class Truth:
    """Holds what the module computed for one task.

    Attributes:
        x: the samples ``[n, ...]``, one tensor or a tree of them.
        outputs: what it returned.
        g: a random cotangent of the shape of the outputs.
        grads: the gradients of ``<outputs, g>`` by the names of the parameters.
        coarse: whether some of it was computed in less than float32.
        seeds: int64 ``[1]``, from which its random numbers followed; ``None`` where it drew none.
    """

    x: Any
    outputs: Tensor
    g: Tensor
    grads: dict[str, Tensor]
    coarse: bool = False
    seeds: Tensor | None = None


def truth_of(
    outputs: Tensor, parameters: dict[str, Tensor], x: Any, coarse: bool = False, seeds: Tensor | None = None
) -> Truth:
    """Differentiates what the module returned in those of its ``parameters`` that require a gradient."""
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs)
    live = {name: p for name, p in parameters.items() if p.requires_grad}
    grads: Sequence[Tensor | None] = [None] * len(live)
    if outputs.requires_grad and live:
        grads = gradients(outputs, live.values(), g)
    found = {n: torch.zeros_like(p) if d is None else d for (n, p), d in zip(live.items(), grads, strict=True)}
    return Truth(x, outputs.detach(), g, found, coarse, seeds)


def check(program: Program, theta: Tensor, truth: Truth, step: int = 0) -> str | None:
    """Says in words how ``program`` at ``theta [P]`` differs from the module; it is ``None`` where they agree."""
    outputs, grads, _ = _run(program, theta, truth, step)
    outputs_allowed, gradient_allowed = _allowed(theta, truth)
    if outputs.shape != truth.outputs.shape or not _close(outputs, truth.outputs, outputs_allowed):
        return f"its outputs differ by {_error(outputs, truth.outputs):.1e}"
    largest = _largest_gradient(truth, grads, gradient_allowed)
    worst = ("", 0.0)
    for name, wanted in truth.grads.items():
        error = _error(grads.get(name, torch.zeros_like(wanted)), wanted, largest)
        worst = max(worst, (name, error), key=lambda pair: pair[1] if pair[1] == pair[1] else float("inf"))
    if not worst[1] <= gradient_allowed:
        return f"its gradient of {worst[0]!r} differs by {worst[1]:.1e}"
    return None


def _largest_gradient(truth: Truth, grads: dict[str, Tensor], allowed: float) -> float:
    """Returns what the gradients' differences are relative to: the largest of the module's.

    Gradients that cancel, such as that of a bias before a batch norm, leave rounding of what they are summed from. It
    is some units in the last place of the others, frozen parameters' and outputs' among them, and no more is forgiven.
    """
    rounding = 100 * torch.finfo(truth.g.dtype).eps / allowed
    numbers = [*truth.grads.values(), *(rounding * d for d in (*grads.values(), truth.g))]
    return max((float(d.nan_to_num(0.0, 0.0, 0.0).abs().max()) for d in numbers if d.numel()), default=0.0)


def first_difference(
    program: Program, theta: Tensor, truth: Truth, recording: Recording, made: Sequence[Made], step: int = 0
) -> str:
    """Names the first operation in which ``program`` differs from the module.

    Args:
        program: differs from the module by ``check``.
        theta: the parameters ``[P]``.
        truth: what the module computed.
        recording: what the module did on samples of the same shapes.
        made: the recorded values that the nodes of a Program make, in their order.
    """
    allowed = 10 * _allowed(theta, truth)[0]
    named = _of_step(program, dict(enumerate(program.unflatten(theta))), step)
    leaves = {name: t.detach().requires_grad_() for name, t in named.items()}
    with torch.enable_grad():
        values = replay(recording, leaves, truth.x, truth.seeds)
    _, _, run = _run(program, theta, truth, step)
    number: dict[Made, int] = {}
    for ref in made:
        like = [i for i, v in run.values.items() if _is_like(v, values[ref], allowed)]
        if not like:
            return _name(recording, ref)
        number[ref] = like[-1]
    live = [r for r in made if values[r].requires_grad]  # what no gradient goes through has none to compare
    wanted = torch.autograd.grad(values[recording.output], [values[r] for r in live], truth.g, allow_unused=True)
    copies = run.values[program.output].shape[0]
    adjoints = _adjoints(program, run, truth.g.expand(copies, *truth.g.shape))
    for ref, adjoint in reversed(list(zip(live, wanted, strict=True))):
        found = adjoints.get(number[ref])
        zero = torch.zeros_like(values[ref])
        if not _close(zero if found is None else found[-1], zero if adjoint is None else adjoint, 1e4 * allowed):
            return _culprit(recording, _last_reader(recording, ref, made) or ref, made)
    worst = _worst_parameter(program, theta, truth, step)
    return _culprit(recording, _last_reader(recording, Weight(worst), made) or made[0], made)


def _allowed(theta: Tensor, truth: Truth) -> tuple[float, float]:
    return _ALLOWED[torch.bfloat16 if truth.coarse else theta.dtype]


def _worst_parameter(program: Program, theta: Tensor, truth: Truth, step: int) -> str:
    """Returns the name of the parameter whose gradient differs most."""
    _, grads, _ = _run(program, theta, truth, step)
    errors = {n: _error(grads.get(n, torch.zeros_like(d)), d, 1.0) for n, d in truth.grads.items()}
    return max(errors, key=errors.__getitem__)


def _last_reader(recording: Recording, ref: Ref, made: Sequence[Made]) -> Made | None:
    """Returns the last node's value that is made of ``ref``."""
    readers = [r for r in made if ref in _sources(recording, r, made)]
    return readers[-1] if readers else None


def _run(program: Program, theta: Tensor, truth: Truth, step: int) -> tuple[Tensor, dict[str, Tensor], Pass]:
    """Runs the Program on the truth's task; returns outputs, gradients by name, and the pass.

    Where functions are mapped over tasks there are two of them, since a single one does not show what mapping may do.
    """
    copies = 2 if program.derived else 1
    x = each_part(lambda part: part.expand(copies, *part.shape), truth.x)
    seeds = None if truth.seeds is None else truth.seeds.expand(copies)
    run = Pass(program, theta.expand(copies, -1), Batch(x, x, None, seeds), step, (True,) * len(program.parameters))
    with torch.no_grad():
        outputs = run.forward()[-1]
        differentiable = truth.grads and outputs.shape == truth.outputs.shape
        grads = run.vjp(truth.g.expand(copies, *truth.g.shape)) if differentiable else {}
    return outputs, _of_step(program, {k: d[-1] for k, d in grads.items()}, step), run


def _of_step(program: Program, tensors: Mapping[int, Tensor], step: int) -> dict[str, Tensor]:
    """Returns tensors like parameters by name; of those that have a row for each inner step, that of ``step``."""
    varying = {k for node in program.nodes if node.layer.varies for k in node.params}
    return {program.parameters[k].name: t[step] if k in varying else t for k, t in tensors.items()}


@torch.no_grad()
def _adjoints(program: Program, run: Pass, g: Tensor) -> dict[int, Tensor]:
    """Returns the adjoint of each value of a pass."""
    adjoints = {program.output: g}
    for i in reversed(range(len(program.nodes))):
        if i + 1 not in adjoints or not program.nodes[i].layer.carries_gradient:
            continue
        node, ctx = program.nodes[i], run.contexts[i]
        ctx.needs_inputs, ctx.needs_params = (True,) * len(node.inputs), (True,) * len(node.params)
        found, _ = node.layer.backward(ctx, [run.params[k] for k in node.params], adjoints[i + 1])
        for value, adjoint in zip(node.inputs, found, strict=True):
            if adjoint is not None:
                adjoints[value] = adjoints[value] + adjoint if value in adjoints else adjoint
    return adjoints


def _sources(recording: Recording, ref: Made, made: Sequence[Made]) -> set[Ref]:
    """Returns all values that go into the node of ``ref``: those of other nodes, parameters, and those inside."""
    known = set(made)
    return recording.behind(recording.operations[ref.operation].reads, lambda source: source not in known)


def _culprit(recording: Recording, ref: Made, made: Sequence[Made]) -> str:
    """Names what is wrong with a gradient in the node of ``ref``: where there is one, what no gradient goes through."""
    inside = _sources(recording, ref, made) - set(made)
    without = [r for r in inside if isinstance(r, Made) and not recording.operations[r.operation].grad]
    return _name(recording, max(without, key=lambda r: r.operation, default=ref))


def _name(recording: Recording, ref: Made) -> str:
    """Names the operation that made a value, with the user's line or the module."""
    operation = recording.operations[ref.operation]
    where = f" at {operation.line}" if operation.line else f" in module {operation.path!r}" if operation.path else ""
    return f"{operation.name}{where}"


def _is_like(value: Any, wanted: Tensor, allowed: float) -> bool:
    """Says whether the value ``[T, ...]`` of a pass holds what is wanted for its last task."""
    return isinstance(value, Tensor) and value.shape[1:] == wanted.shape and _close(value[-1], wanted, allowed)


def _error(found: Tensor, wanted: Tensor, scale: float | None = None) -> float:
    """Returns the largest difference over ``scale``, or over the largest number that is wanted."""
    if not wanted.numel():
        return 0.0
    found, wanted = found.detach(), wanted.detach()
    if scale is None:
        scale = float(wanted.nan_to_num(0.0, 0.0, 0.0).abs().max())
    both = torch.isnan(found) & torch.isnan(wanted) | (found == wanted)
    difference = (found - wanted).masked_fill(both, 0.0)
    return float(difference.abs().max()) / max(scale, 1e-30)


def _close(found: Tensor, wanted: Tensor, allowed: float) -> bool:
    if not wanted.is_floating_point():
        return torch.equal(found, wanted)
    return _error(found, wanted) <= allowed
