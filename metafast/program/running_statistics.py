"""Updates the running statistics of batch norm in its ``running`` mode."""

from __future__ import annotations

import torch
from torch import Tensor

from metafast.kernels.batch_norm import BatchNorm
from metafast.program import Program
from metafast.program.interpreter import Pass
from metafast.tasks import Batch


@torch.no_grad()
def track(program: Program, params: Tensor, batch: Batch) -> None:
    """Moves the running mean ``mu [C]`` and variance ``[C]`` of each batch norm towards those of ``batch``.

    ``mu <- (1 - m) mu + m mean(x)`` and likewise for the unbiased variance, where ``m`` is the layer's momentum and
    ``x`` its input at ``params [P]`` for the samples of all tasks: this is what ``torch.nn.BatchNorm`` does in training
    mode.
    """
    run = Pass(program, params.expand(batch.x.shape[0], -1), batch, 0, (False,) * len(program.parameters))
    run.forward()
    for node in program.nodes:
        if isinstance(node.layer, BatchNorm) and node.layer.mode == "running":
            x = run.values[node.inputs[0]]
            by_channel = (x if batch.mask is None else x[batch.mask][None]).transpose(0, 2).flatten(1)
            for constant, moment in zip(node.constants, (by_channel.mean(1), by_channel.var(1)), strict=True):
                constant.lerp_(moment.to(constant.dtype), node.layer.momentum)
