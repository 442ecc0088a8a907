"""Finds losses by name, recognises PyTorch's, and makes one of any other callable."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn

from metafast.kernels.contract.layer import Loss
from metafast.kernels.cross_entropy import CrossEntropy
from metafast.kernels.custom_loss import CustomLoss
from metafast.kernels.mse import MSE

_BY_NAME: dict[str, Loss] = {loss.kind: loss for loss in (CrossEntropy(), MSE())}

TORCH_FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "mse": F.mse_loss,
}
"""PyTorch's function for each loss that has a name, for code that computes the same without metafast's rules."""

_RECOGNISED: dict[Any, tuple[Callable[..., Loss], tuple[str, ...]]] = {
    F.cross_entropy: (CrossEntropy, ("weight", "label_smoothing", "ignore_index", "reduction")),
    nn.CrossEntropyLoss: (CrossEntropy, ("weight", "label_smoothing", "ignore_index", "reduction")),
    F.mse_loss: (MSE, ("reduction",)),
    nn.MSELoss: (MSE, ("reduction",)),
}
"""The losses behind PyTorch's functions and classes, with the options that their rules know."""

LossLike: TypeAlias = str | Loss | Callable[[Tensor, Tensor], Tensor]


def as_loss(loss: LossLike) -> Loss:
    """Returns the loss with its rules.

    Args:
        loss: ``"cross_entropy"``, ``"mse"``, a loss that has rules already, or a callable that takes the outputs
            ``[n, ...]`` and targets ``[n, ...]`` of one task and returns a scalar. PyTorch's cross entropy and squared
            error are recognised as function, as ``functools.partial`` of it and as module, with their options.

    Raises:
        ValueError: the name is unknown, or the loss is not reduced to a scalar.
        TypeError: ``loss`` is neither a name nor callable, or it is a class.
    """
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, str):
        if loss not in _BY_NAME:
            raise ValueError(
                f"loss={loss!r} is unknown; choose from {sorted(_BY_NAME)}, or pass a callable of outputs and targets"
            )
        return _BY_NAME[loss]
    if isinstance(loss, type):
        raise TypeError(f"loss={loss.__name__} is a class; pass an instance: {loss.__name__}()")
    if callable(loss):
        return _recognise(loss) or CustomLoss(loss)
    what = "None" if loss is None else f"a {type(loss).__name__}"
    raise TypeError(f"loss is {what}; pass a name from {sorted(_BY_NAME)} or a callable")


def _recognise(loss: Callable[..., Tensor]) -> Loss | None:
    """Returns the loss of one of PyTorch's functions or modules; ``None`` for any other, or with unusual options."""
    options: dict[str, Any] = {}
    key: Any = loss
    if isinstance(loss, functools.partial) and not loss.args:
        key, options = loss.func, dict(loss.keywords)
    elif isinstance(loss, nn.Module):
        key = None if "forward" in vars(loss) or loss._forward_hooks or loss._forward_pre_hooks else type(loss)
    try:
        make, names = _RECOGNISED[key]
    except (KeyError, TypeError):  # a callable need not be hashable
        return None
    if isinstance(loss, nn.Module):
        options = {name: getattr(loss, name) for name in names}
    return make(**options, function=loss) if options.keys() <= set(names) else None


def may_become_another(loss: Loss) -> bool:
    """Says whether the user holds what a loss of torch's was recognised by, and so may change it."""
    held = loss.module is not None or isinstance(loss.function, functools.partial)
    return held and loss.kind != CustomLoss.kind


def has_become_another(loss: Loss) -> bool:
    """Says whether what the loss was recognised by is something else now; options of modules are read as they are."""
    if not may_become_another(loss):
        return False
    now = as_loss(loss.function)
    return type(now) is not type(loss) or (loss.module is None and _as_key(now) != _as_key(loss))


def _as_key(loss: Loss) -> list[tuple[str, Any]]:
    return [(name, id(value) if isinstance(value, Tensor) else value) for name, value in loss.options.items()]
