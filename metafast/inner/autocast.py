"""Keeps autocast out of the inner loop, which computes in the dtype of the parameters."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import ParamSpec, TypeVar

import torch

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
        if torch.compiler.is_compiling() or not torch._C._is_any_autocast_enabled():
            return function(*args, **kwargs)
        _say_once()
        with ExitStack() as stack:
            for device in _DEVICES:
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    return call


@functools.cache
def _say_once() -> None:
    warnings.warn(_SAID, UserWarning, stacklevel=3)
