"""A convolution and the batch norm behind it as one layer: the norm's sums come out of the convolution's products.

The norm takes away the mean of each channel and with it a bias of the convolution, which is no parameter of this layer:
nothing depends on it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..batch_norm.kernel import TritonBatchNorm
from ..contract.layer import Layer, RuleContext, Tangents, Tensors
from .kernel import TritonConv2d


@dataclass(frozen=True)
class NormalisedConv(Layer):
    """``norm(conv(x))``, where ``conv`` has no bias and ``norm`` measures its statistics.

    The parameters are the weight of ``conv``, then those of ``norm``.
    """

    conv: TritonConv2d
    norm: TritonBatchNorm
    kind = "conv2d+batch_norm"

    def forward(self, ctx: RuleContext, params: Tensors, inputs: Tensors, constants: Tensors = ()) -> Tensor:
        of_conv, of_norm = self._split(params)
        ctx.conv = RuleContext(ctx.step, ctx.mask, ctx.needs_inputs, (False,))
        ctx.norm = RuleContext(ctx.step, ctx.mask, (True,), (False,) * len(of_norm))
        ctx.conv.statistics = True
        z = self.conv.forward(ctx.conv, of_conv, inputs)
        ctx.norm.moments = ctx.conv.parts, ctx.conv.rows
        return self.norm.forward(ctx.norm, of_norm, [z])

    def backward(self, ctx: RuleContext, params: Tensors, g_y: Tensor) -> tuple[Tangents, Tangents]:
        self._ask(ctx)
        of_conv, of_norm = self._split(params)
        (g_z,), found = self.norm.backward(ctx.norm, of_norm, g_y)
        assert g_z is not None  # always asked for
        into, before = self.conv.backward(ctx.conv, of_conv, g_z)
        return into, [*before, *found]

    def tangent_forward(self, ctx: RuleContext, params: Tensors, d_params: Tangents, d_inputs: Tangents) -> Tensor:
        (of_conv, of_norm), (d_conv, d_norm) = self._split(params), self._split(d_params)
        ctx.z_has_tangent = any(d is not None for d in (*d_conv, *d_inputs))
        if not ctx.z_has_tangent:
            return self.norm.tangent_forward(ctx.norm, of_norm, d_norm, [None])
        ctx.conv.standard = ctx.norm.x, ctx.norm.stat
        zd = self.conv.tangent_forward(ctx.conv, of_conv, d_conv, d_inputs)
        ctx.norm.tangent_parts = ctx.conv.parts
        return self.norm.tangent_forward(ctx.norm, of_norm, d_norm, [zd])

    def tangent_backward(
        self, ctx: RuleContext, params: Tensors, d_params: Tangents, gd_y: Tensor
    ) -> tuple[Tangents, Tangents]:
        self._ask(ctx)
        (of_conv, of_norm), (d_conv, d_norm) = self._split(params), self._split(d_params)
        (gd_z,), found = self.norm.tangent_backward(ctx.norm, of_norm, d_norm, gd_y)
        assert gd_z is not None  # always asked for
        if ctx.z_has_tangent:
            into, before = self.conv.tangent_backward(ctx.conv, of_conv, d_conv, gd_z)
        else:  # the convolution's Jacobian is constant along the direction
            into, before = self.conv.backward(ctx.conv, of_conv, gd_z)
        return into, [*before, *found]

    @staticmethod
    def _split(params: Tangents) -> tuple[list, list]:
        return [params[0]], list(params[1:])

    def _ask(self, ctx: RuleContext) -> None:
        of_conv, of_norm = self._split(ctx.needs_params)  # type: ignore[arg-type]
        ctx.conv.needs_inputs, ctx.conv.needs_params = ctx.needs_inputs, tuple(of_conv)
        # The convolution keeps its adjoint for the tangent rules even where nothing is asked of it now.
        ctx.norm.needs_inputs = (True,)
        ctx.norm.needs_params = tuple(of_norm)
