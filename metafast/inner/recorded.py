"""Computes a learner's losses by plain operations that autograd records: every order, and every tensor that is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metafast.executors import Executor
from metafast.executors.composition import Adjoints, Sets, in_pieces, segments_of
from metafast.executors.steps import Steps
from metafast.inner.autocast import in_own_dtype
from metafast.program import Program
from metafast.program.inner_loop import InnerLoop
from metafast.program.interpreter import FixedPrefix, Pass, without_padding
from metafast.tasks import Batch, each_part, parts_of


class OwnParameter(NamedTuple):
    """Names a parameter that the loss reads by itself, beside the outputs.

    Attributes:
        number: its number in the Program.
        tensor: the tensor that the loss reads; ``theta_0`` is made of it.
    """

    number: int
    tensor: Tensor


@in_own_dtype
def recorded(
    program: Program, loop: InnerLoop, start: Tensor, rates: Tensor, sets: Sets, own: Sequence[OwnParameter] = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes losses ``[T]``, outputs ``[T, m, ...]`` and ``z_S`` while autograd records every inner step.

    The results can be differentiated to any order, in all that they are made of. ``start`` are theta_0 or ``z_0``, of
    one task for all or of each; ``rates`` as the loop says.
    """
    trajectory = recorded_adapt(program, loop, start, rates, sets.support, own)
    losses, outputs = _judged(program, loop, {s: trajectory[s] for s, _ in loop.judged_steps}, sets.query)
    return losses, outputs, trajectory[-1]


@in_own_dtype
def recorded_adapt(
    program: Program, loop: InnerLoop, start: Tensor, rates: Tensor, support: Batch, own: Sequence[OwnParameter] = ()
) -> list[Tensor]:
    """Takes the inner steps from theta_0 or ``z_0`` and returns ``z_0 .. z_S``, each ``[T, (1 + K) P]``.

    With ``loop.truncate`` all that comes before the last so many steps is a constant, to which theta_0 is added.
    """
    steps = Steps(program, loop, rates)
    trajectory = [steps.start(start, support.at(0).x.shape[0])]
    support = without_padding(support)
    prefix = None
    if not support.each_step:
        adapted = tuple(p.adapted for p in program.parameters)
        prefix = Pass(program, steps.theta(trajectory[0]), support, loop.first, adapted).forward_prefix()
    cut = 0 if loop.truncate is None else max(loop.steps - loop.truncate, 0)
    for step in range(loop.steps):
        z = _step(steps, program, trajectory[-1], support.at(step), step, prefix, own if step == 0 else ())
        if step + 1 <= cut:
            theta = steps.theta(trajectory[0])
            z = steps.add(z.detach(), theta - theta.detach())
        trajectory.append(z)
    return trajectory


def _step(
    steps: Steps, program: Program, z: Tensor, batch: Batch, step: int, prefix: FixedPrefix | None = None,
    own: Sequence[OwnParameter] = (),
) -> Tensor:  # fmt: skip
    """Takes one step on samples without padding, while autograd records it."""
    number = steps.loop.first + step
    run = Pass(program, steps.theta(z), batch, number, tuple(p.adapted for p in program.parameters), prefix)
    run.forward()
    losses = run.loss()
    gradient = run.flat(run.backward())
    if own:
        gradient = _with_own(program, gradient, losses, own)
    return steps.advance(z, gradient.detach() if steps.loop.first_order else gradient, number)


def _judged(program: Program, loop: InnerLoop, z: dict[int, Tensor], query: Batch) -> tuple[Tensor, Tensor]:
    """Computes the weighted losses ``[T]`` at those steps that ``z`` has, and the outputs at the last of them."""
    query, nothing = without_padding(query), (False,) * len(program.parameters)
    weights = dict(loop.judged_steps)
    losses = query.y.new_zeros(query.x.shape[0], dtype=next(iter(z.values())).dtype)
    for step, at in z.items():
        run = Pass(program.query, at[:, : program.size], query, loop.first + step, nothing)
        outputs = run.forward()
        if weights[step] != 0:
            losses = losses + weights[step] * run.loss()
    return losses, outputs


