"""A user's loss: its gradient and the tangent of it from torch.func."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.func import grad, jvp, vmap

from ..layer import Context, Loss


@dataclass(frozen=True)
class CustomLoss(Loss):
    """``L[t] = function(outputs[t], targets[t])``, a scalar for one task's ``[n, ...]``."""

    stem = "custom_loss"
    function: Callable[[Tensor, Tensor], Tensor]

    def forward(self, ctx: Context, outputs: Tensor, targets: Tensor) -> Tensor:
        if ctx.mask is not None:
            raise ValueError(
                "a loss callable does not see the sample mask; use 'cross_entropy' or 'mse' with ragged tasks"
            )
        ctx.z, ctx.y = outputs, targets
        losses = vmap(self.function)(outputs, targets)
        if losses.dim() != 1:
            raise ValueError(
                f"the loss callable returned shape {tuple(losses.shape[1:])} for one task; it must return a scalar: "
                "add .mean()"
            )
        return losses

    def backward(self, ctx: Context) -> Tensor:
        return self._gradient(ctx.z, ctx.y)

    def tangent_backward(self, ctx: Context, d_outputs: Tensor) -> Tensor:
        return jvp(lambda z: self._gradient(z, ctx.y), (ctx.z,), (d_outputs,))[1]

    def _gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return vmap(grad(self.function))(outputs, targets)
