"""Small modules and losses that the source of a random program names."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Residual(nn.Module):
    """``x + inner(x)``."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Twice(nn.Module):
    """One layer that is called twice, with a function in between."""

    def __init__(self, layer: nn.Module, between: nn.Module) -> None:
        super().__init__()
        self.layer, self.between = layer, between

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.between(self.layer(x)))


class Tied(nn.Module):
    """Two layers that share a weight, and with ``turned`` one that reads it transposed."""

    def __init__(self, width: int, hidden: int, turned: bool) -> None:
        super().__init__()
        self.first = nn.Linear(width, hidden if turned else width)
        self.second = None if turned else nn.Linear(width, width, bias=False)
        if self.second is not None:
            self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return h @ self.first.weight if self.second is None else self.second(h)


class Frozen(nn.Module):
    """A part that runs under ``no_grad``."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.inner(x)


class Gate(nn.Module):
    """A gate by chunk."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.both = nn.Linear(width, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.both(x).chunk(2, dim=-1)
        return value * torch.sigmoid(gate)


class Cosine(nn.Module):
    """A cosine layer with a temperature: expressions of parameters alone."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(outputs, width)), nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale.exp() * F.linear(F.normalize(x + 0.1, dim=-1), F.normalize(self.weight, dim=-1))


class Shifted(nn.Module):
    """Parameters and a buffer without a layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shift, self.scale = nn.Parameter(0.3 * torch.randn(width)), nn.Parameter(torch.tensor(1.2))
        self.register_buffer("offset", torch.linspace(-0.5, 0.5, width))

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.shift - self.offset) * F.softplus(self.scale)


class SumOf(nn.Module):
    """The sum of two branches that end in equal shapes."""

    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


def log_cosh(outputs: Tensor, targets: Tensor) -> Tensor:
    return torch.log(torch.cosh(outputs - targets)).mean()


def half_sum(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (outputs - targets).square().sum() / len(outputs)


def smoothed(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, label_smoothing=0.1)


def focal(outputs: Tensor, targets: Tensor) -> Tensor:
    p = torch.softmax(outputs, -1).gather(1, targets[:, None])
    return -((1 - p) ** 2 * p.log()).mean()