class _Sums:
    """Adds up the adjoints of leaves, and of parts of them, while the way back goes from step to step."""

    def __init__(self) -> None:
        self.sums: dict[int, Tensor] = {}

    def add(self, leaf: Tensor, grad: Tensor, index: Any = ...) -> None:
        """Adds the adjoint of ``leaf[index]``."""
        if id(leaf) not in self.sums:
            self.sums[id(leaf)] = torch.zeros_like(leaf)
        self.sums[id(leaf)][index] += grad

    def of(self, leaf: Tensor) -> Tensor:
        """Returns the sum for a leaf."""
        return self.sums.get(id(leaf), torch.zeros_like(leaf))


@in_own_dtype
def recorded_vjp(
    executor: Executor, program: Program, loop: InnerLoop, modules: nn.ModuleList,
    sets_of: Callable[[Sequence[Tensor]], Sets], inputs: Sequence[Tensor], kept: Tensor,
    adjoints: Adjoints, needed: Sequence[bool],
    pick: Callable[[Tensor], Tensor] = lambda of_all: of_all,
) -> list[Tensor | None]:  # fmt: skip
    """Computes the adjoints of those ``inputs`` that are ``needed``, from those of the losses and the outputs.

    Autograd records one step after another, from the last to the first, and the memory is that of one step.

    Args:
        executor: takes steps again that are not kept.
        program: the model and its loss.
        loop: the inner loop.
        modules: the modules that the losses, or the rule, are.
        sets_of: makes the support and query sets of their tensors.
        inputs: theta_0 or ``z_0``, rates, the tensors that the sets are made of, and the parameters of ``modules``.
        kept: what ``evaluate`` has kept of the way forward.
        adjoints: those of what ``evaluate`` returns.
        needed: for each input, whether its adjoint is computed.
        pick: picks the elements of the Program's parameters from ``theta`` and from rates.
    """
    leaves = [t.detach().requires_grad_(need) if need else t for t, need in zip(inputs, needed, strict=True)]
    batch = len(inputs) - len(list(modules.parameters()))
    with torch.enable_grad(), standing_in(modules, leaves[batch:]):
        start, rates = pick(leaves[0]), pick(leaves[1])
        sets = sets_of(leaves[2:batch])
        steps = Steps(program, loop, rates)
        run = _WayBackRun(executor, program, steps, sets, adjoints, leaves[batch:])
        z0 = steps.start(start, kept.shape[1])
        v = run.back(kept, z0.detach())
        grads = [run.found.of(leaf) if need else None for leaf, need in zip(leaves, needed, strict=True)]
        for k, (whole, v_whole) in enumerate(((z0, v), (rates, run.found.of(rates)))):
            if needed[k]:
                grads[k] = torch.autograd.grad(whole, leaves[k], v_whole)[0] if whole is not leaves[k] else v_whole
    return grads


