"""The models that the tests meta-train: small, and each with one thing that is special."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import nn


def mlp(activation=nn.Tanh, widths=(3, 6, 5, 2)):
    layers = []
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        layers += [nn.Linear(a, b)] + [activation()] * (i < len(widths) - 2)
    return nn.Sequential(*layers)


def convnet(norm=nn.BatchNorm2d, pool=nn.MaxPool2d, stride=1):
    """Two blocks on 2x9x7 images and a head."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=stride, padding=1), norm(4), nn.ReLU(), pool(2),
        nn.Conv2d(4, 3, (3, 2), padding=(1, 0), bias=False), norm(3), nn.ReLU(),
        nn.AdaptiveAvgPool2d((2, 1)), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip


class Residual(nn.Module):
    """Functional ops, a skip connection, a projection and nested modules."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 3, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh())
        self.skip = nn.Conv2d(3, 3, 1, bias=False)
        self.classifier = nn.Linear(3, 3)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = self.block(x) + self.skip(x)
        x = x + torch.sigmoid(x)
        x = F.avg_pool2d(x, 2)
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Attention(nn.Module):
    """Self-attention over a sequence [n, L, d]."""

    def __init__(self, width=4, outputs=3):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        weights = torch.softmax(q @ k.transpose(-1, -2) / q.size(-1) ** 0.5, dim=-1)
        return self.head((weights @ v).mean(1))


class Gated(nn.Module):
    """A multiplicative gate by chunk, and one by slicing."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 8), nn.Linear(4, 6), nn.Linear(3, 2)

    def forward(self, x):
        value, gate = torch.chunk(self.a(x), 2, -1)
        x = self.b(value * torch.sigmoid(gate))
        return self.head(x[:, :3] * torch.tanh(x[:, 3:]))


class Viewed(nn.Module):
    """Shapes worked out from the input."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 3, 3), nn.Linear(9, 3)

    def forward(self, x):
        x = torch.tanh(self.conv(x))
        n, c, h, w = x.shape
        x = x.view(n, c, h * w)[:, :, :3]
        return self.head(x.reshape(x.size(0), -1))


class Buffered(nn.Module):
    """Input normalised by buffers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.1, -0.2, 0.3]))
        self.register_buffer("scale", torch.tensor(0.7))
        self.net = mlp(nn.GELU)

    def forward(self, x):
        return self.net((x - self.mean) * self.scale)


class Tied(nn.Module):
    """One weight used twice, and one layer called twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 3), nn.Linear(3, 3, bias=False), nn.Linear(3, 2)
        self.b.weight = self.a.weight

    def forward(self, x):
        x = torch.tanh(self.b(torch.tanh(self.a(x))))
        return self.head(torch.tanh(self.a(x)))


class Repeated(nn.Module):
    """A layer called three times, behind another one."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.head = nn.Linear(3, 7), nn.Linear(7, 7), nn.Linear(7, 2)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        for _ in range(3):
            h = torch.tanh(self.again(h))
        return self.head(h)


class Direct(nn.Module):
    """Parameters without a layer: a vector, a matrix and a scalar."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.randn(3))
        self.weight = nn.Parameter(0.5 * torch.randn(3, 4))
        self.temperature = nn.Parameter(torch.tensor(1.3))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = torch.tanh((x + self.shift) @ self.weight) * self.temperature
        return self.head(x)


class Functional(nn.Module):
    """The functional forms, with parameters of the module's own."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(0.4 * torch.randn(3, 2, 3, 3))
        self.bias = nn.Parameter(torch.zeros(3))
        self.weight = nn.Parameter(0.4 * torch.randn(3, 3))

    def forward(self, x):
        x = F.leaky_relu(F.conv2d(x, self.kernel, self.bias, stride=2, padding=1), 0.1)
        x = F.max_pool2d(x, kernel_size=2, stride=1)
        return F.linear(F.gelu(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1)), self.weight)


class Unused(nn.Module):
    """A parameter that the forward pass never reads."""

    def __init__(self):
        super().__init__()
        self.net, self.spare = mlp(), nn.Linear(2, 2)

    def forward(self, x):
        return self.net(x)


class Embedded(nn.Module):
    """ANIL's shape: a body with batch norm and a named head."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
        self.norm = nn.LayerNorm(24)
        self.classifier = nn.Linear(24, 3)

    def forward(self, x):
        return self.classifier(self.norm(self.body(x)))


class Recurrent(nn.Module):
    """A loop over a sequence whose length is known beforehand."""

    def __init__(self, length=3):
        super().__init__()
        self.cell, self.head, self.length = nn.Linear(6, 4), nn.Linear(4, 3), length

    def forward(self, x):
        state = torch.zeros_like(x[:, 0].sum(-1, keepdim=True)).expand(-1, 4)
        for t in range(self.length):
            state = torch.tanh(self.cell(torch.cat([x[:, t, :2], state], dim=-1)))
        return self.head(state)


class Scaled(nn.Module):
    """A learned loss."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, outputs, targets):
        return self.scale * F.cross_entropy(outputs, targets)
