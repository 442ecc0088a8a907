"""The numbers that are drawn: their distributions, and what they depend on."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from metafast.kernels.noise import Noise
from metafast.program.noise import given_numbers

ONE = torch.tensor([12345])


def numbers(distribution, seeds=None, step=0, number=0, shape=(200, 500), dtype=torch.float64, **options):
    layer = Noise(number, distribution, dtype, shape, **options)
    return layer.values(ONE if seeds is None else seeds, step, shape)


QUANTILES = torch.tensor([0.001, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999], dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("distribution", "cdf"), [
    ("uniform", lambda x: x), ("open", lambda x: x), ("normal", torch.special.ndtr),
])  # fmt: skip
def test_numbers_have_their_distribution(distribution, cdf, dtype):
    found = numbers(distribution, dtype=dtype).flatten()
    below = cdf(found.double().quantile(QUANTILES))
    allowed = 5 * (QUANTILES * (1 - QUANTILES) / found.numel()).sqrt()
    assert ((below - QUANTILES).abs() <= allowed).all(), below - QUANTILES
    assert found.unique().numel() > 0.98 * found.numel()
    if distribution != "normal":
        assert float(found.min()) >= 0
        assert float(found.max()) < 1
    if distribution == "open":
        assert float(found.min()) > 0


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_what_is_kept_has_the_right_share_and_size(rate):
    found = numbers("kept", rate=rate, scale=1 / (1 - rate))
    kept = found != 0
    assert (found[kept] == 1 / (1 - rate)).all()
    share, deviation = float(kept.double().mean()), math.sqrt(rate * (1 - rate) / found.numel())
    assert abs(share - (1 - rate)) < 5 * deviation
    neighbours = [kept[..., 1:] & kept[..., :-1], kept[:, 1:] & kept[:, :-1], kept[..., 64:] & kept[..., :-64]]
    for both in neighbours:
        assert float(both.double().mean()) == pytest.approx((1 - rate) ** 2, abs=0.01)


def test_tasks_steps_draws_and_sets_are_independent():
    from metafast.kernels.noise.counter import seeds_of

    cpu = torch.device("cpu")
    seeds = torch.cat([seeds_of(base, 8, part, cpu) for base in (0, 1, -5) for part in (0, 1)])
    assert seeds.unique().numel() == len(seeds)
    rows = [numbers("normal", seeds, step, number, (4000,)) for step in (0, 1, 2) for number in (0, 1)]
    correlation = torch.corrcoef(torch.cat(rows))
    correlation.fill_diagonal_(0)
    assert float(correlation.abs().max()) < 6 / math.sqrt(4000)


def test_a_sample_has_the_same_numbers_beside_any_others():
    assert torch.equal(numbers("normal", shape=(7, 5))[:, :3], numbers("normal", shape=(3, 5)))


def test_the_counter_in_whole_numbers_of_python():
    word, gamma = (1 << 64) - 1, 0x9E3779B97F4A7C15

    def mix(x):
        x &= word
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & word
        x = (x ^ x >> 27) * 0x94D049BB133111EB & word
        return x ^ x >> 31

    seeds, step, number = (0, 1, -7), 2, 3
    keys = [mix(mix(z + (step + 1) * gamma) + (number + 1) * gamma) for z in seeds]
    wanted = [[(mix(key + (i + 1) * gamma) >> 11) / 2**53 for i in range(5)] for key in keys]
    assert numbers("uniform", torch.tensor(seeds), step, number, (5,)).tolist() == wanted


@pytest.mark.parametrize(("function", "own"), [
    ("dropout", lambda x: F.dropout(x, 0.3)),
    ("alpha dropout", lambda x: F.alpha_dropout(x, 0.3, True)),
    ("channels", lambda x: F.dropout2d(x.reshape(-1, 10, 1, 1), 0.3)),
    ("rrelu", lambda x: F.rrelu(x - 1.5, training=True)),
    ("exponential_", lambda x: torch.empty_like(x).exponential_(2.0)),
    ("log_normal_", lambda x: torch.empty_like(x).log_normal_(0.1, 0.2)),
    ("geometric_", lambda x: torch.empty_like(x).geometric_(0.3)),
    ("cauchy_", lambda x: torch.atan(torch.empty_like(x).cauchy_(0.5, 2.0))),
    ("randint", lambda x: torch.randint(2, 9, x.shape).double()),
    ("bernoulli", lambda x: torch.bernoulli(x / 2)),
    ("bernoulli_", lambda x: torch.empty_like(x).bernoulli_(0.2)),
    ("multinomial", lambda x: torch.multinomial(torch.arange(1.0, 6).expand(20000, 5), 2).double()[:, 1]),
    ("multinomial again", lambda x: torch.multinomial(torch.arange(1.0, 6).expand(20000, 5), 2, True).double()),
    ("uniform_", lambda x: torch.empty_like(x).uniform_(2, 5)),
    ("normal_", lambda x: torch.empty_like(x).normal_(2, 5)),
])  # fmt: skip
def test_operations_draw_as_torch_draws(function, own):
    """Mean, deviation and quantiles of what is computed of a counter against torch's own generator."""
    torch.manual_seed(0)
    x = torch.ones(20000, 2, dtype=torch.float64)
    wanted = own(x).flatten().double()
    with given_numbers(ONE):
        found = own(x).flatten().double()
    assert found.shape == wanted.shape
    deviation = float(wanted.std())
    assert abs(float(found.mean() - wanted.mean())) < 5 * deviation * math.sqrt(2 / len(wanted))
    assert float(found.std()) == pytest.approx(deviation, rel=0.06)
    for q in (0.1, 0.5, 0.9):
        at = float(wanted.quantile(q))
        shares = [float((v <= at + 1e-9).double().mean()) for v in (found, wanted)]
        assert abs(shares[0] - shares[1]) < 5 * math.sqrt(0.5 / len(wanted))


@pytest.mark.parametrize("distribution", ["uniform", "open", "normal", "kept"])
def test_threads_do_not_matter(distribution):
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(numbers(distribution, shape=(999, 333), rate=0.3))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
