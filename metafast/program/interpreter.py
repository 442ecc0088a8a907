"""Runs a Program for T tasks by the rules of its layers: forward, backward, and the tangents of both."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field

import torch
from torch import Tensor

from metafast.kernels.contract.layer import RuleContext
from metafast.program import Program
from metafast.tasks import Batch, each_part, parts_of

Adjoints = dict[int, Tensor]
"""The adjoint ``[T, n, ...]`` of the loss in a value, by the value's number."""
Gradients = dict[int, Tensor]
"""The gradient ``[T, *shape]`` of the loss in a parameter, by the parameter's number."""


@dataclass
class FixedPrefix:
    """Holds the part of a support pass that no inner step changes, and which is therefore computed once.

    Attributes:
        values: the outputs ``[T, n, ...]`` of its nodes, by the value's number.
        contexts: what its nodes keep between their rules, by the node's number.
        adjoint: the sum of the adjoints that the passes of all inner steps send back into its values.
        zero: a zero of shape ``[1, 1]``, to be expanded to the gradients of parameters that no node reads.
    """

    values: dict[int, Tensor] = field(default_factory=dict)
    contexts: dict[int, RuleContext] = field(default_factory=dict)
    adjoint: Adjoints = field(default_factory=dict)
    zero: Tensor | None = None


