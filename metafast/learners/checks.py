"""Checks what users hand in; each error names the value and the remedy."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from metafast.program import Program
from metafast.program.interpreter import Pass
from metafast.tasks import Batch, TaskBatch, each_part, parts_of


def check_batch(tasks: TaskBatch) -> None:
    """Raises TypeError for anything but a TaskBatch."""
    if not isinstance(tasks, TaskBatch):
        raise TypeError(
            f"a learner takes a TaskBatch, not {'None' if tasks is None else f'a {type(tasks).__name__}'}: "
            "mf.TaskBatch(support_x, support_y, query_x, query_y)"
        )


def check_steps(tasks: TaskBatch, steps: int) -> None:
    """Raises ValueError where each step has support samples of its own, and there are not as many as ``steps``."""
    if tasks.each_step and tasks.support_y.shape[0] != steps:
        raise ValueError(
            f"support_x has samples for {tasks.support_y.shape[0]} inner steps (each_step=True), and there are "
            f"{steps}: give as many, or set learner.steps"
        )


def check_initialised(model: nn.Module) -> None:
    """Raises ValueError where a parameter has no shape yet, as in a lazy module, or is complex."""
    for name, module in model.named_modules():
        lazy = [n for n, p in module.named_parameters(recurse=False) if isinstance(p, UninitializedParameter)]
        if lazy:
            raise ValueError(
                f"{type(module).__name__} {name!r} has not been run, so that {lazy[0]!r} has no shape yet; run the "
                "model once on samples of one task before: model(x)"
            )
    for name, parameter in model.named_parameters():
        if parameter.is_complex():
            raise ValueError(
                f"parameter {name!r} is complex, and an inner loop moves real ones: hold torch.view_as_real of it, and "
                "take torch.view_as_complex of that in forward"
            )


def check_buffers(model: nn.Module) -> None:
    """Raises ValueError where a buffer is to get a gradient, or where no change of it could be seen."""
    for name, buffer in model.named_buffers():
        if buffer.requires_grad:
            raise ValueError(
                f"buffer {name!r} requires a gradient, and an inner loop gives none to buffers: make it an "
                f"nn.Parameter, or call requires_grad_(False) on it"
            )
        if buffer.is_inference():
            raise ValueError(
                f"buffer {name!r} was made in inference mode, where torch counts no changes: outside of it, set it to "
                "a clone() of itself"
            )


def check_like(tasks: TaskBatch, learner: nn.Module) -> None:
    """Raises where a tensor of the batch does not live where the learner lives, or in another dtype."""
    tensors = {name: t for name, t in learner.state_dict().items() if t.is_floating_point()}
    for name in ("support_x", "query_x", "support_y", "query_y"):
        for x in parts_of(getattr(tasks, name)):
            _check_like(name, x, tensors)


def _check_like(name: str, x: Tensor, tensors: Mapping[str, Tensor]) -> None:
    """Checks one tensor of a batch against all ``tensors`` of a learner."""
    for known, tensor in tensors.items():
        if x.device != tensor.device:
            raise ValueError(
                f"{name} is on {x.device} and {known} on {tensor.device}; use tasks.to(device) and "
                "learner.to(device) with one device"
            )
        if x.is_floating_point() and x.dtype not in (torch.float32, torch.float64) and name.endswith("x"):
            raise TypeError(
                f"{name} has dtype {x.dtype}; metafast computes in float32 and float64: use "
                "tasks.to(torch.float32) and learner.float()"
            )
        if not x.is_floating_point():
            continue  # labels
        if x.dtype != tensor.dtype:
            raise TypeError(
                f"{name} has dtype {x.dtype} and {known} {tensor.dtype}; use tasks.to({tensor.dtype}) or "
                f"learner.to({x.dtype})"
            )


def check_padding(tasks: TaskBatch, unpaddable: str | None) -> None:
    """Raises ValueError where the batch has padding and the model is ``unpaddable``, for the reason that this says."""
    for name in ("support_mask", "query_mask"):
        mask = getattr(tasks, name)
        if unpaddable is not None and mask is not None and not bool(mask.all()):
            raise ValueError(f"{name} leaves samples out, which cannot be: {unpaddable}")


@torch.no_grad()
def mixing(program: Program, params: Tensor, tasks: TaskBatch) -> str | None:
    """Says in words which layer lets padding reach the outputs of other samples; ``None`` where none does.

    Only derived layers can, which do not see the mask. Runs in which the last sample of each task is padding show it,
    for the masks of all batches to come.
    """
    for name, batch in (("support", tasks.support), ("query", tasks.query)):
        if all(node.layer.kind != "derived" for node in program.nodes):
            continue
        mask, outputs = _without_last(batch), []
        for padding in (0, 1):
            x = each_part(partial(_padded, mask=mask, value=padding), batch.x)
            theta, nothing = params.expand(len(tasks), -1), (False,) * len(program.parameters)
            seeds = torch.arange(len(tasks), device=params.device) if program.draws else None
            run = Pass(program, theta, Batch(x, batch.y, mask, seeds), 0, nothing)
            outputs.append(run.forward()[mask])
        if not torch.equal(*outputs):
            derived = [node.name for node in program.nodes if node.layer.kind == "derived"]
            return (
                f"the padding of {name}_x would change the outputs of the samples that count, since one of {derived} "
                "mixes the samples of a task and does not see the mask. Use tasks of one size with this model"
            )
    return None


def _without_last(batch: Batch) -> Tensor:
    """Returns a mask ``[T, n]`` that leaves out a further sample of each task that has several."""
    mask = torch.ones(batch.y.shape[:2], dtype=torch.bool, device=batch.y.device) if batch.mask is None else batch.mask
    last = mask.shape[1] - 1 - mask.flip(1).byte().argmax(1)
    return mask.scatter(1, last[:, None], mask.sum(1, keepdim=True) == 1)


def _padded(x: Tensor, mask: Tensor, value: int) -> Tensor:
    """Returns ``x [T, n, ...]`` with ``value`` in the place of the samples that ``mask [T, n]`` leaves out."""
    kept = mask.reshape(*mask.shape, *(1,) * (x.dim() - 2))
    return torch.where(kept, x, torch.full_like(x, value))
