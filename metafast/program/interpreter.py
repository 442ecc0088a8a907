"""One pass of T tasks through a Program by the layers' rules: forward, backward, and both for a tangent."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field

import torch
from torch import Tensor

from metafast.kernels.contract.layer import RuleContext
from metafast.program import Program
from metafast.tasks import Batch

Adjoints = dict[int, Tensor]  # by value
Gradients = dict[int, Tensor]  # by parameter


@dataclass
class FixedPrefix:
    """The part of a support pass that no inner step changes: values and contexts by node, computed once.

    ``adjoint`` gathers on the way back what flows into its values. ``zero`` is the gradient of whatever no
    node reads.
    """

    values: dict[int, Tensor] = field(default_factory=dict)
    contexts: dict[int, RuleContext] = field(default_factory=dict)
    adjoint: Adjoints = field(default_factory=dict)
    zero: Tensor | None = None


class Pass:
    """T tasks at ``params [T, P]`` on one batch.

    ``wanted`` marks the parameters whose gradients are asked for; values that depend on none of them get no adjoint.
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
        self.program, self.batch, self.step = program, batch, step
        self.theta, self.params = params, program.unflatten(params)
        self.prefix = prefix if prefix is not None else FixedPrefix()
        self.wanted = wanted
        self.depends = _depends(program, wanted)
        self.values: dict[int, Tensor] = {0: batch.x, **self.prefix.values}
        self.contexts: dict[int, RuleContext] = dict(self.prefix.contexts)
        self.tangents: dict[int, Tensor] = {}

    def forward(self) -> Tensor:
        """Outputs ``[T, n, ...]``."""
        for i in range(len(self.program.nodes)):
            if i not in self.contexts:
                self._run(i)
        return self.values[self.program.output]

    def forward_prefix(self) -> FixedPrefix:
        """Runs only the nodes that no inner step changes, for other passes to start from."""
        for i in range(len(self.program.nodes)):
            if not self.program.moving[i + 1]:
                self._run(i)
        return FixedPrefix({i + 1: self.values[i + 1] for i in self.contexts}, dict(self.contexts))

    def loss(self) -> Tensor:
        """Losses ``[T]``, after ``forward``."""
        self.loss_context = RuleContext(self.step, self.batch.mask, (True,), ())
        return self.program.loss.forward(self.loss_context, self.values[self.program.output], self.batch.y)

    def backward(self) -> Gradients:
        """Gradients of each task's loss, by parameter, after ``loss``; the prefix is left out."""
        adjoints = {self.program.output: self.program.loss.backward(self.loss_context)}
        return self._backward(adjoints, self.prefix.contexts)

    def backward_prefix(self) -> Gradients:
        """Gradients by parameter of what has gathered in the prefix's ``adjoint``."""
        return self._backward(dict(self.prefix.adjoint), ())

    def _backward(self, adjoints: Adjoints, skipped: Container[int]) -> Gradients:
        gradients: Gradients = {}
        for i in reversed(range(len(self.program.nodes))):
            if i in skipped or i + 1 not in adjoints or not self.depends[i + 1]:
                continue
            node, ctx = self.program.nodes[i], self.contexts[i]
            self._ask(i, ctx)
            into = node.layer.backward(ctx, self._of(i, self.params), adjoints.pop(i + 1))
            self._spread(i, into, adjoints, gradients)
        return gradients

    def jvp(self, direction: Tensor) -> Tensor | None:
        """Tangent of the outputs along ``direction [T, P]`` on the adapted parameters, after ``backward``."""
        directions = [
            d if p.adapted else None
            for d, p in zip(self.program.unflatten(direction), self.program.parameters, strict=True)
        ]
        self.directions = directions
        for i, node in enumerate(self.program.nodes):
            d_params = self._of(i, directions)
            d_inputs = [self.tangents.get(v) for v in node.inputs]
            if any(d is not None for d in (*d_params, *d_inputs)):
                params = self._of(i, self.params)
                self.tangents[i + 1] = node.layer.tangent_forward(self.contexts[i], params, d_params, d_inputs)
        return self.tangents.get(self.program.output)

    def hvp(self) -> Gradients:
        """Tangents of the gradients, by parameter, after ``jvp``: the rows of ``H u`` and the mixed rows.

        What reaches the prefix is added to its ``adjoint``. A node without a tangent has a constant Jacobian along the
        direction, so the tangent of its adjoint goes back by its plain ``backward``.
        """
        d_outputs = self.tangents[self.program.output]
        adjoints = {self.program.output: self.program.loss.tangent_backward(self.loss_context, d_outputs)}
        gradients: Gradients = {}
        for i in reversed(range(len(self.program.nodes))):
            if i + 1 not in adjoints or not self.depends[i + 1] or i in self.prefix.contexts:
                continue
            node, ctx, params = self.program.nodes[i], self.contexts[i], self._of(i, self.params)
            self._ask(i, ctx)
            gd_y = adjoints.pop(i + 1)
            if i + 1 in self.tangents:
                into = node.layer.tangent_backward(ctx, params, self._of(i, self.directions), gd_y)
            else:
                into = node.layer.backward(ctx, params, gd_y)
            self._spread(i, into, adjoints, gradients)
        for value, adjoint in adjoints.items():
            known = self.prefix.adjoint.get(value)
            self.prefix.adjoint[value] = adjoint if known is None else known + adjoint
        return gradients

    def flat(self, gradients: Gradients) -> Tensor:
        """``[T, P]`` from gradients by parameter; zero where there is none."""
        tasks = self.batch.x.shape[0]
        if self.prefix.zero is None:
            self.prefix.zero = self.theta.new_zeros(1, 1)
        parts = []
        for k, p in enumerate(self.program.parameters):
            part = gradients.get(k)
            parts.append(self.prefix.zero.expand(tasks, p.size) if part is None else part.reshape(tasks, p.size))
        return torch.cat(parts, 1)

    def _run(self, i: int) -> None:
        node = self.program.nodes[i]
        ctx = RuleContext(self.step, self.batch.mask, (False,) * len(node.inputs), (False,) * len(node.params))
        inputs = [self.values[v] for v in node.inputs]
        try:
            self.values[i + 1] = node.layer.forward(ctx, self._of(i, self.params), inputs, node.constants)
        except (RuntimeError, ValueError, IndexError) as error:
            shapes = ", ".join(str(list(value.shape[1:])) for value in inputs)
            raise ValueError(
                f"layer {node.name!r} ({node.layer.kind}) cannot take an input of shape {shapes} [n, ...]: {error}. "
                f"The samples have shape {list(self.batch.x.shape[2:])}; check it against the model's first layer"
            ) from error
        self.contexts[i] = ctx

    def _ask(self, i: int, ctx: RuleContext) -> None:
        node = self.program.nodes[i]
        ctx.needs_inputs = tuple(self.depends[v] for v in node.inputs)
        ctx.needs_params = tuple(self.wanted[k] for k in node.params)

    def _of(self, i: int, tensors: list[Tensor] | list[Tensor | None]) -> list:
        return [tensors[k] for k in self.program.nodes[i].params]

    def _spread(self, i: int, into: tuple, adjoints: Adjoints, gradients: Gradients) -> None:
        node = self.program.nodes[i]
        for targets, found, store in ((node.inputs, into[0], adjoints), (node.params, into[1], gradients)):
            for target, g in zip(targets, found, strict=True):
                if g is not None:
                    store[target] = store[target] + g if target in store else g


def _depends(program: Program, wanted: tuple[bool, ...]) -> list[bool]:
    depends = [False]
    for node in program.nodes:
        depends.append(any(depends[v] for v in node.inputs) or any(wanted[k] for k in node.params))
    return depends