class Pass:
    """Takes T tasks with the parameters ``params [T, P]`` through ``program`` on one batch.

    Its methods follow one another: ``forward``, ``loss``, ``backward``, ``jvp``, ``hvp``.

    Args:
        program: the model and its loss.
        params: ``theta [T, P]``, the parameters of each task.
        batch: the samples of each task.
        step: the inner step that the pass belongs to.
        wanted: for each parameter, whether its gradient is computed; values that depend on no such parameter get no
            adjoint.
        prefix: the part that has been computed already.

    Attributes:
        theta: ``params`` as they were given, ``[T, P]``.
        params: the same as one tensor ``[T, *shape]`` for each parameter.
        depends: for each value, whether it depends on a wanted parameter.
        values: ``[T, n, ...]``, by the value's number; value 0 is the input.
        contexts: what each node keeps between its rules, by the node's number.
        tangents: the derivative of each value along the direction of ``jvp``; a value that is missing has none.
    """

    def __init__(
        self,
        program: Program,
        params: Tensor,
        batch: Batch,
        step: int,
        wanted: tuple[bool, ...],
        prefix: FixedPrefix | None = None,
    ) -> None:
        program = program.at(batch.x.shape[1])
        self.program = program
        self.batch = batch
        self.step = step
        self.theta = params
        self.params = program.unflatten(params)
        self.prefix = prefix if prefix is not None else FixedPrefix()
        self.wanted = wanted
        self.depends = _depends(program, wanted)
        self.values: dict[int, Tensor] = {0: batch.x, **self.prefix.values}
        self.contexts: dict[int, RuleContext] = dict(self.prefix.contexts)
        self.tangents: dict[int, Tensor] = {}

    def forward(self) -> Tensor:
        """Computes the outputs ``[T, n, ...]``."""
        for i in range(len(self.program.nodes)):
            if i not in self.contexts:
                self._run(i)
        return self.values[self.program.output]

    def forward_prefix(self) -> FixedPrefix:
        """Runs only the nodes that no inner step changes; the passes of the inner steps start from what it returns."""
        for i in range(len(self.program.nodes)):
            if not self.program.moving[i + 1]:
                self._run(i)
        return FixedPrefix({i + 1: self.values[i + 1] for i in self.contexts}, dict(self.contexts))

    def loss(self) -> Tensor:
        """Computes the losses ``[T]``, after ``forward``."""
        self.loss_context = RuleContext(self.step, self.batch.mask, (True,), ())
        return self.program.loss.forward(self.loss_context, self.values[self.program.output], self.batch.y)

    def backward(self) -> Gradients:
        """Computes the gradients of each task's loss, after ``loss``; it stops where the prefix begins."""
        adjoints = {self.program.output: self.program.loss.backward(self.loss_context)}
        return self._backward(adjoints, self.prefix.contexts)

    def vjp(self, g: Tensor) -> Gradients:
        """Computes the gradients of ``<outputs, g>`` for ``g [T, n, ...]``, after ``forward``."""
        return self._backward({self.program.output: g}, ())

    def backward_prefix(self) -> Gradients:
        """Takes the sum in the prefix's ``adjoint`` back through the prefix, to the gradients of its parameters."""
        return self._backward(dict(self.prefix.adjoint), ())

    def _backward(self, adjoints: Adjoints, skipped: Container[int]) -> Gradients:
        """Takes ``adjoints`` back through all nodes but those in ``skipped``."""
        gradients: Gradients = {}
        for i in reversed(range(len(self.program.nodes))):
            if i in skipped or i + 1 not in adjoints or not self.depends[i + 1]:
                continue
            node = self.program.nodes[i]
            ctx = self.contexts[i]
            self._set_needs(i, ctx)
            found = node.layer.backward(ctx, self._params_of(i, self.params), adjoints.pop(i + 1))
            self._accumulate(i, found, adjoints, gradients)
        return gradients

    def jvp(self, direction: Tensor) -> Tensor | None:
        """Computes the outputs' tangent ``[T, n, ...]`` along ``direction [T, P]``, after ``backward``.

        The direction counts on the adapted parameters only. ``None`` means that the tangent is zero.
        """
        directions = [
            d if p.adapted else None
            for d, p in zip(self.program.unflatten(direction), self.program.parameters, strict=True)
        ]
        self.directions = directions
        for i, node in enumerate(self.program.nodes):
            d_params = self._params_of(i, directions)
            d_inputs = [self.tangents.get(v) for v in node.inputs]
            if node.layer.carries_gradient and any(d is not None for d in (*d_params, *d_inputs)):
                params = self._params_of(i, self.params)
                self.tangents[i + 1] = node.layer.tangent_forward(self.contexts[i], params, d_params, d_inputs)
        return self.tangents.get(self.program.output)

    def hvp(self) -> Gradients:
        """Computes the tangents of the gradients, after ``jvp``: ``H u`` in the rows of all wanted parameters.

        What reaches the prefix is added to its ``adjoint``. A node without a tangent has a Jacobian that is constant
        along the direction, so that the tangent of its adjoint goes back by ``backward`` itself.
        """
        d_outputs = self.tangents[self.program.output]
        adjoints = {self.program.output: self.program.loss.tangent_backward(self.loss_context, d_outputs)}
        gradients: Gradients = {}
        for i in reversed(range(len(self.program.nodes))):
            if i + 1 not in adjoints or not self.depends[i + 1] or i in self.prefix.contexts:
                continue
            node = self.program.nodes[i]
            ctx = self.contexts[i]
            params = self._params_of(i, self.params)
            self._set_needs(i, ctx)
            gd_y = adjoints.pop(i + 1)
            if i + 1 in self.tangents:
                found = node.layer.tangent_backward(ctx, params, self._params_of(i, self.directions), gd_y)
            else:
                found = node.layer.backward(ctx, params, gd_y)
            self._accumulate(i, found, adjoints, gradients)
        for value, adjoint in adjoints.items():
            known = self.prefix.adjoint.get(value)
            self.prefix.adjoint[value] = adjoint if known is None else known + adjoint
        return gradients

    def flat(self, gradients: Gradients) -> Tensor:
        """Joins gradients by parameter into one tensor ``[T, P]``, with zeros where there is none."""
        tasks = self.batch.x.shape[0]
        if self.prefix.zero is None:
            self.prefix.zero = self.theta.new_zeros(1, 1)
        parts = []
        for k, p in enumerate(self.program.parameters):
            part = gradients.get(k)
            parts.append(self.prefix.zero.expand(tasks, p.size) if part is None else part.reshape(tasks, p.size))
        return torch.cat(parts, 1)

    def _run(self, i: int) -> None:
        """Computes the value of node ``i``."""
        node = self.program.nodes[i]
        needs = (False,) * len(node.inputs), (False,) * len(node.params)
        ctx = RuleContext(self.step, self.batch.mask, *needs, self.batch.seeds)
        inputs = [self.values[v] for v in node.inputs]
        try:
            self.values[i + 1] = node.layer.forward(ctx, self._params_of(i, self.params), inputs, node.constants)
        except (RuntimeError, ValueError, IndexError) as error:
            shapes = ", ".join(str(list(value.shape[1:])) for value in inputs)
            samples = ", ".join(str(list(part.shape[2:])) for part in parts_of(self.batch.x))
            where = f" at {node.line}" if node.line else ""
            raise ValueError(
                f"layer {node.name!r} ({node.layer.kind}){where} cannot take an input of shape {shapes} [n, ...]: "
                f"{error}. The samples have shape {samples}; check it against the model's first layer"
            ) from error
        self.contexts[i] = ctx

    def _set_needs(self, i: int, ctx: RuleContext) -> None:
        """Tells the rules of node ``i`` which adjoints to compute."""
        node = self.program.nodes[i]
        ctx.needs_inputs = tuple(self.depends[v] for v in node.inputs)
        ctx.needs_params = tuple(self.wanted[k] for k in node.params)

    def _params_of(self, i: int, tensors: list[Tensor] | list[Tensor | None]) -> list:
        """Picks from one tensor for each parameter those of node ``i``, in the order that its rules take."""
        return [tensors[k] for k in self.program.nodes[i].params]

    def _accumulate(self, i: int, found: tuple, adjoints: Adjoints, gradients: Gradients) -> None:
        """Adds what a rule of node ``i`` has found to the adjoints of its inputs and its parameters' gradients."""
        node = self.program.nodes[i]
        for targets, terms, sums in ((node.inputs, found[0], adjoints), (node.params, found[1], gradients)):
            for target, term in zip(targets, terms, strict=True):
                if term is not None:
                    sums[target] = sums[target] + term if target in sums else term


