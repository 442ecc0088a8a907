"""Layers of torch.nn and functions of torch.nn.functional as they are used."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from front_door.case import CLASSES, Table, images, samples, sequences
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

CASES = Table()
volumes, signals = samples(2, 4, 4, 4), samples(2, 9)


class Recurrent(nn.Module):
    """The last state of a recurrent network."""

    def __init__(self, kind, **options):
        super().__init__()
        self.net = kind(8, 5, batch_first=True, **options)
        self.head = nn.Linear(5 * (1 + bool(options.get("bidirectional"))), CLASSES)

    def forward(self, x):
        out, _ = self.net(x)
        return self.head(out[:, -1])


for kind in (nn.RNN, nn.LSTM, nn.GRU):
    CASES.one(f"{kind.__name__}", lambda kind=kind: Recurrent(kind), sequences)
CASES.one(
    "an LSTM of two layers in both directions", lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True), sequences
)
CASES.one("an LSTM with projections", lambda: Projected(), sequences)


class Projected(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.head = nn.LSTM(8, 6, batch_first=True, proj_size=3), nn.Linear(3, CLASSES)

    def forward(self, x):
        _, (h, _) = self.net(x)
        return self.head(h[-1])


class Cells(nn.Module):
    """A loop over cells, with states that start as parameters."""

    def __init__(self, kind):
        super().__init__()
        self.cell, self.head = kind(8, 5), nn.Linear(5, CLASSES)
        self.start = nn.Parameter(torch.randn(5))

    def forward(self, x):
        h = self.start.expand(x.size(0), -1)
        state = (h, torch.zeros_like(h)) if isinstance(self.cell, nn.LSTMCell) else h
        for step in x.transpose(0, 1):
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


for kind in (nn.RNNCell, nn.LSTMCell, nn.GRUCell):
    CASES.one(f"a loop over a {kind.__name__}", lambda kind=kind: Cells(kind), sequences)


class Attention(nn.Module):
    """Causal attention with the heads unpacked from one projection."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out, self.head = (
            nn.LayerNorm(8),
            nn.Linear(8, 24),
            nn.Linear(8, 8),
            nn.Linear(8, CLASSES),
        )

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, dim=-1))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head((x + self.out(h.transpose(1, 2).flatten(2))).mean(1))


class MultiHead(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True, **options), nn.Linear(8, CLASSES)

    def forward(self, x):
        y, weights = self.attention(x, x, x, need_weights=True)
        return self.head(y[:, 0] * weights.mean(0).diagonal().sum())


class MultiHeadMasked(MultiHead):
    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.size(1), dtype=x.dtype)
        y, _ = self.attention(x, x, x, attn_mask=mask, need_weights=False)
        return self.head(y.mean(1))


CASES.one("causal scaled_dot_product_attention", Attention, sequences)
CASES.one("MultiheadAttention with its weights", MultiHead, sequences)
CASES.one("MultiheadAttention under a mask", MultiHeadMasked, sequences)
CASES.one(
    "a TransformerEncoderLayer without dropout",
    lambda: nn.Sequential(
        nn.TransformerEncoderLayer(8, 2, 16, 0.0, activation="gelu", batch_first=True, norm_first=True),
        nn.Flatten(),
        nn.Linear(32, CLASSES),
    ),
    sequences,
)
CASES.one(
    "a TransformerDecoderLayer",
    lambda: Decoder(),
    sequences,
)


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.query, self.head = nn.Parameter(torch.randn(2, 8)), nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head(self.layer(self.query.expand(len(x), -1, -1), x).mean(1))


def image_net(*layers, width):
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), *layers, nn.Flatten(), nn.Linear(width, CLASSES))


