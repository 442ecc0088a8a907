"""Holds the recipes: everything that decides a training run, as data, with the settings of the papers.

Losses here are means over the samples. The code behind Finn et al. 2017 divides the summed cross-entropy by the shots
only, so its inner gradient is ``ways`` times larger: its rate 0.4 (5 ways) and 0.1 (20 ways) are both 2.0 here.
Accuracies depend on the queries per class, because batch norm takes its statistics from the whole query set of a task:
the papers judge with as many queries per class as shots, and so do these recipes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from metafast import learners
from metafast.learners.base import INNER_SETTINGS

NETWORKS = ("mlp", "conv4-stride", "conv4-pool")
SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class Recipe:
    """Describes one training run and how it is judged.

    Attributes:
        name: how the command line calls it.
        note: where the settings come from and what differs from that source.
        data: the name of a data set, as its record in ``metafast.episodes.sources`` has it.
        split: how classes are divided, for data whose record offers more than one way; empty: in the data's own way.
        algorithm: the name of a learner, one of ``learners.names()``.
        network: one of ``NETWORKS``; ``channels`` is its width, ``head_std`` the deviation of the initial head of
            ``conv4-stride``.
        ways: classes in a task; 0 for regression.
        shots, queries: samples a class (or a task, in regression) in training.
        steps, inner_lr, inner_optimizer: the inner loop in training; the rate belongs to the mean loss. They and
            ``test_steps`` are ``None`` where the learner has no such setting.
        tasks: tasks in a meta-batch.
        iterations: outer steps.
        lr, final_lr, schedule: the outer optimiser's rate, ``lr`` at the start and ``final_lr`` at the end.
        clip: bound on each element of the meta-gradient, or ``None``.
        test_shots, test_queries, test_steps: the final test, once for each shot and, where the learner takes inner
            steps, for each number of them. The first of ``test_shots`` with the last of ``test_steps`` is the result
            that a run is known by.
        eval_every: iterations between validations on unseen classes; 0 for none.
        eval_tasks: tasks in a validation.
    """

    name: str
    note: str
    data: str
    network: str
    channels: int
    ways: int
    shots: int
    queries: int
    steps: int | None
    inner_lr: float | None
    tasks: int
    iterations: int
    test_shots: tuple[int, ...]
    test_queries: int
    test_steps: tuple[int, ...] | None
    head_std: float = 1.0
    split: str = ""
    algorithm: str = "maml"
    inner_optimizer: str | None = "sgd"
    lr: float = 1e-3
    final_lr: float = 0.0
    schedule: str = "constant"
    clip: float | None = None
    eval_every: int = 0
    eval_tasks: int = 200

    def __post_init__(self) -> None:
        learners.by_name(self.algorithm).check_recipe(self)
        for name, choices in (("network", NETWORKS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}")
        for name in (
            "channels",
            "shots",
            "queries",
            "steps",
            "tasks",
            "iterations",
            "test_queries",
            "eval_tasks",
        ):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("inner_lr", "lr"):
            if (value := getattr(self, name)) is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a positive number")
        for name, least in (("test_shots", 1), ("test_steps", 0)):
            if (value := getattr(self, name)) is not None and (not value or min(value) < least):
                raise ValueError(f"{name} is {getattr(self, name)}; it needs numbers of at least {least}")
        if self.ways < 0 or self.ways == 1:
            raise ValueError(f"ways is {self.ways}; a classification task needs at least 2 classes (0: regression)")
        if self.eval_every < 0:
            raise ValueError(f"eval_every is {self.eval_every}; give iterations between validations, 0 for none")

    @property
    def classification(self) -> bool:
        """Says whether a task is a choice among classes."""
        return self.ways > 0

    @property
    def validates(self) -> bool:
        """Says whether there is a validation before the last iteration is over."""
        return 0 < self.eval_every <= self.iterations

    @property
    def loss(self) -> str:
        """Names the loss that a learner is built with."""
        return "cross_entropy" if self.classification else "mse"

    @property
    def metric(self) -> str:
        """Names what the tests report."""
        return "accuracy" if self.classification else "mse"

    def lr_at(self, iteration: int) -> float:
        """Returns the outer rate of an iteration, counted from 0."""
        if self.schedule == "constant":
            return self.lr
        progress = iteration / self.iterations
        remaining = 1 - progress if self.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return self.final_lr + (self.lr - self.final_lr) * remaining

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON values, one for each field."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Recipe:
        """Reads what ``to_json`` wrote.

        Raises:
            ValueError: a field is unknown or missing; the text names it.
        """
        names = {f.name for f in fields(cls)}
        if set(value) != names:
            odd = ", ".join(sorted(set(value) ^ names))
            raise ValueError(f"the recipe was written by another version of metafast: {odd} unknown or missing")
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
        return cls(**plain)


def recipe(name: str, algorithm: str | None = None, **overrides: Any) -> Recipe:
    """Returns the recipe of that name under an algorithm, with fields replaced.

    An override of ``None`` changes nothing. Settings of an inner loop that the algorithm does not take become ``None``.

    Raises:
        ValueError: no recipe or algorithm of that name, or a value out of range.
    """
    if name not in RECIPES:
        raise ValueError(f"there is no recipe {name!r}; choose from {', '.join(RECIPES)}")
    chosen = RECIPES[name]
    if algorithm is not None and algorithm != chosen.algorithm:
        learner = learners.by_name(algorithm)
        unused: dict[str, Any] = {name: None for name in INNER_SETTINGS if name not in learner.inner_settings}
        changes = learner.recipe_changes.get("classification" if chosen.classification else "regression", {})
        chosen = replace(chosen, algorithm=algorithm, **unused, **changes)
    given = {key: value for key, value in overrides.items() if value is not None}
    if "shots" in given and "test_shots" not in given:
        given["test_shots"] = (given["shots"],)
    return replace(chosen, **given)


_SINUSOID = Recipe(
    name="sinusoid",
    note="Finn et al. 2017, section 5.1: y = A sin(x - p), MLP 1-40-40-1, 25 tasks, 10 shots, one step, tested with "
    "5 shots (table 2) and 10. The rate is that of its code, 0.001, with which table 2 comes out; at the 0.01 of its "
    "text a rare task diverges after several steps.",
    data="sinusoid",
    network="mlp",
    channels=40,
    ways=0,
    shots=10,
    queries=10,
    steps=1,
    inner_lr=0.001,
    tasks=25,
    iterations=70_000,
    test_shots=(5, 10),
    test_queries=100,
    test_steps=(0, 1, 5, 10),
)


def _omniglot(ways: int, shots: int) -> Recipe:
    return Recipe(
        name=f"omniglot-{ways}w{shots}s",
        note="Finn et al. 2017, section 5.2 and its code: Conv4-64 with stride 2 and a mean over what remains, rate "
        f"{2.0 / ways:g} on the summed loss = 2.0 on the mean. Differs: a stride-2 convolution pads one pixel on "
        "every side, and batch norm has a learned scale beside its shift.",
        data="omniglot",
        split="background",
        network="conv4-stride",
        channels=64,
        ways=ways,
        shots=shots,
        queries=shots,
        steps=1 if ways == 5 else 5,
        inner_lr=2.0,
        tasks=32 if ways == 5 else 16,
        iterations=60_000,
        test_shots=(shots,),
        test_queries=shots,
        test_steps=(0, 1, 3) if ways == 5 else (0, 1, 5),
        eval_every=500,
    )


# 5-way Omniglot learns in fewer iterations with the pooling network that most later papers use.
_POOLED: dict[str, Any] = {
    "note": "Conv4-64 with 2x2 max-pooling (Vinyals et al. 2016) in place of the strides of Finn et al. 2017, whose "
    "meta-batch, steps and queries it keeps; inner rate 0.5 on the mean loss as in learn2learn's Omniglot example, "
    "outer rate from 0.002 down a cosine.",
    "network": "conv4-pool",
    "inner_lr": 0.5,
    "lr": 2e-3,
    "schedule": "cosine",
    "final_lr": 1e-5,
    "eval_every": 0,  # the end of a cosine is its best; validations of 200 tasks would choose among its last by chance
}

_GLYPHS = replace(
    _omniglot(5, 1),
    name="glyphs-5w1s",
    note="Characters rendered from fonts, no download; the Omniglot network of Finn et al. 2017 with 32 channels, a "
    "smaller initial head and a larger outer rate, which learn several times faster.",
    data="glyphs",
    split="",
    channels=32,
    head_std=0.1,
    lr=3e-3,
    iterations=2_000,
)

_FOLDER = replace(
    _omniglot(5, 1),
    name="folder-5w1s",
    note="Any pictures, one sub-folder a class, at 84x84 in colour; the MiniImagenet settings of Finn et al. 2017: "
    "Conv4-32 with pooling, rate 0.01 on the summed loss = 0.05 on the mean, 15 queries a class in training.",
    data="folder",
    split="",
    network="conv4-pool",
    channels=32,
    queries=15,
    steps=5,
    inner_lr=0.05,
    tasks=4,
    clip=10.0,
    test_steps=(0, 5, 10),
)

RECIPES: dict[str, Recipe] = {
    r.name: r
    for r in (
        _SINUSOID,
        _GLYPHS,
        *(replace(_omniglot(5, shots), **_POOLED) for shots in (1, 5)),
        *(_omniglot(20, shots) for shots in (1, 5)),
        _FOLDER,
    )
}
