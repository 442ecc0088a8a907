"""Updates the running statistics of batch norm in its ``running`` mode."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from metafast.kernels.batch_norm import BatchNorm
from metafast.kernels.contract.layer import RuleContext
from metafast.kernels.mse import MSE
from metafast.program import Node, Program
from metafast.program.one_thread import one_thread
from metafast.tasks import Batch

Predict = Callable[[Program, Tensor, Tensor, int, Tensor | None], Tensor]
"""Computes the outputs ``[T, n, ...]`` of a Program at ``params [P]`` for ``x [T, n, ...]``, a step, and seeds."""


@torch.no_grad()
def track(program: Program, predict: Predict, params: Tensor, batch: Batch) -> None:
    """Moves the running mean ``mu [C]`` and variance ``[C]`` of each batch norm towards those of ``batch``.

    ``mu <- (1 - m) mu + m mean(x)`` and likewise for the unbiased variance, where ``m`` is the layer's momentum and
    ``x`` its input at ``params [P]`` for the samples of all tasks: this is what ``torch.nn.BatchNorm`` does in training
    mode. The executor that runs the inner loop computes ``x``, so that it depends on threads as little as all else.
    """
    inputs = []
    for _, before in _norms(program):
        x = _reshaped(before, before.output, batch.x)  # executors refuse a model that computes nothing
        inputs.append(predict(before, params, batch.x, 0, batch.seeds) if x is None else x)
    for (node, _), x in zip(_norms(program), inputs, strict=True):
        by_channel = (x if batch.mask is None else x[batch.mask][None]).transpose(0, 2).flatten(1)
        with one_thread():
            moments = by_channel.mean(1), by_channel.var(1)
        for constant, moment in zip(node.constants, moments, strict=True):
            constant.lerp_(moment.to(constant.dtype), node.layer.momentum)


def _reshaped(program: Program, value: int, x: Tensor) -> Tensor | None:
    """Returns a value of ``program`` where it is the input ``x`` in some shape, and ``None`` where it is computed."""
    if value == 0:
        return x
    node = program.nodes[value - 1]
    before = _reshaped(program, node.inputs[0], x) if node.layer.kind == "flatten" else None
    return None if before is None else node.layer.forward(RuleContext(0, None, (False,), ()), (), (before,))


_known: WeakKeyDictionary[Program, list[tuple[Node, Program]]] = WeakKeyDictionary()


def _norms(program: Program) -> list[tuple[Node, Program]]:
    """Lists the batch norms to track, each with the part of ``program`` that makes its input.

    Executors plan each part once, so parts live as long as the whole.
    """
    if program not in _known:
        _known[program] = [
            (node, Program(program.nodes[:i], program.parameters, node.inputs[0], MSE()))
            for i, node in enumerate(program.nodes)
            if isinstance(node.layer, BatchNorm) and node.layer.mode == "running"
        ]
    return _known[program]
