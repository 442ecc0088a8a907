"""A linear layer as a 1x1 convolution of images of one pixel."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..contract.layer import Layer, RuleContext, Tangents, Tensors
from ..conv2d import Conv2d
from ..conv2d.kernel import TritonConv2d
from .reference import Linear


@dataclass(frozen=True)
class TritonLinear(Layer):
    """The rules of ``Linear``: samples and all axes between them and the features are the samples of a convolution."""

    options: Linear
    precision: str = "float32"
    kind = "linear"

    @property
    def convolution(self) -> TritonConv2d:
        """The layer that does the work."""
        return TritonConv2d(Conv2d(bias=self.options.bias), self.precision)

    def forward(self, ctx: RuleContext, params: Tensors, inputs: Tensors, constants: Tensors = ()) -> Tensor:
        ctx.lead = inputs[0].shape[:-1]
        return self._leave(ctx, self.convolution.forward(ctx, _images(params), [self._enter(inputs[0])]))

    def backward(self, ctx: RuleContext, params: Tensors, g_y: Tensor) -> tuple[Tangents, Tangents]:
        return self._adjoints(ctx, *self.convolution.backward(ctx, _images(params), self._enter(g_y)))

    def tangent_forward(self, ctx: RuleContext, params: Tensors, d_params: Tangents, d_inputs: Tangents) -> Tensor:
        entered = [None if d_inputs[0] is None else self._enter(d_inputs[0])]
        return self._leave(ctx, self.convolution.tangent_forward(ctx, _images(params), _images(d_params), entered))

    def tangent_backward(
        self, ctx: RuleContext, params: Tensors, d_params: Tangents, gd_y: Tensor
    ) -> tuple[Tangents, Tangents]:
        found = self.convolution.tangent_backward(ctx, _images(params), _images(d_params), self._enter(gd_y))
        return self._adjoints(ctx, *found)

    @staticmethod
    def _enter(x: Tensor) -> Tensor:
        return x.flatten(1, -2)[..., None, None]

    @staticmethod
    def _leave(ctx: RuleContext, y: Tensor) -> Tensor:
        return y.reshape(*ctx.lead, y.shape[2])

    def _adjoints(self, ctx: RuleContext, into: Tangents, found: Tangents) -> tuple[Tangents, Tangents]:
        weight = found[0]
        rest = [None if weight is None else weight[:, :, 0, 0], *found[1:]]
        return (None if into[0] is None else self._leave(ctx, into[0]),), rest


def _images(params: Tangents) -> list:
    """Weights ``[T,O,I]`` as ``[T,O,1,1,I]``; a bias stays."""
    weight = params[0]
    return [None if weight is None else weight[:, :, None, None], *params[1:]]


def lower(layer: Linear, precision: str) -> TritonLinear:
    """The rules of ``layer`` in Triton."""
    return TritonLinear(layer, precision)
