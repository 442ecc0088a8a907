"""Mean squared error, a mean or a sum over the samples and elements of each task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..contract.layer import Loss, RuleContext, check_reduction
from ..contract.sample_weights import sample_weights


@dataclass(frozen=True, eq=False)
class MSE(Loss):
    """``L = sum_m w_m (z_m - y_m)^2``: ``g = 2 w (z - y)``, ``gd = 2 w zd``; all ``[T,n,...]``.

    ``w_m = 1/M`` for the M elements of a task that count, or 1 where they are summed.

    Args:
        reduction: ``"mean"`` or ``"sum"``.
        function: the user's own module or function, of which the options were read.
    """

    kind = "mse"
    reads_targets = False
    reduction: str = "mean"
    function: Callable[..., Tensor] = F.mse_loss

    def __post_init__(self) -> None:
        check_reduction(self.reduction)

    @property
    def options(self) -> dict[str, Any]:
        reduction = self.now("reduction")
        return {} if reduction == "mean" else {"reduction": reduction}

    def check(self, output: tuple[int, ...], targets: Tensor, name: str) -> None:
        if tuple(targets.shape[2:]) != output:
            raise ValueError(
                f"mse takes outputs and targets of one shape; a sample's output has shape {output} and in {name} "
                f"{tuple(targets.shape)} it has {tuple(targets.shape[2:])}. Nothing is broadcast: reshape the targets "
                "(often y[..., None])"
            )
        if not targets.is_floating_point():
            raise TypeError(f"{name} has dtype {targets.dtype}; mse takes floating-point targets: use {name}.float()")

    def forward(self, ctx: RuleContext, outputs: Tensor, targets: Tensor) -> Tensor:
        ctx.e = outputs - targets
        weights = sample_weights(ctx.mask, outputs) / outputs[0, 0].numel()
        if self.now("reduction") == "sum":
            weights = (weights != 0).to(outputs.dtype)
        ctx.w = weights.reshape(*weights.shape, *(1,) * (outputs.dim() - 2))
        return (ctx.w * ctx.e * ctx.e).flatten(1).sum(1)

    def backward(self, ctx: RuleContext) -> Tensor:
        return 2 * ctx.w * ctx.e

    def tangent_backward(self, ctx: RuleContext, d_outputs: Tensor) -> Tensor:
        return 2 * ctx.w * d_outputs
