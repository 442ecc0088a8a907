"""Python that is computed with shapes."""

from __future__ import annotations

import math
import operator
from functools import reduce

import torch
import torch.nn.functional as F
from front_door.case import CLASSES, Net, Table, images, sequences
from torch import nn

CASES = Table()


@CASES.forward()
def zeros_of_the_number_of_samples(net, x):
    assert x.shape[1] == 8
    positions = net.table(torch.arange(x.size(1)))
    return net.head(torch.tanh(net.body(x) + torch.zeros(x.size(0), 8, dtype=x.dtype) + positions.mean(0)))


@CASES.forward()
def a_column_of_ones(net, x):
    with_bias = torch.cat([net.body(x), torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    return net.head(torch.tanh(with_bias[:, 1:]) * with_bias[:, -1:])


@CASES.forward(images)
def products_of_sizes(net, x):
    total = 1
    for size in x.size()[1:]:
        total *= size
    flat = x.view(*x.shape[:1], total)
    return net.head(torch.tanh(flat[:, : total // 9] * math.sqrt(total)))


@CASES.forward(images)
def reduce_over_a_shape(net, x):
    features = reduce(operator.mul, x.shape[1:], 1)
    return net.head(x.reshape(-1, features)[:, -8:])


@CASES.forward(sequences)
def zip_over_unbind(net, x):
    total = 0
    for i, (step, weight) in enumerate(zip(x.unbind(1), net.matrix.unbind(0), strict=False)):
        total = total + torch.tanh(net.body(step) * weight) / (i + 1)
    return net.head(total)


@CASES.forward(sequences)
def a_loop_over_the_time_axis(net, x):
    state = x.new_zeros(x.size(0), 8)
    for t in range(x.shape[1]):
        state = torch.tanh(net.body(x[:, t]) + net.second(state))
    return net.head(state)


@CASES.forward(sequences)
def a_list_of_chunks(net, x):
    parts = [torch.tanh(part).sum(-1, keepdim=True) for part in net.body(x).chunk(4, dim=-1)]
    return net.head(torch.cat(parts * 2, dim=-1).amax(1))


@CASES.forward(sequences)
def positions_by_arange(net, x):
    positions = torch.arange(x.size(1), device=x.device).unsqueeze(0).expand(x.size(0), -1)
    return net.head(torch.tanh(net.body(x) + net.table(positions)).mean(1))


@CASES.forward(sequences)
def sinusoidal_positions(net, x):
    _, length, width = x.shape
    rate = torch.exp(torch.arange(0, width, 2, dtype=x.dtype) * (-math.log(100.0) / width))
    angle = torch.arange(length, dtype=x.dtype)[:, None] * rate
    encoding = torch.zeros(length, width, dtype=x.dtype)
    encoding[:, 0::2], encoding[:, 1::2] = angle.sin(), angle.cos()
    return net.head(torch.tanh(net.body(x + encoding)).mean(1))


@CASES.forward(sequences)
def a_causal_mask_by_triu(net, x):
    length = x.size(1)
    mask = torch.triu(torch.full((length, length), float("-inf"), dtype=x.dtype), diagonal=1)
    scores = net.body(x) @ net.second(x).transpose(-2, -1) / x.size(-1) ** 0.5
    return net.head((torch.softmax(scores + mask, dim=-1) @ x).mean(1))


@CASES.forward(images)
def a_branch_on_the_number_of_axes(net, x):
    if x.dim() == 4 and x.shape[-1] == x.shape[-2]:
        x = x.flatten(2).mean(1)
    elif x.ndim == 2:
        x = x * 100
    return net.head(torch.tanh(net.body(x[..., :8])))


@CASES.forward()
def a_shape_as_a_number(net, x):
    return net.head(torch.tanh(net.body(x) + x.size(1)) / x.numel() * x.shape[0])


@CASES.forward(images)
def pooling_by_the_size_of_the_image(net, x):
    pooled = F.avg_pool2d(x, x.shape[2:]).flatten(1)
    largest = F.max_pool2d(x, x.size(2)).flatten(1)
    return net.head(torch.cat([pooled, largest] * 2, dim=1))


@CASES.forward()
def the_mean_over_the_samples(net, x):
    h = net.body(x)
    return net.head(torch.tanh(h - h.sum(0) / x.shape[0]))


@CASES.forward()
def distances_between_samples(net, x):
    h = torch.tanh(net.body(x))
    near = torch.softmax(-(h[:, None] - h).square().sum(-1), dim=-1)
    return net.head(near @ h)


@CASES.forward()
def leave_one_out_over_the_samples(net, x):
    h = net.body(x)
    other = h.roll(1, dims=0)
    return net.head(torch.tanh(h * other + h.flip(0)))


@CASES.forward(images)
def patches_by_unfold(net, x):
    n = x.shape[0]
    patches = x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(n, -1, 8)
    return net.head(torch.tanh(net.body(patches)).mean(1))


@CASES.forward(images)
def patches_by_functional_unfold(net, x):
    patches = F.unfold(x, 2, stride=2).transpose(1, 2)
    return net.head(torch.tanh(net.body(patches)).amax(1))


@CASES.forward(sequences)
def movedim_flatten_unflatten(net, x):
    h = net.body(x).unflatten(-1, (2, 4)).movedim(2, 1)
    return net.head(torch.tanh(h.flatten(2).mean(1).unflatten(1, (4, 4)).repeat_interleave(2, dim=2).sum(1)))


class Reshapes(nn.Module):
    """What shape the hidden layer has is kept in an attribute of the module."""

    def __init__(self, shape=(2, 4)):
        super().__init__()
        self.shape = list(shape)
        self.body, self.head = nn.Linear(8, math.prod(shape)), nn.Linear(shape[1], CLASSES)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)).view(-1, *self.shape).mean(dim=1))


CASES.one("a shape in an attribute", Reshapes)


@CASES.forward(base=Net)
def the_last_samples_by_negative_indices(net, x):
    h = net.body(x)
    return net.head(torch.tanh(h)) + net.head(h[-1:]) - net.head(h[[0, -1]]).mean(0)


@CASES.forward()
def whitened_by_the_samples(net, x):
    h = net.body(x)
    return net.head(torch.tanh((h - h.mean(0)) / (h.std(0) + 1e-3)) + h.var(0, unbiased=False))


@CASES.forward()
def numbers_made_of_a_shape_tensor(net, x):
    count = torch.tensor(x.shape).prod().item()
    return net.head(torch.tanh(net.body(x)) * (10 / count) + torch.arange(len(x), dtype=x.dtype)[:, None])


@CASES.forward()
def moved_to_where_the_weights_are(net, x):
    x = x.to(net.body.weight.device, net.body.weight.dtype).contiguous().clone()
    return net.head(torch.tanh(net.body(x.cpu())).type_as(x))
