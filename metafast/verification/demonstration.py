"""``metafast demo`` trains two small recipes, checks what they reach, and times them beside a loop in torch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from metafast.files import write_json
from metafast.learners import MAML
from metafast.training.progress import Progress
from metafast.training.recipes import recipe
from metafast.training.report import device_name, finish, measured
from metafast.training.run import Options, Training
from metafast.verification.speed import SpeedComparison, compare

TEST_TASKS = 600


@dataclass(frozen=True)
class Expectation:
    """One thing that a trained recipe should reach. ``text`` says it in words, with what was measured."""

    text: str
    reached: bool


@dataclass(frozen=True)
class Demonstration:
    """Everything that was measured; ``summaries`` and ``speeds`` are by the name of the recipe."""

    summaries: Mapping[str, dict[str, Any]]
    speeds: Mapping[str, SpeedComparison]
    expectations: tuple[Expectation, ...]
    device: str
    seconds: float
    folder: Path

    @property
    def reached(self) -> bool:
        """Tells whether every expectation is reached and all gradients agree."""
        return all(e.reached for e in self.expectations) and all(s.agrees for s in self.speeds.values())

    def to_json(self) -> dict[str, Any]:
        """Returns JSON values."""
        return {
            "reached": self.reached,
            "expectations": [asdict(expectation) for expectation in self.expectations],
            "speeds": {name: speed.to_json() for name, speed in self.speeds.items()},
            "device": self.device,
            "seconds": round(self.seconds, 1),
            "summaries": dict(self.summaries),
        }

    def __str__(self) -> str:
        lines = [f"[{'ok' if e.reached else 'NOT REACHED'}] {e.text}" for e in self.expectations]
        lines += ["", f"second-order meta-gradients on {self.device}:"]
        lines += [f"  {name}: {speed}" for name, speed in self.speeds.items()]
        pictures = ", ".join(str(path) for path in sorted(self.folder.rglob("*.png")))
        return "\n".join([*lines, "", f"pictures: {pictures}", f"{self.seconds:.0f} s in all"])


def demonstrate(folder: Path, device: str, backend: str, progress: Progress) -> Demonstration:
    """Trains, tests and times both recipes, and writes everything into ``folder``."""
    began = time.perf_counter()
    recipes = (
        recipe("sinusoid", iterations=5_000, test_shots=(10,), test_steps=(0, 1, 5, 10)),
        recipe("glyphs-5w1s", iterations=600, eval_every=0),
    )
    summaries, speeds = {}, {}
    for chosen in recipes:
        progress.note(f"{chosen.name}: {chosen.iterations} iterations of {chosen.tasks} tasks")
        start = time.perf_counter()
        training = Training(chosen, Options(folder / chosen.name, device=device, backend=backend))
        learner, rate = training.learner, chosen.inner_lr
        assert isinstance(learner, MAML)  # both recipes above are MAML's
        assert rate is not None
        speeds[chosen.name] = compare(learner, training.episodes.train.batch(0), rate)
        training.run(progress)
        summaries[chosen.name] = finish(training, TEST_TASKS, time.perf_counter() - start)
    seconds = time.perf_counter() - began
    shown = Demonstration(summaries, speeds, judge(summaries), device_name(training.device), seconds, folder)
    write_json(folder / "demo.json", shown.to_json())
    return shown


def judge(summaries: Mapping[str, dict[str, Any]]) -> tuple[Expectation, ...]:
    """Compares the summaries of the two recipes with what they should reach."""
    sine = {row["steps"]: row for row in summaries["sinusoid"]["tests"]}
    glyphs = summaries["glyphs-5w1s"]["result"]
    return (
        Expectation(f"sinusoid before it adapts: MSE {measured(sine[0], 'mse')} (above 3)", sine[0]["mse"] > 3),
        Expectation(f"after 1 step on 10 points: MSE {measured(sine[1], 'mse')} (at most 1.5)", sine[1]["mse"] <= 1.5),
        Expectation(f"after 5 steps: MSE {measured(sine[5], 'mse')} (below 1 step)", sine[5]["mse"] < sine[1]["mse"]),
        Expectation(
            f"5-way 1-shot on unseen characters: accuracy {measured(glyphs, 'accuracy')} (at least 85%), "
            f"1 query a class, batch statistics",
            glyphs["accuracy"] >= 0.85,
        ),
    )