class _WayBackRun:
    """Goes back from the query losses to ``z_0``, step by step, and adds up the adjoints of all leaves.

    Args:
        executor: takes steps again that are not kept.
        program: the model and its loss.
        steps: the steps of the loop, with its rates.
        sets: the support and query sets.
        adjoints: those of what ``evaluate`` returns.
        of_modules: the parameters of the modules that the losses, or the rule, are.
    """

    def __init__(
        self, executor: Executor, program: Program, steps: Steps, sets: Sets,
        adjoints: Adjoints, of_modules: Sequence[Tensor],
    ) -> None:  # fmt: skip
        self.executor, self.program, self.steps, self.sets, self.adjoints = executor, program, steps, sets, adjoints
        self.further = [t for t in of_modules if t.requires_grad]
        self.judged = {s for s, _ in steps.loop.judged_steps} if adjoints.losses is not None else {steps.loop.steps}
        self.found = _Sums()

    def back(self, kept: Tensor, z0: Tensor) -> Tensor:
        """Returns the adjoint of ``z_0 [T, (1 + K) P]``; ``kept`` is what ``evaluate`` has kept of the way forward."""
        loop = self.steps.loop
        segments = segments_of(loop, kept.shape[1], kept.shape[-1], kept.element_size())
        v = self._judge(loop.steps, kept[-1])
        v = v if self.adjoints.final is None else v + self.adjoints.final
        for number, (a, b) in reversed(list(enumerate(segments.spans))):
            trajectory = kept if segments.keeps_all else self._again(kept[number], a, b)
            for step in reversed(range(a, b)):
                leaf = trajectory[step - a].detach().requires_grad_()
                v = self._through(step, leaf, v)
                if step in self.judged:
                    v = v + self._judge(step, leaf)
        if segments.begin == 0:
            return v
        v = self.steps.of_theta(v)
        if self.adjoints.losses is not None and segments.skips(loop):
            v = v + self._before(z0, in_pieces(loop.part(0, segments.begin), segments.row))
        return v

    def _before(self, z: Tensor, pieces: Sequence[tuple[int, int]]) -> Tensor:
        """Returns what the query losses of the steps in ``pieces``, which are taken from ``z_0``, make of theta_0."""
        v = torch.zeros_like(z)
        for a, b in pieces:
            trajectory = self._again(z, a, b)
            for step in sorted(self.judged & {*range(a, b)}):
                v = v + self._judge(step, trajectory[step - a])
            z = trajectory[-1]
        return v

    def _again(self, z: Tensor, a: int, b: int) -> Tensor:
        """Takes the steps ``a .. b - 1`` from ``z`` again."""
        part, batch = self.steps.loop.part(a, b), self.sets.support.steps(a, b)
        return self.executor.adapt(self.program, part, z, self.steps.rates.detach(), batch).detach()

    def _through(self, step: int, leaf: Tensor, v: Tensor) -> Tensor:
        """Goes back through one step that is taken from ``leaf``."""
        loop, rates, support = self.steps.loop, self.steps.rates, self.sets.support
        batch, parts = _read(support.at(step), step if support.each_step else ..., support)
        row = min(loop.first + step, rates.shape[-2] - 1)
        rows = rates[..., row : row + 1, :].detach().requires_grad_(rates.requires_grad)
        if rates.requires_grad:
            parts.append((rows, rates, (..., slice(row, row + 1), slice(None))))
        z = _step(Steps(self.program, loop, rows), self.program, leaf, without_padding(batch), step)
        return self._take([z], [v], leaf, parts)

    def _judge(self, step: int, z: Tensor) -> Tensor:
        """Returns what the query loss after ``step`` steps, and at the end the outputs, make of ``z``."""
        loop, leaf = self.steps.loop, z.detach().requires_grad_()
        query, parts = _read(self.sets.query, ...)
        values = _judged(self.program, loop, {step: leaf}, query)
        of_outputs = self.adjoints.outputs if step == loop.steps else None
        pairs = [(a, g) for a, g in zip(values, (self.adjoints.losses, of_outputs), strict=True) if g is not None]
        pairs = [(a, g) for a, g in pairs if a.requires_grad]
        return self._take([a for a, _ in pairs], [g for _, g in pairs], leaf, parts) if pairs else torch.zeros_like(z)

    def _take(
        self, values: Sequence[Tensor], given: Sequence[Tensor], z: Tensor, parts: Sequence[tuple[Tensor, Tensor, Any]]
    ) -> Tensor:
        """Returns the adjoint of ``z``, and adds those of ``parts``: each a tensor, what it is of, its place there."""
        wanted = [z, *(part for part, _, _ in parts), *self.further]
        of_z, *grads = torch.autograd.grad(values, wanted, given, materialize_grads=True, allow_unused=True)
        for (_, leaf, index), grad in zip(parts, grads, strict=False):
            self.found.add(leaf, grad, index)
        for leaf, grad in zip(self.further, grads[len(parts) :], strict=True):
            self.found.add(leaf, grad)
        return of_z


def _read(batch: Batch, index: Any, whole: Batch | None = None) -> tuple[Batch, list[tuple[Tensor, Tensor, Any]]]:
    """Returns a batch of leaves, and for each tensor that requires a gradient the leaf, what it is of and its place.

    ``batch`` is that step of ``whole`` which ``index`` says.
    """
    parts: list[tuple[Tensor, Tensor, Any]] = []
    whole = batch if whole is None else whole

    def read(tensor: Tensor, of: Tensor) -> Tensor:
        if not of.requires_grad:
            return tensor
        leaf = tensor.detach().requires_grad_()
        parts.append((leaf, of, index))
        return leaf

    wholes = iter(parts_of(whole.x))
    x = each_part(lambda part: read(part, next(wholes)), batch.x)
    return batch._replace(x=x, y=read(batch.y, whole.y)), parts


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