def _depends(program: Program, wanted: tuple[bool, ...]) -> list[bool]:
    """Says for each value whether it depends on a wanted parameter."""
    depends = [False]
    for node in program.nodes:
        found = any(depends[v] for v in node.inputs) or any(wanted[k] for k in node.params)
        depends.append(found and node.layer.carries_gradient)
    return depends


def without_padding(batch: Batch) -> Batch:
    """Returns the batch with a sample of the same task that counts in the place of each that is padding.

    Padding may hold anything, and rules give it an adjoint of zero: where it holds no numbers, or where the model has
    none for them, zero times that would not be zero. On samples that count the model has numbers.
    """
    if batch.mask is None:
        return batch
    if batch.each_step:
        steps_and_tasks = batch.mask.shape[:2]
        x, y = (each_part(lambda part: part.flatten(0, 1), samples) for samples in (batch.x, batch.y))
        flat = without_padding(Batch(x, y, batch.mask.flatten(0, 1)))
        x, y = (each_part(lambda part: part.unflatten(0, steps_and_tasks), samples) for samples in (flat.x, flat.y))
        return batch._replace(x=x, y=y)
    tasks, samples = batch.mask.shape
    task = torch.arange(tasks, device=batch.mask.device)[:, None]
    sample = torch.arange(samples, device=batch.mask.device)
    first = batch.mask.byte().argmax(1, keepdim=True)
    taken = torch.where(batch.mask, sample, first)
    x, y = (each_part(lambda part: part[task, taken], samples) for samples in (batch.x, batch.y))
    return batch._replace(x=x, y=y)
