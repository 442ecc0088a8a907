"""Steps out of torch.func's transforms, for work that belongs to no transform: what is found once and kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

_of_functorch = torch._C._functorch


def transforming() -> bool:
    """Says whether a transform of torch.func is being computed."""
    return _of_functorch.peek_interpreter_stack() is not None


def plain(tensor: Tensor) -> Tensor:
    """Returns the tensor without what transforms have put around it."""
    while _of_functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _of_functorch.get_unwrapped(tensor)
    return tensor


@contextmanager
def outside_transforms() -> Iterator[None]:
    """Computes as if no transform were there. Tensors must be plain."""
    if not transforming():
        yield
        return
    with temporarily_clear_interpreter_stack():
        yield
