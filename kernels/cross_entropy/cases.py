"""Sizes and options at which cross-entropy is tested."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contract.case import LossCase
from .reference import CrossEntropy

_WEIGHT = torch.tensor([1.0, 2.0, 0.5, 0.0, 3.0])


def _plain(name: str, outputs: tuple[int, ...], classes: int | None, **settings: Any) -> LossCase:
    return LossCase(name, CrossEntropy(), F.cross_entropy, outputs, classes, **settings)


def _with(
    name: str, outputs: tuple[int, ...] = (6, 5), soft: bool = False, leave: int = -100, **options: Any
) -> LossCase:
    prepare = _probabilities if soft else partial(_left_out, leave)
    return LossCase(
        name, CrossEntropy(**options), partial(_torch, options), outputs, None if soft else 5, prepare=prepare
    )


def _torch(options: dict[str, Any], outputs: Tensor, targets: Tensor) -> Tensor:
    tensors = {k: v.to(outputs.dtype) if isinstance(v, Tensor) else v for k, v in options.items()}
    return F.cross_entropy(outputs, targets, **tensors)


def _probabilities(targets: Tensor) -> Tensor:
    return targets.softmax(2)


def _left_out(label: int, targets: Tensor) -> Tensor:
    targets = targets.clone()
    targets[:, 1] = label
    return targets


CASES = [
    _plain("five ways", (25, 5), 5),
    _plain("one sample", (1, 3), 3),
    _plain("two classes", (7, 2), 2),
    _plain("twenty ways", (20, 20), 20),
    _plain("more outputs than classes seen", (6, 9), 2),
    _plain("saturated", (9, 4), 4, scale=30.0, tolerance=1e-4,
           reason="p (1 - p) of outputs of size 30 keeps few of the bits of p"),
    _plain("labels of five ways left out", (9, 5), 5, prepare=partial(_left_out, -100)),
    _plain("probabilities", (6, 4), None, prepare=_probabilities),
    _plain("sequences", (4, 5, 3), 5),
    _plain("images", (3, 4, 2, 3), 4, prepare=partial(_left_out, -100)),
    _plain("probabilities of sequences", (4, 5, 3), None, prepare=_probabilities),
    _with("class weights", weight=_WEIGHT),
    _with("smoothed labels", label_smoothing=0.1),
    _with("smoothed and weighted", weight=_WEIGHT, label_smoothing=0.2),
    _with("smoothed and weighted sequences", (4, 5, 3), weight=_WEIGHT, label_smoothing=0.2),
    _with("another label left out", leave=2, ignore_index=2),
    _with("a sum", reduction="sum"),
    _with("a sum, weighted and smoothed", reduction="sum", weight=_WEIGHT, label_smoothing=0.3),
    _with("weighted probabilities", soft=True, weight=_WEIGHT),
    _with("smoothed and weighted probabilities", soft=True, weight=_WEIGHT, label_smoothing=0.1),
    _with("a sum of weighted probabilities", soft=True, weight=_WEIGHT, reduction="sum"),
]  # fmt: skip
