"""Values that are unused, are no floating-point numbers, or are written in place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from front_door.case import CLASSES, Net, Table, images, sequences, small, tokens, vectors
from torch import nn

import metafast as mf

CASES = Table()


@CASES.forward(sequences)
def a_maximum_whose_indices_are_unused(net, x):
    values, _ = net.body(x).max(dim=1)
    net.log = values.norm()
    return net.head(values)


@CASES.forward()
def dead_layers(net, x):
    net.blocks(x)
    net.table(torch.arange(3))
    unused = net.second(x).sum()
    del unused
    return net.head(torch.tanh(net.body(x)))


@CASES.forward()
def where_with_a_mask_of_activations(net, x):
    h = net.body(x)
    keep = h > 0
    return net.head(torch.where(keep, h, 0.1 * h) + h * (h.abs() < 0.5))


@CASES.forward()
def argsort_and_gather(net, x):
    h = net.body(x)
    return net.head(h.gather(1, h.argsort(1)))


@CASES.forward()
def the_largest_four(net, x):
    h = net.body(x)
    values, places = h.topk(4, dim=1)
    return net.head(torch.zeros_like(h).scatter(1, places, torch.tanh(values)))


@CASES.forward()
def one_hot_of_an_argmax(net, x):
    h = net.body(x)
    hard = F.one_hot(h.argmax(-1), 8).to(h.dtype)
    return net.head(torch.tanh(h) * (1 + hard))


@CASES.forward()
def sorted_and_cumulated(net, x):
    ordered, _ = net.body(x).sort(dim=1, descending=True)
    return net.head(torch.softmax(ordered, 1).cumsum(1) + 0.1 * torch.cummax(ordered, 1).values)


@CASES.forward()
def bucketize_into_an_embedding(net, x):
    bins = torch.bucketize(x.mean(1), torch.tensor([-0.3, 0.0, 0.3], dtype=x.dtype))
    return net.head(torch.tanh(net.body(x) + net.table(bins)))


@CASES.forward()
def logic_of_masks(net, x):
    h = net.body(x)
    inside = (h > -0.5) & (h < 0.5) | ~(h.abs() <= 1)
    return net.head(h.masked_fill(inside, 0.0) + inside.sum(1, keepdim=True) / 8)


@CASES.forward()
def a_quantised_activation_through_integers(net, x):
    h = net.body(x)
    level = (h.detach() * 4).round().to(torch.int64).clamp(-8, 7) + 8
    return net.head(torch.tanh(h) + net.table(level % 8).mean(1))


@CASES.forward()
def an_activation_written_in_slices(net, x):
    h = net.body(x)
    h[:, 0] = 0
    h[:, 1:3] *= 2
    h[:, -1] = h[:, 2] + h[:, 3]
    return net.head(torch.tanh(h))


@CASES.forward()
def augmented_assignments(net, x):
    h = net.body(x)
    h += net.second(x)
    h *= 0.5
    h -= h.mean()
    return net.head(torch.tanh(h))


@CASES.forward()
def in_place_methods(net, x):
    h = net.body(x)
    h.masked_fill_(x > 1, 0.3).add_(x, alpha=0.1).sub_(0.1).relu_()
    return net.head(h)


@CASES.forward()
def views_of_views_written_in_place(net, x):
    h = net.body(x)
    square = h.view(-1, 2, 4)
    square.transpose(1, 2)[:, 1:, 0].mul_(3)
    square[:, 1].sub_(net.vector[:4])
    return net.head(torch.tanh(h))


@CASES.forward()
def a_view_written_after_it_was_read(net, x):
    h = net.body(x)
    first = h[:, :4].clone()
    kept = h[:, :4]
    h[:, 0] = 0
    return net.head(torch.tanh(torch.cat([first, kept], dim=1)))


@CASES.forward()
def out_arguments(net, x):
    with torch.no_grad():
        buffer = torch.empty(x.shape[0], 8, dtype=x.dtype)
        torch.mul(x, 2.0, out=buffer)
    return net.head(torch.tanh(net.body(buffer)))


@CASES.forward()
def a_result_filled_row_by_row(net, x):
    out = x.new_empty(x.size(0), CLASSES)
    for i in range(x.size(0)):
        out[i] = net.head(torch.tanh(net.body(x[i])))
    return out


@CASES.forward()
def index_add_and_scatter_add(net, x):
    groups = torch.tensor([0, 1, 0, 2, 1, 0, 2, 2])
    h = torch.tanh(net.body(x))
    sums = torch.zeros(x.size(0), 8, dtype=x.dtype).index_add(1, groups, h)
    return net.head(sums.scatter_add(1, groups.expand(x.size(0), -1), 0.5 * h))


@CASES.forward()
def index_put_by_a_mask(net, x):
    h = net.body(x)
    h[h < 0] = 0.1
    return net.head(h)


class Text(nn.Module):
    """Token ids, an embedding, and the padding left out of the mean."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 6, padding_idx=0), nn.Linear(6, CLASSES)

    def forward(self, ids):
        pad = (ids == 0).unsqueeze(-1)
        e = self.embedding(ids).masked_fill(pad, 0.0)
        return self.head(e.sum(1) / (~pad).sum(1).clamp(min=1))


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(20, 6, mode="mean"), nn.Linear(6, CLASSES)

    def forward(self, ids):
        return self.head(torch.tanh(self.bag(ids)))


