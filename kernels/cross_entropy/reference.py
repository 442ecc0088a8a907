"""Softmax cross-entropy, a mean over the samples of each task."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..contract.layer import Loss, RuleContext
from ..contract.sample_weights import sample_weights


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """``L = -sum_m w_m log p_m[y_m]``, ``p = softmax z``, ``w_m = 1/M``: ``g = w (p - onehot y)``,
    ``gd = w p (zd - sum_k p_k zd_k)``. Outputs ``z [T,n,K]``, targets ``y [T,n]`` int64 in ``0..K-1``."""

    kind = "cross_entropy"

    def check(self, output: tuple[int, ...], targets: Tensor, name: str) -> None:
        if len(output) != 1 or targets.dim() != 2:
            raise ValueError(
                f"cross_entropy takes outputs [T, n, classes] and labels [T, n]; a sample's output has shape {output} "
                f"and {name} has shape {tuple(targets.shape)}. For other shapes pass a callable as loss"
            )
        if targets.dtype != torch.int64:
            raise TypeError(f"{name} has dtype {targets.dtype}; cross_entropy takes class indices: use {name}.long()")
        low, high = (int(v) for v in targets.aminmax())
        if low < 0 or high >= output[0]:
            wrong = low if low < 0 else high
            raise ValueError(
                f"{name} contains the label {wrong}, but the model has {output[0]} outputs: labels must lie in "
                f"0..{output[0] - 1}, those of padded samples too. Number the classes of each task from 0, or give the "
                "model more outputs"
            )

    def forward(self, ctx: RuleContext, outputs: Tensor, targets: Tensor) -> Tensor:
        log_p = torch.log_softmax(outputs, -1)
        ctx.p = log_p.exp()
        ctx.y = targets[..., None]
        ctx.w = sample_weights(ctx.mask, outputs)
        return -(ctx.w * log_p.gather(-1, ctx.y)[..., 0]).sum(1)

    def backward(self, ctx: RuleContext) -> Tensor:
        onehot = torch.zeros_like(ctx.p).scatter(-1, ctx.y, 1.0)
        return ctx.w[..., None] * (ctx.p - onehot)

    def tangent_backward(self, ctx: RuleContext, d_outputs: Tensor) -> Tensor:
        mean = (ctx.p * d_outputs).sum(-1, keepdim=True)
        return ctx.w[..., None] * ctx.p * (d_outputs - mean)