for name, layers, width in [
    ("GroupNorm", lambda: [nn.GroupNorm(2, 4), nn.ReLU()], 144),
    ("InstanceNorm2d with a scale", lambda: [nn.InstanceNorm2d(4, affine=True), nn.Tanh()], 144),
    ("LocalResponseNorm", lambda: [nn.LocalResponseNorm(2)], 144),
    ("BatchNorm2d without a scale", lambda: [nn.BatchNorm2d(4, affine=False), nn.Tanh()], 144),
    ("a strided, dilated, grouped convolution", lambda: [nn.Conv2d(4, 8, 3, 2, 2, 2, groups=2), nn.Tanh()], 72),
    ("reflection padding", lambda: [nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.Tanh()], 144),
    ("circular padding", lambda: [nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), nn.Tanh()], 144),
    ("replicated padding", lambda: [nn.Conv2d(4, 4, 3, padding="same", padding_mode="replicate"), nn.Tanh()], 144),
    ("padding layers", lambda: [nn.ZeroPad2d((1, 0, 2, 1)), nn.ReflectionPad2d(1), nn.Conv2d(4, 2, 3)], 126),
    ("ConvTranspose2d", lambda: [nn.MaxPool2d(2), nn.ConvTranspose2d(4, 2, 3, 2, output_padding=1), nn.Tanh()], 128),
    ("Upsample by nearest and bilinear", lambda: [nn.AvgPool2d(3), nn.Upsample(scale_factor=2),
                                                 nn.Upsample(size=(6, 5), mode="bilinear"), nn.Tanh()], 120),
    ("PixelShuffle and PixelUnshuffle", lambda: [nn.PixelShuffle(2), nn.Tanh(), nn.Conv2d(1, 2, 3, 2, 1),
                                                 nn.PixelUnshuffle(2)], 72),
    ("ChannelShuffle", lambda: [nn.ChannelShuffle(2), nn.Tanh()], 144),
    ("pooling with ceil_mode and without the padding", lambda: [nn.AvgPool2d(3, 2, 1, ceil_mode=True,
                                                                count_include_pad=False), nn.Tanh()], 64),
    ("LPPool2d", lambda: [nn.Softplus(), nn.LPPool2d(2, 2)], 36),
    ("AdaptiveMaxPool2d", lambda: [nn.AdaptiveMaxPool2d((3, 2)), nn.Tanh()], 24),
    ("channels_last", lambda: [nn.Tanh(), ChannelsLast(), nn.Conv2d(4, 2, 3), nn.Tanh()], 32),
    ("a depthwise separable block", lambda: [nn.Conv2d(4, 4, 3, 1, 1, groups=4), nn.BatchNorm2d(4), nn.ReLU6(),
                                             nn.Conv2d(4, 6, 1), nn.Hardswish()], 216),
]:  # fmt: skip
    CASES.one(name, lambda layers=layers, width=width: image_net(*layers(), width=width), images)


class ChannelsLast(nn.Module):
    def forward(self, x):
        return x.to(memory_format=torch.channels_last).contiguous()


class SqueezeExcite(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.down, self.up = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        x = F.silu(self.conv(x))
        gate = torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))
        return self.head((x * gate).mean((2, 3)))


CASES.one("squeeze and excitation", SqueezeExcite, images)


class Interpolated(nn.Module):
    """A small U-Net: the way up is interpolated to the size of the way down."""

    def __init__(self):
        super().__init__()
        self.down, self.deep, self.up = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(6, 2, 1)
        self.head = nn.Linear(72, CLASSES)

    def forward(self, x):
        a = F.elu(self.down(x))
        b = F.elu(self.deep(F.avg_pool2d(a, 2)))
        b = F.interpolate(b, size=a.shape[-2:], mode="bilinear", align_corners=False)
        return self.head(self.up(torch.cat([a, b], dim=1)).flatten(1))


CASES.one("a skip connection over an interpolation", Interpolated, images)
CASES.one(
    "Conv1d, BatchNorm1d, MaxPool1d",
    lambda: nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(4, 3, 2, 2),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(3, CLASSES),
    ),
    signals,
)  # fmt: skip
CASES.one(
    "ConvTranspose1d and F.pad",
    lambda: nn.Sequential(
        nn.ConvTranspose1d(2, 3, 3), nn.ConstantPad1d(1, 0.5), nn.Tanh(), nn.Flatten(), nn.Linear(39, CLASSES)
    ),
    signals,
)
CASES.one(
    "Conv3d, BatchNorm3d, AvgPool3d",
    lambda: nn.Sequential(
        nn.Conv3d(2, 3, 3, padding=1),
        nn.BatchNorm3d(3),
        nn.Tanh(),
        nn.AvgPool3d(2),
        nn.Flatten(),
        nn.Linear(24, CLASSES),
    ),
    volumes,
)

for activation in (nn.PReLU, lambda: nn.PReLU(8), nn.Softplus, nn.SiLU, nn.Hardswish, nn.ELU, nn.SELU, nn.CELU, nn.Mish,
                   nn.GELU,
                   lambda: nn.GELU("tanh"), nn.Hardtanh, nn.LogSigmoid, nn.Softsign, nn.Tanhshrink,
                   nn.Softshrink, lambda: nn.Threshold(0.1, 0.2), lambda: nn.Softmax(1),
                   lambda: nn.LogSoftmax(-1), lambda: nn.Softmin(1), lambda: nn.RMSNorm(8),
                   lambda: nn.LayerNorm(8, elementwise_affine=False), lambda: nn.LeakyReLU(0.3)):  # fmt: skip
    CASES.one(
        f"the activation {activation()}",
        lambda activation=activation: nn.Sequential(nn.Linear(8, 8), activation(), nn.Linear(8, CLASSES)),
    )
