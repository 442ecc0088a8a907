"""Sees what a run of a module does besides operations: reads of values, Functions, scripts, and coins of others."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode

from metafast.program.operation import CaptureError

_NO_HOOKS = (
    "The gradients of an inner loop are computed by rules, which run no hooks; write what it does to the gradient as a "
    "torch.autograd.Function, or take it off"
)


def refuse_backward_hooks(model: nn.Module) -> None:
    """Raises CaptureError where a hook waits for the gradient of a module, of all modules or of a parameter."""
    if torch_module._global_backward_hooks or torch_module._global_backward_pre_hooks:
        raise CaptureError(f"a backward hook is registered for all modules. {_NO_HOOKS}")
    for name, module in model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            raise CaptureError(f"{type(module).__name__} {name!r} has a backward hook. {_NO_HOOKS}")
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise CaptureError(f"parameter {name!r} has a hook for its gradient. {_NO_HOOKS}")


class Watcher(Protocol):
    """Is told of what a run does. ``inside`` is the Function that is being run, if one is."""

    inside: type | None

    def read(self, tensor: Tensor, how: str) -> None:
        """Takes note that Python reads the numbers of ``tensor``."""

    def refuse(self, what: str, remedy: str) -> CaptureError:
        """Makes the error that says why the run cannot become a Program."""

    def function(self, cls: Any, apply: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Runs a ``torch.autograd.Function``."""


class ValueReads(TorchFunctionMode):
    """Tells the recorder where Python reads the numbers of a tensor without an operation."""

    def __init__(self, recorder: Watcher) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if func in (Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__) and self.recorder.inside is None:
            self.recorder.read(args[0], f".{name}()")
        elif self.recorder.inside is not None:
            pass  # what a Function does inside of itself is its own
        elif func is Tensor.register_hook:
            raise self.recorder.refuse("registers a hook for a gradient", _NO_HOOKS)
        elif func in (torch.autograd.grad, torch.autograd.backward, Tensor.backward):
            raise self.recorder.refuse(
                f"differentiates by {name}", "A gradient inside of forward has no place in a Program"
            )
        return func(*args, **(kwargs or {}))


@contextmanager
def functions_kept_whole(recorder: Watcher) -> Iterator[None]:
    """Sends the calls of all ``torch.autograd.Function``s to the recorder.

    ``Function.apply`` itself stays as it is, because modules hold it bound, as by ``sign = Sign.apply``; it calls the
    ``apply`` of the class below, which has none of its own.
    """
    base: Any = torch.autograd.function._SingleLevelFunction
    thread = threading.get_ident()

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        run = super(base, cls).apply
        elsewhere = recorder.inside is not None or threading.get_ident() != thread
        return run(*args, **kwargs) if elsewhere else recorder.function(cls, run, args, kwargs)

    base.apply = classmethod(apply)
    try:
        yield
    finally:
        del base.apply


def in_this_thread(hook: Callable[..., None]) -> Callable[..., None]:
    """Returns a ``hook`` of all modules that leaves alone those that other threads run."""
    thread = threading.get_ident()

    def run(*args: Any) -> None:
        if threading.get_ident() == thread:
            hook(*args)

    return run


class OtherCoins(CaptureError):
    """Is raised where a run has drawn random numbers of Python or NumPy."""


def other_random_states() -> tuple[Any, ...]:
    """Returns what tells whether Python and, where it is loaded, NumPy have drawn a random number."""
    numpy = sys.modules.get("numpy.random")
    return random.getstate(), numpy and (*numpy.get_state()[2:4], int(numpy.get_state()[1][0]))


def coins_refused(error: Exception, line: str) -> CaptureError:
    """Makes the error that says where random numbers of Python or NumPy are drawn."""
    return CaptureError(
        f"{error} draws random numbers by Python's random or by NumPy at {line or 'an unknown line'}; each pass would "
        "have to draw the same. Draw by torch, or in __init__"
    )


def forget_optimised_scripts(model: nn.Module) -> None:
    """Makes TorchScript interpret its graphs again, where it has run them so often that it optimised them."""
    functions: Any = torch.jit._state._python_cu.get_functions
    for function in functions():
        function._debug_flush_compilation_cache()
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule) and hasattr(module, "forward"):
            flush = getattr(module.forward, "_debug_flush_compilation_cache", None)
            if flush is not None:
                flush()
