"""Updates the running statistics of batch norm in its ``running`` mode."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from metafast.kernels.batch_norm import BatchNorm
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
    given = params, batch.x, 0, batch.seeds
    inputs = [batch.x if before is None else predict(before, *given) for _, before in _norms(program)]
    for (node, _), x in zip(_norms(program), inputs, strict=True):
        by_channel = (x if batch.mask is None else x[batch.mask][None]).transpose(0, 2).flatten(1)
        with one_thread():
            moments = by_channel.mean(1), by_channel.var(1)
        for constant, moment in zip(node.constants, moments, strict=True):
            constant.lerp_(moment.to(constant.dtype), node.layer.momentum)


_known: WeakKeyDictionary[Program, list[tuple[Node, Program | None]]] = WeakKeyDictionary()


def _norms(program: Program) -> list[tuple[Node, Program | None]]:
    """Lists the batch norms to track, each with the part of ``program`` that makes its input.

    It is ``None`` where that is the input of the model. Executors plan each part once, so parts live as long as the
    whole.
    """
    if program not in _known:
        norms = [
            (i, node)
            for i, node in enumerate(program.nodes)
            if isinstance(node.layer, BatchNorm) and node.layer.mode == "running"
        ]
        _known[program] = [
            (node, Program(program.nodes[:i], program.parameters, node.inputs[0], MSE()) if node.inputs[0] else None)
            for i, node in norms
        ]
    return _known[program]
