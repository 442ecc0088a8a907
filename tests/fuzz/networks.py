"""Draws networks: perceptrons, convolutional networks and sequence models with every option of their layers."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable

import torch
from fuzz.sample import NAMES
from torch import Tensor

Shape = tuple[int, ...]
Maker = Callable[[random.Random, Shape], str]

NATIVE = ("nn.ReLU()", "nn.Tanh()", "nn.Sigmoid()", "nn.GELU()", "nn.LeakyReLU()", "nn.LeakyReLU(0.3)")
DERIVED = (
    "nn.SiLU()", "nn.ELU()", "nn.Softplus()", "nn.PReLU()", "nn.Mish()", "nn.Softsign()", "nn.CELU(0.7)", "nn.SELU()",
    "nn.Hardtanh(-2, 2)", "nn.GELU('tanh')", "Call(torch.sin)", "Call(lambda x: x * torch.sigmoid(x))",
    "Call(lambda x: torch.where(x > 0, x, 0.2 * x))", "Call(lambda x: x + (torch.tanh(x) - x).detach())",
    "Call(lambda x: x.clamp(-1.5, 1.5) + 0.1 * x)", "Call(lambda x: x / (1 + x.abs()))",
    "Call(lambda x: 0.5 * x + x.new_ones(x.shape[1:]))",
)  # fmt: skip
MIXING = (
    "Call(lambda x: torch.softmax(x, -1))", "Call(lambda x: F.normalize(x + 0.1, dim=-1))",
    "Call(lambda x: x - x.mean(-1, keepdim=True))", "Call(lambda x: torch.cat([x, x.sin()], -1))",
    "Call(lambda x: x[..., ::2] + x[..., :1])", "Call(lambda x: x.flip(-1) * 0.5 + x)", "Call(lambda x: x.cumsum(-1))",
    "Call(lambda x: x.logsumexp(-1, keepdim=True) + x)", "Call(lambda x: x.view(len(x), -1))",
    "nn.Identity()", "nn.Dropout(0.5).eval()",
)  # fmt: skip

ODD = ("Call(", "GroupNorm", "InstanceNorm", "Gate(", "Cosine(", "Shifted(", "Frozen(", "padding_mode", *DERIVED)
"""What has no rules of its own; the curvature of a network without any of it comes from rules alone."""


def activation(dice: random.Random, shape: Shape) -> str:
    return dice.choice(NATIVE if dice.random() < 0.75 else DERIVED)


def width(dice: random.Random) -> int:
    return dice.choice([1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 17, 33] if dice.random() < 0.8 else [3, 5])


def linear(dice: random.Random, shape: Shape) -> str:
    return f"nn.Linear({shape[-1]}, {width(dice)}, bias={dice.random() < 0.8})"


def layer_norm(dice: random.Random, shape: Shape) -> str:
    over = list(shape) if len(shape) > 1 and dice.random() < 0.5 else [shape[-1]]
    if math.prod(over) == 1:
        return "nn.Identity()"  # the norm of one number is a constant: what follows would stand on a kink
    how = dice.choice(["", ", elementwise_affine=False", ", bias=False"])
    return f"nn.LayerNorm({over}, eps={dice.choice([1e-5, 1e-3, 0.1])}{how})"


def batch_norm(dice: random.Random, shape: Shape) -> str:
    axes = {1: 1, 2: 1, 3: 2}[len(shape)]
    return f"nn.BatchNorm{axes}d({shape[0]}, eps={dice.choice([1e-5, 1e-3, 0.1])}, affine={dice.random() < 0.85})"


def residual(dice: random.Random, shape: Shape) -> str:
    d, hidden = shape[-1], width(dice)
    inner = f"nn.Linear({d}, {hidden}), {activation(dice, shape)}, nn.Linear({hidden}, {d})"
    return f"Residual({dice.choice([f'nn.Linear({d}, {d})', f'nn.Sequential({inner})'])})"


def twice(dice: random.Random, shape: Shape) -> str:
    return f"Twice(nn.Linear({shape[-1]}, {shape[-1]}), {activation(dice, shape)})"


def tied(dice: random.Random, shape: Shape) -> str:
    return f"Tied({shape[-1]}, {width(dice)}, {dice.random() < 0.5})"


def branches(dice: random.Random, shape: Shape) -> str:
    d, w = shape[-1], width(dice)
    return f"SumOf(nn.Linear({d}, {w}), nn.Sequential({activation(dice, shape)}, nn.Linear({d}, {w}, bias=False)))"


def parameters(dice: random.Random, shape: Shape) -> str:
    d, w = shape[-1], width(dice)
    return dice.choice([f"Gate({d}, {w})", f"Cosine({d}, {w})", f"Shifted({d})", f"Frozen(nn.Linear({d}, {w}))"])


def in_place(dice: random.Random, shape: Shape) -> str:
    return dice.choice(["nn.ReLU(inplace=True)", "nn.LeakyReLU(0.2, inplace=True)", "Call(torch.relu_)"])


def mixing(dice: random.Random, shape: Shape) -> str:
    return dice.choice(MIXING)


def convolution(dice: random.Random, shape: Shape) -> str:
    channels, out = shape[0], dice.randint(1, 5)
    groups = dice.choice([1, 1, 1, channels])
    kernel = (dice.randint(1, 3), dice.randint(1, 3)) if dice.random() < 0.5 else (3, 3)
    stride, dilation = dice.choice([1, 1, 2, (1, 2), 3]), dice.choice([1, 1, 1, 2, (2, 1)])
    padding = dice.choice([0, 1, 1, (1, 0), 2])
    mode = ", padding_mode='circular'" if padding == 1 and min(shape[1:]) > 1 and dice.random() < 0.1 else ""
    bias = dice.random() < 0.7
    return (
        f"nn.Conv2d({channels}, {out * groups if groups > 1 else out}, {kernel}, stride={stride}, padding={padding}, "
        f"dilation={dilation}, groups={groups}, bias={bias}{mode})"
    )


def pooling(dice: random.Random, shape: Shape) -> str:
    kernel, stride, padding = (
        dice.choice([2, 3, (2, 1), (1, 3)]),
        dice.choice([1, 2, 2, (2, 1)]),
        dice.choice([0, 0, 1]),
    )
    padding = 0 if isinstance(kernel, tuple) else padding
    ceil = dice.random() < 0.2
    return dice.choice([
        f"nn.MaxPool2d({kernel}, {stride}, {padding}, ceil_mode={ceil})",
        f"nn.AvgPool2d({kernel}, {stride}, {padding}, ceil_mode={ceil}, count_include_pad={dice.random() < 0.5})",
        f"nn.AdaptiveAvgPool2d(({dice.randint(1, 3)}, {dice.randint(1, 3)}))",
    ])  # fmt: skip


def image_norm(dice: random.Random, shape: Shape) -> str:
    channels = shape[0]
    if math.prod(shape[1:]) == 1:
        return layer_norm(dice, shape)
    return dice.choice([f"nn.GroupNorm({dice.choice([1, channels])}, {channels}, eps=0.01)", layer_norm(dice, shape),
                        f"nn.InstanceNorm2d({channels}, eps=0.01, affine={dice.random() < 0.5})"])  # fmt: skip


def image_block(dice: random.Random, shape: Shape) -> str:
    c = shape[0]
    same = f"nn.Conv2d({c}, {c}, 3, padding=1, bias={dice.random() < 0.5})"
    between = activation(dice, shape)
    return dice.choice([f"Residual(nn.Sequential({same}, {between}))", f"Residual({same})", f"Twice({same}, {between})",
                        f"SumOf({same}, nn.Conv2d({c}, {c}, 1))"])  # fmt: skip


VECTOR: list[tuple[Maker, float]] = [
    (linear, 5), (activation, 4), (in_place, 0.5), (layer_norm, 1), (batch_norm, 0.8), (residual, 1), (twice, 0.7),
    (tied, 0.5), (branches, 0.6), (parameters, 0.7), (mixing, 0.7),
]  # fmt: skip
IMAGE: list[tuple[Maker, float]] = [
    (convolution, 5), (activation, 3), (in_place, 0.5), (batch_norm, 1.2), (pooling, 1.5), (image_norm, 1),
    (image_block, 1),
]  # fmt: skip
SEQUENCE: list[tuple[Maker, float]] = [(linear, 4), (activation, 3), (layer_norm, 1), (residual, 1), (mixing, 0.5)]


class Growing:
    """A network that grows layer by layer; a layer that its input does not fit is left out."""

    def __init__(self, dice: random.Random, shape: Shape) -> None:
        self.dice, self.layers = dice, list[str]()
        self.plain = dice.random() < 0.4
        self.x: Tensor = torch.randn(5, *shape)

    @property
    def shape(self) -> Shape:
        return tuple(self.x.shape[1:])

    def add(self, source: str) -> None:
        """Adds a layer where it takes what there is, and does not make it empty or large."""
        if self.plain and any(part in source for part in ODD):
            return
        # Neither the caller's input nor what another layer has saved may be written to.
        free = self.layers and self.layers[-1].startswith(("nn.Linear", "nn.Conv2d", "nn.BatchNorm"))
        if not free and ("inplace" in source or "relu_" in source):
            return
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                y = eval(source, dict(NAMES))(self.x)
        except (RuntimeError, ValueError, IndexError):
            return
        if y.dim() > 1 and y.shape[0] == len(self.x) and 0 < y[0].numel() <= 400 and bool(y.isfinite().all()):
            self.x = y
            self.layers.append(source)

    def add_from(self, table: list[tuple[Maker, float]], count: int) -> None:
        """Adds ``count`` layers of a table, by their weights."""
        makers, weights = zip(*table, strict=True)
        for maker in self.dice.choices(makers, weights, k=count):
            self.add(maker(self.dice, self.shape))


def network(dice: random.Random) -> tuple[str, Shape, int]:
    """Draws a network and returns its source, the shape of a sample and the number of outputs."""
    kind = dice.choices(["vector", "image", "sequence"], [5, 4, 1])[0]
    if kind == "image":
        shape: Shape = (dice.randint(1, 3), dice.randint(2, 9), dice.randint(2, 9))
        growing = Growing(dice, shape)
        growing.add_from(IMAGE, dice.randint(1, 6))
        if dice.random() < 0.2:
            growing.add("Call(lambda x: x.mean((2, 3)))")
        growing.add(
            dice.choice(["nn.Flatten()", "Call(lambda x: x.view(x.size(0), -1))", "Call(lambda x: x.flatten(1))"])
        )
    elif kind == "sequence":
        shape = (dice.randint(1, 4), dice.randint(2, 6))
        growing = Growing(dice, shape)
        growing.add_from(SEQUENCE, dice.randint(1, 3))
        growing.add(dice.choice(["nn.Flatten()", "Call(lambda x: x.mean(1))", "Call(lambda x: x[:, -1])"]))
    else:
        shape = (width(dice),)
        growing = Growing(dice, shape)
    if len(growing.shape) > 1:
        growing.add("nn.Flatten()")
    growing.add_from(VECTOR, dice.randint(1, 6))
    outputs = dice.randint(1, 6)
    growing.add(f"nn.Linear({growing.shape[-1]}, {outputs}, bias={dice.random() < 0.9})")
    return f"nn.Sequential({', '.join(growing.layers)})", shape, outputs
