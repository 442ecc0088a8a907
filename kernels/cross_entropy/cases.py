"""Sizes at which cross-entropy is tested."""

from __future__ import annotations

import torch.nn.functional as F

from ..contract.case import LossCase
from .reference import CrossEntropy

CASES = [
    LossCase("five ways", CrossEntropy(), F.cross_entropy, (25, 5), 5),
    LossCase("one sample", CrossEntropy(), F.cross_entropy, (1, 3), 3),
    LossCase("two classes", CrossEntropy(), F.cross_entropy, (7, 2), 2),
    LossCase("twenty ways", CrossEntropy(), F.cross_entropy, (20, 20), 20),
    LossCase("more outputs than classes seen", CrossEntropy(), F.cross_entropy, (6, 9), 2),
    LossCase(
        "saturated", CrossEntropy(), F.cross_entropy, (9, 4), 4, 30.0, 1e-4,
        "p (1 - p) of outputs of size 30 keeps few of the bits of p",
    ),
]  # fmt: skip
