"""A user's loss: its gradient and the Hessian-vector product in the outputs come from torch.autograd."""

from __future__ import annotations

import math
import os
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.overrides import TorchFunctionMode

from ..contract.layer import Loss, RuleContext

Function = Callable[[Tensor, Tensor], Tensor]


class CustomLoss(Loss):
    """``L[t] = function(outputs[t], targets[t])``, a scalar for one task's ``[n, ...]`` samples that count.

    The function runs for all tasks of one size at once where that gives what it gives for one task alone, and task by
    task where not. The first call finds out.
    """

    kind = "custom_loss"
    reads_targets = False

    def __init__(self, function: Function) -> None:
        self.function = function
        self._together: bool | None = None
        self._only_once = False

    def forward(self, ctx: RuleContext, outputs: Tensor, targets: Tensor) -> Tensor:
        ctx.recorded = torch.is_grad_enabled()
        ctx.z = outputs if ctx.recorded and outputs.requires_grad else outputs.detach().requires_grad_()
        with torch.enable_grad():
            if self._together is None:
                self._together = self._runs_together(*_first_task(ctx.z, targets, ctx.mask))
            ctx.losses = self._losses(ctx.z, targets, ctx.mask)
        return ctx.losses if ctx.recorded else ctx.losses.detach()

    def backward(self, ctx: RuleContext) -> Tensor:
        with torch.enable_grad():
            ctx.g = _gradient(ctx.losses, ctx.z)
        return ctx.g if ctx.recorded else ctx.g.detach()

    def tangent_backward(self, ctx: RuleContext, d_outputs: Tensor) -> Tensor:
        if not ctx.g.requires_grad:
            return torch.zeros_like(ctx.g)
        no_second = (
            f"{_described(self.function)} cannot be differentiated twice: one of its operations has no second "
            "derivative in torch. Use another one, or first_order=True"
        )
        if self._only_once:
            raise ValueError(no_second)
        try:
            (found,) = torch.autograd.grad(
                ctx.g, ctx.z, d_outputs, retain_graph=True, create_graph=torch.is_grad_enabled(), materialize_grads=True
            )
        except RuntimeError as error:
            raise ValueError(no_second) from error
        # Where the loss has no curvature, as |z|, torch may give zeros that are nowhere in memory.
        return found.clone() if found._is_zerotensor() else found

    def _losses(self, outputs: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor:
        """Returns the losses ``[T]``, with their graph."""
        losses = None
        if self._together:
            losses = self._at_once(outputs, targets, mask)
            self._together = losses is not None
        if losses is None:
            losses = self._one_by_one(outputs, targets, mask)
        if not losses.requires_grad:
            raise ValueError(
                f"{_described(self.function)} returned a tensor that does not depend on the outputs as far as autograd "
                "sees: compute it by torch operations, without .item(), .detach() and torch.no_grad()"
            )
        return losses

    def _at_once(self, outputs: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor | None:
        """Computes all tasks that have as many samples in one call; ``None`` where the function cannot."""
        if mask is None:
            return self._try_together(outputs, targets)
        sizes = mask.sum(1)
        losses = outputs.new_zeros(len(outputs))
        for size in sizes.unique().tolist():
            chosen = sizes == size
            kept = mask & chosen[:, None]
            some = self._try_together(*(v[kept].reshape(-1, size, *v.shape[2:]) for v in (outputs, targets)))
            if some is None:
                return None
            losses = losses.index_put((chosen,), some)
        return losses

    def _try_together(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """Calls the function on all tasks at once; ``None`` where it fails, or returns no scalar for each."""
        try:
            losses = vmap(self.function)(outputs.clone(), targets)
        except Exception:
            return None
        return losses.to(outputs.dtype) if losses.dim() == 1 else None

    def _one_by_one(self, outputs: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor:
        losses = []
        for t in range(len(outputs)):
            kept = slice(None) if mask is None else mask[t]
            losses.append(self._of_task(outputs[t][kept], targets[t][kept]))
        return torch.stack(losses)

    def _of_task(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Calls the function on one task.

        Raises:
            ValueError: it fails, or returns no scalar tensor; the text names the user's line.
        """
        shapes = f"one task's outputs of shape {tuple(outputs.shape)} and targets of shape {tuple(targets.shape)}"
        try:
            loss: Any = self.function(outputs.clone(), targets)  # which it may change in place
        except Exception as error:
            line = _last_line(error)
            raise ValueError(
                f"{_described(self.function)} failed{line and f' at {line}'}: {type(error).__name__}: {error}. It was "
                f"called with {shapes}{self._about_integers(outputs, targets)}"
            ) from error
        if not isinstance(loss, Tensor):
            raise ValueError(
                f"{_described(self.function)} returned {'nothing' if loss is None else f'a {type(loss).__name__}'} for "
                f"{shapes}; it must return a scalar "
                "tensor, without .item()"
            )
        if loss.dim():
            raise ValueError(
                f"{_described(self.function)} returned shape {tuple(loss.shape)} for {shapes}; it must return a "
                "scalar: add .mean()"
            )
        return loss.to(outputs.dtype)

    def _about_integers(self, outputs: Tensor, targets: Tensor) -> str:
        """Returns the remedy where the function fails because the targets are integers; empty where it would not help.

        What torch says of it names dtypes, and neither the targets nor what to do.
        """
        if targets.is_floating_point():
            return ""
        try:
            _gradient(self.function(outputs.clone(), targets.to(outputs.dtype)), outputs)
        except Exception:
            return ""
        remedy = "y.double()" if outputs.dtype == torch.float64 else "y.float()"
        return f". The targets have dtype {targets.dtype}, and it takes real numbers: use {remedy}"

    def _runs_together(self, outputs: Tensor, targets: Tensor) -> bool:
        """Says whether the function gives for several tasks at once what it gives for the first task alone.

        Raises:
            ValueError: it gives two values for the same task, or has no gradient.
        """
        prints = _Prints()
        with prints:
            loss = self._of_task(outputs, targets)
        values = [float(v.detach()) for v in (loss, self._of_task(outputs, targets))]
        if not math.isclose(*values, rel_tol=1e3 * torch.finfo(loss.dtype).eps) and not all(map(math.isnan, values)):
            raise ValueError(
                f"{_described(self.function)} returned {values[0]:.6g} and then {values[1]:.6g} for the same "
                "outputs and targets: it draws random numbers or changes with each call. The inner loop computes a "
                "loss several times: make it a function of outputs and targets alone"
            )
        if not loss.requires_grad:
            return False
        try:
            gradient = _gradient(loss, outputs)
        except RuntimeError as error:
            raise ValueError(
                f"{_described(self.function)} cannot be differentiated: {error}{self._about_integers(outputs, targets)}"
            ) from error
        self._only_once = _has_errors(gradient)
        if prints.seen:
            return False
        two = [torch.stack([v, v]) for v in (outputs, targets)]
        with warnings.catch_warnings():  # an operation that torch runs task by task gains nothing
            warnings.filterwarnings("error", "There is a performance drop")
            together = self._try_together(*two)
        if together is None or not together.requires_grad or not _alike(together[0], loss):
            return False
        return _alike(_gradient(together[:1], two[0])[0], gradient)


class _Prints(TorchFunctionMode):
    """Sees whether a function prints tensors, which then have to be those of one task."""

    seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen = self.seen or func in (Tensor.__repr__, Tensor.__format__)
        return func(*args, **(kwargs or {}))


def _first_task(outputs: Tensor, targets: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    kept = slice(None) if mask is None else mask[0]
    return outputs[0][kept], targets[0][kept]


def _gradient(losses: Tensor, outputs: Tensor) -> Tensor:
    """Returns the gradient of the sum of ``losses`` in ``outputs``, which can be differentiated again."""
    (gradient,) = torch.autograd.grad(losses.sum(), outputs, create_graph=True, materialize_grads=True)
    return gradient


def _has_errors(gradient: Tensor) -> bool:
    """Says whether the graph of a gradient has a place that stands for a missing derivative.

    Torch raises an error there only where it gets there, which ``torch.autograd.grad`` does not.
    """
    seen: set[Any] = set()
    waiting = [gradient.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name().rpartition("::")[2] in ("Error", "DelayedError"):
            return True
        waiting += [source for source, _ in node.next_functions]
    return False


def _alike(a: Tensor, b: Tensor) -> bool:
    """Says whether ``a`` and ``b`` are equal but for rounding."""
    a, b = a.detach(), b.detach()
    tolerance = 1e3 * torch.finfo(b.dtype).eps
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * float(b.abs().nan_to_num(0.0).max()), equal_nan=True)


def _described(function: Any) -> str:
    """Returns words for a loss: its name, and where it is defined."""
    function = getattr(function, "func", function)  # of a partial
    name = getattr(function, "__qualname__", type(function).__name__)
    code = getattr(function if hasattr(function, "__code__") else getattr(function, "forward", None), "__code__", None)
    where = f" ({code.co_filename}:{code.co_firstlineno})" if code and not _in_torch(code.co_filename) else ""
    return f"the loss {name}{where}"


def _last_line(error: BaseException) -> str:
    """Returns the last line of the user's that ``error`` went through, as ``file:number (text)``."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f.filename != __file__ and not _in_torch(f.filename)]
    return f"{own[-1].filename}:{own[-1].lineno} ({own[-1].line})" if own else ""


def _in_torch(file: str) -> bool:
    return file.startswith(os.path.dirname(torch.__file__))