class Coded(nn.Module):
    """Ids that came as floating-point numbers, one-hot."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Linear(20, 6, bias=False), nn.Linear(6, CLASSES)

    def forward(self, ids):
        return self.head(torch.tanh(self.embedding(F.one_hot(ids.long(), 20).to(self.head.weight.dtype)).mean(1)))


CASES.one("token ids with a padding mask", Text, tokens())
# torch has no second derivative of it.
CASES.one("an EmbeddingBag", Bag, tokens(), options={"first_order": True}, truth={"first_order": True})
CASES.one("token ids one-hot", Coded, tokens())


@CASES.forward()
def an_embedding_of_numbers_cast_to_ids(net, x):
    ids = (x.abs() * 3).long().clamp(max=7)
    return net.head(torch.tanh(net.table(ids).mean(1) + net.body(x)))


# A row of zeros: the norm's derivative there is not finite, and torch's own is zero.
@CASES.forward()
def normalised_rows_of_zeros(net, x):
    h = torch.relu(net.body(x) * (x[:, :1] > 0))
    return net.head(F.normalize(h, dim=1))


@CASES.forward()
def the_norm_of_rows_of_zeros(net, x):
    h = torch.relu(net.body(x) * (x[:, :1] > 0))
    return net.head(h) / (1 + h.norm(dim=1, keepdim=True))


@CASES.forward()
def cosine_similarity_with_rows_of_zeros(net, x):
    h = torch.relu(net.body(x) * (x[:, :1] > 0))
    return net.head(h) + F.cosine_similarity(h, net.vector.expand_as(h), dim=1)[:, None]


@CASES.forward()
def a_square_root_that_where_protects(net, x):
    h = net.body(x)
    safe = torch.where(h > 0, h, torch.ones_like(h))
    return net.head(torch.where(h > 0, safe.sqrt(), torch.zeros_like(h)))


@CASES.forward(images)
def an_amax_with_ties(net, x):
    h = torch.relu(x.flatten(1)[:, :16].unflatten(1, (8, 2)) - 0.5)
    return net.head(torch.tanh(net.body(h.amax(-1))))


# torch.fft makes complex numbers on the way.
@CASES.forward(sequences, may_be_refused=True)
def the_power_spectrum(net, x):
    return net.head(torch.log1p(torch.fft.rfft(net.body(x), dim=1).abs().square()).mean(1))


@CASES.forward(may_be_refused=True)
def a_complex_rotation(net, x):
    h = torch.view_as_complex(net.body(x).unflatten(1, (4, 2)).contiguous())
    turned = h * torch.polar(torch.ones_like(net.vector[:4]), net.vector[:4])
    return net.head(torch.tanh(torch.view_as_real(turned).flatten(1)))


@CASES.forward()
def numbers_of_buffers_and_of_python(net, x):
    level = net.level.item()
    return net.head(torch.tanh(net.body(x) * level) ** int(level))


@CASES.forward(base=Net)
def a_tensor_made_of_numbers(net, x):
    scale = torch.tensor([1.0, 2.0, 0.5] * 2 + [1.0, 3.0], dtype=x.dtype)
    weights = torch.as_tensor([[i / 8 for i in range(8)]], dtype=x.dtype)
    return net.head(torch.tanh(net.body(x)) * scale + weights)


@CASES.forward()
def one_expert_for_each_sample(net, x):
    choice = F.linear(x, net.matrix).argmax(-1)
    answers = torch.stack([torch.tanh(net.body(x)), torch.relu(net.second(x)), net.blocks(x)])
    return net.head(answers[choice, torch.arange(len(x))])


def ids_from_one() -> mf.TaskBatch:
    """Token ids of which none is zero, so that a zero is no sample."""
    tasks = tokens(8)()
    return mf.TaskBatch(tasks.support_x + 1, tasks.support_y, tasks.query_x + 1, tasks.query_y)


@CASES.forward(ids_from_one)
def ids_that_count_from_one(net, ids):
    places = torch.zeros(len(ids), 8, dtype=net.vector.dtype)
    return net.head(places.scatter_add(1, ids - 1, torch.tanh(net.vector[ids - 1])))


@CASES.forward(ids_from_one)
def the_last_of_a_length(net, ids):
    last = (ids != 0).sum(1) - 1
    h = torch.tanh(net.table(ids - 1))
    return net.head(h.gather(1, last[:, None, None].expand(-1, 1, 8))[:, 0])


@CASES.forward()
def bins_between_the_least_and_the_largest(net, x):
    low, high = x.min(1, keepdim=True).values, x.max(1, keepdim=True).values
    return net.head(torch.tanh(net.body(x)).gather(1, ((x - low) / (high - low) * 7).long()))


@CASES.forward()
def the_inverse_of_a_weight(net, x):
    weight = net.scalar * torch.eye(8, dtype=x.dtype) + 0.1 * net.body.weight
    return net.head(torch.tanh(x @ torch.linalg.inv(weight)))


@CASES.forward()
def the_cholesky_factor_of_a_weight(net, x):
    weight = net.scalar * torch.eye(8, dtype=x.dtype) + 0.1 * net.body.weight
    return net.head(torch.tanh(x @ torch.linalg.cholesky(weight @ weight.T)))


class Filter(nn.Module):
    """A filter of complex numbers behind a parameter of one number, and so at an odd place of the flat vector."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.filter = nn.Parameter(torch.ones(1)), nn.Parameter(torch.randn(5, 2))
        self.longer, self.head = nn.Parameter(torch.randn(11)), nn.Linear(8, CLASSES)

    def filtered(self, x, numbers):
        return self.head(torch.fft.irfft(torch.fft.rfft(x * self.gain) * numbers, n=8))


