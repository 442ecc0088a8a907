"""Flatten: a change of shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..contract.layer import RuleContext
from ..contract.linear_map import LinearMap
from ..contract.pattern import SAMPLES, Pattern


@dataclass(frozen=True)
class Flatten(LinearMap):
    """Merges the axes ``start..end`` of a task's ``[n, ...]``, ``1 <= start``, as ``torch.flatten`` does."""

    kind = "flatten"
    start: int = 1
    end: int = -1

    def apply(self, ctx: RuleContext, x: Tensor) -> Tensor:
        return x.flatten(self.start + 1, self.end + 1 if self.end >= 0 else self.end)

    def transpose(self, ctx: RuleContext, g: Tensor) -> Tensor:
        return g.reshape(ctx.x.shape)


def _read(input: Any, start_dim: int = 0, end_dim: int = -1) -> Flatten | None:
    return Flatten(start_dim, end_dim) if start_dim >= 1 and (end_dim == -1 or end_dim >= start_dim) else None


def _read_view(input: Any, *shape: Any) -> Flatten | None:
    """``x.view(x.size(0), -1)``, with the sizes side by side or as one tuple."""
    sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
    return Flatten() if len(sizes) == 2 and sizes[0] is SAMPLES and sizes[1] == -1 else None


PATTERNS = (
    Pattern(_read, modules=(nn.Flatten,), functions=(torch.flatten,), methods=("flatten",)),
    Pattern(_read_view, functions=(torch.reshape,), methods=("view", "reshape")),
)
