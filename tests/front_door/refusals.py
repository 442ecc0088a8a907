"""What has no right answer is refused, by an error that names the line."""

from __future__ import annotations

import math
import random
import time

import numpy as np
import torch
import torch.nn.functional as F
from front_door.case import CLASSES, Net, Table, vectors
from torch import nn

import metafast as mf

CASES = Table()


def the_last_differs():
    """All tasks have a positive sum but the last one, whose inputs are small and negative."""
    batch = vectors()
    x, qx = batch.support_x.abs(), batch.query_x.abs()
    x[-1], qx[-1] = -0.3 * x[-1], -0.3 * qx[-1]
    return mf.TaskBatch(x, batch.support_y, qx, batch.query_y)


def refused(line, tasks=the_last_differs, **settings):
    """The case of a forward pass that is refused by an error with this line."""
    return CASES.forward(tasks, refused=("refusals.py", line), **settings)


@refused("if x.sum() > 0:")
def a_branch_on_the_data(net, x):
    if x.sum() > 0:
        return net.head(net.body(x))
    return net.head(net.second(x))


@refused("return net.head(net.body(x) if x.mean().item() > 0 else net.second(x))")
def a_branch_on_an_item(net, x):
    return net.head(net.body(x) if x.mean().item() > 0 else net.second(x))


@refused("level = float(x.max())")
def a_float_of_the_data(net, x):
    level = float(x.max())
    return net.head(torch.tanh(net.body(x) / level))


@refused("first = x.detach().numpy()")
def numpy_of_the_data(net, x):
    first = x.detach().numpy()
    return net.head(torch.tanh(net.body(x) * np.sign(first.sum())))


@refused("scale = np.asarray(x.detach()).max()")
def an_array_of_the_data(net, x):
    scale = np.asarray(x.detach()).max()
    return net.head(torch.tanh(net.body(x)) / float(scale))


@refused("row = x.mean(0).tolist()")
def a_list_of_the_data(net, x):
    row = x.mean(0).tolist()
    return net.head(torch.tanh(net.body(x)) * row[0])


@refused("places = (x[:, 0] > 0).nonzero()[:, 0]")
def nonzero_of_the_data(net, x):
    places = (x[:, 0] > 0).nonzero()[:, 0]
    return net.head(torch.tanh(net.body(x))) + net.head(x[places]).sum(0)


@refused("chosen = x[x[:, 0] > 0.1]")
def samples_chosen_by_a_mask(net, x):
    chosen = x[x[:, 0] > 0.1]
    return net.head(torch.tanh(net.body(x))) + net.second(chosen).sum(0)[:CLASSES]


@refused("for row in torch.unique(x.round()[:, 0]):")
def a_loop_over_unique_values(net, x):
    h = net.body(x)
    for row in torch.unique(x.round()[:, 0]):
        h = h + row
    return net.head(h)


@refused("while h.norm() > 3:")
def a_loop_until_a_value(net, x):
    h = net.body(x)
    while h.norm() > 3:
        h = 0.5 * h
    return net.head(h)


@refused("if torch.isnan(h).any():")
def a_check_that_raises(net, x):
    h = net.body(x)
    if torch.isnan(h).any():
        raise RuntimeError("not a number")
    return net.head(torch.tanh(h))


@refused("if torch.equal(x, x.abs()):")
def a_branch_on_equality(net, x):
    if torch.equal(x, x.abs()):
        return net.head(net.body(x))
    return net.head(net.second(x))


@refused("k = int((x.sum() > 0).long()) + 1")
def an_integer_of_the_data(net, x):
    k = int((x.sum() > 0).long()) + 1
    return net.head(torch.tanh(net.body(x)).topk(8, dim=1).values * k)


@refused("noise = np.random.rand(8)")
def random_numbers_of_numpy(net, x):
    noise = np.random.rand(8)  # noqa: NPY002  (as people write it)
    return net.head(torch.tanh(net.body(x) + torch.from_numpy(noise)))


@CASES.forward(refused=("random",))
def a_coin_of_python(net, x):
    if random.random() < 0.5:
        return net.head(torch.tanh(net.body(x)))
    return net.head(net.body(x))


