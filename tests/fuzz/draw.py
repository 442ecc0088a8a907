"""Draws a whole program from a seed."""

from __future__ import annotations

import random

from fuzz.networks import network
from fuzz.sample import Sample, dice, trained_names

REGRESSION = ('"mse"', '"mse"', '"mse"', "log_cosh", "half_sum")
CLASSIFICATION = ('"cross_entropy"', '"cross_entropy"', '"cross_entropy"', "smoothed", "focal")
AXES = ((), ("step",), ("layer",), ("parameter",), ("layer", "step"), ("parameter", "step"))


def draw(seed: int) -> Sample:
    """The program of a seed."""
    d = dice(seed)
    source, shape, outputs = network(d)
    classes = outputs > 1 and d.random() < 0.5
    normed = "BatchNorm" in source
    steps = d.choice([1, 1, 2, 2, 2, 3, 3, 4, 5, 6])
    loss = d.choice(CLASSIFICATION if classes else REGRESSION)
    sample = Sample(
        source,
        shape,
        outputs,
        loss,
        classes,
        rate=_rate(d),
        steps=steps,
        first_order=d.random() < 0.2,
        step_weights=_step_weights(d, steps) if d.random() < 0.25 else None,
        bn=d.choice([None, "task", "per_step", "frozen", "running"]) if normed else None,
        tasks=_tasks(d, steps),
        # A variance of two or three numbers makes any gradient chaotic.
        support=d.randint(6, 9) if normed else d.randint(1, 8),
        query=d.randint(6, 9) if normed else d.randint(1, 8),
        ragged=loss[0] == '"' and d.random() < 0.2,
        dtype=d.choice(["float64", "float64", "float32"]),
        backend=d.choices(["auto", "reference", "cpu", "twin"], [5, 3, 1, 1])[0],
        threads=d.choices([1, 2, 3], [18, 1, 1])[0],
        seed=seed,
    )
    return _with_subset(d, sample)


def _rate(d: random.Random) -> str:
    if d.random() < 0.3:
        return d.choice(["0.01", "0.05", "0.1"])
    value = d.choice(["0.05", "(0.01, 0.05)", "(0.02, 0.1)"])
    return f"mf.Rate({value}, {d.choice(AXES)!r}, learn={d.random() < 0.7})"


def _step_weights(d: random.Random, steps: int) -> tuple[float, ...]:
    weights = [d.choice([0.0, 0.2, 0.5, 1.0, -0.3]) for _ in range(steps)]
    return (*weights[:-1], weights[-1] or 0.7)


def _tasks(d: random.Random, steps: int) -> int:
    """Many tasks are rare, and take few steps: the truth goes through them one by one."""
    if d.random() < 0.05 and steps <= 2:
        return d.choice([16, 17, 31, 33, 64, 65, 86])
    return d.choice([1, 2, 2, 3, 3, 4, 5, 7, 8, 9])


def _with_subset(d: random.Random, sample: Sample) -> Sample:
    """Freezes some parameters, or lets the inner loop move some of them."""
    names = trained_names(sample.make_model())
    if len(names) > 1 and d.random() < 0.2:
        frozen = d.sample(names, d.randint(1, len(names) - 1))
        sample = sample.with_settings(frozen=tuple(sorted(frozen)))
        names = [name for name in names if name not in frozen]
    if len(names) > 1 and d.random() < 0.3:
        adapt = names[-2:] if d.random() < 0.5 else d.sample(names, d.randint(1, len(names) - 1))
        sample = sample.with_settings(adapt=tuple(adapt))
    return sample