CASES.one("GLU", lambda: nn.Sequential(nn.Linear(8, 16), nn.GLU(), nn.Linear(8, CLASSES)))
CASES.one("log_softmax with nll_loss", lambda: nn.Sequential(nn.Linear(8, CLASSES), nn.LogSoftmax(1)), loss=F.nll_loss)


class TwoLegs(nn.Module):
    """Bilinear and the similarities of two branches."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.mix = nn.Linear(8, 4), nn.Linear(8, 4), nn.Bilinear(4, 4, CLASSES)
        self.similarity, self.distance = nn.CosineSimilarity(dim=1), nn.PairwiseDistance()

    def forward(self, x):
        a, b = self.a(x), torch.tanh(self.b(x))
        return self.mix(a, b) * self.similarity(a, b)[:, None] + self.distance(a, b)[:, None]


CASES.one("Bilinear, CosineSimilarity and PairwiseDistance", TwoLegs)


class Prototypes(nn.Module):
    """Distances to learned prototypes, and a log of a sum of exponentials over components."""

    def __init__(self):
        super().__init__()
        self.body, self.centres = nn.Linear(8, 4), nn.Parameter(torch.randn(2 * CLASSES, 4))

    def forward(self, x):
        near = -(torch.tanh(self.body(x))[:, None] - self.centres).square().sum(-1)
        return torch.logsumexp(near.unflatten(1, (CLASSES, 2)), dim=-1)


CASES.one("distances to prototypes", Prototypes)


class Residuals(nn.Module):
    """A block that is called three times, in one line."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        for _ in range(3):
            x = x + self.block(x)
        return self.head(x)


CASES.one("one block called three times", Residuals)


class ByCdist(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.centres = nn.Linear(8, 4), nn.Parameter(torch.randn(CLASSES, 4))

    def forward(self, x):
        return -torch.cdist(torch.tanh(self.body(x)), self.centres)


# torch has no second derivative of these two.
FIRST_ORDER = {"options": {"first_order": True}, "truth": {"first_order": True}}
CASES.one("cdist at first order", ByCdist, **FIRST_ORDER)
CASES.one("cdist at second order", ByCdist, refused=("layers.py", "return -torch.cdist(", "second"))
for suffix, settings in [("first", FIRST_ORDER), ("second", {"refused": ("ardsigmoid", "second")})]:
    CASES.one(
        f"Hardsigmoid at {suffix} order",
        lambda: nn.Sequential(nn.Linear(8, 8), nn.Hardsigmoid(), nn.Linear(8, CLASSES)),
        **settings,
    )


class Packed(nn.Module):
    """Sequences of known lengths, packed."""

    def __init__(self):
        super().__init__()
        self.net, self.head = nn.GRU(8, 5, batch_first=True), nn.Linear(5, CLASSES)

    def forward(self, x):
        lengths = torch.arange(len(x)).remainder(3) + 2
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.head(self.net(packed)[1][-1])


class Transformed(nn.Module):
    """A spatial transformer; torch has no second derivative of its sampling."""

    def __init__(self):
        super().__init__()
        self.place, self.conv, self.head = nn.Linear(72, 6), nn.Conv2d(2, 2, 3), nn.Linear(32, CLASSES)

    def forward(self, x):
        theta = 0.1 * self.place(x.flatten(1)).view(-1, 2, 3) + torch.eye(2, 3, dtype=x.dtype)
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        return self.head(torch.tanh(self.conv(F.grid_sample(x, grid, align_corners=False))).flatten(1))


CASES.one("a packed GRU", Packed, sequences, may_be_refused=True)
CASES.one("a spatial transformer at first order", Transformed, images, **FIRST_ORDER)


def normed(norm):
    net = nn.Sequential(nn.Linear(8, 8), norm, nn.Tanh(), nn.Linear(8, CLASSES))
    for part in (norm.running_mean, norm.running_var):
        if part is not None:
            part.uniform_(0.5, 1.5)
    return net


class FunctionalNorms(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.scale, self.head = nn.Linear(8, 8), nn.Parameter(torch.rand(8) + 0.5), nn.Linear(8, CLASSES)

    def forward(self, x):
        h = F.batch_norm(self.body(x), None, None, self.scale, training=True)
        h = F.layer_norm(h, (8,), self.scale) + F.group_norm(h, 2)
        return self.head(torch.tanh(h))


CASES.one("BatchNorm in training", lambda: normed(nn.BatchNorm1d(8)))
CASES.one("BatchNorm in evaluation", lambda: normed(nn.BatchNorm1d(8)).eval())
CASES.one("BatchNorm without statistics", lambda: normed(nn.BatchNorm1d(8, track_running_stats=False)))
CASES.one("BatchNorm with a cumulative average", lambda: normed(nn.BatchNorm1d(8, momentum=None)))
CASES.one("norms as functions", FunctionalNorms)