@refused("x.mul_(2)")
def a_write_to_the_input(net, x):
    x.mul_(2)
    return net.head(torch.tanh(net.body(x)))


@refused('raise ValueError("this network takes 9 features")')
def an_error_of_the_module(net, x):
    if x.shape[1] != 9:
        raise ValueError("this network takes 9 features")
    return net.head(x)


@refused("return net.head(net.body(x)[:, :5])")
def shapes_that_do_not_fit(net, x):
    return net.head(net.body(x)[:, :5])


@refused("net.body.weight.mul_(0.99)")
def a_parameter_written_in_forward(net, x):
    with torch.no_grad():
        net.body.weight.mul_(0.99)
    return net.head(torch.tanh(net.body(x)))


@CASES.module(refused=("first axis",))
def a_module_that_merges_its_samples():
    class Merged(Net):
        def forward(self, x):
            return self.head(x).flatten()

    return Merged()


@refused("x[:, 0] = 0")
def a_write_into_a_slice_of_the_input(net, x):
    x[:, 0] = 0
    return net.head(torch.tanh(net.body(x)))


@refused("if (net.body.weight > 0).any():")
def a_branch_on_a_parameter(net, x):
    if (net.body.weight > 0).any():
        return net.head(net.body(x))
    return net.head(net.second(x))


@refused("h = torch.full_like(x, x.mean())")
def a_tensor_filled_with_a_value(net, x):
    h = torch.full_like(x, x.mean())
    return net.head(torch.tanh(net.body(x)) + net.body(h))


@refused("return net.head(torch.cat([h[:, :k], h[:, k:]], dim=1))")
def a_slice_up_to_a_value(net, x):
    k = (x.sum() > 0).long() + 2
    h = net.body(x)
    return net.head(torch.cat([h[:, :k], h[:, k:]], dim=1))


@refused("return net.head(net.body(x)) * math.sqrt(x.var())")
def math_of_a_value(net, x):
    return net.head(net.body(x)) * math.sqrt(x.var())


@refused("best = max(x[:, 0])")
def the_maximum_by_python(net, x):
    best = max(x[:, 0])
    return net.head(torch.tanh(net.body(x)) * best)


@CASES.forward(the_last_differs, may_be_refused=True)
def repeats_by_values(net, x):
    h = net.body(x)
    counts = (x.mean(0) > 0).long() + 1
    h = h.repeat_interleave(counts, dim=1)[:, :8]
    return net.head(torch.tanh(h))


@refused("kept = torch.masked_select(h, h > 0)")
def masked_select(net, x):
    h = net.body(x)
    kept = torch.masked_select(h, h > 0)
    return net.head(h) + kept.mean()


@refused("hard = F.one_hot((x[:, 0].abs() * 3).long())")
def one_hot_of_unknown_width(net, x):
    hard = F.one_hot((x[:, 0].abs() * 3).long())
    return net.head(torch.tanh(net.body(x))) + hard.sum(1, keepdim=True)


@refused('text = f"{x.mean():.3f}"')
def a_number_in_a_text(net, x):
    text = f"{x.mean():.3f}"
    return net.head(torch.tanh(net.body(x)) * float(text))


@CASES.forward(the_last_differs, refused=("refusals.py", "the seed of torch's generator"))
def a_seed_that_forward_sets(net, x):
    torch.manual_seed(0)
    return net.head(torch.tanh(net.body(x + 0.1 * torch.randn(x.shape, dtype=x.dtype))))


@CASES.forward(the_last_differs, refused=("refusals.py",))
def a_clock(net, x):
    return net.head(torch.tanh(net.body(x))) * (time.perf_counter() % 1)


class Renormalised(nn.Module):
    """An embedding that clips its own weight, in forward."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(20, 6, max_norm=0.5), nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.head(torch.tanh(self.table((x.abs() * 5).long().clamp(max=19)).mean(1)))


CASES.one("an embedding with max_norm", Renormalised, refused=("refusals.py", "self.table("))