@CASES.forward(base=Filter)
def complex_numbers_in_a_parameter(net, x):
    return net.filtered(x, torch.view_as_complex(net.filter))


@CASES.forward(base=Filter)
def complex_numbers_in_a_part_of_a_parameter(net, x):
    return net.filtered(x, torch.view_as_complex(net.longer[:10].view(5, 2)))


class Turned(torch.autograd.Function):
    """Looks at a parameter as complex numbers where nobody sees it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.view_as_real(torch.view_as_complex(x).square())

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return torch.stack([x[:, 0] * g[:, 0] + x[:, 1] * g[:, 1], x[:, 0] * g[:, 1] - x[:, 1] * g[:, 0]], 1) * 2


@CASES.forward(base=Filter)
def complex_numbers_inside_a_function(net, x):
    return net.filtered(x, torch.complex(*Turned.apply(net.filter).unbind(1)))


@CASES.forward()
def writes_to_the_real_part(net, x):
    z = torch.complex(net.body(x), net.second(x)).clone()
    z.real.mul_(0.5)
    z.imag[:, 1:].add_(net.vector[1:])
    return net.head(z.real * z.imag)


@CASES.forward()
def writes_to_pairs_of_real_numbers(net, x):
    z = torch.complex(net.body(x), net.second(x))
    pairs = torch.view_as_real(z)
    pairs[..., 0] *= net.scalar
    z.mul_(1j)
    return net.head(torch.tanh((z * z).imag + pairs[..., 1]))


@CASES.forward()
def writes_to_pairs_seen_as_complex_numbers(net, x):
    h = net.body(x).unflatten(1, (4, 2)).clone()
    z = torch.view_as_complex(h)
    z[:, 1:].mul_(1j)
    h[..., 0] += 1.0
    return net.head(torch.tanh(torch.view_as_real(z * z).flatten(1)))


@CASES.forward(refused=("values.py", "conj_physical"))
def a_conjugate_view_of_what_is_written(net, x):
    z = torch.complex(net.body(x), net.second(x)).clone()
    conjugate = z.conj()
    z.mul_(2)
    return net.head((z * conjugate).real)


def integers_for_each_output() -> mf.TaskBatch:
    tasks = vectors()
    support, query = ((x[..., :CLASSES] > 0).long() for x in (tasks.support_x, tasks.query_x))
    return mf.TaskBatch(tasks.support_x, support, tasks.query_x, query)


def binary_loss(outputs, targets):
    return F.binary_cross_entropy_with_logits(outputs, targets)


def loss_that_fails_on_the_way_back(outputs, targets):
    return F.huber_loss(outputs, targets)


CASES.one("integers that should be real numbers", small, integers_for_each_output, loss=binary_loss,
          refused=("return F.binary_cross_entropy_with_logits", "use y.double()"))  # fmt: skip
CASES.one("integers that have no gradient", small, integers_for_each_output, loss=loss_that_fails_on_the_way_back,
          refused=("loss_that_fails_on_the_way_back", "use y.double()"))  # fmt: skip
