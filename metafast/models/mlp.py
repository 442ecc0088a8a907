"""The multilayer perceptron of sinusoid regression."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn


def mlp(inputs: int = 1, outputs: int = 1, hidden: tuple[int, ...] = (40, 40), seed: int = 0) -> nn.Sequential:
    """The sinusoid regressor of Finn et al. 2017: ReLU layers, ``[n, inputs] -> [n, outputs]``.

    Weights come from a normal distribution with deviation 0.01, cut at two deviations, and biases are zero, as in
    the paper's code. The initial values depend on ``seed`` alone.
    """
    generator = torch.Generator().manual_seed(seed)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    width = inputs
    for i, units in enumerate(hidden, start=1):
        layers[f"hidden{i}"] = nn.Linear(width, units)
        layers[f"relu{i}"] = nn.ReLU()
        width = units
    layers["head"] = nn.Linear(width, outputs)
    for layer in layers.values():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02, generator=generator)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(layers)
