"""Costs against the published numbers of the cost model: FLOPs, P, A and bytes of the standard workloads."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from metafast.program.capture import capture
from metafast.program.flops import ProgramCost, program_cost
from metafast.program.losses import as_loss


def conv4(channels: int, image: tuple[int, int, int], ways: int, pool: bool = True) -> nn.Sequential:
    """Conv4 with biases in its convolutions, as the published parameter counts have them."""
    inputs, height, _ = image
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Conv2d(inputs, channels, 3, stride=1 if pool else 2, padding=1)]
        layers += [nn.BatchNorm2d(channels, track_running_stats=False), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if pool else []
        inputs, height = channels, height // 2 if pool else -(-height // 2)
    if not pool:
        layers, height = [*layers, nn.AdaptiveAvgPool2d(1)], 1
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * height * height, ways))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))


def cost(model: nn.Module, sample: tuple[int, ...], adapt: list[str] | None = None) -> ProgramCost:
    x = torch.zeros(2, *sample)
    program = capture(model, as_loss("cross_entropy"), x, bn="task", adapt=adapt, steps=1)
    return program_cost(program, x)


OMNIGLOT, MINI = (1, 28, 28), (3, 84, 84)
ROUNDING = 2e-3  # of published numbers; the smallest has no more figures


@pytest.mark.parametrize(
    ("model", "sample", "megaflops", "first", "parameters", "activations"),
    [
        (mlp(), (1,), 3.36e-3, 8e-5, 1761, 81),
        (conv4(64, OMNIGLOT, 5), OMNIGLOT, 19.63, 0.9032, 112261, 66432),
        (conv4(64, OMNIGLOT, 20), OMNIGLOT, 19.63, 0.9032, 113236, 66432),
        (conv4(64, OMNIGLOT, 5, pool=False), OMNIGLOT, 5.3137, 0.22579, 112261, 16960),
        (conv4(32, MINI, 5), MINI, 54.69, 12.19, 32901, 299552),
        (conv4(64, MINI, 5), MINI, 194.3, 24.39, 121093, 599104),
    ],
)
def test_per_sample(
    model: nn.Module, sample: tuple[int, ...], megaflops: float, first: float, parameters: int, activations: int
) -> None:
    found = cost(model, sample)
    assert found.forward == pytest.approx(megaflops * 1e6, rel=3e-4)
    assert found.fed_by_input == pytest.approx(first * 1e6, rel=3e-4)
    assert found.parameters == parameters
    assert found.activations == activations


@pytest.mark.parametrize(
    ("model", "sample", "tasks", "support", "query", "steps", "second", "first", "least", "streamed"),
    [
        (mlp(), (1,), 25, 10, 10, 1, 0.00996, 0.005, 0.02313, 4.3),
        (mlp(), (1,), 25, 10, 10, 5, 0.0398, 0.015, 1.784, 15.0),
        (mlp(), (1,), 4096, 10, 10, 1, 1.632, 0.8192, 0.3488, 704.5),
        (mlp(), (1,), 4096, 10, 10, 5, 6.521, 2.458, 288.871, 2458.7),
        (conv4(64, OMNIGLOT, 5), OMNIGLOT, 32, 5, 5, 1, 36.82, 18.56, 2.351, 1320.4),
        (conv4(64, OMNIGLOT, 5), OMNIGLOT, 32, 5, 5, 5, 147.0, 55.67, 146.045, 5066.6),
        (conv4(64, OMNIGLOT, 5), OMNIGLOT, 32, 5, 75, 5, 276.9, 185.6, 153.069, 9233.2),
        (conv4(64, OMNIGLOT, 20), OMNIGLOT, 16, 20, 20, 5, 294.0, 111.3, 75.837, 9359.4),
        (conv4(64, OMNIGLOT, 5, pool=False), OMNIGLOT, 32, 5, 5, 1, 9.985, 5.029, 2.351, 465.5),
        (conv4(64, OMNIGLOT, 20, pool=False), OMNIGLOT, 16, 20, 20, 5, 79.77, 30.18, 75.837, 2583.7),
        (conv4(32, MINI, 5), MINI, 4, 5, 75, 5, 88.68, 60.75, 32.754, 4931.6),
        (conv4(32, MINI, 5), MINI, 4, 25, 75, 5, 261.2, 121.5, 39.528, 14517.3),
    ],
)
def test_meta_gradient(
    model: nn.Module, sample: tuple[int, ...], tasks: int, support: int, query: int, steps: int,
    second: float, first: float, least: float, streamed: float,
) -> None:  # fmt: skip
    """Gigaflops of both orders, the least megabytes and the streamed megabytes, as the cost model prints them."""
    program = cost(model, sample)
    exact = program.meta_gradient(tasks, support, query, steps)
    assert exact.flops / 1e9 == pytest.approx(second, rel=ROUNDING)
    half = program.meta_gradient(tasks, support, query, steps, second_order=False)
    assert half.flops / 1e9 == pytest.approx(first, rel=ROUNDING)
    assert exact.least_bytes / 1e6 == pytest.approx(least, rel=ROUNDING)
    assert exact.streamed_bytes / 1e6 == pytest.approx(streamed, rel=ROUNDING)


@pytest.mark.parametrize(("support", "gigaflops"), [(5, 48.6), (25, 60.8)])
def test_only_the_head_adapts(support: int, gigaflops: float) -> None:
    """ANIL on Conv4-32: the body's products are counted once, not once a step."""
    program = cost(conv4(32, MINI, 5), MINI, adapt=["17.weight", "17.bias"])
    assert program.meta_gradient(4, support, 75, 5).flops / 1e9 == pytest.approx(gigaflops, rel=ROUNDING)


def test_closed_form() -> None:
    """step = ns (3F - f1), Hessian-vector product = ns (6F - 4 f1), query = nq (3F - f1)."""
    program = cost(conv4(64, OMNIGLOT, 5), OMNIGLOT)
    forward, first = program.forward, program.fed_by_input
    assert program.step(7) == 7 * (3 * forward - first)
    assert program.hessian(7) == 7 * (6 * forward - 4 * first)
    assert program.query(7) == 7 * (3 * forward - first)


def test_layer_without_rules_is_counted() -> None:
    """A module of the user's own has no rules here; its products are found all the same."""

    class Gram(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(6, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(x @ self.weight.T)

    found = cost(nn.Sequential(nn.Linear(3, 4), Gram()), (3,))
    assert [node.flops for node in found.nodes if node.flops] == [2 * 3 * 4, 2 * 4 * 6]
