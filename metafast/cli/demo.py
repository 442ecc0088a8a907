"""``metafast demo``: two small recipes trained far enough to adapt, and the speed beside a plain loop over tasks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metafast.files import write_json
from metafast.learners import MAML
from metafast.training.progress import Progress
from metafast.training.recipes import recipe
from metafast.training.report import device_name, finish, measured
from metafast.training.run import Options, Training
from metafast.verification import torch_loop

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": nn.functional.mse_loss,
    "cross_entropy": nn.functional.cross_entropy,
}
# float32 sums in another order, through one inner step; a wrong rule is off by far more.
AGREEMENT = 1e-3
# Timings are medians over at least this many runs and seconds.
RUNS, SECONDS = 5, 1.0


@dataclass(frozen=True)
class Speed:
    """Second-order meta-gradients on the same tensors: tasks a second, and how far the two gradients differ."""

    recipe: str
    metafast: float
    plain: float
    difference: float

    def __str__(self) -> str:
        if self.difference > AGREEMENT:
            return f"{self.recipe}: the meta-gradients differ by {self.difference:.1e} (relative): no comparison"
        return (
            f"{self.recipe}: {self.metafast:,.0f} tasks/s, plain torch loop {self.plain:,.0f} tasks/s: "
            f"{self.metafast / self.plain:.1f} times (the meta-gradients agree to {self.difference:.0e})"
        )


@dataclass(frozen=True)
class Goal:
    """One thing that the demo has to show."""

    text: str
    reached: bool


@dataclass(frozen=True)
class Demo:
    """All that was measured."""

    summaries: dict[str, dict[str, Any]]
    speeds: tuple[Speed, ...]
    goals: tuple[Goal, ...]
    device: str
    seconds: float
    folder: Path

    @property
    def reached(self) -> bool:
        """Has every goal been reached, with gradients that agree?"""
        return all(g.reached for g in self.goals) and all(s.difference <= AGREEMENT for s in self.speeds)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "reached": self.reached,
            "goals": [asdict(goal) for goal in self.goals],
            "speeds": [asdict(speed) for speed in self.speeds],
            "device": self.device,
            "seconds": round(self.seconds, 1),
            "summaries": self.summaries,
        }

    def __str__(self) -> str:
        goals = [f"[{'ok' if goal.reached else 'NOT REACHED'}] {goal.text}" for goal in self.goals]
        speeds = ["", f"second-order meta-gradients on {self.device}:", *(f"  {speed}" for speed in self.speeds)]
        pictures = ", ".join(str(path) for path in sorted(self.folder.rglob("*.png")))
        return "\n".join([*goals, *speeds, "", f"pictures: {pictures}", f"{self.seconds:.0f} s in all"])


def run_demo(folder: Path, device: str, backend: str, progress: Progress) -> Demo:
    """Trains, tests, compares, and writes everything into ``folder``."""
    began = time.perf_counter()
    recipes = (
        recipe("sinusoid", iterations=5_000, test_shots=(10,), test_steps=(0, 1, 5, 10)),
        recipe("glyphs-5w1s", iterations=600, eval_every=0),
    )
    summaries, speeds = {}, []
    for chosen in recipes:
        progress.note(f"{chosen.name}: {chosen.iterations} iterations of {chosen.tasks} tasks")
        options = Options(folder / chosen.name, device=device, backend=backend)
        start = time.perf_counter()
        training = Training(chosen, options)
        speeds.append(compare(training))
        training.run(progress)
        summaries[chosen.name] = finish(training, 600, time.perf_counter() - start)
    seconds = time.perf_counter() - began
    demo = Demo(summaries, tuple(speeds), judge(summaries), device_name(training.device), seconds, folder)
    write_json(folder / "demo.json", demo.to_json())
    return demo


def compare(training: Training) -> Speed:
    """Times one meta-gradient of a run's recipe by its learner and by the plain loop, after they have agreed."""
    recipe, learner = training.recipe, training.learner
    assert isinstance(learner, MAML)  # the plain loop is MAML's, and so are the recipes of the demo
    rate = recipe.inner_lr
    assert rate is not None
    tasks = training.episodes.train.batch(0)
    adapted = {p.name for p in learner.program.parameters if p.adapted}

    def ours() -> None:
        learner.zero_grad()
        learner.backward(tasks)

    def theirs() -> Any:
        loss = LOSSES[recipe.loss]
        return torch_loop.meta_gradient(learner.model, loss, tasks, rate, learner.steps, adapted)

    ours()
    _, wanted = theirs()
    found = {name: p.grad for name, p in learner.model.named_parameters() if p.grad is not None}
    square = sum(float((found[name] - g).square().sum()) for name, g in wanted.items())
    difference = (square / sum(float(g.square().sum()) for g in wanted.values())) ** 0.5
    learner.zero_grad()
    rates = [recipe.tasks / _seconds(work, training.device) for work in (ours, theirs)]
    learner.zero_grad()
    return Speed(recipe.name, rates[0], rates[1], difference)


def _seconds(work: Callable[[], Any], device: str) -> float:
    times: list[float] = []
    while len(times) < RUNS or sum(times) < SECONDS:
        start = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def judge(summaries: dict[str, dict[str, Any]]) -> tuple[Goal, ...]:
    """What the two trained recipes have to show."""
    sine = {row["steps"]: row for row in summaries["sinusoid"]["tests"]}
    glyphs = summaries["glyphs-5w1s"]["result"]
    return (
        Goal(f"sinusoid before it adapts: MSE {measured(sine[0], 'mse')} (above 3)", sine[0]["mse"] > 3),
        Goal(f"after 1 step on 10 points: MSE {measured(sine[1], 'mse')} (at most 1.5)", sine[1]["mse"] <= 1.5),
        Goal(f"after 5 steps: MSE {measured(sine[5], 'mse')} (below 1 step)", sine[5]["mse"] < sine[1]["mse"]),
        Goal(
            f"5-way 1-shot on unseen characters: accuracy {measured(glyphs, 'accuracy')} (at least 85%), "
            f"1 query a class, batch statistics",
            glyphs["accuracy"] >= 0.85,
        ),
    )
