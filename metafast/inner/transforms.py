"""Steps out of torch.func's transforms, for work that belongs to no transform: what is found once and kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from metafast.inner.autograd import NO_MAPPING
from metafast.tasks import TaskBatch, each_part

_of_functorch = torch._C._functorch


def transforming() -> bool:
    """Says whether a transform of torch.func is being computed."""
    return _of_functorch.peek_interpreter_stack() is not None


def plain(tensor: Tensor) -> Tensor:
    """Returns the tensor without what transforms have put around it.

    Raises:
        RuntimeError: it has an axis that a transform hides.
    """
    while _of_functorch.is_functorch_wrapped_tensor(tensor):
        if _of_functorch.is_batchedtensor(tensor):
            raise RuntimeError(NO_MAPPING)
        tensor = _of_functorch.get_unwrapped(tensor)
    return tensor


def plain_batch(tasks: TaskBatch) -> TaskBatch:
    """Returns the batch with plain tensors."""
    named: dict[str, Any] = {
        name: value if value is None or isinstance(value, bool) else each_part(plain, value)
        for name, value in vars(tasks).items()
    }
    return TaskBatch(**named)


@contextmanager
def outside_transforms(*modules: nn.Module) -> Iterator[None]:
    """Computes as if no transform were there, with the plain parameters and buffers of ``modules``."""
    if not transforming():
        yield
        return
    registries: list[dict[str, Any]] = [
        r for module in modules for m in module.modules() for r in (m._parameters, m._buffers)
    ]
    wrapped = [
        (r, name, t)
        for r in registries
        for name, t in r.items()
        if t is not None and _of_functorch.is_functorch_wrapped_tensor(t)
    ]
    try:
        for registry, name, tensor in wrapped:
            registry[name] = plain(tensor)
        with temporarily_clear_interpreter_stack():
            yield
    finally:
        for registry, name, tensor in wrapped:
            registry[name] = tensor
