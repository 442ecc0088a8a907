"""Batch norm and layer norm share one set of formulas, and differ in what a mean runs over.

With ``mean`` over the normalised axes, ``r = (var x + eps)^-1/2`` and ``xh = r (x - mean x)``, let
``P(u) = r (u - mean u - xh mean(xh u))``, a symmetric map. Then, with ``gh = gamma g_y``,

    y  = gamma xh + beta          g_x = P(gh)         g_gamma = sum g_y xh     g_beta = sum g_y
    yd = gamma P(xd) + gammad xh + betad
    gd_x = P(gamma gd_y + gammad g_y) - r (xh mean(gh xhd) + xhd mean(gh xh) + g_x mean(xh xd)),  xhd = P(xd)
    gd_gamma = sum(gd_y xh + g_y xhd)                 gd_beta = sum gd_y

Where the statistics are fixed rather than measured, ``P(u) = r u`` and the bracket is zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layer import Layer, RuleContext, Tangents, Tensors
from .optional_sums import sum_present


class Normalise(Layer):
    """Normalisation with an affine map behind it. Parameters: ``gamma`` and ``beta``, either may be absent."""

    eps: float
    scale: bool
    shift: bool
    fixed_statistics: bool

    @property
    def parameter_names(self) -> tuple[str, ...]:
        return ("weight",) * self.scale + ("bias",) * self.shift

    def mean(self, ctx: RuleContext, u: Tensor) -> Tensor:
        """Mean over the normalised axes, kept as axes of length one."""
        raise NotImplementedError

    def view(self, ctx: RuleContext, parameter: Tensor) -> Tensor:
        """A parameter ``[T, ...]`` shaped to be broadcast against ``x``."""
        raise NotImplementedError

    def reduce(self, ctx: RuleContext, u: Tensor, parameter: Tensor) -> Tensor:
        """The transpose of ``view``: sums ``u`` to the shape of the parameter."""
        raise NotImplementedError

    def keep(self, ctx: RuleContext, u: Tensor) -> Tensor:
        """``u`` with padded samples set to zero."""
        return u

    def project(self, ctx: RuleContext, u: Tensor) -> Tensor:
        """``P(u)``, the derivative of ``xh`` in ``x``."""
        if self.fixed_statistics:
            return ctx.r * u
        return self.keep(ctx, ctx.r * (u - self.mean(ctx, u) - ctx.xh * self.mean(ctx, ctx.xh * u)))

    def standardise(self, ctx: RuleContext, x: Tensor, constants: Tensors) -> None:
        """Keeps ``r`` and ``xh``."""
        centred = x - self.mean(ctx, x)
        ctx.r = torch.rsqrt(self.mean(ctx, centred * centred) + self.eps)
        ctx.xh = centred * ctx.r

    def forward(self, ctx: RuleContext, params: Tensors, inputs: Tensors, constants: Tensors = ()) -> Tensor:
        self.standardise(ctx, inputs[0], constants)
        gamma, beta = self._split(params)
        y = self._scaled(ctx, gamma, ctx.xh)
        return y if beta is None else y + self.view(ctx, beta)

    def backward(self, ctx: RuleContext, params: Tensors, g_y: Tensor) -> tuple[Tangents, Tangents]:
        ctx.g, ctx.g_x = g_y, None
        if ctx.needs_inputs[0]:
            ctx.gh = self._scaled(ctx, self._split(params)[0], g_y)
            ctx.g_x = self.project(ctx, ctx.gh)
        return (ctx.g_x,), self._adjoints(ctx, params, [(g_y, ctx.xh)], g_y)

    def tangent_forward(self, ctx: RuleContext, params: Tensors, d_params: Tangents, d_inputs: Tangents) -> Tensor:
        gammad, betad = self._split(d_params)
        ctx.xd = d_inputs[0]
        ctx.xhd = None if ctx.xd is None else self.project(ctx, ctx.xd)
        return sum_present(
            None if ctx.xhd is None else self._scaled(ctx, self._split(params)[0], ctx.xhd),
            None if gammad is None else self.view(ctx, gammad) * ctx.xh,
            None if betad is None else self.view(ctx, betad).expand_as(ctx.xh),
        )

    def tangent_backward(
        self, ctx: RuleContext, params: Tensors, d_params: Tangents, gd_y: Tensor
    ) -> tuple[Tangents, Tangents]:
        gd_x = None
        if ctx.needs_inputs[0]:
            gammad, _ = self._split(d_params)
            ghd = self._scaled(ctx, self._split(params)[0], gd_y)
            gd_x = self.project(ctx, ghd if gammad is None else ghd + self.view(ctx, gammad) * ctx.g)
            if ctx.xhd is not None and not self.fixed_statistics:
                gd_x = gd_x - self.keep(ctx, ctx.r * self._projection_tangent(ctx))
        terms = [(gd_y, ctx.xh)] if ctx.xhd is None else [(gd_y, ctx.xh), (ctx.g, ctx.xhd)]
        return (gd_x,), self._adjoints(ctx, params, terms, gd_y)

    def _projection_tangent(self, ctx: RuleContext) -> Tensor:
        """Minus the tangent of ``P`` itself, applied to ``gh``, over ``r``: the bracket of ``gd_x``."""
        return (
            ctx.xh * self.mean(ctx, ctx.gh * ctx.xhd)
            + ctx.xhd * self.mean(ctx, ctx.gh * ctx.xh)
            + ctx.g_x * self.mean(ctx, ctx.xh * ctx.xd)
        )

    def _split(self, params: Tangents) -> tuple[Tensor | None, Tensor | None]:
        rest = list(params)
        gamma = rest.pop(0) if self.scale else None
        return gamma, rest.pop(0) if self.shift else None

    def _scaled(self, ctx: RuleContext, gamma: Tensor | None, u: Tensor) -> Tensor:
        return u if gamma is None else self.view(ctx, gamma) * u

    def _adjoints(self, ctx: RuleContext, params: Tensors, terms: list[tuple[Tensor, Tensor]], g: Tensor) -> Tangents:
        adjoints: list[Tensor | None] = []
        if self.scale:
            products = sum_present(*(a * b for a, b in terms)) if ctx.needs_params[0] else None
            adjoints.append(None if products is None else self.reduce(ctx, products, params[0]))
        if self.shift:
            adjoints.append(self.reduce(ctx, g, params[-1]) if ctx.needs_params[-1] else None)
        return adjoints
