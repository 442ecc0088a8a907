"""Finds losses by name, and makes one of any callable."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch.nn.functional as F
from torch import Tensor

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

LossLike: TypeAlias = str | Loss | Callable[[Tensor, Tensor], Tensor]


def as_loss(loss: LossLike) -> Loss:
    """Returns the loss with its rules.

    Args:
        loss: ``"cross_entropy"``, ``"mse"``, a loss that has rules already, or a callable that takes the outputs
            ``[n, ...]`` and targets ``[n, ...]`` of one task and returns a scalar.

    Raises:
        ValueError: the name is unknown.
        TypeError: ``loss`` is neither a name nor callable.
    """
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, str):
        if loss not in _BY_NAME:
            raise ValueError(
                f"loss={loss!r} is unknown; choose from {sorted(_BY_NAME)}, or pass a callable of outputs and targets"
            )
        return _BY_NAME[loss]
    if callable(loss):
        return CustomLoss(loss)
    raise TypeError(f"loss is a {type(loss).__name__}; pass a name from {sorted(_BY_NAME)} or a callable")
