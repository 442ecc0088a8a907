"""Softmax cross-entropy as ``torch.nn.functional.cross_entropy`` computes it, for each task by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contract.layer import Loss, RuleContext, check_reduction


@dataclass(frozen=True, eq=False)
class CrossEntropy(Loss):
    """``L = -sum a log p``, ``p = softmax z``: ``g = s p - a``, ``gd = s p (zd - sum_k p_k zd_k)``, ``s = sum_k a_k``.

    Outputs ``z [T,n,K,...]``. Targets are labels ``[T,n,...]`` int64 in ``0..K-1``, or probabilities ``[T,n,K,...]``.
    ``a [T,n,K,...]`` says how much each class of each element counts; for labels without options it is ``onehot / M``
    with the number M of a task's labels. A label of ``ignore_index`` is left out.

    Args:
        weight, label_smoothing, ignore_index, reduction: as in ``torch.nn.functional.cross_entropy``.
        function: the user's own module or function, of which the options were read.
    """

    kind = "cross_entropy"
    weight: Tensor | None = None
    label_smoothing: float = 0.0
    ignore_index: int = -100
    reduction: str = "mean"
    function: Callable[..., Tensor] = F.cross_entropy

    def __post_init__(self) -> None:
        check_reduction(self.reduction)

    @property
    def options(self) -> dict[str, Any]:
        usual = {"weight": None, "label_smoothing": 0.0, "ignore_index": -100, "reduction": "mean"}
        chosen = {name: self.now(name) for name in usual}
        return {name: value for name, value in chosen.items() if value is not None and value != usual[name]}

    def of_kind_alone(self, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        return not self.options and dtype == torch.int64 and len(shape) == 2

    def check(self, output: tuple[int, ...], targets: Tensor, name: str) -> None:
        shape = tuple(targets.shape[2:])
        if not output or shape not in (output, output[1:]) or (shape == output and not targets.is_floating_point()):
            raise ValueError(
                f"cross_entropy takes outputs [T, n, classes, ...] with labels [T, n, ...] (int64) or probabilities of "
                f"the outputs' shape (floating point); a sample's output has shape {output} and {name} has shape "
                f"{tuple(targets.shape)} and dtype {targets.dtype}. For other shapes pass a callable as loss"
            )
        weight = self.now("weight")
        if weight is not None and weight.shape != output[:1]:
            raise ValueError(
                f"the weight of the cross entropy has shape {tuple(weight.shape)}, but the model has {output[0]} "
                "outputs: give one number for each class"
            )
        if shape == output:
            return
        if targets.dtype != torch.int64:
            raise TypeError(f"{name} has dtype {targets.dtype}; cross_entropy takes class indices: use {name}.long()")
        self._check_labels(output[0], targets, name)

    def _check_labels(self, classes: int, labels: Tensor, name: str) -> None:
        low, high = (int(v) for v in labels.aminmax())
        if low >= 0 and high < classes:
            return
        left_out = self.now("ignore_index")
        outside = labels[((labels < 0) | (labels >= classes)) & (labels != left_out)]
        if outside.numel():
            low, high = (int(v) for v in outside.aminmax())
            raise ValueError(
                f"{name} contains the label {low if low < 0 else high}, but the model has {classes} outputs: labels "
                f"must lie in 0..{classes - 1}, those of padded samples too, or be {left_out} to be left out. "
                "Number the classes of each task from 0, or give the model more outputs"
            )

    def forward(self, ctx: RuleContext, outputs: Tensor, targets: Tensor) -> Tensor:
        log_p = torch.log_softmax(outputs, 2)
        ctx.p = log_p.exp()
        a, counted, total = self._coefficients(ctx.mask, outputs, targets)
        # A class that does not count may have a probability of zero.
        losses = -torch.where(counted, a * log_p, 0.0).flatten(1).sum(1) / total
        ctx.a = a / torch.where(total == 0, 1.0, total).reshape(-1, *(1,) * (a.dim() - 1))
        ctx.s = ctx.a.sum(2, keepdim=True)
        return losses

    def backward(self, ctx: RuleContext) -> Tensor:
        return ctx.s * ctx.p - ctx.a  # type: ignore[no-any-return]

    def tangent_backward(self, ctx: RuleContext, d_outputs: Tensor) -> Tensor:
        mean = (ctx.p * d_outputs).sum(2, keepdim=True)
        return ctx.s * ctx.p * (d_outputs - mean)  # type: ignore[no-any-return]

    def _coefficients(self, mask: Tensor | None, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns ``a`` before it is divided, where it may differ from zero, and what it is divided by, ``[T]``."""
        weight, smoothing = self.now("weight"), self.now("label_smoothing")
        soft = targets.is_floating_point()
        elements = (*outputs.shape[:2], *outputs.shape[3:])
        kept = torch.ones(elements, dtype=torch.bool, device=outputs.device)
        if mask is not None:
            kept = mask.reshape(*mask.shape, *(1,) * (len(elements) - 2)).expand(elements)
        if not soft:
            kept = kept & (targets != self.now("ignore_index"))
        counted = kept[:, :, None].expand(outputs.shape)
        a = targets
        if not soft:
            labels = torch.where(kept, targets, 0)[:, :, None]
            a = torch.zeros_like(outputs).scatter(2, labels, 1.0)
            counted = counted if smoothing else counted & (a != 0)
        size = kept.to(outputs.dtype)
        if weight is not None:
            weight = weight.to(outputs).reshape(-1, *(1,) * (outputs.dim() - 3))
            size = size if soft else size * (a * weight).sum(2)
        if smoothing:
            a = (1 - smoothing) * a + smoothing / outputs.shape[2]
        a = a * kept[:, :, None]
        a = a if weight is None else a * weight
        total = size.flatten(1).sum(1)
        return a, counted, total if self.now("reduction") == "mean" else torch.ones_like(total)
