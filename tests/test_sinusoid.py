"""Sinusoid tasks."""

import math

import pytest
import torch

from metafast.episodes import SinusoidSampler


def test_shapes():
    batch = SinusoidSampler(shots=10, queries=7, tasks=25).batch(0)
    assert batch.support_x.shape == batch.support_y.shape == (25, 10, 1)
    assert batch.query_x.shape == batch.query_y.shape == (25, 7, 1)
    assert batch.support_x.dtype == batch.query_y.dtype == torch.float32


def test_targets_are_the_true_wave():
    sampler = SinusoidSampler(10, 10, 50, seed=3)
    batch, truth = sampler.batch(9), sampler.truth(9)
    expected = truth.amplitude * torch.sin(batch.query_x.double() - truth.phase)
    torch.testing.assert_close(batch.query_y.double(), expected, rtol=1e-7, atol=1e-12)
    assert torch.equal(truth(batch.support_x), batch.support_y)


def test_truth_of_a_rank_is_its_share():
    sampler = SinusoidSampler(5, 5, 8)
    assert torch.equal(sampler.truth(2, rank=1, world=2).phase, sampler.truth(2).phase[4:])


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [("amplitude", 0.1, 5.0), ("phase", 0.0, math.pi), ("x", -5.0, 5.0)],
)
def test_draws_are_uniform_over_the_papers_ranges(values, low, high):
    sampler = SinusoidSampler(1, 1, 100_000)
    drawn = sampler.batch(0).support_x if values == "x" else getattr(sampler.truth(0), values)
    unit = (drawn.double().flatten().sort().values - low) / (high - low)
    ideal = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    kolmogorov = (unit - ideal).abs().max().item()
    assert 0 <= unit[0] < unit[-1] <= 1
    assert kolmogorov < 1.95 / 100_000**0.5  # exceeded by chance once in a thousand


def test_amplitude_phase_and_inputs_are_uncorrelated():
    sampler = SinusoidSampler(1, 1, 100_000)
    batch, truth = sampler.batch(1), sampler.truth(1)
    columns = [truth.amplitude, truth.phase, batch.support_x.double(), batch.query_x.double()]
    correlation = torch.corrcoef(torch.stack([c.flatten() for c in columns]))
    assert (correlation - torch.eye(4)).abs().max() < 5 / 100_000**0.5


def test_streams_do_not_coincide():
    amplitudes = [SinusoidSampler(1, 1, 1000, 0, s).truth(0).amplitude.flatten() for s in ("train", "test")]
    assert torch.cat(amplitudes).unique().numel() == 2000


@pytest.mark.parametrize("name", ["shots", "queries", "tasks"])
def test_numbers_must_be_positive(name):
    with pytest.raises(ValueError, match=f"{name} is 0; it must be an integer of at least 1"):
        SinusoidSampler(**{"shots": 5, "queries": 5, "tasks": 5, name: 0})
