"""Losses of a user's own at which the derived loss is tested."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contract.case import LossCase
from .reference import CustomLoss


def _smoothed(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, label_smoothing=0.1)


def _log_cosh(outputs: Tensor, targets: Tensor) -> Tensor:
    return torch.log(torch.cosh(outputs - targets)).mean()


CASES = [
    LossCase("smoothed labels", CustomLoss(_smoothed), _smoothed, (10, 5), 5),
    LossCase("log cosh", CustomLoss(_log_cosh), _log_cosh, (6, 2)),
    LossCase("Huber", CustomLoss(F.huber_loss), F.huber_loss, (6, 2), scale=2.0),
]
