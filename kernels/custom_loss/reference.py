"""A user's loss: its gradient and the tangent of it from torch.func."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.func import grad, vjp, vmap

from ..contract.layer import Loss, RuleContext


@dataclass(frozen=True)
class CustomLoss(Loss):
    """``L[t] = function(outputs[t], targets[t])``, a scalar for one task's ``[n, ...]``."""

    kind = "custom_loss"
    reads_targets = False
    function: Callable[[Tensor, Tensor], Tensor]

    def forward(self, ctx: RuleContext, outputs: Tensor, targets: Tensor) -> Tensor:
        if ctx.mask is not None:
            raise ValueError(
                "a loss callable does not see the sample mask; use 'cross_entropy' or 'mse' with ragged tasks"
            )
        ctx.z, ctx.y = outputs, targets
        try:
            losses = vmap(self.function)(outputs, targets)
        except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
            raise ValueError(
                f"the loss callable failed on one task's outputs of shape {tuple(outputs.shape[1:])} and targets of "
                f"shape {tuple(targets.shape[1:])}: {error}. It must return a scalar tensor by torch operations alone, "
                "without .item() and without branches on values"
            ) from error
        if losses.dim() != 1:
            raise ValueError(
                f"the loss callable returned shape {tuple(losses.shape[1:])} for one task; it must return a scalar: "
                "add .mean()"
            )
        return losses

    def backward(self, ctx: RuleContext) -> Tensor:
        return self._gradient(ctx.z, ctx.y)

    def tangent_backward(self, ctx: RuleContext, d_outputs: Tensor) -> Tensor:
        # The Hessian is symmetric: reverse mode serves, which more of torch's losses have than forward mode.
        found: Tensor = vjp(lambda z: self._gradient(z, ctx.y), ctx.z)[1](d_outputs)[0]
        # Where the loss has no curvature, as |z|, torch may give zeros that are nowhere in memory.
        return found.clone() if found._is_zerotensor() else found

    def _gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return vmap(grad(self.function))(outputs, targets)
