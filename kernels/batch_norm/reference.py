"""Batch norm: the formulas of ``normalise``, with means over samples and positions of one task and channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..contract.layer import RuleContext, Tensors
from ..contract.normalise import Normalise
from ..contract.pattern import Pattern

MODES = ("task", "per_step", "frozen", "running")


@dataclass(frozen=True)
class BatchNorm(Normalise):
    """``y = gamma (x - mu) / sqrt(var + eps) + beta`` per task and channel; ``x [T,n,C,...]``, ``gamma, beta [T,C]``.

    ``mode`` says where ``mu`` and ``var`` come from (Ioffe & Szegedy 2015, 1502.03167):

    - ``task``: this pass of this task (biased variance; support and query each their own: the MAML default);
    - ``per_step``: the same, with ``gamma, beta [T,S+1,C]``, a row for each inner step (MAML++, 1810.09502);
    - ``frozen``, ``running``: the constants ``mu, var [C]``. The rules are the same for both: with ``running`` the
      learner moves the constants between meta-steps.
    """

    kind = "batch_norm"
    keeps_channels = True
    mode: str = "task"
    eps: float = 1e-5
    scale: bool = True
    shift: bool = True
    momentum: float = 0.1

    @property
    def fixed_statistics(self) -> bool:  # type: ignore[override]
        return self.mode in ("frozen", "running")

    @property
    def varies(self) -> bool:  # type: ignore[override]
        return self.mode == "per_step"

    @property
    def constant_names(self) -> tuple[str, ...]:
        return ("running_mean", "running_var") if self.fixed_statistics else ()

    def numbers(self, shapes: Sequence[tuple[int, ...]]) -> list[float]:
        """``eps``, whether statistics are fixed, and the rows of each parameter, one or one for each inner step."""
        return [self.eps, self.fixed_statistics, shapes[0][0] if shapes and self.varies else 1]

    def mean(self, ctx: RuleContext, u: Tensor) -> Tensor:
        axes = (1, *range(3, u.dim()))
        if ctx.mask is None:
            return u.mean(axes, keepdim=True)
        count = ctx.mask.sum(1) * u[0, 0, 0].numel()
        return self.keep(ctx, u).sum(axes, keepdim=True) / count.reshape(-1, *(1,) * (u.dim() - 1))

    def keep(self, ctx: RuleContext, u: Tensor) -> Tensor:
        if ctx.mask is None:
            return u
        return u * ctx.mask.reshape(*ctx.mask.shape, *(1,) * (u.dim() - 2)).to(u.dtype)

    def standardise(self, ctx: RuleContext, x: Tensor, constants: Tensors) -> None:
        if not self.fixed_statistics:
            if x.shape[1] * x[0, 0, 0].numel() == 1:
                raise ValueError(
                    "one number in each channel has no variance: batch norm needs a second sample, or bn='frozen'"
                )
            super().standardise(ctx, x, constants)
            return
        mu, var = (c.to(x.dtype).reshape(-1, *(1,) * (x.dim() - 3)) for c in constants)
        ctx.r = torch.rsqrt(var + self.eps)
        ctx.xh = (x - mu) * ctx.r

    def view(self, ctx: RuleContext, parameter: Tensor) -> Tensor:
        row = parameter[:, self._row(ctx, parameter)] if self.varies else parameter
        return row.reshape(row.shape[0], 1, -1, *(1,) * (ctx.xh.dim() - 3))

    def reduce(self, ctx: RuleContext, u: Tensor, parameter: Tensor) -> Tensor:
        by_channel = u.sum((1, *range(3, u.dim())))
        if not self.varies:
            return by_channel
        row, rows = self._row(ctx, parameter), parameter.shape[1]
        return torch.nn.functional.pad(by_channel[:, None], (0, 0, row, rows - 1 - row))

    @staticmethod
    def _row(ctx: RuleContext, parameter: Tensor) -> int:
        return min(ctx.step, parameter.shape[1] - 1)


def _read(
    input_shape: tuple[int, ...], eps: float, momentum: float, weight: Any, bias: Any, running_mean: Any, bn: str
) -> BatchNorm | None:
    if len(input_shape) < 2 or (bn in ("frozen", "running") and running_mean is None):
        return None
    return BatchNorm(bn, eps, weight is not None, bias is not None, momentum)


PATTERNS = (Pattern(_read, ("batch_norm.default",), unread=("running_mean", "running_var")),)
