"""The four-block convolutional network of Omniglot and mini-ImageNet."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn


def conv4(
    ways: int,
    *,
    channels: int = 64,
    image: tuple[int, ...] = (1, 28, 28),
    pool: bool = False,
    head_std: float = 1.0,
    blocks: int = 4,
    seed: int = 0,
) -> nn.Sequential:
    """Blocks of 3x3 convolution, batch norm and ReLU under a linear head: ``[n, *image] -> [n, ways]``.

    ``pool=False`` is the Omniglot network of Finn et al. 2017: convolutions of stride 2, then the mean over what
    is left of the image, and a head drawn from ``N(0, head_std^2)``. ``pool=True`` is the other common variant
    (Vinyals et al. 2016): stride 1 and a 2x2 max-pool in each block, then all of the remaining pixels, and a head
    drawn by Xavier's rule, like all convolutions. A convolution has no bias, since the batch norm behind it would
    cancel it; batch norm keeps no running statistics. The initial values depend on ``seed`` alone.

    Raises:
        ValueError: the image is too small for that many poolings.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs, height, width = image
    if pool and min(height, width) < 2**blocks:
        raise ValueError(
            f"{blocks} poolings halve a {height}x{width} image below one pixel; it must be at least "
            f"{2**blocks} pixels wide and high"
        )
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i in range(1, blocks + 1):
        convolution = nn.Conv2d(inputs, channels, 3, stride=1 if pool else 2, padding=1, bias=False)
        nn.init.xavier_uniform_(convolution.weight, generator=generator)
        layers[f"conv{i}"] = convolution
        layers[f"norm{i}"] = nn.BatchNorm2d(channels, eps=1e-3, track_running_stats=False)
        layers[f"relu{i}"] = nn.ReLU()
        if pool:
            layers[f"pool{i}"] = nn.MaxPool2d(2)
            height, width = height // 2, width // 2
        inputs = channels
    if not pool:
        layers["mean"] = nn.AdaptiveAvgPool2d(1)
        height = width = 1
    layers["flatten"] = nn.Flatten()
    head = nn.Linear(channels * height * width, ways)
    if pool:
        nn.init.xavier_uniform_(head.weight, generator=generator)
    else:
        nn.init.normal_(head.weight, std=head_std, generator=generator)
    nn.init.zeros_(head.bias)
    layers["head"] = head
    return nn.Sequential(layers)
