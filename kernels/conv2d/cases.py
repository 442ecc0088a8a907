"""Sizes at which conv2d is tested."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from ..contract.case import Case, Shape
from .reference import Conv2d


def _case(name: str, x: Shape, outputs: int, kernel: tuple[int, int], **options: Any) -> Case:
    layer = Conv2d(**options)
    params: tuple[Shape, ...] = ((outputs, x[1] // layer.groups, *kernel), (outputs,))
    return Case(
        name,
        layer,
        lambda p, i: F.conv2d(
            i[0], p[0], p[1] if layer.bias else None, layer.stride, layer.padding, layer.dilation, layer.groups
        ),
        params if layer.bias else params[:1],
        (x,),
    )


CASES = [
    _case("3x3, padded, odd image", (3, 2, 7, 5), 3, (3, 3), padding=(1, 1)),
    _case("no padding, no bias", (2, 3, 5, 6), 2, (3, 3), bias=False),
    _case("stride 2, even image, padding 1", (2, 2, 8, 6), 3, (3, 3), stride=(2, 2), padding=(1, 1)),
    _case("stride 3 leaves a remainder", (2, 1, 9, 8), 2, (2, 2), stride=(3, 3)),
    _case("unequal strides and paddings", (2, 2, 6, 9), 3, (3, 5), stride=(1, 2), padding=(0, 2)),
    _case("1x1", (2, 3, 4, 4), 5, (1, 1)),
    _case("1x1, stride 2", (2, 3, 5, 4), 2, (1, 1), stride=(2, 2)),
    _case("5x3", (2, 2, 7, 6), 2, (5, 3), padding=(2, 1)),
    _case("even kernel 4x2", (2, 2, 6, 5), 3, (4, 2), padding=(2, 1)),
    _case("dilation 2", (2, 2, 8, 7), 3, (3, 3), padding=(2, 2), dilation=(2, 2)),
    _case("unequal dilation, stride 2", (2, 2, 9, 9), 2, (3, 2), stride=(2, 1), padding=(1, 1), dilation=(2, 3)),
    _case("two groups", (2, 4, 5, 5), 6, (3, 3), padding=(1, 1), groups=2),
    _case("depthwise, no bias", (2, 3, 5, 4), 3, (3, 3), padding=(1, 1), groups=3, bias=False),
    _case("one sample, kernel as large as the image", (1, 2, 4, 3), 3, (4, 3)),
    _case("one pixel under padding", (3, 2, 1, 1), 2, (3, 3), padding=(1, 1)),
    _case("1x1 on one pixel that only padding meets", (3, 9, 1, 1), 10, (1, 1), stride=(3, 3), padding=(1, 1)),
    _case("1x1 on one pixel", (3, 9, 1, 1), 10, (1, 1)),
    _case("Conv4-64 at 14x14", (2, 64, 14, 14), 64, (3, 3), padding=(1, 1)),
    _case("first layer of 84x84x3", (1, 3, 84, 84), 8, (3, 3), padding=(1, 1)),
]
