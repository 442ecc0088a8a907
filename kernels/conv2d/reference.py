"""y = W * x + b, per task: one grouped convolution whose groups are the tasks.

Bilinear: writing ``*`` for the convolution, ``*'`` for its data gradient and ``(x)`` for its weight gradient,

    g_x = W *' g          g_W = g (x) x
    yd  = W * xd + Wd * x      gd_x = W *' gd + Wd *' g      gd_W = gd (x) x + g (x) xd
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..contract.layer import Layer, RuleContext, Tangents, Tensors
from ..contract.optional_sums import add_optional, sum_present
from ..contract.pattern import Pattern, pair


@dataclass(frozen=True)
class Conv2d(Layer):
    """``y[t,n] = conv2d(x[t,n], W[t]) + b[t]``; ``x [T,n,C,H,W]``, ``W [T,O,C/groups,kh,kw]``, ``b [T,O]``."""

    kind = "conv2d"
    input_rank = 3
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    bias: bool = True

    @property
    def parameter_names(self) -> tuple[str, ...]:
        return ("weight", "bias") if self.bias else ("weight",)

    def numbers(self, shapes: Sequence[tuple[int, ...]]) -> list[float]:
        """``O, C/groups, kh, kw``, then stride, padding and dilation along both axes."""
        return [*shapes[0], *self.stride, *self.padding, *self.dilation]

    def forward(self, ctx: RuleContext, params: Tensors, inputs: Tensors, constants: Tensors = ()) -> Tensor:
        ctx.x = _fold(inputs[0])
        y = _unfold(self._conv(ctx.x, params[0]), params[0].shape[0])
        ctx.y_shape = y.shape
        return y + params[1][:, None, :, None, None] if self.bias else y

    def backward(self, ctx: RuleContext, params: Tensors, g_y: Tensor) -> tuple[Tangents, Tangents]:
        ctx.g = _fold(g_y)
        g_x, g_w = self._adjoints(ctx.g, ctx.x, params[0], ctx.needs_inputs[0], ctx.needs_params[0])
        return (self._tasks(g_x, params[0]),), self._with_bias(ctx, g_w, g_y)

    def tangent_forward(self, ctx: RuleContext, params: Tensors, d_params: Tangents, d_inputs: Tangents) -> Tensor:
        xd, (wd, bd) = d_inputs[0], (*d_params, None)[:2]
        ctx.xd = None if xd is None else _fold(xd)
        tasks = params[0].shape[0]
        return sum_present(
            None if ctx.xd is None else _unfold(self._conv(ctx.xd, params[0]), tasks),
            None if wd is None else _unfold(self._conv(ctx.x, wd), tasks),
            None if bd is None else bd[:, None, :, None, None].expand(ctx.y_shape),
        )

    def tangent_backward(
        self, ctx: RuleContext, params: Tensors, d_params: Tangents, gd_y: Tensor
    ) -> tuple[Tangents, Tangents]:
        gd = _fold(gd_y)
        need_x, need_w = ctx.needs_inputs[0], ctx.needs_params[0]
        gd_x, gd_w = self._adjoints(gd, ctx.x, params[0], need_x, need_w)
        if need_w and ctx.xd is not None:
            gd_w = add_optional(self._adjoints(ctx.g, ctx.xd, params[0], False, True)[1], gd_w)
        if need_x and d_params[0] is not None:
            gd_x = add_optional(self._adjoints(ctx.g, ctx.x, d_params[0], True, False)[0], gd_x)
        return (self._tasks(gd_x, params[0]),), self._with_bias(ctx, gd_w, gd_y)

    def _conv(self, x: Tensor, weight: Tensor) -> Tensor:
        groups = self.groups * weight.shape[0]
        return torch.conv2d(x, weight.flatten(0, 1), None, self.stride, self.padding, self.dilation, groups)

    def _adjoints(
        self, g: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_w: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        if not (need_x or need_w):
            return None, None
        g_x, g_w, _ = torch.ops.aten.convolution_backward(
            g, x, weight.flatten(0, 1), None, self.stride, self.padding, self.dilation, False, (0, 0),
            self.groups * weight.shape[0], (need_x, need_w, False),
        )  # fmt: skip
        return g_x, None if g_w is None else g_w.reshape(weight.shape)

    @staticmethod
    def _tasks(g_x: Tensor | None, weight: Tensor) -> Tensor | None:
        return None if g_x is None else _unfold(g_x, weight.shape[0])

    def _with_bias(self, ctx: RuleContext, g_w: Tensor | None, g: Tensor) -> Tangents:
        if not self.bias:
            return (g_w,)
        return g_w, g.sum((1, 3, 4)) if ctx.needs_params[1] else None


def _fold(x: Tensor) -> Tensor:
    """``[T,n,C,H,W]`` -> ``[n,T*C,H,W]``: tasks become groups of channels."""
    return x.transpose(0, 1).flatten(1, 2)


def _unfold(x: Tensor, tasks: int) -> Tensor:
    """The inverse of ``_fold``."""
    return x.unflatten(1, (tasks, -1)).transpose(0, 1)


def _read(
    input_shape: tuple[int, ...], bias: Any, stride: Any, padding: Any, dilation: Any, groups: int
) -> Conv2d | None:
    if padding == "valid":
        padding = 0
    if isinstance(padding, str) or len(input_shape) != 4:
        return None
    return Conv2d(pair(stride), pair(padding), pair(dilation), groups, bias is not None)


PATTERNS = (Pattern(_read, ("conv2d.default", "conv2d.padding")),)
