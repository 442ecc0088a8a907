"""Sizes at which the mean squared error is tested."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F

from ..contract.case import LossCase
from .reference import MSE

CASES = [
    LossCase("sinusoid", MSE(), F.mse_loss, (10, 1)),
    LossCase("one sample of one number", MSE(), F.mse_loss, (1, 1)),
    LossCase("vectors", MSE(), F.mse_loss, (5, 3)),
    LossCase("numbers without an axis", MSE(), F.mse_loss, (7,)),
    LossCase("images", MSE(), F.mse_loss, (2, 3, 4, 5)),
    LossCase("a sum", MSE("sum"), partial(F.mse_loss, reduction="sum"), (5, 3)),
]
