"""Keeps autocast out of the inner loop, which computes in the dtype of the parameters."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, ParamSpec, TypeVar

import torch
from torch.utils._pytree import tree_map_only

from metafast.tasks import TaskBatch

_DEVICES = ("cpu", "cuda")
_SAID = (
    "autocast has no effect inside a learner: the inner loop and its meta-gradient are computed in the dtype of the "
    "parameters. For products of lower precision pass precision= to the learner. Call loss.backward() outside of "
    "autocast, as PyTorch advises"
)

Taken = ParamSpec("Taken")
Found = TypeVar("Found")


def in_own_dtype(function: Callable[Taken, Found]) -> Callable[Taken, Found]:
    """Makes ``function`` run without autocast, and say so once where it was on."""

    @functools.wraps(function)
    def call(*args: Taken.args, **kwargs: Taken.kwargs) -> Found:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if torch.is_inference_mode_enabled():
            return _outside_inference(call, *args, **kwargs)
        if not torch._C._is_any_autocast_enabled():
            return function(*args, **kwargs)
        _say_once()
        with ExitStack() as stack:
            for device in _DEVICES:
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    return call


def _outside_inference(function: Callable[..., Found], *args: Any, **kwargs: Any) -> Found:
    """Calls ``function`` outside of inference mode, whose tensors no inner loop can differentiate."""
    with torch.inference_mode(False), torch.no_grad():
        own = tree_map_only(torch.Tensor, torch.clone, [_as_tree(arg) for arg in args])
        named = tree_map_only(torch.Tensor, torch.clone, kwargs)
        return function(*(_from_tree(arg, given) for arg, given in zip(own, args, strict=True)), **named)


def _as_tree(argument: Any) -> Any:
    """Returns a batch as a dict of its tensors, which torch looks into, and anything else as it is."""
    return vars(argument) if isinstance(argument, TaskBatch) else argument


def _from_tree(tree: Any, argument: Any) -> Any:
    return TaskBatch(**tree) if isinstance(argument, TaskBatch) else tree


@functools.cache
def _say_once() -> None:
    warnings.warn(_SAID, UserWarning, stacklevel=3)
