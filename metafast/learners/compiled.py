"""Takes a learner through torch.compile: its whole inner loop becomes one operator of the compiled graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from metafast.inner.operators import loss_parameters, meta_loss
from metafast.learners.base import LearnerOutput
from metafast.tasks import TaskBatch

CREATE_GRAPH = (
    "create_graph=True records plain operations of unknown number, which a compiled graph cannot hold; call the "
    "learner uncompiled for it"
)
UNSEEN = (
    "the loss reads a tensor that requires a gradient and that torch.compile cannot see (a value that the function "
    "closes over, or a parameter of the model). Make it a parameter of an nn.Module and pass that as loss, or call the "
    "learner uncompiled"
)


def compiled(
    number: int, parameters: Sequence[Tensor], rates: Tensor, loss_module: nn.Module | None, tasks: TaskBatch,
    step_weights: Sequence[float], first_order: bool,
) -> LearnerOutput:  # fmt: skip
    """Calls the operator of learner ``number``; this function is what torch.compile traces."""
    theta = torch.cat([p.reshape(-1) for p in parameters])
    of_loss = [p.reshape(-1) for p in loss_parameters(loss_module)]
    losses, outputs, *_ = meta_loss(
        number, theta, rates, tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y,
        torch.cat(of_loss) if of_loss else theta.new_empty(0), tasks.support_mask, tasks.query_mask,
        list(step_weights), first_order, torch.is_grad_enabled(),
    )  # fmt: skip
    return LearnerOutput(losses, outputs)


def output_shape(model: nn.Module, named: dict[str, Tensor], x: Tensor) -> tuple[int, ...]:
    """Returns the shape of the outputs of ``model`` on the samples ``x [n, ...]``, which may be tensors without data.

    ``named`` are the model's parameters; a parameter with a row for each inner step stands for one of its rows.
    """
    shapes = {name: p.shape for name, p in model.named_parameters()}
    parameters = {name: t if t.shape == shapes[name] else t[0] for name, t in named.items()}
    buffers = {name: x.new_empty(b.shape, dtype=b.dtype) for name, b in model.named_buffers()}
    with torch.no_grad():
        return tuple(functional_call(model, {**parameters, **buffers}, (x,)).shape)
