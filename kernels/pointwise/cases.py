"""Sizes at which the elementwise layers are tested."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contract.case import Case, Shape
from ..contract.layer import Layer
from .reference import GELU, LeakyReLU, ReLU, Sigmoid, Tanh


def _case(name: str, layer: Layer, function: Callable[[Tensor], Tensor], x: Shape) -> Case:
    return Case(name, layer, lambda p, i: function(i[0]), (), (x,))


CASES = [
    _case("image", ReLU(), torch.relu, (2, 3, 4, 5)),
    _case("one sample", ReLU(), torch.relu, (1, 3)),
    _case("hidden layer", ReLU(), torch.relu, (10, 40)),
    _case("default slope", LeakyReLU(), F.leaky_relu, (5, 7)),
    _case("slope 0.2", LeakyReLU(0.2), lambda x: F.leaky_relu(x, 0.2), (2, 3, 4)),
    _case("negative slope", LeakyReLU(-0.5), lambda x: F.leaky_relu(x, -0.5), (5, 7)),
    _case("vector", Tanh(), torch.tanh, (5, 7)),
    _case("image", Tanh(), torch.tanh, (2, 3, 4, 5)),
    _case("vector", Sigmoid(), torch.sigmoid, (5, 7)),
    _case("one sample", Sigmoid(), torch.sigmoid, (1, 3)),
    _case("vector", GELU(), F.gelu, (5, 7)),
    _case("image", GELU(), F.gelu, (2, 3, 4, 5)),
]
