"""Mean squared error: loss and gradient in one pass; the tangent is the gradient of ``zd`` against zero."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract.layer import Loss, RuleContext
from ..contract.sample_weights import sample_weights
from ..primitives.launch import TILES, block, empty, launch
from .reference import MSE


@triton.jit
def metafast_mse(loss, g, z, y, w, share, n, K: tl.constexpr, B: tl.constexpr):
    """``loss [T]``, ``g = 2 w (z - y) / K`` for samples of ``K`` elements; without ``w`` each element counts
    ``share``. Grid (1, task)."""
    task = tl.program_id(1).to(tl.int64)
    base = task * n * K
    total = tl.zeros((B,), tl.float32)
    for start in range(0, n * K, B):
        i = start + tl.arange(0, B)
        inside = i < n * K
        e = tl.load(z + base + i, inside, 0.0).to(tl.float32)
        if y is not None:
            e -= tl.load(y + base + i, inside, 0.0).to(tl.float32)
        weight = tl.where(inside, share, 0.0) if w is None else tl.load(w + task * n + i // K, inside, 0.0) / K
        total += tl.where(weight != 0, weight * e * e, 0.0)
        tl.store(g + base + i, 2 * weight * e, inside)
    tl.store(loss + task, tl.sum(total, 0))


@dataclass(frozen=True)
class TritonMSE(Loss):
    """The rules of ``MSE``."""

    reference: MSE
    kind = "mse"

    def check(self, output: tuple[int, ...], targets: Tensor, name: str) -> None:
        self.reference.check(output, targets, name)

    def forward(self, ctx: RuleContext, outputs: Tensor, targets: Tensor) -> Tensor:
        ctx.has_kernel = self.reference.of_kind_alone(targets.shape, targets.dtype)
        if not ctx.has_kernel:
            return self.reference.forward(ctx, outputs, targets)
        z, ctx.dtype = outputs.float().contiguous(), outputs.dtype
        ctx.w = None if ctx.mask is None else sample_weights(ctx.mask, z)
        loss, ctx.g = self._run(ctx, z, targets.contiguous())
        return loss

    def backward(self, ctx: RuleContext) -> Tensor:
        g: Tensor = ctx.g.to(ctx.dtype) if ctx.has_kernel else self.reference.backward(ctx)
        return g

    def tangent_backward(self, ctx: RuleContext, d_outputs: Tensor) -> Tensor:
        if not ctx.has_kernel:
            return self.reference.tangent_backward(ctx, d_outputs)
        return self._run(ctx, d_outputs.float().contiguous(), None)[1].to(ctx.dtype)

    @staticmethod
    def _run(ctx: RuleContext, z: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        tasks, n = z.shape[:2]
        size = z[0, 0].numel()
        loss, g = empty(z, tasks), torch.empty_like(z)
        block_size = block(n * size, 16, TILES.elements)
        launch(metafast_mse, (1, tasks), loss, g, z, y, ctx.w, 1 / (n * size), n, K=size, B=block_size, warps=8)
        return loss, g


def lower(loss: MSE, precision: str) -> TritonMSE | None:
    """The rules of ``loss`` in Triton, which has none for its options."""
    return None if loss.options else TritonMSE(loss)
