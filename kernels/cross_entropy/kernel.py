"""Softmax cross-entropy: loss, probabilities and gradient in one pass, and the tangent of the gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract.layer import Loss, RuleContext
from ..primitives.launch import TILES, block, cdiv, empty, launch
from .reference import CrossEntropy

LEFT_OUT = tl.constexpr(-100)  # the label of samples that do not count, as PyTorch has it


@triton.jit
def metafast_cross_entropy(loss, p, g, share, z, y, mask, n, K: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr):
    """``loss [T]``, ``p`` and ``g`` ``[T,n,K]``, and ``share [T,n]``, what each sample counts: one over the number of
    those that count by ``mask`` and label. NaN for a task with a label outside, or with none that counts. Grid (1,
    task): the samples of a task one block after another."""
    task = tl.program_id(1).to(tl.int64)
    k = tl.arange(0, BK)
    count = tl.zeros((BR,), tl.float32)
    for start in range(0, n, BR):
        row = start + tl.arange(0, BR)
        kept = tl.load(y + task * n + row, row < n, LEFT_OUT) != LEFT_OUT
        if mask is not None:
            kept = kept & (tl.load(mask + task * n + row, row < n, 0.0) != 0)
        count += tl.where(kept, 1.0, 0.0)
    samples = tl.sum(count, 0)
    each = tl.div_rn(1.0, tl.maximum(samples, 1.0))
    total = tl.zeros((BR,), tl.float32)
    for start in range(0, n, BR):
        row = start + tl.arange(0, BR)
        inside = (row < n)[:, None] & (k < K)[None, :]
        offset = (task * n + row)[:, None] * K + k[None, :]
        v = tl.load(z + offset, inside, float("-inf")).to(tl.float32)
        top = tl.where(row < n, tl.max(v, 1), 0.0)
        e = tl.where(inside, tl.exp(v - top[:, None]), 0.0)
        s = tl.where(row < n, tl.sum(e, 1), 1.0)
        label = tl.load(y + task * n + row, row < n, 0)
        kept = (row < n) & (label != LEFT_OUT)
        if mask is not None:
            kept = kept & (tl.load(mask + task * n + row, row < n, 0.0) != 0)
        weight = tl.where(kept, each, 0.0)
        tl.store(share + task * n + row, weight, row < n)
        weight = tl.where((weight != 0) & ((label < 0) | (label >= K)), float("nan"), weight)
        hit = k[None, :] == label[:, None]
        of_label = tl.sum(tl.where(hit & inside, v - top[:, None], 0.0), 1)
        total += weight * tl.where(weight != 0, tl.log(s) - of_label, 0.0)
        q = e / s[:, None]
        tl.store(p + offset, q, inside)
        tl.store(g + offset, weight[:, None] * (q - tl.where(hit, 1.0, 0.0)), inside)
    tl.store(loss + task, tl.where(samples == 0, float("nan"), tl.sum(total, 0)))


@triton.jit
def metafast_cross_entropy_tangent(gd, p, zd, share, rows, K: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr):
    """``gd = share p (zd - sum p zd)``. Grid (row tile,)."""
    row, k = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, BK)
    inside = (row < rows)[:, None] & (k < K)[None, :]
    offset = row.to(tl.int64)[:, None] * K + k[None, :]
    q = tl.load(p + offset, inside, 0.0)
    d = tl.load(zd + offset, inside, 0.0).to(tl.float32)
    weight = tl.load(share + row, row < rows, 0.0)[:, None]
    tl.store(gd + offset, weight * q * (d - tl.sum(q * d, 1)[:, None]), inside)


@dataclass(frozen=True)
class TritonCrossEntropy(Loss):
    """The rules of ``CrossEntropy``; targets that are no labels of samples go to the rules in PyTorch."""

    reference: CrossEntropy
    kind = "cross_entropy"

    def check(self, output: tuple[int, ...], targets: Tensor, name: str) -> None:
        self.reference.check(output, targets, name)

    def forward(self, ctx: RuleContext, outputs: Tensor, targets: Tensor) -> Tensor:
        z, ctx.dtype = outputs.float().contiguous(), outputs.dtype
        ctx.has_kernel = self.reference.of_kind_alone(targets.shape, targets.dtype)
        if not ctx.has_kernel:
            return self.reference.forward(ctx, z, targets)
        tasks, n, classes = z.shape
        loss, ctx.p, ctx.g, ctx.share = empty(z, tasks), torch.empty_like(z), torch.empty_like(z), empty(z, tasks, n)
        mask = None if ctx.mask is None else ctx.mask.to(z.dtype).contiguous()
        launch(metafast_cross_entropy, (1, tasks), loss, ctx.p, ctx.g, ctx.share, z, targets.contiguous(), mask, n,
               K=classes, **self._block(n, classes))  # fmt: skip
        return loss

    def backward(self, ctx: RuleContext) -> Tensor:
        g: Tensor = ctx.g if ctx.has_kernel else self.reference.backward(ctx)
        return g.to(ctx.dtype)

    def tangent_backward(self, ctx: RuleContext, d_outputs: Tensor) -> Tensor:
        if not ctx.has_kernel:
            return self.reference.tangent_backward(ctx, d_outputs.float()).to(ctx.dtype)
        tasks, n, classes = ctx.p.shape
        gd, sizes = torch.empty_like(ctx.p, dtype=ctx.dtype), self._block(tasks * n, classes)
        grid = (cdiv(tasks * n, sizes["BR"]),)
        launch(metafast_cross_entropy_tangent, grid, gd, ctx.p, d_outputs.contiguous(), ctx.share, tasks * n,
               K=classes, **sizes)  # fmt: skip
        return gd

    @staticmethod
    def _block(rows: int, classes: int) -> dict[str, int]:
        columns = block(classes, 1, classes * 2)
        return {"BR": block(rows, 1, max(1, TILES.elements // columns)), "BK": columns}


def lower(loss: CrossEntropy, precision: str) -> TritonCrossEntropy | None:
    """The rules of ``loss`` in Triton, which has none for its options."""
    return None if loss.options else TritonCrossEntropy(loss)
