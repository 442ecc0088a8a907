"""Losses of a user's own at which the derived loss is tested."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..contract.case import LossCase
from .reference import CustomLoss


def _smoothed(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, label_smoothing=0.1)


def _log_cosh(outputs: Tensor, targets: Tensor) -> Tensor:
    return torch.log(torch.cosh(outputs - targets)).mean()


def _one_hot(outputs: Tensor, targets: Tensor) -> Tensor:
    """Its operations depend on values: it runs task by task."""
    return (outputs.softmax(-1) - F.one_hot(targets, 5)).square().sum(-1).mean()


def _of_some(outputs: Tensor, targets: Tensor) -> Tensor:
    """Branches on a value, reads another as a number, and takes the samples that it finds."""
    if targets.sum() > 6:
        outputs = 2 * outputs
    weight = 1 + targets.max().item()
    return weight * F.cross_entropy(outputs[targets >= 0], targets[targets >= 0], reduction="sum") / len(targets)


def _in_place(outputs: Tensor, targets: Tensor) -> Tensor:
    outputs.mul_(2).sub_(targets)
    return outputs.pow(4).mean()


def _binary(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs, targets, pos_weight=torch.tensor([1.0, 2.0, 3.0]).to(outputs))


def _likelihood(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.nll_loss(F.log_softmax(outputs, -1), targets)


CASES = [
    LossCase("smoothed labels", CustomLoss(_smoothed), _smoothed, (10, 5), 5),
    LossCase("log cosh", CustomLoss(_log_cosh), _log_cosh, (6, 2)),
    LossCase("Huber", CustomLoss(F.huber_loss), F.huber_loss, (6, 2), scale=2.0),
    LossCase("L1, a module", CustomLoss(nn.L1Loss()), F.l1_loss, (6, 2)),
    LossCase("smooth L1", CustomLoss(F.smooth_l1_loss), F.smooth_l1_loss, (6, 2), scale=2.0),
    LossCase("binary cross-entropy", CustomLoss(_binary), _binary, (6, 3), prepare=Tensor.sigmoid),
    LossCase("log-likelihood of log_softmax", CustomLoss(_likelihood), _likelihood, (6, 5), 5),
    LossCase("one-hot labels", CustomLoss(_one_hot), _one_hot, (6, 5), 5),
    LossCase("branches, numbers, some samples", CustomLoss(_of_some), _of_some, (4, 5), 5),
    LossCase("in place", CustomLoss(_in_place), lambda z, y: (2 * z - y).pow(4).mean(), (6, 2)),
]
